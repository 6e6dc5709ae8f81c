"""``python -m mpkernels`` is ``mpkernels``."""

from mpkernels.cli import main

main()
