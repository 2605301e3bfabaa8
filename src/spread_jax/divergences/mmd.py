"""Maximum mean discrepancies, and the spread distances that are one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_callable, check_count, check_positive, check_same_event, check_samples
from spread_jax._pairwise import flatten_events, squared_distances
from spread_jax._pytree import frozen_pytree
from spread_jax.divergences.estimators import Estimate, spread_divergence
from spread_jax.divergences.f_divergences import total_variation
from spread_jax.noise import SpreadNoise

__all__ = [
    "GaussianKernel",
    "InverseMultiquadricKernel",
    "LaplaceKernel",
    "MixtureKernel",
    "mmd_squared",
    "spread_l1",
    "spread_l2_squared",
]

Kernel = Callable[[jax.Array, jax.Array], jax.Array]

_BLOCK_EDGE = 1024


@frozen_pytree
class GaussianKernel:
    """k(x, x2) = exp(-|x - x2|^2 / (2 bandwidth^2)), called on [n, *event] and [m, *event] to give [n, m].

    Characteristic: its Fourier transform is positive everywhere, the condition that makes Gaussian noise
    valid.

    Args:
      bandwidth: > 0, in units of x; a pytree leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> print(GaussianKernel(1.0)(jnp.zeros((1, 2)), jnp.zeros((3, 2))))
      [[1. 1. 1.]]
    """

    bandwidth: float | jax.Array

    def __post_init__(self):
        check_positive("bandwidth", self.bandwidth)

    def __call__(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        square = jnp.square(self.bandwidth)
        return jnp.exp(-0.5 * _distances(x, x2, square) / square)


@frozen_pytree
class LaplaceKernel:
    """k(x, x2) = exp(-|x - x2|_1 / bandwidth), the characteristic function of Cauchy noise: characteristic.

    Args:
      bandwidth: > 0, in units of x; a pytree leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> print(LaplaceKernel(1.0)(jnp.zeros((1, 2)), jnp.zeros((1, 2))))
      [[1.]]
    """

    bandwidth: float | jax.Array

    def __post_init__(self):
        check_positive("bandwidth", self.bandwidth)

    def __call__(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        x, x2 = check_batch("x", x), check_batch("x2", x2)
        check_same_event("x", x, "x2", x2)
        x, x2 = flatten_events(x), flatten_events(x2)
        return jnp.exp(-jax.vmap(lambda row: jnp.abs(row[None] - x2).sum(axis=1))(x) / self.bandwidth)


@frozen_pytree
class InverseMultiquadricKernel:
    """k(x, x2) = c / (c + |x - x2|^2), whose heavy tails give distant samples a gradient.

    Args:
      c: > 0, a squared length in units of x; a pytree leaf. Wasserstein autoencoders use 2 Z s^2 for
        latents of Z dimensions and prior variance s^2, the mean squared distance of two prior samples.

    Source: Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> print(InverseMultiquadricKernel(1.0)(jnp.zeros((1, 1)), jnp.ones((1, 1))))
      [[0.5]]
    """

    c: float | jax.Array

    def __post_init__(self):
        check_positive("c", self.c)

    def __call__(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        return self.c / (self.c + _distances(x, x2, self.c))


@frozen_pytree
class MixtureKernel:
    """k = sum_i w_i k_i, so that no single length scale has to be right.

    Args:
      kernels: a sequence of kernels; their numbers are leaves.
      weights: one positive number for each kernel, 1 / len(kernels) by default.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = MixtureKernel([GaussianKernel(s) for s in (0.5, 1.0, 2.0)])
      >>> print(kernel(jnp.zeros((1, 1)), jnp.zeros((1, 1))).round(4))
      [[1.]]
    """

    kernels: Sequence[Any]
    weights: Sequence[float] | jax.Array | None = None

    def __post_init__(self):
        object.__setattr__(self, "kernels", tuple(self.kernels))
        if not self.kernels:
            raise ValueError("kernels must hold at least one kernel, got none.")
        for kernel in self.kernels:
            check_callable("kernels", kernel)
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            for weight in self.weights:
                check_positive("weights", weight)
            if len(self.weights) != len(self.kernels):
                raise ValueError(
                    f"weights must have {len(self.kernels)} entries, one for each kernel, got {len(self.weights)}."
                )

    def __call__(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        weights = self.weights
        if weights is None:
            weights = [1 / len(self.kernels)] * len(self.kernels)
        return sum(weight * kernel(x, x2) for weight, kernel in zip(weights, self.kernels, strict=True))


def mmd_squared(
    x: jax.Array,
    y: jax.Array,
    kernel: Kernel,
    *,
    unbiased: bool = True,
    chunk_size: int | None = None,
) -> jax.Array:
    r"""Squared maximum mean discrepancy of two sets of samples, E k(x, x') + E k(y, y') - 2 E k(x, y).

    Kernel matrices are visited in blocks of chunk_size x chunk_size and only summed, and the gradient
    recomputes each block: memory does not grow with the number of pairs.

    Args:
      x: [n, *event].
      y: [m, *event].
      kernel: (x, x2) -> [n, m]: one of the kernels here, `noise.mmd_kernel`, or your own.
      unbiased: leave the pairs of a sample with itself out, so that the mean over draws of x and y is the
        squared MMD of their distributions (a single value can be negative). False keeps them: the exact
        squared MMD of the two empirical distributions, never negative.
      chunk_size: the edge of a block of pairs, 1024 by default.

    Returns:
      Scalar.

    Raises:
      TypeError: x or y is not floating point, or `kernel` is not callable.
      ValueError: an empty set, a single sample where `unbiased` needs two, different events, non-finite
        concrete samples, or a kernel that returns another shape.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, lemma 6.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.zeros((2, 1)), jnp.full((2, 1), 100.0)
      >>> print(mmd_squared(x, y, GaussianKernel(1.0)))
      2.0
    """
    x, y = check_samples("x", x), check_samples("y", y)
    check_same_event("x", x, "y", y)
    check_callable("kernel", kernel)
    if unbiased and min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(
            f"x and y must hold at least two samples for unbiased=True, got {x.shape[0]} and {y.shape[0]}; "
            "pass unbiased=False."
        )
    chunk_size = _BLOCK_EDGE if chunk_size is None else check_count("chunk_size", chunk_size)
    mean = lambda a, b, same: _mean_kernel(a, b, kernel, chunk_size, same and unbiased)
    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def spread_l2_squared(
    p_samples: jax.Array, q_samples: jax.Array, noise: SpreadNoise, *, chunk_size: int | None = None
) -> jax.Array:
    r"""Squared L2 distance of two spread empirical distributions, ∫ (p~(y) - q~(y))^2 dy, exactly.

    It is the squared MMD with the kernel k(x, x2) = ∫ p(y|x) p(y|x2) dy. It needs no logarithm, so it is
    defined for noises without a shared support too, such as UniformNoise. In the dimensions of an image it is 0 or
    infinite in any dtype, for its unit is that of a density: compare there by `mmd_squared` with the kernel
    exp(noise.log_mmd_kernel(x, x2) - c), c being its value of a sample and itself; of Gaussian noise that is
    `GaussianKernel(sqrt(2) sigma)`.

    Args:
      p_samples: [n, *event].
      q_samples: [m, *event].
      noise: a noise with `mmd_kernel`.
      chunk_size: as in `mmd_squared`.

    Returns:
      Scalar, in units of a density: infinite where that is larger than the dtype holds, 0 where smaller.

    Raises:
      TypeError: if the noise has no closed-form `mmd_kernel`.
      ValueError: as `mmd_squared`.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> x = jnp.zeros((2, 1))
      >>> print(spread_l2_squared(x, x, GaussianNoise(1.0)))
      0.0
    """
    if not hasattr(noise, "mmd_kernel"):
        raise TypeError(f"noise {type(noise).__name__} has no closed-form mmd_kernel, which this distance needs.")
    p_samples, q_samples = check_samples("p_samples", p_samples), check_samples("q_samples", q_samples)
    check_same_event("p_samples", p_samples, "q_samples", q_samples)
    distance = functools.partial(mmd_squared, p_samples, q_samples, unbiased=False, chunk_size=chunk_size)
    if not hasattr(noise, "log_mmd_kernel"):
        return distance(noise.mmd_kernel)
    # Only the unit may be too large: infinity minus infinity would be no number.
    log_unit = noise.log_mmd_kernel(p_samples[:1], p_samples[:1])[0, 0]
    relative = distance(lambda x, x2: jnp.exp(noise.log_mmd_kernel(x, x2) - log_unit))
    return jnp.where(relative == 0, 0, relative * jnp.exp(log_unit))


def spread_l1(
    p_samples: jax.Array,
    q_samples: jax.Array,
    noise: SpreadNoise,
    *,
    num_samples: int,
    key: jax.Array,
    chunk_size: int | None = None,
) -> Estimate:
    r"""L1 distance of two spread empirical distributions, ∫ |p~(y) - q~(y)| dy: twice their total variation.

    Args:
      p_samples: [n, *event].
      q_samples: [m, *event].
      noise: the spread noise p(y|x).
      num_samples: draws of y from each side.
      key: a JAX random key.
      chunk_size: as in `log_spread_density`.

    Returns:
      Estimate(value, standard_error), the value between 0 and 2. See `spread_divergence`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> x = jnp.zeros((2, 1))
      >>> print(spread_l1(x, x + 100, GaussianNoise(1.0), num_samples=8, key=jax.random.key(0)).value)
      2.0
    """
    half = spread_divergence(
        p_samples,
        q_samples,
        noise,
        divergence=total_variation,
        num_samples=num_samples,
        key=key,
        chunk_size=chunk_size,
    )
    return Estimate(2 * half.value, 2 * half.standard_error)


def _distances(x, x2, unit):
    """Squared distances for a kernel of x - x2 in units of sqrt(unit), whose relative error is a few eps."""
    x, x2 = check_batch("x", x), check_batch("x2", x2)
    check_same_event("x", x, "x2", x2)
    return squared_distances(flatten_events(x), flatten_events(x2), negligible=8 * unit)


def _mean_kernel(x, y, kernel, chunk_size, without_diagonal):
    """The mean of kernel(x, y) over all pairs, or over those of different index."""
    (x_blocks, x_index), (y_blocks, y_index) = _indexed_blocks(x, chunk_size), _indexed_blocks(y, chunk_size)

    def block_sum(x_block, i, y_block, j):
        values = kernel(x_block, y_block)
        shape = (x_block.shape[0], y_block.shape[0])
        if jnp.shape(values) != shape:
            raise ValueError(f"kernel must return shape [n, m] = {shape}, got {jnp.shape(values)}.")
        used = (i[:, None] >= 0) & (j[None, :] >= 0)
        if without_diagonal:
            used &= i[:, None] != j[None, :]
        return jnp.where(used, values, 0).sum(axis=1)

    def one_row(block):
        x_block, i = block
        add = lambda total, other: (total + jax.checkpoint(block_sum)(x_block, i, *other), None)
        sums = jax.lax.scan(add, jnp.zeros(x_block.shape[0], x.dtype), (y_blocks, y_index))[0]
        # Row means before the sum over rows: float32 sums of 10^9 ones lose their digits.
        return sums.sum()

    num_x, num_y = x.shape[0], y.shape[0] - int(without_diagonal)
    if x_blocks.shape[0] == y_blocks.shape[0] == 1:
        # One block is kept for its gradient: computing it again takes a third longer below 1000 samples.
        total = block_sum(x_blocks[0], x_index[0], y_blocks[0], y_index[0]).sum()
        return total / num_x / num_y
    return (jax.lax.map(one_row, (x_blocks, x_index)) / num_y).sum() / num_x


def _indexed_blocks(x, chunk_size):
    """Blocks of nearly equal size, padded with the last sample, and each index (-1 in the padding)."""
    count = x.shape[0]
    num_blocks = -(-count // chunk_size)
    edge = math.ceil(count / num_blocks)
    missing = num_blocks * edge - count
    padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
    index = jnp.where(jnp.arange(num_blocks * edge) < count, jnp.arange(num_blocks * edge), -1)
    return padded.reshape(num_blocks, edge, *x.shape[1:]), index.reshape(num_blocks, edge)
