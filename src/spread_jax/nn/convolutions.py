"""Convolutions whose gradients are fast on a CPU, with Flax's parameters.

A strided convolution ("down") and a transposed one ("up") are the two maps, and each is the other's
input gradient. With stride s, kernel w of size K and offset p they are, per spatial axis,

    down:       y[o] = sum_k  x[s o + k - p] w[k]
    up:         y[o] = sum_k  x[i] w[k]            over k with  o + k - p = s i
    correlate:  g[k] = sum_o  x[s o + k - p] y[o]  (the kernel gradient of both)

Differentiating `up` through XLA's own transposed convolution asks for a kernel gradient whose kernel is
larger than its input. XLA's CPU backend answers by exchanging the operands, leaves its fast path and runs
a plain loop, 30 to 50 times slower than need be. Here the three maps are written directly:

  - `up` as s*s stride-1 convolutions, one for each output phase o mod s, interleaved: with o = s m + r
    only the taps k = (p - r) mod s, + s, ... meet an input pixel, and they meet x[m + (k + r - p) / s];
  - `correlate` as a convolution that contracts the batch, with the second operand dilated by s;
  - the gradient of `up` in x is `down` of the cotangent with the kernel flipped and its channel axes
    exchanged (p becomes K - 1 - p), the gradient of `down` is `up` in the same way, and the kernel gradient
    of `up` is `correlate` with x and the cotangent exchanged, flipped.

Reverse mode of any order works; forward mode does not go through a custom gradient, so `native=True` keeps
XLA's own form reachable. Parameters, names and initialisers are Flax's: checkpoints are interchangeable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Conv", "ConvTranspose", "conv", "conv_transpose"]

_IMAGE = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4  # 3 -> 12 and 4 -> 16 output channels: one to two vectors of eight floats


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, *, native: bool = False) -> jax.Array:
    """Strided convolution with SAME padding, `lax.conv_general_dilated` with a CPU-friendly gradient.

    Args:
      x: images [batch, height, width, in_channels].
      kernel: [kernel_height, kernel_width, in_channels, out_channels].
      stride: the step between output pixels, the same along both axes.
      native: use XLA's own gradient, which also supports forward mode.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), out_channels].

    Example:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((1, 8, 8, 3)), jnp.ones((5, 5, 3, 4)), stride=2).shape
      (1, 4, 4, 4)
    """
    if native:
        return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=_IMAGE)
    return _conv(*_varying_alike(x, kernel), stride)


def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int, *, native: bool = False) -> jax.Array:
    """Transposed convolution with SAME padding, `lax.conv_transpose` with a CPU-friendly gradient.

    Args:
      x: images [batch, height, width, in_channels].
      kernel: [kernel_height, kernel_width, in_channels, out_channels].
      stride: output pixels per input pixel, the same along both axes.
      native: use XLA's own form, which also supports forward mode.

    Returns:
      [batch, stride * height, stride * width, out_channels].

    Example:
      >>> import jax.numpy as jnp
      >>> conv_transpose(jnp.ones((1, 8, 8, 3)), jnp.ones((5, 5, 3, 4)), stride=2).shape
      (1, 16, 16, 4)
    """
    if native:
        return lax.conv_transpose(x, kernel, (stride, stride), "SAME", dimension_numbers=_IMAGE)
    return _conv_transpose(*_varying_alike(x, kernel), stride)


def _varying_alike(x, kernel):
    """Both, varying over the devices of a `shard_map` if one is: a custom gradient must be of its argument's type."""
    varying = [getattr(getattr(jax.typeof(a), "manual_axis_type", None), "varying", frozenset()) for a in (x, kernel)]
    either = varying[0] | varying[1]
    return tuple(
        lax.pcast(a, tuple(sorted(either - own)), to="varying") for a, own in zip((x, kernel), varying, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, stride):
    size = tuple(-(-n // stride) for n in x.shape[1:3])
    return _down(x, kernel, stride, _same_offset(x, kernel, stride, size), size)


def _conv_forward(x, kernel, stride):
    return _conv(x, kernel, stride), (x, kernel)


def _conv_backward(stride, residuals, grad):
    x, kernel = residuals
    offset = _same_offset(x, kernel, stride, grad.shape[1:3])
    flipped, flipped_offset = _adjoint(kernel, offset)
    grad_x = _up(grad, flipped, stride, flipped_offset, x.shape[1:3])
    return grad_x, _correlate(x, grad, stride, offset, kernel.shape[:2])


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_transpose(x, kernel, stride):
    size = tuple(stride * n for n in x.shape[1:3])
    return _up(x, kernel, stride, _transpose_offset(kernel, stride), size)


def _conv_transpose_forward(x, kernel, stride):
    return _conv_transpose(x, kernel, stride), (x, kernel)


def _conv_transpose_backward(stride, residuals, grad):
    x, kernel = residuals
    flipped, offset = _adjoint(kernel, _transpose_offset(kernel, stride))
    grad_x = _down(grad, flipped, stride, offset, x.shape[1:3])
    grad_kernel = _correlate(grad, x, stride, offset, kernel.shape[:2])
    return grad_x, jnp.flip(grad_kernel, (0, 1)).swapaxes(2, 3)


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _same_offset(x, kernel, stride, size):
    """Pixels of SAME padding before the first one, per spatial axis."""
    return tuple(
        max((o - 1) * stride + k - n, 0) // 2 for o, k, n in zip(size, kernel.shape[:2], x.shape[1:3], strict=True)
    )


def _transpose_offset(kernel, stride):
    """The padding `lax.conv_transpose` puts before its dilated input for SAME, per spatial axis."""
    return tuple(k - 1 if stride > k - 1 else -(-(k + stride - 2) // 2) for k in kernel.shape[:2])


def _adjoint(kernel, offset):
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return flipped, tuple(k - 1 - p for k, p in zip(kernel.shape[:2], offset, strict=True))


def _down(x, kernel, stride, offset, size):
    if stride == 1 and kernel.shape[3] <= _FEW_CHANNELS and all(o % 2 == 0 for o in size):
        return _down_by_blocks(x, kernel, offset, size)
    padding = [
        (p, (o - 1) * stride + k - p - n)
        for p, o, k, n in zip(offset, size, kernel.shape[:2], x.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_IMAGE)


def _down_by_blocks(x, kernel, offset, size):
    height, width, in_channels, out_channels = kernel.shape
    shifted = [jnp.pad(kernel, ((r, 1 - r), (c, 1 - c), (0, 0), (0, 0))) for r in range(2) for c in range(2)]
    block_kernel = jnp.stack(shifted, axis=3).reshape(height + 1, width + 1, in_channels, -1)
    blocks = _down(x, block_kernel, 2, offset, tuple(o // 2 for o in size))
    batch, rows, columns, _ = blocks.shape
    pixels = blocks.reshape(batch, rows, columns, 2, 2, out_channels)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, out_channels)


def _up(x, kernel, stride, offset, size):
    if stride == 1:
        return _down(x, kernel, 1, offset, size)
    phases_h = _phases(stride, offset[0], kernel.shape[0], x.shape[1], size[0])
    phases_w = _phases(stride, offset[1], kernel.shape[1], x.shape[2], size[1])
    rows = []
    for taps_h, padding_h in phases_h:
        row = []
        for taps_w, padding_w in phases_w:
            taps = kernel[taps_h, taps_w]
            if taps.size:
                y = lax.conv_general_dilated(x, taps, (1, 1), (padding_h, padding_w), dimension_numbers=_IMAGE)
            else:  # a stride larger than the kernel leaves phases that no tap reaches
                y = jnp.zeros((x.shape[0], -(-size[0] // stride), -(-size[1] // stride), kernel.shape[3]), x.dtype)
            row.append(y)
        rows.append(jnp.stack(row, axis=3))
    y = jnp.stack(rows, axis=2)  # [batch, height, phase, width, phase, channels]
    batch, height, _, width, _, channels = y.shape
    y = y.reshape(batch, height * stride, width * stride, channels)
    return y[:, : size[0], : size[1]]


def _phases(stride, offset, kernel_size, in_size, out_size):
    """For each output phase: which taps meet an input pixel, and the padding that aligns them."""
    length = -(-out_size // stride)
    phases = []
    for r in range(stride):
        first = (offset - r) % stride
        taps = slice(first, kernel_size, stride)
        count = len(range(first, kernel_size, stride))
        low = -((first + r - offset) // stride)
        phases.append((taps, (low, length + count - 1 - in_size - low)))
    return phases


def _correlate(x, y, stride, offset, kernel_size):
    padding = [
        (p, (o - 1) * stride + k - p - n)
        for p, o, k, n in zip(offset, y.shape[1:3], kernel_size, x.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(
        x, y, (1, 1), padding, rhs_dilation=(stride, stride), dimension_numbers=("CHWN", "IHWO", "HWNC")
    )


class _FlaxConv(nn.Module):
    """What `Conv` and `ConvTranspose` share: Flax's parameters, initialisers and dtype rules."""

    features: int
    kernel_size: tuple[int, int] = (5, 5)
    stride: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    native: bool = False

    def _apply(self, function, x):
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = function(x, kernel, self.stride, native=self.native)
        return y if bias is None else y + bias


class Conv(_FlaxConv):
    """SAME convolution over [batch, height, width, channels], parameters as `flax.linen.Conv`.

    Attributes:
      features: output channels.
      kernel_size: taps along height and width.
      stride: step between output pixels.
      use_bias: whether to add a bias for each output channel.
      dtype: compute dtype; None infers it from the input and the parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel [height, width, in, out].
      bias_init: initialiser of the bias [out].
      native: use XLA's own gradient, which also supports forward mode.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer, x = Conv(features=8, stride=2), jnp.ones((1, 16, 16, 3))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 8, 8, 8)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self._apply(conv, x)


class ConvTranspose(_FlaxConv):
    """SAME transposed convolution over [batch, height, width, channels], as `flax.linen.ConvTranspose`.

    Attributes:
      features: output channels.
      kernel_size: taps along height and width.
      stride: output pixels per input pixel.
      use_bias: whether to add a bias for each output channel.
      dtype: compute dtype; None infers it from the input and the parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel [height, width, in, out].
      bias_init: initialiser of the bias [out].
      native: use XLA's own form, which also supports forward mode.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer, x = ConvTranspose(features=3, stride=2), jnp.ones((1, 16, 16, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 32, 32, 3)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self._apply(conv_transpose, x)
