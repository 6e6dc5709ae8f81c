"""The tiles that projected Gaussians meet, as lists sorted by depth."""

from mpkernels.splatting.intersect_tiles.api import TileIntersections, intersect_tiles

__all__ = ["TileIntersections", "intersect_tiles"]
