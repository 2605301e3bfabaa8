"""Convolutions whose gradients are fast, with Flax's parameters.

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

Two more forms of the same sums, each where it was measured to be faster on two cores of a CPU (5x5 kernels, batch 32):

  - *blocks*: with few output channels a convolution cannot fill vectors. The pixels of a block of the output, or the
    s*s phases of `up`, become channels of one convolution with a kernel that has a shifted copy for each. A quarter
    more multiplications at least, and 7.5 -> 3.4 ms for `up` from 16 channels to 8 at 32x32, 6.5 -> 2.8 ms for the
    input gradient of the last layer from 8 channels to 3 at 64x64. With few input channels, as those of a picture, a
    convolution gathers runs of memory as short: there the input's blocks become channels too;
  - *products*: with few positions (batch x height x width) and many channels the kernel is larger than the images, and
    flipping, transposing or slicing it is what costs. One matrix product for each tap, or for all at once, leaves it
    as it lies, and shifts images instead: 54 -> 13 ms for the input gradient from 1,024 channels to 512 at batch 8.

On a GPU or TPU the three maps are single operations of the platform, if they are written as what its compiler
recognises. On a TPU `up` is the convolution over a dilated image, which costs nothing there, and its phases only with
fewer pixels than taps. For cuDNN, as XLA of jax 0.10 and 0.11 compiles for an H200 (`python -m benchmarks.program`):

  - `up` is the gradient routine of `down` where a reversed kernel meets a dilated image. XLA cancels the reversal of a
    kernel that was just reversed and then convolves all the zeros, four times the work, unless a barrier lies between;
  - with fewer pixels than taps it exchanges the operands, eight times the work: there the phases stay;
  - a kernel gradient is the gradient routine only if the images are larger than the kernel, and else a convolution
    whose kernel is filled with zeros, three times the work: there it is one matrix product;
  - it pads both sides alike, and XLA otherwise once for `down` or `up` and once more, by other sizes, for the kernel's
    gradient: an image is padded once for both, behind a barrier.

Reverse mode of any order works; forward mode does not go through a custom gradient, so `native=True` keeps
XLA's own form reachable. Parameters, names and initialisers are Flax's: checkpoints are interchangeable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Conv", "ConvTranspose", "conv", "conv_transpose"]

_IMAGE = ("NHWC", "HWIO", "NHWC")
_IMAGE_CHANNELS = 4  # up to here one side of a layer is an image, and the sum over its channels and taps is short
# Output channels up to which blocks are faster: 6.6 -> 4.0 ms at 16 channels, 7.5 -> 5.9 at 32 and 2.6 -> 2.7 at 64 of
# the gradient to what an image was made from; 13 -> 10.5 ms at 16 channels and 7.6 -> 8.7 at 32 of `up`.
_BLOCK_CHANNELS, _PHASE_CHANNELS = 32, 16
# Output channels up to which an image's blocks become channels as well, filled up to a vector's 16 numbers. One core:
# 3.8 -> 2.8 ms for the first layer at 16 channels, 3.9 -> 3.5 at 32, 5.1 -> 5.8 at 64; 5.4 -> 3.8 for the gradient to
# what an image was made from at 8, 8.1 -> 7.1 at 16, 12.8 -> 12.0 at 32; 5.5 -> 3.0 for the kernel of that layer at 8,
# 7.0 -> 7.6 at 16. Not where that is over twice the work: 2.6 -> 3.4 ms with a 4x4 kernel, 1.1 -> 1.3 with one gray
# channel, both at 32 channels.
_BOTH_CHANNELS, _BOTH_KERNEL_CHANNELS, _VECTOR, _MOST_WORK = 32, 8, 16, 2
# Positions for each channel of the deeper side up to which products are faster. `up` as the input gradient of `down`:
# 4.2 -> 3.3 ms at 2, 18 -> 12 at 1, 1.2 -> 1.6 at 4; all others: 58 -> 30 ms at 1/8, 12.9 -> 14.7 at 1.
_ADJOINT_POSITIONS, _POSITIONS = 2, 0.25


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
        return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=_IMAGE)
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

    def grad_x(grad, kernel):
        flipped, flipped_offset = _adjoint(kernel, offset)
        return _up(grad, flipped, stride, flipped_offset, x.shape[1:3])

    def grad_x_by_product(grad, kernel):
        every = _product(grad, kernel.reshape(-1, kernel.shape[3]).T)  # of all taps side by side
        taps = jnp.split(every, kernel.shape[0] * kernel.shape[1], axis=-1)
        return _scatter(taps, kernel.shape[:2], stride, offset, x.shape[1:3]).astype(grad.dtype)

    def grad_kernel(x, grad):
        return _correlate(x, grad, stride, offset, kernel.shape[:2])

    def grad_kernel_by_product(x, grad):
        taps = jnp.concatenate(_taps(x, kernel.shape[:2], stride, offset, grad.shape[1:3]), axis=-1)
        return _over_positions(taps, grad).reshape(kernel.shape)

    cpu = grad_kernel_by_product if _few_positions(grad) else grad_kernel
    gpu = grad_kernel_by_product if _taken_for_forward(grad, kernel, stride) else grad_kernel
    return (
        _on_cpu(_few_positions(grad, _ADJOINT_POSITIONS), grad_x_by_product, grad_x, grad, kernel),
        lax.platform_dependent(x, grad, cpu=cpu, cuda=gpu, rocm=gpu, default=grad_kernel),
    )


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_transpose(x, kernel, stride):
    size = tuple(stride * n for n in x.shape[1:3])
    offset = _transpose_offset(kernel, stride)

    def by_product(x, kernel):
        flipped = _each_tap(x, kernel)[::-1]
        return _scatter(flipped, kernel.shape[:2], stride, _flipped_offset(kernel, offset), size).astype(x.dtype)

    return _on_cpu(_few_positions(x), by_product, lambda x, kernel: _up(x, kernel, stride, offset, size), x, kernel)


def _conv_transpose_forward(x, kernel, stride):
    return _conv_transpose(x, kernel, stride), (x, kernel)


def _conv_transpose_backward(stride, residuals, grad):
    x, kernel = residuals
    offset = _flipped_offset(kernel, _transpose_offset(kernel, stride))

    def grad_x(grad, kernel):
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _down(grad, flipped, stride, offset, x.shape[1:3])

    def taps(grad):
        return _taps(grad, kernel.shape[:2], stride, offset, x.shape[1:3])[::-1]

    def grad_x_by_product(grad, kernel):
        kernels = kernel.reshape(-1, *kernel.shape[2:])
        each = (_product(tap, of_tap.T) for tap, of_tap in zip(taps(grad), kernels, strict=True))
        return sum(each).astype(grad.dtype)

    def grad_kernel(x, grad):
        flipped = _correlate(grad, x, stride, offset, kernel.shape[:2])
        return jnp.flip(flipped, (0, 1)).swapaxes(2, 3)

    def grad_kernel_by_product(x, grad):
        every = jnp.stack(taps(grad))
        return jax.vmap(_over_positions)(jnp.broadcast_to(x, (len(every), *x.shape)), every).reshape(kernel.shape)

    def grad_kernel_by_one_product(x, grad):
        every = _over_positions(x, jnp.concatenate(taps(grad), axis=-1))
        return every.reshape(-1, *kernel.shape[:2], kernel.shape[3]).transpose(1, 2, 0, 3)

    few = _few_positions(x)
    cpu = grad_kernel_by_product if few else grad_kernel
    gpu = grad_kernel_by_one_product if _taken_for_forward(x, kernel, stride) else grad_kernel
    return (
        _on_cpu(few, grad_x_by_product, grad_x, grad, kernel),
        lax.platform_dependent(x, grad, cpu=cpu, cuda=gpu, rocm=gpu, default=grad_kernel),
    )


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


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


def _adjoint(kernel, offset):
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3), _flipped_offset(kernel, offset)


def _padding(x, kernel_size, stride, offset, size):
    """Pixels before and after the image, per spatial axis, so that tap k of output o meets x[s o + k - p]."""
    axes = zip(offset, size, kernel_size, x.shape[1:3], strict=True)
    return [(p, (o - 1) * stride + k - p - n) for p, o, k, n in axes]


def _down(x, kernel, stride, offset, size):
    def plain(x, kernel):
        if stride == 1 and min(kernel.shape[2:]) <= _IMAGE_CHANNELS and kernel.shape[3] <= _BLOCK_CHANNELS:
            edge = 4 if kernel.shape[3] <= _IMAGE_CHANNELS and all(o % 4 == 0 for o in size) else 2
            if all(o % edge == 0 for o in size):
                return _down_by_blocks(x, kernel, offset, size, edge)
        padding = _padding(x, kernel.shape[:2], stride, offset, size)
        return _convolve(x, kernel, padding, window_strides=(stride, stride), dimension_numbers=_IMAGE)

    edge = 2 if stride == 1 else 1
    few = _IMAGE_CHANNELS < kernel.shape[3] <= _BOTH_CHANNELS
    return _on_cpu(
        few and _blocks_pay(x, kernel.shape[:2], stride, offset, size, edge),
        lambda x, kernel: _down_between_blocks(x, kernel, stride, offset, size, edge),
        plain,
        x,
        kernel,
    )


def _convolve(x, kernel, padding, **settings):
    """A convolution of x; on a GPU x is padded before it, once for all convolutions of the same padded x."""

    def padded(x, kernel):
        whole = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)))
        return lax.conv_general_dilated(lax.optimization_barrier(whole), kernel, padding="VALID", **settings)

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, padding=padding, **settings)

    if all(low == high for low, high in padding):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cuda=padded, rocm=padded, default=plain)


def _down_between_blocks(x, kernel, stride, offset, size, edge):
    """`_down` from blocks of the input, stride * edge wide, to blocks of the output, `edge` wide, as channels."""
    blocks, block_kernel = _blocks(x, stride * edge), _between_blocks(kernel, stride, offset, edge)
    missing = -blocks.shape[3] % _VECTOR
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (0, missing)))
    block_kernel = jnp.pad(block_kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    block_offset = tuple(-low for low, _ in _span(kernel.shape[:2], stride, offset, edge))
    padding = _padding(blocks, block_kernel.shape[:2], 1, block_offset, [o // edge for o in size])
    return _pixels(lax.conv_general_dilated(blocks, block_kernel, (1, 1), padding, dimension_numbers=_IMAGE), edge)


def _blocks_pay(image, kernel_size, stride, offset, size, edge):
    """Whether the image divides into blocks, and the kernel between them is little larger than its taps."""
    block, channels = stride * edge, image.shape[3]
    if any(n % block or o % edge for n, o in zip(image.shape[1:3], size, strict=True)):
        return False
    wide = -(-block * block * channels // _VECTOR) * _VECTOR
    taps = math.prod(high - low + 1 for low, high in _span(kernel_size, stride, offset, edge))
    return channels <= _IMAGE_CHANNELS and taps * wide <= _MOST_WORK * math.prod(kernel_size) * channels


def _span(kernel_size, stride, offset, edge):
    """The first and last input block, relative to that of an output block, that a kernel meets, per spatial axis.

    Pixel e m + r of the output and tap k meet pixel s e m + s r + k - p of the input.
    """
    block = stride * edge
    return [(-p // block, (stride * (edge - 1) + k - 1 - p) // block) for k, p in zip(kernel_size, offset, strict=True)]


def _between_blocks(kernel, stride, offset, edge):
    """The kernel between blocks: [height, width, (stride * edge)^2 * in_channels, edge^2 * out_channels]."""
    block = stride * edge
    margins = [
        [(stride * r - p - low * block, (high + 1) * block - stride * r + p - k) for r in range(edge)]
        for k, p, (low, high) in zip(
            kernel.shape[:2], offset, _span(kernel.shape[:2], stride, offset, edge), strict=True
        )
    ]
    shifted = [jnp.pad(kernel, (rows, columns, (0, 0), (0, 0))) for rows in margins[0] for columns in margins[1]]
    taps = jnp.stack(shifted, axis=3)
    blocks = _blocks(taps.reshape(1, *taps.shape[:2], -1), block)
    return blocks.reshape(*blocks.shape[1:3], block * block * kernel.shape[2], edge * edge * kernel.shape[3])


def _blocks(pixels, edge):
    """[batch, edge * height, edge * width, channels] -> [batch, height, width, edge * edge * channels]."""
    batch, height, width, channels = pixels.shape
    blocks = pixels.reshape(batch, height // edge, edge, width // edge, edge, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // edge, width // edge, -1)


def _down_by_blocks(x, kernel, offset, size, edge):
    height, width, in_channels, _ = kernel.shape
    more = edge - 1
    shifts = [(r, c) for r in range(edge) for c in range(edge)]
    shifted = [jnp.pad(kernel, ((r, more - r), (c, more - c), (0, 0), (0, 0))) for r, c in shifts]
    block_kernel = jnp.stack(shifted, axis=3).reshape(height + more, width + more, in_channels, -1)
    return _pixels(_down(x, block_kernel, edge, offset, tuple(o // edge for o in size)), edge)


def _pixels(blocks, edge):
    """[batch, height, width, edge * edge * channels] -> [batch, edge * height, edge * width, channels]."""
    batch, height, width, _ = blocks.shape
    pixels = blocks.reshape(batch, height, width, edge, edge, -1).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(batch, height * edge, width * edge, -1)


def _up(x, kernel, stride, offset, size):
    if stride == 1:
        return _down(x, kernel, 1, offset, size)

    def phases(x, kernel):
        return _up_by_phases(x, kernel, stride, offset, size)

    def blocks(x, kernel):
        return _up_by_blocks(x, kernel, stride, offset, size)

    def dilated(x, kernel):
        axes = zip(offset, size, kernel.shape[:2], x.shape[1:3], strict=True)
        padding = [(p, o + k - 2 - p - stride * (n - 1)) for p, o, k, n in axes]
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_IMAGE
        )

    def adjoint(x, kernel):
        # A dilated image and a reversed kernel are what XLA knows a gradient by.
        flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)))
        return dilated(x, jnp.flip(flipped, (0, 1)))

    cpu = blocks if kernel.shape[3] <= _PHASE_CHANNELS else phases
    gpu, others = (adjoint, dilated) if math.prod(kernel.shape[:2]) <= math.prod(x.shape[1:3]) else (phases, phases)
    return lax.platform_dependent(x, kernel, cpu=cpu, cuda=gpu, rocm=gpu, default=others)


def _up_by_phases(x, kernel, stride, offset, size):
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


def _up_by_blocks(x, kernel, stride, offset, size):
    """All phases as channels: phase r of block m is the sum over q of x[m + q] w[s q + p - r]."""
    first = [-(p // stride) for p in offset]
    last = [(k - 1 - p + stride - 1) // stride for k, p in zip(kernel.shape[:2], offset, strict=True)]
    edges = zip(offset, kernel.shape[:2], first, last, strict=True)
    # Zeros in the place of taps that a phase does not have; a negative number cuts taps off, which no phase does.
    margins = [
        [(r - p - stride * low, stride * high + p - r - k + 1) for r in range(stride)] for p, k, low, high in edges
    ]
    shifted = [
        lax.pad(kernel, jnp.zeros((), kernel.dtype), ((*rows, 0), (*columns, 0), (0, 0, 0), (0, 0, 0)))[
            ::stride, ::stride
        ]
        for rows in margins[0]
        for columns in margins[1]
    ]
    block_kernel = jnp.stack(shifted, axis=3)
    block_kernel = block_kernel.reshape(*block_kernel.shape[:3], -1)
    lengths = [-(-o // stride) for o in size]
    padding = [(-low, m + high - n) for low, high, m, n in zip(first, last, lengths, x.shape[1:3], strict=True)]
    blocks = lax.conv_general_dilated(x, block_kernel, (1, 1), padding, dimension_numbers=_IMAGE)
    return _pixels(blocks, stride)[:, : size[0], : size[1]]


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
    def plain(x, y, offset=offset, kernel_size=kernel_size, dtype=None):
        padding = _padding(x, kernel_size, stride, offset, y.shape[1:3])
        return _convolve(
            x, y, padding, window_strides=(1, 1), rhs_dilation=(stride, stride),
            dimension_numbers=("CHWN", "IHWO", "HWNC"), preferred_element_type=dtype,
        )  # fmt: skip

    def between_blocks(x, y):
        # Blocks are linear in the kernel, so its gradient is the transpose at that of the kernel between blocks: a sum,
        # in float32 at least.
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        kernel = jax.ShapeDtypeStruct((*kernel_size, x.shape[3], y.shape[3]), dtype)
        low, length = zip(*((-low, high - low + 1) for low, high in _span(kernel_size, 1, offset, 2)), strict=True)
        grad = plain(_blocks(x, 2), _blocks(y, 2), low, length, dtype)
        total = jax.linear_transpose(lambda kernel: _between_blocks(kernel, 1, offset, 2), kernel)(grad)[0]
        return total.astype(x.dtype)

    few = stride == 1 and y.shape[3] <= _BOTH_KERNEL_CHANNELS
    return _on_cpu(few and _blocks_pay(x, kernel_size, 1, offset, y.shape[1:3], 2), between_blocks, plain, x, y)


def _on_cpu(wanted, cpu, default, *arrays):
    """cpu(*arrays) if wanted and compiled for a CPU, else default(*arrays)."""
    return lax.platform_dependent(*arrays, cpu=cpu, default=default) if wanted else default(*arrays)


def _taken_for_forward(deep, kernel, stride):
    """Whether XLA takes a kernel gradient on a GPU for a convolution, of which `deep` is the kernel, with gaps."""
    return stride > 1 and all(n <= k for n, k in zip(deep.shape[1:3], kernel.shape[:2], strict=True))


def _few_positions(deep, for_each_channel=_POSITIONS):
    """Whether `deep`, the smaller image of a layer with the more channels, has few positions beside these."""
    positions = deep.shape[0] * deep.shape[1] * deep.shape[2]
    return positions <= for_each_channel * deep.shape[3]


def _taps(x, kernel_size, stride, offset, size):
    """x[s o + k - p] for each tap k, each [batch, *size, channels]."""
    edges = [(low, high, 0) for low, high in _padding(x, kernel_size, stride, offset, size)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    spans = [stride * (o - 1) + 1 for o in size]
    return [
        padded[:, r : r + spans[0] : stride, c : c + spans[1] : stride]
        for r in range(kernel_size[0])
        for c in range(kernel_size[1])
    ]


def _product(x, y):
    """x y, in float32 at least, for sums over taps."""
    return jnp.matmul(x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _each_tap(x, kernel):
    """x w[k] for each tap k, [taps, batch, height, width, out_channels], in float32 at least."""
    kernels = kernel.reshape(-1, *kernel.shape[2:])
    return jax.vmap(_product)(jnp.broadcast_to(x, (len(kernels), *x.shape)), kernels)


def _over_positions(x, y):
    """sum of x y^T over batch, height and width: [x_channels, y_channels]."""
    return jnp.einsum("...x,...y->xy", x, y)


def _scatter(taps, kernel_size, stride, offset, size):
    """The image whose pixel s i + k - p gets tap k of position i: taps x [batch, h, w, c] -> [batch, *size, c]."""
    lengths = [-(-n // stride) for n in size]
    rows = []
    for phase in range(stride * stride):
        total = jnp.zeros((taps[0].shape[0], *lengths, taps[0].shape[3]), taps[0].dtype)
        for number, tap in enumerate(taps):
            shifts = [
                k - p - r for k, p, r in zip(divmod(number, kernel_size[1]), offset, divmod(phase, stride), strict=True)
            ]
            if all(shift % stride == 0 for shift in shifts):
                moved = [shift // stride for shift in shifts]
                edges = [(by, m - n - by, 0) for by, m, n in zip(moved, lengths, tap.shape[1:3], strict=True)]
                total += lax.pad(tap, jnp.zeros((), tap.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
        rows.append(total)
    return _pixels(jnp.concatenate(rows, axis=3), stride)[:, : size[0], : size[1]]


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
