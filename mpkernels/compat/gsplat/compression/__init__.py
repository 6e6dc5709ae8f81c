"""gsplat.compression: not supported."""

from mpkernels.compat.gsplat.unsupported import unsupported

__all__ = ["PngCompression"]

PngCompression = unsupported("PngCompression", "compression to PNG files")
