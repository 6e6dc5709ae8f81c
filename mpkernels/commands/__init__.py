"""What ``mpkernels <command>`` runs, a file a command; :mod:`mpkernels.cli` declares their arguments."""
