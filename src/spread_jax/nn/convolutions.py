"""Convolutions whose gradients are fast, with Flax's parameters.

A strided convolution ("down") and a transposed one ("up") are the two maps, and each is the other's
input gradient. With stride s, kernel w of size K and offset p they are, per spatial axis,

    down:       y[o] = sum_k  x[s o + k - p] w[k]
    up:         y[o] = sum_k  x[i] w[k]            over k with  o + k - p = s i
    correlate:  g[k] = sum_o  x[s o + k - p] y[o]  (the kernel gradient of both)

Differentiating `up` through XLA's own transposed convolution asks for a kernel gradient whose kernel is
larger than its input. XLA's CPU backend answers by exchanging the operands, leaves its fast path and runs
a plain loop, 30 to 50 times slower than need be. Here the three maps are written directly, and what follows from them:

  - `correlate` is a convolution that contracts the batch, with the second operand dilated by s;
  - the gradient of `up` in x is `down` of the cotangent with the kernel flipped and its channel axes
    exchanged (p becomes K - 1 - p), the gradient of `down` is `up` in the same way, and the kernel gradient
    of `up` is `correlate` with x and the cotangent exchanged, flipped.

Each platform computes these sums by the forms that are fast on it: `_cpu_convolutions.py` and `_gpu_convolutions.py`
have them, with what was measured. This file chooses between them.

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

from spread_jax.nn import _cpu_convolutions as cpu
from spread_jax.nn import _gpu_convolutions as gpu
from spread_jax.nn._cpu_convolutions import IMAGE

__all__ = ["Conv", "ConvTranspose", "conv", "conv_transpose"]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, *, native: bool = False) -> jax.Array:
    """Strided convolution with SAME padding, `lax.conv_general_dilated` with a fast gradient.

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
        return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=IMAGE)
    return _conv(*_varying_alike(x, kernel), stride)


