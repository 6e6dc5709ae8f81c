"""Gaussian splatting: projection, spherical harmonics, tile intersection, rasterization, training (Kerbl et al. 2023)."""
