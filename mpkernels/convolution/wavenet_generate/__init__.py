"""WaveNet's sample loop: the ops `wavenet_generate` and `wavenet_sample`, and the packing of weights."""

from mpkernels.convolution.wavenet_generate.api import (
    GenerationInterrupted,
    WaveNetOutput,
    WaveNetState,
    wavenet_generate,
    wavenet_sample,
)
from mpkernels.convolution.wavenet_generate.packing import PackedWaveNet, WaveNetLayer, WaveNetWeights, pack_wavenet

__all__ = [
    "GenerationInterrupted",
    "PackedWaveNet",
    "WaveNetLayer",
    "WaveNetOutput",
    "WaveNetState",
    "WaveNetWeights",
    "pack_wavenet",
    "wavenet_generate",
    "wavenet_sample",
]
