"""Networks of a spread image y and the scale sigma of its noise, for divergences over many scales.

The scale enters through sines and cosines of log sigma, from which each layer's normalisation takes its scale and
shift. No layer knows more than one example: there are no statistics of a batch.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from spread_jax.nn._layers import MOST, Network, check_width, score_head
from spread_jax.nn.convolutions import Conv, ConvTranspose

__all__ = ["Denoiser", "ScaleCritic"]

_SMALLEST = 1e-6  # of sigma, below which its logarithm stands still: at 0 a denoiser gives y
_END = 4  # pixels along a side from which on nothing is halved


class _Conditional(Network):
    """What both share: layers modulated by the scale of the noise."""

    def _modulated(self, h: jax.Array, sigma: jax.Array, *, first: bool = False) -> jax.Array:
        """Normalised over one example's pixels and channels, then scaled and shifted by functions of log sigma.

        The first layer's is not normalised: it would hide how bright and how full of contrast an image is.
        """
        # From 1/4, which is the c_noise of Karras et al., to 8 radians for each factor e of sigma.
        frequencies = 2.0 ** jnp.arange(-2, 4, dtype=sigma.dtype)
        angles = jnp.log(jnp.maximum(sigma, _SMALLEST))[:, None] * frequencies[None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        zeros = nn.initializers.zeros_init()  # a plain normalisation at first
        modulation = nn.Dense(2 * h.shape[-1], kernel_init=zeros, dtype=self.dtype)(waves)[:, None, None]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        if not first:
            norm = nn.GroupNorm(num_groups=1, epsilon=1e-5, use_scale=False, use_bias=False, dtype=self.dtype)
            h = self.normalised(norm, h)
        return h * (1 + scale) + shift


class ScaleCritic(_Conditional):
    """v(y, sigma), a critic that is told the scale of the noise: convolutions of coarse and fine parts, a dense layer.

    Of every block of 2x2 pixels [[a, b], [c, d]], less m, the Haar transform goes in, each part at a scale of its own:

        coarse: 2 (a + b + c + d) / 2 / sqrt(4 s^2 + sigma^2),
        fine:   (a - b + c - d, a + b - c - d, a - b - c + d) / 2 / sqrt(t^2 + sigma^2),

    m and s being mean and scale of the data, and t that of its fine parts. They are orthogonal, so noise is noise of
    scale sigma in each, and what goes in is of order one at every scale: where the noise is small, details that are a
    tenth of an image's contrast are half as large to the critic as its outlines. With the coarse part at 1 in place of
    2 samples of faces are sharper and further from the data; at one scale for all parts they are blurred.
    A 3x3 convolution takes them to width channels, and 5x5 stride-2 ones to 4x4 or less, with 2 width, 4 width and from
    there 8 width channels. Each is followed by a normalisation over the example (a group norm of one group; not the
    first), a scale and a shift that are functions of log sigma, and leaky ReLU 0.2. Statistics of a batch would make v
    depend on the other images, and a bound on a divergence needs one function of y. The last layer starts at 0, so
    v = 0: data and samples are equally likely.

    Attributes:
      width: channels of the first convolution.
      data_scale: s, standard deviation of the data's pixels.
      data_mean: m, mean of the data's pixels.
      detail_scale: t, root mean square of the fine parts.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Raises:
      ValueError: sigma is neither a scalar nor one number for each example, or the width not positive.

    Source: Wang et al., Diffusion-GAN, ICLR 2023, for a critic that is told the level of noise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> critic, y, sigma = ScaleCritic(width=4), jnp.zeros((2, 16, 16, 3)), jnp.array([0.1, 1.0])
      >>> v, variables = jax.jit(lambda key: critic.init_with_output(key, y, sigma))(jax.random.key(0))
      >>> v.tolist()
      [0.0, 0.0]
    """

    width: int = 64
    data_scale: float = 0.25
    data_mean: float = 0.5
    detail_scale: float = 0.05

    def __post_init__(self):
        check_width(self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, y: jax.Array, sigma: jax.Array | float) -> jax.Array:
        sigma = _for_each(sigma, y)
        coarse, fine = haar_parts(y.astype(sigma.dtype) - self.data_mean)
        below = lambda scale: jnp.sqrt(scale**2 + sigma**2)[:, None, None, None]
        h = jnp.concatenate([2 * coarse / below(2 * self.data_scale), fine / below(self.detail_scale)], axis=-1)
        h = self.layer(Conv, self.width, kernel_size=(3, 3), use_bias=False)(h)
        h = nn.leaky_relu(self._modulated(h, sigma, first=True), 0.2)
        block = 1
        while max(h.shape[1:3]) > _END:
            h = self.layer(Conv, min(2**block, MOST) * self.width, stride=2, use_bias=False)(h)
            h = nn.leaky_relu(self._modulated(h, sigma), 0.2)
            block += 1
        return score_head(h)


class Denoiser(_Conditional):
    """E[x|y] of y = x + sigma eps: a small U-Net F, preconditioned for every sigma.

        D(y, sigma) = m + c_skip (y - m) + c_out F(c_in (y - m), log sigma),
        c_skip = s^2 / (sigma^2 + s^2),   c_out = sigma s / sqrt(sigma^2 + s^2),   c_in = 1 / sqrt(sigma^2 + s^2),

    m and s being mean and scale of the data: D is y at sigma = 0 and forgets y as sigma grows, and what F has to give
    is of order one at every scale. F takes blocks of 2x2 pixels for channels, and gives such. 5x5 convolutions halve
    the image from there while its sides are even and above 4, from width to 2 width, 4 width and from there 8 width
    channels, and transposed ones double it again, adding what there was at each size; the others are 3x3. Every layer
    but the last is followed by a normalisation over the example (not the first), a scale and a shift that are functions
    of log sigma, and SiLU. The last starts at 0: then D = m + c_skip (y - m).

    Attributes:
      width: channels at half the image's size.
      data_scale: s, standard deviation of the data's pixels.
      data_mean: m, mean of the data's pixels.
      dtype: compute dtype of the convolutions.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Raises:
      ValueError: sigma is neither a scalar nor one number for each example, the height or width of y is odd, or `width`
        not positive.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022, table 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> denoiser, y = Denoiser(width=4), jnp.ones((2, 16, 16, 3))
      >>> x, variables = jax.jit(lambda key: denoiser.init_with_output(key, y, 0.25))(jax.random.key(0))
      >>> x.shape, float(x[0, 0, 0, 0])
      ((2, 16, 16, 3), 0.75)
    """

    width: int = 64
    data_scale: float = 0.25
    data_mean: float = 0.5

    def __post_init__(self):
        check_width(self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, y: jax.Array, sigma: jax.Array | float) -> jax.Array:
        sigma = _for_each(sigma, y)
        y, scale = y.astype(sigma.dtype), sigma[:, None, None, None]
        total = scale**2 + self.data_scale**2
        correction = self._correction((y - self.data_mean) / jnp.sqrt(total), sigma)
        # 1 - c_skip from y, which keeps the digits of y - D at small sigma: that is the score times sigma^2.
        step = self.data_scale * correction / jnp.sqrt(total) - scale / total * (y - self.data_mean)
        return y + scale * step

    def _correction(self, y, sigma):
        """F, of order one."""
        blocks = _to_blocks(y)
        after = lambda h, **settings: nn.silu(self._modulated(h, sigma, **settings))
        h = after(self.layer(Conv, self.width, kernel_size=(3, 3), use_bias=False)(blocks), first=True)
        passed = []
        while all(side % 2 == 0 and side > _END for side in h.shape[1:3]):
            passed.append(h)
            h = after(self.layer(Conv, min(2 ** len(passed), MOST) * self.width, stride=2, use_bias=False)(h))
        h = after(self.layer(Conv, h.shape[-1], kernel_size=(3, 3), use_bias=False)(h)) + h
        for same_size in reversed(passed):
            h = after(self.layer(ConvTranspose, same_size.shape[-1], stride=2, use_bias=False)(h)) + same_size
        # The blocks of y once more: at small sigma F has to give each pixel's noise.
        h = jnp.concatenate([h, blocks.astype(h.dtype)], axis=-1)
        zeros = nn.initializers.zeros_init()
        h = self.layer(Conv, blocks.shape[-1], kernel_size=(3, 3), kernel_init=zeros)(h)
        return _to_pixels(h.astype(sigma.dtype))


def _for_each(sigma: jax.Array | float, y: jax.Array) -> jax.Array:
    """sigma of each example, [batch]."""
    sigma = jnp.asarray(sigma, jnp.float64 if y.dtype == jnp.float64 else jnp.float32)
    batch = y.shape[0]
    if sigma.shape not in ((), (batch,), (batch, *(1,) * (y.ndim - 1))):
        raise ValueError(f"sigma must be a scalar or one number for each of the {batch} examples, got {sigma.shape}.")
    return jnp.broadcast_to(sigma.reshape(-1), (batch,))


def haar_parts(x):
    """Coarse [n, h/2, w/2, channels] and fine [n, h/2, w/2, 3 channels] parts of arrays [n, h, w, channels].

    The Haar transform of blocks of 2x2, which is orthogonal. An odd side has its last row or column twice.
    """
    a, b = x[:, ::2], x[:, 1::2]
    if x.shape[1] % 2:
        b = jnp.concatenate([b, x[:, -1:]], axis=1)
    (a, b), (c, d) = (_columns(rows) for rows in (a, b))
    fine = [a - b + c - d, a + b - c - d, a - b - c + d]
    return (a + b + c + d) / 2, jnp.concatenate(fine, axis=-1) / 2


def _columns(rows):
    left, right = rows[:, :, ::2], rows[:, :, 1::2]
    if rows.shape[2] % 2:
        right = jnp.concatenate([right, rows[:, :, -1:]], axis=2)
    return left, right


def _to_blocks(y: jax.Array) -> jax.Array:
    """[batch, 2 height, 2 width, channels] -> [batch, height, width, 4 channels]."""
    batch, height, width, channels = y.shape
    if height % 2 or width % 2:
        raise ValueError(f"y must have an even height and width, got shape {y.shape}.")
    blocks = y.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels)


def _to_pixels(blocks: jax.Array) -> jax.Array:
    """[batch, height, width, 4 channels] -> [batch, 2 height, 2 width, channels]."""
    batch, height, width, channels = blocks.shape
    pixels = blocks.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(batch, 2 * height, 2 * width, channels // 4)
