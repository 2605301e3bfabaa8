"""Forms of the convolutions that are fast on a CPU, and the geometry that they share.

The maps and their indices are those of `spread_jax.nn.convolutions`. The forms, each where it was measured to be faster
on two cores (5x5 kernels, batch 32):

  - *phases*: `up` as s*s stride-1 convolutions, one for each output phase o mod s, interleaved: with o = s m + r
    only the taps k = (p - r) mod s, + s, ... meet an input pixel, and they meet x[m + (k + r - p) / s];
  - *blocks*: with few output channels a convolution cannot fill vectors. The pixels of a block of the output, or the
    s*s phases of `up`, become channels of one convolution with a kernel that has a shifted copy for each. A quarter
    more multiplications at least, and 7.5 -> 3.4 ms for `up` from 16 channels to 8 at 32x32, 6.5 -> 2.8 ms for the
    input gradient of the last layer from 8 channels to 3 at 64x64. With few input channels, as those of a picture, a
    convolution gathers runs of memory as short: there the input's blocks become channels too;
  - *products*: with few positions (batch x height x width) and many channels the kernel is larger than the images, and
    flipping, transposing or slicing it is what costs. One matrix product for each tap, or for all at once, leaves it
    as it lies, and shifts images instead: 54 -> 13 ms for the input gradient from 1,024 channels to 512 at batch 8.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from spread_jax._checks import at_least_float32_dtype

IMAGE = ("NHWC", "HWIO", "NHWC")
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


def padding(x, kernel_size, stride, offset, size):
    """Pixels before and after the image, per spatial axis, so that tap k of output o meets x[s o + k - p]."""
    axes = zip(offset, size, kernel_size, x.shape[1:3], strict=True)
    return [(p, (o - 1) * stride + k - p - n) for p, o, k, n in axes]


def to_pixels(blocks, edge):
    """[batch, height, width, edge * edge * channels] -> [batch, edge * height, edge * width, channels]."""
    batch, height, width, _ = blocks.shape
    pixels = blocks.reshape(batch, height, width, edge, edge, -1).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(batch, height * edge, width * edge, -1)


def _to_blocks(pixels, edge):
    """[batch, edge * height, edge * width, channels] -> [batch, height, width, edge * edge * channels]."""
    batch, height, width, channels = pixels.shape
    blocks = pixels.reshape(batch, height // edge, edge, width // edge, edge, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // edge, width // edge, -1)


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
    blocks = _to_blocks(taps.reshape(1, *taps.shape[:2], -1), block)
    return blocks.reshape(*blocks.shape[1:3], block * block * kernel.shape[2], edge * edge * kernel.shape[3])


def edge_of_blocks(kernel, stride, size):
    """The edge of the output's blocks that become channels of `down` on every platform; 1 is none."""
    if stride > 1 or min(kernel.shape[2:]) > _IMAGE_CHANNELS or kernel.shape[3] > _BLOCK_CHANNELS:
        return 1
    edge = 4 if kernel.shape[3] <= _IMAGE_CHANNELS and all(o % 4 == 0 for o in size) else 2
    return edge if all(o % edge == 0 for o in size) else 1


def kernel_to_blocks(kernel, edge):
    """The kernel of `down` with stride `edge` from the image to blocks of the output as channels."""
    more = edge - 1
    shifts = [(r, c) for r in range(edge) for c in range(edge)]
    shifted = [jnp.pad(kernel, ((r, more - r), (c, more - c), (0, 0), (0, 0))) for r, c in shifts]
    return jnp.stack(shifted, axis=3).reshape(kernel.shape[0] + more, kernel.shape[1] + more, kernel.shape[2], -1)


def edge_between_blocks(x, kernel, stride, offset, size):
    """The edge of the output's blocks where the input's become channels of `down` as well; 0 is neither."""
    edge = 2 if stride == 1 else 1
    few = _IMAGE_CHANNELS < kernel.shape[3] <= _BOTH_CHANNELS
    return edge if few and _blocks_pay(x, kernel.shape[:2], stride, offset, size, edge) else 0


def correlates_blocks(x, y, kernel_size, stride, offset):
    """Whether blocks of both images become channels of `correlate`."""
    few = stride == 1 and y.shape[3] <= _BOTH_KERNEL_CHANNELS
    return few and _blocks_pay(x, kernel_size, 1, offset, y.shape[1:3], 2)


