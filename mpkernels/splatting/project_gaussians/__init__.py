"""The projection of 3D Gaussians onto images."""

from mpkernels.splatting.project_gaussians.api import PackedGaussians, ProjectedGaussians, project_gaussians

__all__ = ["PackedGaussians", "ProjectedGaussians", "project_gaussians"]
