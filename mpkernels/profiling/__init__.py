"""How kernels are judged: the compilers found on this machine, and the static resources of compiled kernels."""
