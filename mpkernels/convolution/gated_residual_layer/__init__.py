"""WaveNet's layer: dilated convolution, gate, residual and skip projections in one pass."""
