"""The CelebA model in PyTorch, layer for layer, and its parameters from those of Flax.

SAME padding puts its odd pixel after the image in JAX; PyTorch's symmetric padding amounts to putting it before.
So this model is the mirror image, along both axes, of the one in Flax: images go in and come out flipped, and
PyTorch needs no padding of its own, which would cost it time.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Encoder(nn.Module):
    """q(z|y): four 5x5 stride-2 convolutions with batch normalisation and ReLU, dense mean and log scale."""

    def __init__(self, latent_dim: int, width: int):
        super().__init__()
        channels = [3, *(width * multiple for multiple in (1, 2, 4, 8))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False) for a, b in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in channels[1:])
        self.mean = nn.Linear(16 * channels[-1], latent_dim)
        self.log_std = nn.Linear(16 * channels[-1], latent_dim)

    def forward(self, h):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = functional.relu(norm(convolution(h)))
        h = h.flatten(1)
        return self.mean(h), self.log_std(h)


class Generator(nn.Module):
    """x = g(z) from a 4x4 start: four 5x5 stride-2 transposed convolutions, one to image channels, sigmoid."""

    def __init__(self, latent_dim: int, width: int):
        super().__init__()
        self.deepest = 8 * width
        channels = [self.deepest, 4 * width, 2 * width, width, width // 2]
        self.dense = nn.Linear(latent_dim, 16 * self.deepest, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 5, stride=2, padding=2, output_padding=1, bias=False)
            for a, b in itertools.pairwise(channels)
        )
        self.last = nn.Conv2d(channels[-1], 3, 5, padding=2)

    def forward(self, z):
        h = self.dense(z).unflatten(1, (self.deepest, 4, 4))
        h = functional.relu(self.norms[0](h))
        for convolution, norm in zip(self.convolutions, self.norms[1:], strict=True):
            h = functional.relu(norm(convolution(h)))
        return torch.sigmoid(self.last(h).float())


class SpreadVae(nn.Module):
    """The two networks and minus their mean spread ELBO in nats per example."""

    def __init__(self, latent_dim: int, width: int):
        super().__init__()
        self.encoder, self.generator = Encoder(latent_dim, width), Generator(latent_dim, width)

    def forward(self, images, spread_noise, latent_noise, scale: float):
        """images: uint8 [n, 3, 64, 64]; the noises are standard normal, of the shapes of y and z."""
        y = images.float() / 255.0 + scale * spread_noise
        mean, log_std = (part.float() for part in self.encoder(y))
        x = self.generator(mean + torch.exp(log_std) * latent_noise)
        constant = 0.5 * math.log(2 * math.pi) + math.log(scale)
        log_likelihood = -(0.5 * ((y - x) / scale).square() + constant).flatten(1).sum(1)
        kl = 0.5 * (mean.square() + torch.exp(2 * log_std) - 1 - 2 * log_std).sum(1)
        return (kl - log_likelihood).mean()


def from_flax(params, latent_dim: int, width: int) -> SpreadVae:
    """The model with the parameters of `Encoder` and `Generator` for 64x64 images (4x4 start) at new batch statistics.

    Args:
      params: {"encoder": ..., "generator": ...} as Flax initialises them, or gradients of the same shapes.
      latent_dim: Z.
      width: channels of the encoder's first convolution.

    Returns:
      A `SpreadVae` of the mirror image.
    """
    model = SpreadVae(latent_dim, width)
    deepest = 8 * width
    encoder, generator = params["encoder"], params["generator"]

    def copy(parameter, values):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(values)))

    for i, convolution in enumerate(model.encoder.convolutions):
        copy(convolution.weight, np.flip(encoder[f"Conv_{i}"]["kernel"], (0, 1)).transpose(3, 2, 0, 1))
    for i, convolution in enumerate(model.generator.convolutions):
        copy(convolution.weight, np.asarray(generator[f"ConvTranspose_{i}"]["kernel"]).transpose(2, 3, 0, 1))
    last = generator[f"ConvTranspose_{len(model.generator.convolutions)}"]
    copy(model.generator.last.weight, np.flip(last["kernel"], (0, 1)).transpose(3, 2, 0, 1))
    copy(model.generator.last.bias, np.asarray(last["bias"]))
    for own, network in ((model.encoder, encoder), (model.generator, generator)):
        for i, norm in enumerate(own.norms):
            copy(norm.weight, np.asarray(network[f"BatchNorm_{i}"]["scale"]))
            copy(norm.bias, np.asarray(network[f"BatchNorm_{i}"]["bias"]))
    for name in ("mean", "log_std"):
        kernel = np.asarray(encoder[name]["kernel"]).reshape(4, 4, deepest, latent_dim)
        copy(getattr(model.encoder, name).weight, _mirror(kernel, 0).transpose(3, 2, 0, 1).reshape(latent_dim, -1))
        copy(getattr(model.encoder, name).bias, np.asarray(encoder[name]["bias"]))
    kernel = np.asarray(generator["Dense_0"]["kernel"]).reshape(latent_dim, 4, 4, deepest)
    copy(model.generator.dense.weight, _mirror(kernel, 1).transpose(3, 1, 2, 0).reshape(-1, latent_dim))
    return model


def mirrored_images(images: np.ndarray) -> torch.Tensor:
    """[n, height, width, channels] -> the flipped [n, channels, height, width] of this model."""
    return torch.from_numpy(_mirror(images, 1).transpose(0, 3, 1, 2).copy())


def _mirror(values, first_axis):
    return np.flip(values, (first_axis, first_axis + 1))
