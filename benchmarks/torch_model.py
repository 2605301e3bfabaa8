"""The CelebA model and the networks of many scales in PyTorch, layer for layer, with their parameters from Flax.

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

    for i, convolution in enumerate(model.encoder.convolutions):
        _copy(convolution.weight, np.flip(encoder[f"Conv_{i}"]["kernel"], (0, 1)).transpose(3, 2, 0, 1))
    for i, convolution in enumerate(model.generator.convolutions):
        _copy(convolution.weight, np.asarray(generator[f"ConvTranspose_{i}"]["kernel"]).transpose(2, 3, 0, 1))
    last = generator[f"ConvTranspose_{len(model.generator.convolutions)}"]
    _copy(model.generator.last.weight, np.flip(last["kernel"], (0, 1)).transpose(3, 2, 0, 1))
    _copy(model.generator.last.bias, np.asarray(last["bias"]))
    for own, network in ((model.encoder, encoder), (model.generator, generator)):
        for i, norm in enumerate(own.norms):
            _copy(norm.weight, np.asarray(network[f"BatchNorm_{i}"]["scale"]))
            _copy(norm.bias, np.asarray(network[f"BatchNorm_{i}"]["bias"]))
    for name in ("mean", "log_std"):
        kernel = np.asarray(encoder[name]["kernel"]).reshape(4, 4, deepest, latent_dim)
        _copy(getattr(model.encoder, name).weight, _mirror(kernel, 0).transpose(3, 2, 0, 1).reshape(latent_dim, -1))
        _copy(getattr(model.encoder, name).bias, np.asarray(encoder[name]["bias"]))
    kernel = np.asarray(generator["Dense_0"]["kernel"]).reshape(latent_dim, 4, 4, deepest)
    _copy(model.generator.dense.weight, _mirror(kernel, 1).transpose(3, 1, 2, 0).reshape(-1, latent_dim))
    return model


class Modulation(nn.Module):
    """Normalisation over each image but in the first layer, scaled and shifted by linear functions of the waves."""

    def __init__(self, channels: int, first: bool):
        super().__init__()
        self.norm = nn.Identity() if first else nn.GroupNorm(1, channels, eps=1e-5, affine=False)
        self.dense = nn.Linear(12, 2 * channels)

    def forward(self, h, waves):
        scale, shift = self.dense(waves)[:, :, None, None].chunk(2, dim=1)
        return self.norm(h) * (1 + scale) + shift


def waves_of(sigma):
    """Sines and cosines of log sigma, [n, 12]."""
    angles = sigma.log()[:, None] * 2.0 ** torch.arange(-2, 4, device=sigma.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ScaleCritic(nn.Module):
    """v(y, sigma) of `spread_jax.nn.ScaleCritic` for 64x64 images, data mean 0.5, scale 0.25 and detail scale 0.05."""

    def __init__(self, width: int):
        super().__init__()
        channels = [width * multiple for multiple in (1, 2, 4, 8)]
        first = nn.Conv2d(12, width, 3, padding=1, bias=False)
        halving = [nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False) for a, b in itertools.pairwise(channels)]
        self.convolutions = nn.ModuleList([first, *halving])
        self.modulations = nn.ModuleList(Modulation(b, i == 0) for i, b in enumerate(channels))
        self.score = nn.Linear(16 * channels[-1], 1)

    def forward(self, y, sigma):
        y, waves = y - 0.5, waves_of(sigma)
        # Rows and columns run backwards in the mirror image: a and d change places, b and c too.
        d, c, b, a = (y[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
        coarse = (a + b + c + d) / (0.5**2 + sigma**2).sqrt()[:, None, None, None]
        fine = torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
        h = torch.cat([coarse, fine / (0.05**2 + sigma**2).sqrt()[:, None, None, None]], dim=1)
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            h = functional.leaky_relu(modulation(convolution(h), waves), 0.2)
        return self.score(h.flatten(1))[:, 0]

    def copy_from(self, params):
        """Takes over the parameters of Flax's, for the mirror image."""
        _copy_modulated(self, params)
        kernel = np.asarray(params["score"]["kernel"]).reshape(4, 4, -1, 1)
        _copy(self.score.weight, _mirror(kernel, 0).transpose(3, 2, 0, 1).reshape(1, -1))
        _copy(self.score.bias, params["score"]["bias"])


