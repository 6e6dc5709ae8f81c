"""mpkernels: hand-written kernels for machine perception, with one meaning on CPU, Triton and CUDA."""

from mpkernels import attention, convolution, flows, masks, splatting
from mpkernels import library as _library
from mpkernels.backends import BACKENDS, BackendError, use_backend
from mpkernels.volume import CompositeOutput, composite, composite_from_alphas

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "BackendError",
    "CompositeOutput",
    "attention",
    "composite",
    "composite_from_alphas",
    "convolution",
    "flows",
    "masks",
    "splatting",
    "use_backend",
]

_library.load()
