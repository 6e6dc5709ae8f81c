"""Gaussian splatting (Kerbl et al. 2023): projection, spherical harmonics, tiles, rasterization, training."""
