"""Forms of the convolutions that XLA compiles to the routines of a GPU.

The maps and their indices are those of `spread_jax.nn.convolutions`. They are single operations of the platform, if
they are written as what its compiler recognises. On a TPU `up` is the convolution over a dilated image, which costs
nothing there, and its phases only with fewer pixels than taps. For cuDNN, as XLA of jax 0.10 and 0.11 compiles for an
H200 (`python -m benchmarks.program`):

  - `up` is the gradient routine of `down` where a reversed kernel meets a dilated image. XLA cancels the reversal of a
    kernel that was just reversed and then convolves all the zeros, four times the work, unless a barrier lies between;
  - with fewer pixels than taps it exchanges the operands, eight times the work: there the phases stay;
  - a kernel gradient is the gradient routine only if the images are larger than the kernel, and else a convolution
    whose kernel is filled with zeros, three times the work: there it is one matrix product;
  - it pads both sides alike, and XLA otherwise once for `down` or `up` and once more, by other sizes, for the kernel's
    gradient: an image is padded once for both, behind a barrier.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from spread_jax.nn._cpu_convolutions import IMAGE


def convolve(x, kernel, padding, **settings):
    """A convolution of x; on a GPU x is padded before it, once for all convolutions of the same padded x."""

    def padded(x, kernel):
        whole = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)))
        return lax.conv_general_dilated(lax.optimization_barrier(whole), kernel, padding="VALID", **settings)

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, padding=padding, **settings)

    if all(low == high for low, high in padding):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cuda=padded, rocm=padded, default=plain)


def up(x, kernel, stride, offset, size):
    """`up` as the gradient routine of `down`."""
    # A dilated image and a reversed kernel are what XLA knows a gradient by.
    flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)))
    return up_dilated(x, jnp.flip(flipped, (0, 1)), stride, offset, size)


def up_dilated(x, kernel, stride, offset, size):
    """`up` as one convolution over a dilated image, as a TPU has it."""
    axes = zip(offset, size, kernel.shape[:2], x.shape[1:3], strict=True)
    padding = [(p, o + k - 2 - p - stride * (n - 1)) for p, o, k, n in axes]
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=IMAGE)


def has_fewer_pixels_than_taps(x, kernel):
    """Whether XLA would exchange the operands of `up`."""
    return math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3])


def is_taken_for_forward(deep, kernel, stride):
    """Whether XLA takes a kernel gradient on a GPU for a convolution, of which `deep` is the kernel, with gaps."""
    return stride > 1 and all(n <= k for n, k in zip(deep.shape[1:3], kernel.shape[:2], strict=True))
