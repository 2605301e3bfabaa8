"""Laplace spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax._random import laplace
from spread_jax.noise._product import ClosedProductNoise

__all__ = ["LaplaceNoise"]


@frozen_pytree
class LaplaceNoise(ClosedProductNoise):
    r"""Laplace spread noise with independent dimensions, p(y|x) = prod_d exp(-|y_d - x_d| / b) / (2 b).

    Its Fourier transform prod_d 1 / (1 + b^2 omega_d^2) is positive everywhere. With t = |x - x2| / b in one
    dimension, the KL of two shifts is t + exp(-t) - 1 and `mmd_kernel` is (1 + t) exp(-t) / (4 b); over
    dimensions the first adds and the second multiplies.

    Args:
      scale: b > 0, in units of x (the standard deviation is sqrt(2) b): a number, or an array that broadcasts
        against one event. A pytree leaf. A concrete scale is checked here; a traced one cannot be, and a
        scale <= 0 makes `log_prob` NaN at once.

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

    def __post_init__(self):
        check_positive("scale", self.scale)

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