def _blocks_pay(image, kernel_size, stride, offset, size, edge):
    """Whether the image divides into blocks, and the kernel between them is little larger than its taps."""
    block, channels = stride * edge, image.shape[3]
    if any(n % block or o % edge for n, o in zip(image.shape[1:3], size, strict=True)):
        return False
    wide = -(-block * block * channels // _VECTOR) * _VECTOR
    taps = math.prod(high - low + 1 for low, high in _span(kernel_size, stride, offset, edge))
    return channels <= _IMAGE_CHANNELS and taps * wide <= _MOST_WORK * math.prod(kernel_size) * channels


def down_between_blocks(x, kernel, stride, offset, size, edge):
    """`down` from blocks of the input, stride * edge wide, to blocks of the output, `edge` wide, as channels."""
    blocks, block_kernel = _to_blocks(x, stride * edge), _between_blocks(kernel, stride, offset, edge)
    missing = -blocks.shape[3] % _VECTOR
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (0, missing)))
    block_kernel = jnp.pad(block_kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    block_offset = tuple(-low for low, _ in _span(kernel.shape[:2], stride, offset, edge))
    margins = padding(blocks, block_kernel.shape[:2], 1, block_offset, [o // edge for o in size])
    return to_pixels(lax.conv_general_dilated(blocks, block_kernel, (1, 1), margins, dimension_numbers=IMAGE), edge)


def correlate_between_blocks(x, y, offset, kernel_size, correlate):
    """`correlate` of blocks, by a function (x, y, offset, kernel_size, dtype), and from it that of the images.

    Blocks are linear in the kernel, so its gradient is the transpose at that of the kernel between blocks: a sum, in
    float32 at least.
    """
    dtype = at_least_float32_dtype(x.dtype)
    kernel = jax.ShapeDtypeStruct((*kernel_size, x.shape[3], y.shape[3]), dtype)
    low, length = zip(*((-low, high - low + 1) for low, high in _span(kernel_size, 1, offset, 2)), strict=True)
    grad = correlate(_to_blocks(x, 2), _to_blocks(y, 2), low, length, dtype)
    total = jax.linear_transpose(lambda kernel: _between_blocks(kernel, 1, offset, 2), kernel)(grad)[0]
    return total.astype(x.dtype)


def up(x, kernel, stride, offset, size):
    """`up` by the form that is fast for its number of output channels."""
    form = _up_by_blocks if kernel.shape[3] <= _PHASE_CHANNELS else up_by_phases
    return form(x, kernel, stride, offset, size)


def up_by_phases(x, kernel, stride, offset, size):
    """Stride-1 convolutions to each phase of the output; other platforms use it too, for few pixels."""
    phases_h = _phases(stride, offset[0], kernel.shape[0], x.shape[1], size[0])
    phases_w = _phases(stride, offset[1], kernel.shape[1], x.shape[2], size[1])
    rows = []
    for taps_h, padding_h in phases_h:
        row = []
        for taps_w, padding_w in phases_w:
            taps = kernel[taps_h, taps_w]
            if taps.size:
                y = lax.conv_general_dilated(x, taps, (1, 1), (padding_h, padding_w), dimension_numbers=IMAGE)
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
    blocks = lax.conv_general_dilated(x, block_kernel, (1, 1), padding, dimension_numbers=IMAGE)
    return to_pixels(blocks, stride)[:, : size[0], : size[1]]


def few_positions(deep, for_each_channel=_POSITIONS):
    """Whether `deep`, the smaller image of a layer with the more channels, has few positions beside these."""
    positions = deep.shape[0] * deep.shape[1] * deep.shape[2]
    return positions <= for_each_channel * deep.shape[3]


def few_adjoint_positions(deep):
    """The same for `up` as the input gradient of `down`."""
    return few_positions(deep, _ADJOINT_POSITIONS)


def taps(x, kernel_size, stride, offset, size):
    """x[s o + k - p] for each tap k, each [batch, *size, channels]."""
    edges = [(low, high, 0) for low, high in padding(x, kernel_size, stride, offset, size)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    spans = [stride * (o - 1) + 1 for o in size]
    return [
        padded[:, r : r + spans[0] : stride, c : c + spans[1] : stride]
        for r in range(kernel_size[0])
        for c in range(kernel_size[1])
    ]


def product(x, y):
    """x y, in float32 at least, for sums over taps."""
    return jnp.matmul(x, y, preferred_element_type=at_least_float32_dtype(x.dtype))


def each_tap(x, kernel):
    """x w[k] for each tap k, [taps, batch, height, width, out_channels], in float32 at least."""
    kernels = kernel.reshape(-1, *kernel.shape[2:])
    return jax.vmap(product)(jnp.broadcast_to(x, (len(kernels), *x.shape)), kernels)


def over_positions(x, y):
    """sum of x y^T over batch, height and width: [x_channels, y_channels]."""
    return jnp.einsum("...x,...y->xy", x, y)


def scatter(taps, kernel_size, stride, offset, size):
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
    return to_pixels(jnp.concatenate(rows, axis=3), stride)[:, : size[0], : size[1]]
