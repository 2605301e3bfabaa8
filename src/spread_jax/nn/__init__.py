"""Flax Linen networks: encoders, generators, discriminators, invertible maps, a flow, fast convolutions."""

from spread_jax.nn.convolutions import Conv, ConvTranspose, conv, conv_transpose
from spread_jax.nn.flows import CouplingFlow
from spread_jax.nn.images import (
    Discriminator28,
    Discriminator64,
    Encoder28,
    Encoder64,
    Generator28,
    Generator64,
)
from spread_jax.nn.invertible import (
    Inverse,
    InvertibleResidual,
    SpectralConv,
    check_invertible,
    convolution_norm,
    convolution_norm_bound,
    invert,
    lipschitz_bound,
)

__all__ = [
    "Conv",
    "ConvTranspose",
    "CouplingFlow",
    "Discriminator28",
    "Discriminator64",
    "Encoder28",
    "Encoder64",
    "Generator28",
    "Generator64",
    "Inverse",
    "InvertibleResidual",
    "SpectralConv",
    "check_invertible",
    "conv",
    "conv_transpose",
    "convolution_norm",
    "convolution_norm_bound",
    "invert",
    "lipschitz_bound",
]
