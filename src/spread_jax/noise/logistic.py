"""Logistic spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._product import ClosedProductNoise, coth_excess

__all__ = ["LogisticNoise"]


@frozen_pytree
class LogisticNoise(ClosedProductNoise):
    r"""Logistic spread noise, p(y|x) = prod_d sech^2((y_d - x_d) / (2 s)) / (4 s).

    Tails like Laplace noise, smooth at its centre like Gaussian noise. Its Fourier transform
    prod_d pi s omega_d / sinh(pi s omega_d) is positive everywhere. With a = (x - x2) / (2 s) in one
    dimension, the KL of two shifts is 2 (a coth a - 1) and `mmd_kernel` is (a coth a - 1) / (2 s sinh^2 a).

    Args:
      scale: s > 0, in units of x (the standard deviation is pi s / sqrt(3)): a number, or an array that
        broadcasts against one event. A pytree leaf. A concrete scale is checked here; a traced one cannot be,
        and a scale <= 0 makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(LogisticNoise(1.0).characteristic_function(jnp.zeros((1, 3))))
      [1.]
    """

    scale: float | jax.Array

    _standard_entropy = 2.0

    def __post_init__(self):
        check_positive("scale", self.scale)

    def _standard_sample(self, key, x):
        return jax.random.logistic(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        t = jnp.abs(u)
        return -t - 2 * jnp.log1p(jnp.exp(-t))

    def _standard_transform(self, omega):
        t = jnp.abs(math.pi * omega)
        far = jnp.where(t > 0, t, 1)
        return jnp.where(t > 0, 2 * far * jnp.exp(-far) / -jnp.expm1(-2 * far), 1)

    def _standard_kl(self, u):
        return 2 * coth_excess(0.5 * u)

    def _standard_log_autocorrelation(self, u):
        a = jnp.abs(0.5 * u)
        small = a < 1e-4  # the logarithm of (a coth a - 1) / sinh^2 a there is -log 3 - 2 a^2 / 5
        far = jnp.where(small, 1, a)
        log_sinh = far + jnp.log(-jnp.expm1(-2 * far)) - math.log(2.0)
        log_ratio = jnp.log(coth_excess(far)) - 2 * log_sinh
        return jnp.where(small, -math.log(3.0) - 0.4 * jnp.square(a), log_ratio) - math.log(2.0)
