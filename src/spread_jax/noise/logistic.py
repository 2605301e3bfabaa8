"""Logistic spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._product import ClosedProductNoise, coth_excess, log_sinhc, sum_event
from spread_jax.noise._protocol import per_example

__all__ = ["LogisticNoise"]


@frozen_pytree
class LogisticNoise(ClosedProductNoise):
    r"""Logistic spread noise, p(y|x) = prod_d sech^2((y_d - x_d) / (2 s)) / (4 s).

    Tails like Laplace noise, smooth at its centre like Gaussian noise. Its Fourier transform
    prod_d pi s omega_d / sinh(pi s omega_d) is positive everywhere. With a = (x - x2) / (2 s) in one
    dimension, the KL of two shifts is 2 (a coth a - 1) and `mmd_kernel` is (a coth a - 1) / (2 s sinh^2 a).

    Args:
      scale: s > 0, in units of x (the standard deviation is pi s / sqrt(3)): a number, an array that
        broadcasts against one event, or one for each example, [batch, 1, ...]. A pytree leaf. A concrete scale is
        checked here; a traced one cannot be, and a scale <= 0 makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(LogisticNoise(1.0).characteristic_function(jnp.zeros((1, 3))))
      [1.]
    """

    scale: float | jax.Array

    _standard_entropy = 2.0
    _transform_is_positive = "prod pi s omega / sinh(pi s omega) is positive everywhere"

    def __post_init__(self):
        check_positive("scale", self.scale)

    @per_example
    def squared_hellinger(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The squared Hellinger distance of p(y|x) and p(y|x2), [batch]."""
        return -jnp.expm1(-sum_event(log_sinhc(0.5 * self._distance(x, x2))))

    @per_example
    def total_variation(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The total variation of p(y|x) and p(y|x2), [batch], for events of one number."""
        return jnp.tanh(0.25 * self._distance_in_one_dimension(x, x2))

    def _standard_sample(self, key, x):
        return jax.random.logistic(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        t = jnp.abs(u)
        return -t - 2 * jnp.log1p(jnp.exp(-t))

    def _standard_transform(self, omega):
        return jnp.exp(-log_sinhc(math.pi * omega))

    def _standard_kl(self, u):
        return 2 * coth_excess(0.5 * u)

    def _standard_log_autocorrelation(self, u):
        a = jnp.abs(0.5 * u)
        small = a < 1e-4  # the logarithm of (a coth a - 1) / sinh^2 a there is -log 3 - 2 a^2 / 5
        far = jnp.where(small, 1, a)
        log_sinh = far + jnp.log(-jnp.expm1(-2 * far)) - math.log(2.0)
        log_ratio = jnp.log(coth_excess(far)) - 2 * log_sinh
        return jnp.where(small, -math.log(3.0) - 0.4 * jnp.square(a), log_ratio) - math.log(2.0)
