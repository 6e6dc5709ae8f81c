"""Sign and logarithm of the determinant of triangular matrices."""

from mpkernels.flows.slog_det_triangular.api import slog_det_triangular

__all__ = ["slog_det_triangular"]
