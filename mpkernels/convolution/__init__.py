"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.mulaw import mulaw_decode, mulaw_encode
from mpkernels.convolution.wavenet_generate import (
    GenerationInterrupted,
    PackedWaveNet,
    WaveNetLayer,
    WaveNetOutput,
    WaveNetState,
    WaveNetWeights,
    pack,
    wavenet_generate,
    wavenet_sample,
)

__all__ = [
    "GenerationInterrupted",
    "PackedWaveNet",
    "WaveNetLayer",
    "WaveNetOutput",
    "WaveNetState",
    "WaveNetWeights",
    "mulaw_decode",
    "mulaw_encode",
    "pack",
    "wavenet_generate",
    "wavenet_sample",
]