class Denoiser(nn.Module):
    """E[x|y] of `spread_jax.nn.Denoiser` for 64x64 images, data mean 0.5 and scale 0.25."""

    def __init__(self, width: int):
        super().__init__()
        channels = [width * multiple for multiple in (1, 2, 4, 8)]
        down = [nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False) for a, b in itertools.pairwise(channels)]
        first, middle = (nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((12, width), (channels[-1],) * 2))
        self.convolutions = nn.ModuleList([first, *down, middle])
        self.transposed = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 5, stride=2, padding=2, output_padding=1, bias=False)
            for a, b in itertools.pairwise(channels[::-1])
        )
        self.modulations = nn.ModuleList(Modulation(c, i == 0) for i, c in enumerate([*channels, *channels[::-1]]))
        self.last = nn.Conv2d(width + 12, 12, 3, padding=1)

    def forward(self, y, sigma):
        waves, scale = waves_of(sigma), sigma[:, None, None, None]
        total, centred = scale**2 + 0.25**2, y - 0.5
        blocks, passed, modulations = functional.pixel_unshuffle(centred / total.sqrt(), 2), [], iter(self.modulations)
        after = lambda h: functional.silu(next(modulations)(h, waves))
        *down, middle = self.convolutions
        h = blocks
        for convolution in down:
            h = after(convolution(h))
            passed.append(h)
        h = after(middle(h)) + h
        for convolution, same_size in zip(self.transposed, passed[-2::-1], strict=True):
            h = after(convolution(h)) + same_size
        correction = functional.pixel_shuffle(self.last(torch.cat([h, blocks], dim=1)).float(), 2)
        return y + scale * (0.25 * correction / total.sqrt() - scale / total * centred)

    def copy_from(self, params):
        """Takes over the parameters of Flax's, for the mirror image."""
        _copy_modulated(self, params)
        for i, convolution in enumerate(self.transposed):
            _copy(convolution.weight, np.asarray(params[f"ConvTranspose_{i}"]["kernel"]).transpose(2, 3, 0, 1))
        last = params[f"Conv_{len(self.convolutions)}"]
        width = last["kernel"].shape[2] - 12
        with torch.no_grad():
            first, last_kernel = self.convolutions[0].weight, self.last.weight
            last_kernel.copy_(torch.from_numpy(np.flip(np.array(last["kernel"]), (0, 1)).transpose(3, 2, 0, 1).copy()))
            first.copy_(first[:, _BLOCK])
            last_kernel.copy_(last_kernel[:, [*range(width), *(width + i for i in _BLOCK)]][_BLOCK])
            self.last.bias.copy_(torch.from_numpy(np.asarray(last["bias"])[_BLOCK]))


# Flax's channel of each of PyTorch's, of a block of the mirror image: there channels are the slower axis, and rows and
# columns of a block run backwards.
_BLOCK = [(3 - place) * 3 + channel for channel in range(3) for place in range(4)]
CONDITIONAL = {"scale_critic": ScaleCritic, "denoiser": Denoiser}


def conditional_loss(output, x, sigma):
    """Of a denoiser its weighted squared error, of a critic the logistic loss: every second image is no data."""
    if output.ndim == 4:
        return ((1 / sigma**2 + 1 / 0.25**2) * (output - x).square().mean(dim=(1, 2, 3))).mean()
    signs = 2 * (torch.arange(len(output), device=output.device) % 2) - 1
    return functional.softplus(signs * output).mean()


def _copy_modulated(module, params):
    for i, convolution in enumerate(module.convolutions):
        _copy(convolution.weight, np.flip(params[f"Conv_{i}"]["kernel"], (0, 1)).transpose(3, 2, 0, 1))
    for i, modulation in enumerate(module.modulations):
        _copy(modulation.dense.weight, np.asarray(params[f"Dense_{i}"]["kernel"]).T)
        _copy(modulation.dense.bias, params[f"Dense_{i}"]["bias"])


def _copy(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(values)))


def mirrored_images(images: np.ndarray) -> torch.Tensor:
    """[n, height, width, channels] -> the flipped [n, channels, height, width] of this model."""
    return torch.from_numpy(_mirror(images, 1).transpose(0, 3, 1, 2).copy())


def _mirror(values, first_axis):
    return np.flip(values, (first_axis, first_axis + 1))
