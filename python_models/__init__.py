"""Reference models built on the ops of mpkernels, a file a model, each trained on real data by one command."""
