"""Encoders and generators for square images, in two families.

For sides of 16, 32, 64, 128 and 256 pixels: `Encoder` and `Generator`, at 64x64 those published for CelebA.
For 28, 56, 112 and 224: `DenseEncoder` and `DenseGenerator`, at 28x28 those published for MNIST.
`image_encoder` and `image_generator` choose by the shape of an image.

Parameters and batch statistics are float32; `dtype` is the compute dtype. Encoders return the mean and
log standard deviation of q(z|y), generators x = g(z) in (0, 1).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spread_jax._checks import check_count
from spread_jax.nn._layers import MOST, Network, check_width
from spread_jax.nn.convolutions import Conv, ConvTranspose

__all__ = [
    "DenseEncoder",
    "DenseGenerator",
    "Encoder",
    "Generator",
    "image_encoder",
    "image_generator",
]

_START, _DENSE_START = 4, 7  # pixels along a side at which the convolutions end
_SIDES = [16, 32, 64, 128, 256]
_DENSE_SIDES = [28, 56, 112, 224]
_leaky_1 = functools.partial(nn.leaky_relu, negative_slope=0.1)


class _Network(Network):
    """The layers of both families."""

    def _over_batch(self, h, train: bool):
        # Decay and epsilon of the published code; statistics stay float32 whatever the compute dtype.
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name)
        return self.normalised(norm, h)

    def _downwards(self, h, normalise: Callable, activate: Callable, taps: int, *, normalise_first: bool):
        """Stride-2 convolutions to width, 2 width, ... channels; flat."""
        for block in range(self.blocks):
            bare = block == 0 and not normalise_first
            # A normalisation subtracts any bias again, so the convolutions before one have none.
            features = min(2**block, MOST) * self.width
            h = self.layer(Conv, features, kernel_size=(taps, taps), stride=2, use_bias=bare)(h)
            h = activate(h if bare else normalise(h))
        return h.reshape(h.shape[0], -1)

    def _upwards(self, h, channels: Sequence[int], taps: int, train: bool):
        """Stride-2 transposed convolutions to each number of channels."""
        for features in channels:
            h = self.layer(ConvTranspose, features, kernel_size=(taps, taps), stride=2, use_bias=False)(h)
            h = nn.relu(self._over_batch(h, train))
        return h


def _gaussian_head(h: jax.Array, latent_dim: int) -> tuple[jax.Array, jax.Array]:
    # float32 whatever the compute dtype: the bound is taken from these numbers.
    h = h.astype(jnp.float32)
    mean = nn.Dense(latent_dim, name="mean")(h)
    log_std = nn.Dense(latent_dim, name="log_std")(h)
    return mean, log_std


class Encoder(_Network):
    """q(z|y): 5x5 stride-2 convolutions, then dense mean and log scale.

    Channels width, 2 width, 4 width and from there 8 width, each followed by batch normalisation and ReLU.

    Attributes:
      latent_dim: Z, dimensions of z (published: 64 or 100).
      width: channels of the first convolution (published: 128).
      blocks: convolutions, each halving the side (published: 4, from 64x64 to 4x4).
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder, y = Encoder(latent_dim=16, width=8), jnp.zeros((2, 64, 64, 3))
      >>> variables = jax.jit(lambda key: encoder.init(key, y, train=False))(jax.random.key(0))
      >>> mean, log_std = encoder.apply(variables, y, train=False)
      >>> mean.shape, log_std.shape
      ((2, 16), (2, 16))
    """

    latent_dim: int
    width: int = 128
    blocks: int = 4
    axis_name: str | None = None

    @nn.compact
    def __call__(self, y: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        normalise = functools.partial(self._over_batch, train=train)
        return _gaussian_head(self._downwards(y, normalise, nn.relu, 5, normalise_first=True), self.latent_dim)


class Generator(_Network):
    """x = g(z): dense, stride-2 transposed convolutions, then a stride-1 one; sigmoid.

    For 64x64 from a 4x4 start the channels are 8 width | 4 width, 2 width, width, width / 2 | image channels; from an
    8x8 start 8 width | 4 width, 2 width, width | image channels. Other sides have the same channels at the end, twice
    as many in each layer before, and at most 8 width. Kernels are 5x5; batch normalisation and ReLU follow every layer
    but the last.

    Attributes:
      width: W above, even from a 4x4 start (published: 128).
      channels: image channels.
      image_size: height and width of x, start times a power of two (published: 64).
      start: height and width after the dense layer, 4 (spread divergence) or 8 (the WAE baseline).
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Raises:
      ValueError: there is no such network of this start, image size or width.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment; the 8x8 start is that of
    Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> generator, z = Generator(width=8, image_size=32), jnp.zeros((2, 16))
      >>> x, variables = jax.jit(lambda key: generator.init_with_output(key, z, train=False))(jax.random.key(0))
      >>> x.shape
      (2, 32, 32, 3)
    """

    width: int = 128
    channels: int = 3
    image_size: int = 64
    start: int = 4
    axis_name: str | None = None

    def __post_init__(self):
        if self.start not in (4, 8):
            raise ValueError(f"start must be 4 or 8, got {self.start}.")
        if self.image_size not in _SIDES:
            raise ValueError(f"image_size must be one of {_listed(_SIDES)}, got {self.image_size}.")
        check_width(self.width, even=self.start == 4)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        blocks = (self.image_size // self.start).bit_length() - 1
        last = self.width * self.start // 8
        deepest, *others = (min(last * 2**block, MOST * self.width) for block in range(blocks, -1, -1))
        h = nn.Dense(self.start**2 * deepest, use_bias=False, dtype=self.dtype)(z)
        h = h.reshape(h.shape[0], self.start, self.start, deepest)
        h = self._upwards(nn.relu(self._over_batch(h, train)), others, 5, train)
        return nn.sigmoid(self.layer(ConvTranspose, self.channels)(h).astype(jnp.float32))


class DenseEncoder(_Network):
    """q(z|y): 4x4 stride-2 convolutions and a dense layer, leaky ReLU 0.1, then dense mean and log scale.

    Convolutions to width, 2 width, 4 width and from there 8 width channels, dense 16 width; batch normalisation from
    the second layer on.

    Attributes:
      latent_dim: Z, dimensions of z.
      width: channels of the first convolution (published: 64).
      blocks: convolutions, each halving the side (published: 2, from 28x28 to 7x7).
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: Zhang et al., Spread Divergence, ICML 2020, MNIST experiment, after Chen et al., InfoGAN, 2016.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder, y = DenseEncoder(latent_dim=10, width=8), jnp.zeros((2, 28, 28, 1))
      >>> variables = jax.jit(lambda key: encoder.init(key, y, train=False))(jax.random.key(0))
      >>> encoder.apply(variables, y, train=False)[0].shape
      (2, 10)
    """

    latent_dim: int
    width: int = 64
    blocks: int = 2
    axis_name: str | None = None

    @nn.compact
    def __call__(self, y: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        normalise = functools.partial(self._over_batch, train=train)
        h = self._downwards(y, normalise, _leaky_1, 4, normalise_first=False)
        h = nn.Dense(16 * self.width, use_bias=False, dtype=self.dtype)(h)
        return _gaussian_head(_leaky_1(normalise(h)), self.latent_dim)


class DenseGenerator(_Network):
    """x = g(z): two dense layers, 4x4 stride-2 transposed convolutions, a sigmoid.

    For 28x28: dense 16 width, dense 7x7x(2 width), transposed convolutions to width and to image channels; batch
    normalisation and ReLU between. Larger sides have twice the channels in each layer before, and at most 8 width.

    Attributes:
      width: channels after the last transposed convolution but one (published: 64).
      channels: image channels.
      image_size: height and width of x, 7 times a power of two (published: 28).
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Raises:
      ValueError: there is no such network of this image size or width.

    Source: Zhang et al., Spread Divergence, ICML 2020, MNIST experiment, after Chen et al., InfoGAN, 2016.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> generator, z = DenseGenerator(width=8), jnp.zeros((2, 10))
      >>> x, variables = jax.jit(lambda key: generator.init_with_output(key, z, train=False))(jax.random.key(0))
      >>> x.shape
      (2, 28, 28, 1)
    """

    width: int = 64
    channels: int = 1
    image_size: int = 28
    axis_name: str | None = None

    def __post_init__(self):
        if self.image_size not in _DENSE_SIDES:
            raise ValueError(f"image_size must be one of {_listed(_DENSE_SIDES)}, got {self.image_size}.")
        check_width(self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        blocks = (self.image_size // _DENSE_START).bit_length() - 1
        deepest, *others = (min(2**block, MOST) * self.width for block in range(blocks - 1, -1, -1))
        h = z
        for features in (16 * self.width, _DENSE_START**2 * deepest):
            h = nn.Dense(features, use_bias=False, dtype=self.dtype)(h)
            h = nn.relu(self._over_batch(h, train))
        h = self._upwards(h.reshape(h.shape[0], _DENSE_START, _DENSE_START, deepest), others, 4, train)
        h = self.layer(ConvTranspose, self.channels, kernel_size=(4, 4), stride=2)(h)
        return nn.sigmoid(h.astype(jnp.float32))


def image_encoder(
    image_shape: Sequence[int], *, latent_dim: int, width: int, dtype: Any = jnp.float32
) -> Encoder | DenseEncoder:
    """The encoder q(z|y) for images of a shape, `Encoder` or `DenseEncoder`.

    Args:
      image_shape: [height, width, channels], square with a side of 16, 32, 64, 128 or 256 pixels, or of 28, 56, 112 or
        224.
      latent_dim: Z, dimensions of z.
      width: channels of the first convolution.
      dtype: compute dtype of the convolutions.

    Returns:
      A Flax module: `__call__(y, *, train) -> (mean, log_std)`, each [batch, Z].

    Raises:
      ValueError: there is no network for this shape, latent dimension or width.

    Example:
      >>> image_encoder((32, 32, 3), latent_dim=16, width=8).blocks
      3
    """
    dense, blocks, _ = _family(image_shape)
    check_count("latent_dim", latent_dim)
    check_width(width)
    return (DenseEncoder if dense else Encoder)(latent_dim, width, blocks, dtype=dtype)


def image_generator(
    image_shape: Sequence[int], *, width: int, start: int = 4, dtype: Any = jnp.float32
) -> Generator | DenseGenerator:
    """The generator x = g(z) for images of a shape, `Generator` or `DenseGenerator`.

    Args:
      image_shape: as of `image_encoder`.
      width: channels of the encoder's first convolution, whose mirror this is; even for a `Generator` from 4x4.
      start: 4 or 8, height and width after a `Generator`'s dense layer; a `DenseGenerator` has 7 and takes the 4 only.
      dtype: compute dtype of the convolutions.

    Returns:
      A Flax module: `__call__(z, *, train) -> x` in (0, 1), [batch, *image_shape].

    Raises:
      ValueError: there is no network for this shape, start or width.

    Example:
      >>> image_generator((28, 28, 1), width=8).channels
      1
    """
    dense, _, (side, _, channels) = _family(image_shape)
    if not dense:
        return Generator(width, channels, side, start, dtype=dtype)
    if start != _START:
        raise ValueError(f"start={start} is for sides of {_listed(_SIDES)} pixels; images of {side} start from 7x7.")
    return DenseGenerator(width, channels, side, dtype=dtype)


def _family(image_shape: Sequence[int]) -> tuple[bool, int, tuple[int, int, int]]:
    """Whether the family is that of the dense layers, the halvings of the side, and the shape as integers."""
    try:
        height, width, channels = map(operator.index, image_shape)
    except (TypeError, ValueError):
        height = width = channels = 0
    if height == width and width in _SIDES + _DENSE_SIDES and channels >= 1:
        dense = height in _DENSE_SIDES
        return dense, (height // (_DENSE_START if dense else _START)).bit_length() - 1, (height, width, channels)
    raise ValueError(
        f"There is no network for images of shape {image_shape}: they must be [height, width, channels], square, with "
        f"a side of {_listed(sorted(_SIDES + _DENSE_SIDES))} pixels."
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
