"""The published encoders and generators for 64x64 and 28x28 images, and discriminators that mirror them.

Parameters and batch statistics are float32; `dtype` is the compute dtype. Encoders return the mean and
log standard deviation of q(z|y), generators x = g(z) in (0, 1), discriminators one real number v for each image.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spread_jax.nn.convolutions import Conv, ConvTranspose

__all__ = ["Discriminator28", "Discriminator64", "Encoder28", "Encoder64", "Generator28", "Generator64"]


def _normalise(x: jax.Array, train: bool, dtype: Any, axis_name: str | None) -> jax.Array:
    # Decay and epsilon of the published code; statistics stay float32 whatever the compute dtype.
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name)(x)


def _gaussian_head(h: jax.Array, latent_dim: int) -> tuple[jax.Array, jax.Array]:
    # float32 whatever the compute dtype: the bound is taken from these numbers.
    h = h.astype(jnp.float32)
    mean = nn.Dense(latent_dim, name="mean")(h)
    log_std = nn.Dense(latent_dim, name="log_std")(h)
    return mean, log_std


def _normalise_each(x: jax.Array, dtype: Any) -> jax.Array:
    # Over one image's pixels and channels: no image's number depends on which others are in its batch.
    return nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=dtype)(x)


def _score_head(h: jax.Array) -> jax.Array:
    h = h.astype(jnp.float32).reshape(h.shape[0], -1)
    return nn.Dense(1, kernel_init=nn.initializers.zeros_init(), name="score")(h)[:, 0]


class Encoder64(nn.Module):
    """q(z|y) for 64x64 images: four 5x5 stride-2 convolutions, then dense mean and log scale.

    Channels width, 2 width, 4 width, 8 width, each followed by batch normalisation and ReLU.

    Attributes:
      latent_dim: Z, dimensions of z (published: 64 or 100).
      width: channels of the first convolution (published: 128).
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder, y = Encoder64(latent_dim=16, width=8), jnp.zeros((2, 64, 64, 3))
      >>> variables = encoder.init(jax.random.key(0), y, train=False)
      >>> mean, log_std = encoder.apply(variables, y, train=False)
      >>> mean.shape, log_std.shape
      ((2, 16), (2, 16))
    """

    latent_dim: int
    width: int = 128
    dtype: Any = jnp.float32
    native_gradients: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, y: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        h = y
        for multiple in (1, 2, 4, 8):
            # Batch normalisation subtracts any bias again, so the convolutions before one have none.
            h = Conv(
                self.width * multiple,
                stride=2,
                use_bias=False,
                dtype=self.dtype,
                native=self.native_gradients,
            )(h)
            h = nn.relu(_normalise(h, train, self.dtype, self.axis_name))
        return _gaussian_head(h.reshape(h.shape[0], -1), self.latent_dim)


class Generator64(nn.Module):
    """x = g(z) for 64x64 images: dense, stride-2 transposed convolutions, then a stride-1 one; sigmoid.

    From a 4x4 start the channels are 8 width | 4 width, 2 width, width, width / 2 | image channels; from an
    8x8 start 8 width | 4 width, 2 width, width | image channels. Kernels are 5x5; batch normalisation and
    ReLU follow every layer but the last.

    Attributes:
      width: W above (published: 128).
      channels: image channels.
      start: height and width after the dense layer, 4 (spread divergence) or 8 (the WAE baseline).
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment; the 8x8 start is that of
    Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> generator, z = Generator64(width=8), jnp.zeros((2, 16))
      >>> variables = generator.init(jax.random.key(0), z, train=False)
      >>> generator.apply(variables, z, train=False).shape
      (2, 64, 64, 3)
    """

    width: int = 128
    channels: int = 3
    start: int = 4
    dtype: Any = jnp.float32
    native_gradients: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        if self.start not in (4, 8):
            raise ValueError(f"start must be 4 or 8, got {self.start}.")
        deepest = 8 * self.width
        h = nn.Dense(self.start**2 * deepest, use_bias=False, dtype=self.dtype)(z)
        h = h.reshape(h.shape[0], self.start, self.start, deepest)
        h = nn.relu(_normalise(h, train, self.dtype, self.axis_name))
        sizes = (4, 2, 1, 0.5) if self.start == 4 else (4, 2, 1)
        for multiple in sizes:
            h = ConvTranspose(
                int(self.width * multiple),
                stride=2,
                use_bias=False,
                dtype=self.dtype,
                native=self.native_gradients,
            )(h)
            h = nn.relu(_normalise(h, train, self.dtype, self.axis_name))
        h = ConvTranspose(self.channels, dtype=self.dtype, native=self.native_gradients)(h)
        return nn.sigmoid(h.astype(jnp.float32))


class Encoder28(nn.Module):
    """q(z|y) for 28x28 images: two 4x4 stride-2 convolutions and a dense layer, leaky ReLU 0.1.

    Convolutions to width and 2 width channels, dense 16 width; batch normalisation from the second layer on.

    Attributes:
      latent_dim: Z, dimensions of z.
      width: channels of the first convolution (published: 64).
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.

    Source: Zhang et al., Spread Divergence, ICML 2020, MNIST experiment, after Chen et al., InfoGAN, 2016.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder, y = Encoder28(latent_dim=10, width=8), jnp.zeros((2, 28, 28, 1))
      >>> variables = encoder.init(jax.random.key(0), y, train=False)
      >>> encoder.apply(variables, y, train=False)[0].shape
      (2, 10)
    """

    latent_dim: int
    width: int = 64
    dtype: Any = jnp.float32
    native_gradients: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, y: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        layer = {"kernel_size": (4, 4), "stride": 2, "dtype": self.dtype, "native": self.native_gradients}
        h = nn.leaky_relu(Conv(self.width, **layer)(y), 0.1)
        h = Conv(2 * self.width, use_bias=False, **layer)(h)
        h = nn.leaky_relu(_normalise(h, train, self.dtype, self.axis_name), 0.1)
        h = nn.Dense(16 * self.width, use_bias=False, dtype=self.dtype)(h.reshape(h.shape[0], -1))
        h = nn.leaky_relu(_normalise(h, train, self.dtype, self.axis_name), 0.1)
        return _gaussian_head(h, self.latent_dim)


class Generator28(nn.Module):
    """x = g(z) for 28x28 images: two dense layers, two transposed convolutions, a sigmoid.

    Dense 16 width, dense 7x7x(2 width), then 4x4 stride-2 transposed convolutions; batch normalisation and ReLU
    between.

    Attributes:
      width: channels after the first transposed convolution (published: 64).
      channels: image channels.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.
      axis_name: of `jax.pmap` or `jax.shard_map`, over whose devices batch statistics are taken in training.

    Source: Zhang et al., Spread Divergence, ICML 2020, MNIST experiment, after Chen et al., InfoGAN, 2016.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> generator, z = Generator28(width=8), jnp.zeros((2, 10))
      >>> variables = generator.init(jax.random.key(0), z, train=False)
      >>> generator.apply(variables, z, train=False).shape
      (2, 28, 28, 1)
    """

    width: int = 64
    channels: int = 1
    dtype: Any = jnp.float32
    native_gradients: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        layer = {"kernel_size": (4, 4), "stride": 2, "dtype": self.dtype, "native": self.native_gradients}
        h = nn.Dense(16 * self.width, use_bias=False, dtype=self.dtype)(z)
        h = nn.relu(_normalise(h, train, self.dtype, self.axis_name))
        h = nn.Dense(7 * 7 * 2 * self.width, use_bias=False, dtype=self.dtype)(h)
        h = nn.relu(_normalise(h, train, self.dtype, self.axis_name)).reshape(h.shape[0], 7, 7, 2 * self.width)
        h = ConvTranspose(self.width, use_bias=False, **layer)(h)
        h = nn.relu(_normalise(h, train, self.dtype, self.axis_name))
        h = ConvTranspose(self.channels, **layer)(h)
        return nn.sigmoid(h.astype(jnp.float32))


class Discriminator64(nn.Module):
    """v(y) for 64x64 images, the mirror of `Generator64`: four 5x5 stride-2 convolutions, then a dense layer.

    Channels width, 2 width, 4 width, 8 width; leaky ReLU 0.2. Where the published networks have batch normalisation,
    from the second convolution on, this has normalisation over each image alone (a group norm of one group). A lower
    bound on a divergence of p~ and q~ needs one function of y. Statistics of a batch would make v depend on the other
    images: of data and samples apart, the discriminator could tell the two sets by their means and no bound would
    hold; of both together, each data image would see the samples. The last layer starts at 0, so v = 0: data and
    samples are equally likely, the bound is 0, and the logistic loss 2 log 2.

    Attributes:
      width: channels of the first convolution, as of `Encoder64`.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: Radford, Metz and Chintala, DCGAN, ICLR 2016, for the shape; Ba, Kiros and Hinton, Layer Normalization,
    2016, for the normalisation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> discriminator, y = Discriminator64(width=8), jnp.zeros((2, 64, 64, 3))
      >>> variables = discriminator.init(jax.random.key(0), y)
      >>> discriminator.apply(variables, y).tolist()
      [0.0, 0.0]
    """

    width: int = 128
    dtype: Any = jnp.float32
    native_gradients: bool = False

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        layer = {"stride": 2, "dtype": self.dtype, "native": self.native_gradients}
        h = nn.leaky_relu(Conv(self.width, **layer)(y), 0.2)
        for multiple in (2, 4, 8):
            h = Conv(self.width * multiple, use_bias=False, **layer)(h)
            h = nn.leaky_relu(_normalise_each(h, self.dtype), 0.2)
        return _score_head(h)


class Discriminator28(nn.Module):
    """v(y) for 28x28 images, the mirror of `Generator28`: two 4x4 stride-2 convolutions and two dense layers.

    Convolutions to width and 2 width channels, dense 16 width, leaky ReLU 0.1; normalisation over each image alone and
    the start at v = 0 as in `Discriminator64`.

    Attributes:
      width: channels of the first convolution, as of `Encoder28`.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: the discriminator of Chen et al., InfoGAN, 2016, for the shape; the normalisation as in `Discriminator64`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> discriminator, y = Discriminator28(width=8), jnp.zeros((2, 28, 28, 1))
      >>> variables = discriminator.init(jax.random.key(0), y)
      >>> discriminator.apply(variables, y).shape
      (2,)
    """

    width: int = 64
    dtype: Any = jnp.float32
    native_gradients: bool = False

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        layer = {"kernel_size": (4, 4), "stride": 2, "dtype": self.dtype, "native": self.native_gradients}
        h = nn.leaky_relu(Conv(self.width, **layer)(y), 0.1)
        h = nn.leaky_relu(_normalise_each(Conv(2 * self.width, use_bias=False, **layer)(h), self.dtype), 0.1)
        h = nn.Dense(16 * self.width, use_bias=False, dtype=self.dtype)(h.reshape(h.shape[0], -1))
        h = nn.leaky_relu(_normalise_each(h, self.dtype), 0.1)
        return _score_head(h)
