"""Covariances of Gaussians from quaternions and scales."""
