"""What scripts take from gsplat 1.5.3, on the kernels of this library: change the import, and nothing else.

    import mpkernels.compat.gsplat as gsplat
    from mpkernels.compat.gsplat import DefaultStrategy, rasterization

The same names, submodules, arguments and outputs; tensors may lie on a CPU as well, and wrong arguments raise
ValueError or TypeError where gsplat asserts. What is not supported (2D Gaussians, unscented transforms, rolling
shutters, fisheye cameras, several GPUs, sparse gradients, PNG compression) can be imported, and raises
NotImplementedError where it is used.
"""

from mpkernels.compat.gsplat.compression import PngCompression
from mpkernels.compat.gsplat.cuda._torch_impl import accumulate
from mpkernels.compat.gsplat.cuda._wrapper import (
    RollingShutterType,
    fully_fused_projection,
    fully_fused_projection_2dgs,
    fully_fused_projection_with_ut,
    isect_offset_encode,
    isect_tiles,
    proj,
    quat_scale_to_covar_preci,
    rasterize_to_indices_in_range,
    rasterize_to_indices_in_range_2dgs,
    rasterize_to_pixels,
    rasterize_to_pixels_2dgs,
    rasterize_to_pixels_eval3d,
    spherical_harmonics,
    world_to_cam,
)
from mpkernels.compat.gsplat.exporter import export_splats
from mpkernels.compat.gsplat.optimizers import SelectiveAdam
from mpkernels.compat.gsplat.relocation import compute_relocation
from mpkernels.compat.gsplat.rendering import (
    rasterization,
    rasterization_2dgs,
    rasterization_2dgs_inria_wrapper,
    rasterization_inria_wrapper,
)
from mpkernels.compat.gsplat.strategy import DefaultStrategy, MCMCStrategy, Strategy
from mpkernels.compat.gsplat.unsupported import unsupported
from mpkernels.compat.gsplat.version import __version__

gsplat_version = __version__
accumulate_2dgs = unsupported("accumulate_2dgs", "2D Gaussians")

__all__ = [
    "DefaultStrategy",
    "MCMCStrategy",
    "PngCompression",
    "RollingShutterType",
    "SelectiveAdam",
    "Strategy",
    "__version__",
    "accumulate",
    "accumulate_2dgs",
    "compute_relocation",
    "export_splats",
    "fully_fused_projection",
    "fully_fused_projection_2dgs",
    "fully_fused_projection_with_ut",
    "gsplat_version",
    "isect_offset_encode",
    "isect_tiles",
    "proj",
    "quat_scale_to_covar_preci",
    "rasterization",
    "rasterization_2dgs",
    "rasterization_2dgs_inria_wrapper",
    "rasterization_inria_wrapper",
    "rasterize_to_indices_in_range",
    "rasterize_to_indices_in_range_2dgs",
    "rasterize_to_pixels",
    "rasterize_to_pixels_2dgs",
    "rasterize_to_pixels_eval3d",
    "spherical_harmonics",
    "world_to_cam",
]