def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int, *, native: bool = False) -> jax.Array:
    """Transposed convolution with SAME padding, `lax.conv_transpose` in a fast form, with a fast gradient.

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
        return lax.conv_transpose(x, kernel, (stride, stride), "SAME", dimension_numbers=IMAGE)
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

    def grad_x(grad, kernel):
        return _up(grad, _transposed(kernel), stride, _flipped_offset(kernel, offset), x.shape[1:3])

    def grad_x_by_product(grad, kernel):
        every = cpu.product(grad, kernel.reshape(-1, kernel.shape[3]).T)  # of all taps side by side
        taps = jnp.split(every, kernel.shape[0] * kernel.shape[1], axis=-1)
        return cpu.scatter(taps, kernel.shape[:2], stride, offset, x.shape[1:3]).astype(grad.dtype)

    def grad_kernel(x, grad):
        return _correlate(x, grad, stride, offset, kernel.shape[:2])

    def grad_kernel_by_product(x, grad):
        taps = jnp.concatenate(cpu.taps(x, kernel.shape[:2], stride, offset, grad.shape[1:3]), axis=-1)
        return cpu.over_positions(taps, grad).reshape(kernel.shape)

    return (
        _by_platform(grad_x, grad, kernel, cpu=grad_x_by_product if cpu.few_adjoint_positions(grad) else None),
        _by_platform(
            grad_kernel,
            x,
            grad,
            cpu=grad_kernel_by_product if cpu.few_positions(grad) else None,
            gpu=grad_kernel_by_product if gpu.is_taken_for_forward(grad, kernel, stride) else None,
        ),
    )


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_transpose(x, kernel, stride):
    size = tuple(stride * n for n in x.shape[1:3])
    offset = _transpose_offset(kernel, stride)

    def plain(x, kernel):
        return _up(x, kernel, stride, offset, size)

    def by_product(x, kernel):
        flipped = cpu.each_tap(x, kernel)[::-1]
        return cpu.scatter(flipped, kernel.shape[:2], stride, _flipped_offset(kernel, offset), size).astype(x.dtype)

    return _by_platform(plain, x, kernel, cpu=by_product if cpu.few_positions(x) else None)


def _conv_transpose_forward(x, kernel, stride):
    return _conv_transpose(x, kernel, stride), (x, kernel)


def _conv_transpose_backward(stride, residuals, grad):
    x, kernel = residuals
    offset = _flipped_offset(kernel, _transpose_offset(kernel, stride))

    def grad_x(grad, kernel):
        return _down(grad, _transposed(kernel), stride, offset, x.shape[1:3])

    def taps(grad):
        return cpu.taps(grad, kernel.shape[:2], stride, offset, x.shape[1:3])[::-1]

    def grad_x_by_product(grad, kernel):
        kernels = kernel.reshape(-1, *kernel.shape[2:])
        each = (cpu.product(tap, of_tap.T) for tap, of_tap in zip(taps(grad), kernels, strict=True))
        return sum(each).astype(grad.dtype)

    def grad_kernel(x, grad):
        return _transposed(_correlate(grad, x, stride, offset, kernel.shape[:2]))

    def grad_kernel_by_product(x, grad):
        every = jnp.stack(taps(grad))
        return jax.vmap(cpu.over_positions)(jnp.broadcast_to(x, (len(every), *x.shape)), every).reshape(kernel.shape)

    def grad_kernel_by_one_product(x, grad):
        every = cpu.over_positions(x, jnp.concatenate(taps(grad), axis=-1))
        return every.reshape(-1, *kernel.shape[:2], kernel.shape[3]).transpose(1, 2, 0, 3)

    few = cpu.few_positions(x)
    return (
        _by_platform(grad_x, grad, kernel, cpu=grad_x_by_product if few else None),
        _by_platform(
            grad_kernel,
            x,
            grad,
            cpu=grad_kernel_by_product if few else None,
            gpu=grad_kernel_by_one_product if gpu.is_taken_for_forward(x, kernel, stride) else None,
        ),
    )


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _by_platform(default, *arrays, cpu=None, gpu=None):
    """The form for the platform that is compiled for, applied to the arrays; None is the default."""
    if cpu is None and gpu is None:
        return default(*arrays)
    cpu, gpu = cpu or default, gpu or default
    return lax.platform_dependent(*arrays, cpu=cpu, cuda=gpu, rocm=gpu, default=default)


def _same_offset(x, kernel, stride, size):
    """Pixels of SAME padding before the first one, per spatial axis."""
    return tuple(
        max((o - 1) * stride + k - n, 0) // 2 for o, k, n in zip(size, kernel.shape[:2], x.shape[1:3], strict=True)
    )


def _transpose_offset(kernel, stride):
    """The padding `lax.conv_transpose` puts before its dilated input for SAME, per spatial axis."""
    return tuple(k - 1 if stride > k - 1 else -(-(k + stride - 2) // 2) for k in kernel.shape[:2])


def _flipped_offset(kernel, offset):
    return tuple(k - 1 - p for k, p in zip(kernel.shape[:2], offset, strict=True))


def _transposed(kernel):
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _down(x, kernel, stride, offset, size):
    def plain(x, kernel):
        edge = cpu.edge_of_blocks(kernel, stride, size)
        if edge > 1:
            blocks = _down(x, cpu.kernel_to_blocks(kernel, edge), edge, offset, tuple(o // edge for o in size))
            return cpu.to_pixels(blocks, edge)
        padding = cpu.padding(x, kernel.shape[:2], stride, offset, size)
        return gpu.convolve(x, kernel, padding, window_strides=(stride, stride), dimension_numbers=IMAGE)

    edge = cpu.edge_between_blocks(x, kernel, stride, offset, size)
    between = lambda x, kernel: cpu.down_between_blocks(x, kernel, stride, offset, size, edge)
    return _by_platform(plain, x, kernel, cpu=between if edge else None)


def _up(x, kernel, stride, offset, size):
    if stride == 1:
        return _down(x, kernel, 1, offset, size)
    form = lambda function: lambda x, kernel: function(x, kernel, stride, offset, size)
    few = gpu.has_fewer_pixels_than_taps(x, kernel)
    on_gpu, elsewhere = (cpu.up_by_phases, cpu.up_by_phases) if few else (gpu.up, gpu.up_dilated)
    return _by_platform(form(elsewhere), x, kernel, cpu=form(cpu.up), gpu=form(on_gpu))


def _correlate(x, y, stride, offset, kernel_size):
    def plain(x, y, offset=offset, kernel_size=kernel_size, dtype=None):
        padding = cpu.padding(x, kernel_size, stride, offset, y.shape[1:3])
        return gpu.convolve(
            x, y, padding, window_strides=(1, 1), rhs_dilation=(stride, stride),
            dimension_numbers=("CHWN", "IHWO", "HWNC"), preferred_element_type=dtype,
        )  # fmt: skip

    between = lambda x, y: cpu.correlate_between_blocks(x, y, offset, kernel_size, plain)
    wanted = cpu.correlates_blocks(x, y, kernel_size, stride, offset)
    return _by_platform(plain, x, y, cpu=between if wanted else None)


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
        return y if bias is None else y + bias[None, None, None]


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
