"""Uniform noise: the instructive kernel that is not a spread noise."""

from __future__ import annotations

from typing import NoReturn

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax._threefry import uniform
from spread_jax.noise._product import ProductNoise, fit_event, in_batch, positive_log, sum_event
from spread_jax.noise._protocol import all_pairs, per_example
from spread_jax.noise.validity import SpreadCondition, scale_condition

__all__ = ["UniformNoise"]


@frozen_pytree
class UniformNoise(ProductNoise):
    r"""Uniform noise on [x_d - h, x_d + h] in each dimension: an error wherever a log-density is needed.

    Its Fourier transform prod_d sin(h omega_d) / (h omega_d) vanishes on countably many hyperplanes only, so
    p~ = q~ still implies p = q. But it has bounded support: p~ and q~ need not share theirs, and a
    log-density ratio is infinite or undefined, which is the failure that spreading is meant to cure. So
    `log_prob` raises. Divergences that compare no logarithms stay defined: `mmd_kernel` and the spread L2
    distance work.

    Args:
      scale: h > 0, the half width, in units of x: a number, an array that broadcasts against one event, or
        one for each example, [batch, 1, ...]. A pytree leaf; a concrete value is checked here, a traced one is not.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(UniformNoise(0.5).mmd_kernel(jnp.zeros((1, 1)), jnp.array([[0.0], [0.5], [2.0]])))
      [[1.  0.5 0. ]]
    """

    scale: float | jax.Array

    def __post_init__(self):
        check_positive("scale", self.scale)

    def log_prob(self, y: jax.Array, x: jax.Array) -> NoReturn:
        """Always raises: the spread distributions would not share their support.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            "UniformNoise has bounded support, so one spread density is zero where the other is not and "
            "their log-ratio is undefined; use GaussianNoise, LaplaceNoise or LogisticNoise, or compare by "
            "spread_l2_squared, which needs no logarithm."
        )

    @all_pairs
    def log_mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The logarithm of `mmd_kernel`, [n, m], which can be held in any number of dimensions."""
        width = 2 * in_batch(fit_event("scale", self.scale, x), x)

        def one_row(row):
            overlap = 1 - jnp.abs(row[None] - x2) / width
            apart = overlap <= 0
            logs = jnp.where(apart, -jnp.inf, jnp.log(jnp.where(apart, 1, overlap)))
            return sum_event(logs - positive_log(width))

        return jax.vmap(one_row)(x)

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y: a triangle of width 4 h in each dimension, [n, m].

        In many dimensions it is too large or too small a number to be held: see `log_mmd_kernel`.
        """
        return jnp.exp(self.log_mmd_kernel(x, x2))

    @per_example
    def entropy(self, x: jax.Array) -> jax.Array:
        """The entropy of p(y|x) in nats, [batch]."""
        return sum_event(jnp.broadcast_to(positive_log(2 * self._scale_like(x)), x.shape))

    def spread_conditions(self):
        """The conditions of validity, for `check_valid_spread`."""
        yield scale_condition(self)
        yield SpreadCondition("support", False, "the support is bounded, so p~ and q~ need not share theirs")
        yield SpreadCondition(
            "injective", True, "the Fourier transform prod sin(h omega) / (h omega) has isolated zeros only"
        )

    def _standard_sample(self, key, x):
        return uniform(key, x.shape, x.dtype, -1.0, 1.0)

    def _standard_transform(self, omega):
        # sin(u) / u, whose derivative cancels near zero.
        u = jnp.abs(omega)
        near = u < 0.5
        s, far = jnp.square(jnp.where(near, u, 0)), jnp.where(near, 1, u)
        series = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72 * (1 - s / 110 * (1 - s / 156)))))
        return jnp.where(near, series, jnp.sin(far) / far)
