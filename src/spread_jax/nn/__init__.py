"""Flax Linen networks: the published encoders and generators, and convolutions fast on every platform."""

from spread_jax.nn.convolutions import Conv, ConvTranspose, conv, conv_transpose
from spread_jax.nn.images import Encoder28, Encoder64, Generator28, Generator64

__all__ = [
    "Conv",
    "ConvTranspose",
    "Encoder28",
    "Encoder64",
    "Generator28",
    "Generator64",
    "conv",
    "conv_transpose",
]
