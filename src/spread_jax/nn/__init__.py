"""Flax Linen networks: encoders, generators, critics, a denoiser, invertible maps, a flow, fast convolutions."""

from spread_jax.nn.conditional import Denoiser, ScaleCritic
from spread_jax.nn.convolutions import Conv, ConvTranspose, conv, conv_transpose
from spread_jax.nn.flows import CouplingFlow
from spread_jax.nn.images import (
    DenseEncoder,
    DenseGenerator,
    Encoder,
    Generator,
    image_encoder,
    image_generator,
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
    "Denoiser",
    "DenseEncoder",
    "DenseGenerator",
    "Encoder",
    "Generator",
    "Inverse",
    "InvertibleResidual",
    "ScaleCritic",
    "SpectralConv",
    "check_invertible",
    "conv",
    "conv_transpose",
    "convolution_norm",
    "convolution_norm_bound",
    "image_encoder",
    "image_generator",
    "invert",
    "lipschitz_bound",
]
