"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_update
from mpkernels.convolution.dilated_conv1d import dilated_conv1d
from mpkernels.convolution.gated_residual_layer import GatedResidualLayer, gated_residual_layer
from mpkernels.convolution.masked_conv2d import horizontal_stack, masked_conv2d, pixelcnn_mask, vertical_stack
from mpkernels.convolution.masked_linear import masked_linear
from mpkernels.convolution.mulaw import mulaw_decode, mulaw_encode
from mpkernels.convolution.nade import nade_log_prob, nade_sample
from mpkernels.convolution.wavenet_generate import (
    GenerationInterrupted,
    PackedWaveNet,
    WaveNetLayer,
    WaveNetOutput,
    WaveNetState,
    WaveNetWeights,
    pack_wavenet,
    wavenet_generate,
    wavenet_sample,
)

__all__ = [
    "GatedResidualLayer",
    "GenerationInterrupted",
    "PackedWaveNet",
    "WaveNetLayer",
    "WaveNetOutput",
    "WaveNetState",
    "WaveNetWeights",
    "depthwise_conv1d",
    "depthwise_conv1d_update",
    "dilated_conv1d",
    "gated_residual_layer",
    "horizontal_stack",
    "masked_conv2d",
    "masked_linear",
    "mulaw_decode",
    "mulaw_encode",
    "nade_log_prob",
    "nade_sample",
    "pack_wavenet",
    "pixelcnn_mask",
    "vertical_stack",
    "wavenet_generate",
    "wavenet_sample",
]
