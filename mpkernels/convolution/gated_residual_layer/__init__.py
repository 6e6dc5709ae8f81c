"""WaveNet's layer: dilated convolution, gate, residual and skip projections in one pass."""

from mpkernels.convolution.gated_residual_layer.api import GatedResidualLayer, gated_residual_layer

__all__ = ["GatedResidualLayer", "gated_residual_layer"]
