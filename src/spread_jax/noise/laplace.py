"""Laplace spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax._threefry import laplace
from spread_jax.noise._product import ClosedProductNoise, log1p_excess, sum_event
from spread_jax.noise._protocol import per_example

__all__ = ["LaplaceNoise"]


@frozen_pytree
class LaplaceNoise(ClosedProductNoise):
    r"""Laplace spread noise with independent dimensions, p(y|x) = prod_d exp(-|y_d - x_d| / b) / (2 b).

    Its Fourier transform prod_d 1 / (1 + b^2 omega_d^2) is positive everywhere. With t = |x - x2| / b in one
    dimension, the KL of two shifts is t + exp(-t) - 1 and `mmd_kernel` is (1 + t) exp(-t) / (4 b); over
    dimensions the first adds and the second multiplies.

    Args:
      scale: b > 0, in units of x (the standard deviation is sqrt(2) b): a number, an array that broadcasts
        against one event, or one for each example, [batch, 1, ...]. A pytree leaf. A concrete scale is checked
        here; a traced one cannot be, and a scale <= 0 makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Source: Zhang et al., Spread Divergence, ICML 2020, section 3 and appendix on Laplace noise.

    Example:
      >>> import jax.numpy as jnp
      >>> noise = LaplaceNoise(0.5)
      >>> print(noise.kl(jnp.ones((1, 2)), jnp.zeros((1, 2))).round(4))
      [2.2707]
    """

    scale: float | jax.Array

    _standard_entropy = 1.0 + math.log(2.0)
    _transform_is_positive = "prod 1 / (1 + b^2 omega^2) is positive everywhere"

    def __post_init__(self):
        check_positive("scale", self.scale)

    @per_example
    def squared_hellinger(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The squared Hellinger distance of p(y|x) and p(y|x2), [batch]."""
        return -jnp.expm1(sum_event(log1p_excess(0.5 * self._distance(x, x2))))

    @per_example
    def chi_squared(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The chi-squared divergence of p(y|x) from p(y|x2), [batch]."""
        t = self._distance(x, x2)
        # (2 e^t + e^-2t) / 3 = e^t (1 - (1 - e^-3t) / 3)
        return jnp.expm1(sum_event(t + jnp.log1p(jnp.expm1(-3 * t) / 3)))

    @per_example
    def total_variation(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The total variation of p(y|x) and p(y|x2), [batch], for events of one number."""
        return -jnp.expm1(-0.5 * self._distance_in_one_dimension(x, x2))

    def _standard_sample(self, key, x):
        return laplace(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        return -jnp.abs(u) - math.log(2.0)

    def _standard_transform(self, omega):
        return 1 / (1 + jnp.square(omega))

    def _standard_kl(self, u):
        t = jnp.abs(u)
        # t + exp(-t) - 1 cancels to t^2 / 2 near zero.
        near = t < 0.01
        s = jnp.where(near, t, 0)
        series = s * s * (1 / 2 - s * (1 / 6 - s * (1 / 24 - s * (1 / 120 - s * (1 / 720 - s / 5040)))))
        return jnp.where(near, series, t + jnp.expm1(-t))

    def _standard_log_autocorrelation(self, u):
        t = jnp.abs(u)
        return jnp.log1p(t) - t - math.log(4.0)
