"""Student t and Cauchy spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._product import ClosedProductNoise, ProductNoise, fit_batch, positive_log, sum_event
from spread_jax.noise._protocol import per_example

__all__ = ["CauchyNoise", "StudentTNoise"]

_TRANSFORM_NODES = 257


@frozen_pytree
class StudentTNoise(ProductNoise):
    r"""Student t spread noise with independent dimensions.

    p(y|x) = prod_d Gamma((v+1)/2) / (Gamma(v/2) sqrt(pi v) s) (1 + (y_d - x_d)^2 / (v s^2))^(-(v+1)/2) with v
    degrees of freedom: heavy tails, so a single outlying y costs a logarithm and not a square. It is a
    mixture of Gaussians over their variance, so its Fourier transform is positive everywhere. The integrals
    behind `kl` and `mmd_kernel` have no closed form for general v; `CauchyNoise` (v = 1) has both.

    Args:
      scale: s > 0, in units of x: a number, an array that broadcasts against one event, or one for each example,
        [batch, 1, ...].
      degrees_of_freedom: v > 0, of any of these shapes.
        Both are pytree leaves; samples are differentiable in both. Concrete values are checked here; a traced
        scale <= 0 makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete value is not positive and finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> noise, x = StudentTNoise(0.5, 4.0), jnp.zeros((3, 2))
      >>> noise.log_prob(noise.sample(x, key=jax.random.key(0)), x).shape
      (3,)
    """

    scale: float | jax.Array
    degrees_of_freedom: float | jax.Array

    _transform_is_positive = "is a mixture of Gaussians, positive everywhere"

    def __post_init__(self):
        check_positive("scale", self.scale)
        check_positive("degrees_of_freedom", self.degrees_of_freedom)

    def _freedom_like(self, x):
        return fit_batch("degrees_of_freedom", self.degrees_of_freedom, x)

    def _standard_sample(self, key, x):
        return jax.random.t(key, self._freedom_like(x), x.shape, x.dtype)

    def _standard_log_density(self, u):
        v = self._freedom_like(u)
        constant = _log_gamma_half_step(0.5 * v) - 0.5 * (positive_log(v) + math.log(math.pi))
        return constant - 0.5 * (v + 1) * jnp.log1p(jnp.square(u) / v)

    def _standard_transform(self, omega):
        """E exp(-omega^2 exp(-s) / 2) over the variance ratio exp(-s), exp(s) ~ Gamma(v/2) / (v/2).

        By the trapezoidal rule in s: the integrand is analytic and dies off at both ends, so it converges
        exponentially. With h = v/2 the density of s is exp(-h (e^s - 1 - s)) up to its constant.
        """
        half = 0.5 * jnp.broadcast_to(self._freedom_like(omega), omega.shape)
        constant = _log_density_at_mode(half)
        energy = 0.5 * jnp.square(omega)
        positive = jnp.where(energy > 0, energy, 1)  # where it is zero the result is 1, and nothing may overflow
        digits = 4 - math.log(float(jnp.finfo(omega.dtype).eps))
        # Outside of these ends the integrand is below eps: its width is sqrt(2 digits / h) for large h, its
        # left tail is exp(h s) for small h, or earlier exp(-energy exp(-s)).
        width = digits / half + jnp.sqrt(2 * digits / half)
        left = jnp.maximum(-width, jnp.log(positive / digits))
        right = jnp.maximum(jnp.log1p(width), left + 1e-3)
        left, right = jax.lax.stop_gradient((left, right))
        step = (right - left) / (_TRANSFORM_NODES - 1)

        def add(total, node):
            s = left + step * node
            exponent = constant - half * (jnp.expm1(s) - s) - positive * jnp.exp(-s)
            return total + jnp.exp(exponent), None

        nodes = jnp.arange(_TRANSFORM_NODES, dtype=omega.dtype)
        total = step * jax.lax.scan(add, jnp.zeros_like(omega), nodes)[0]
        return jnp.where(energy > 0, total, 1)


def _log_gamma_half_step(z):
    """log Gamma(z + 1/2) - log Gamma(z); by its asymptotic series where the difference would cancel."""
    large = z > 20
    far, near = jnp.where(large, z, 20), jnp.where(large, 1, z)
    r = 1 / jnp.square(far)
    series = 0.5 * jnp.log(far) - (1 / 8 - r * (1 / 192 - r / 640)) / far
    return jnp.where(large, series, jax.lax.lgamma(near + 0.5) - jax.lax.lgamma(near))


def _log_density_at_mode(h):
    """h log h - h - log Gamma(h); by Stirling's series where the terms would cancel."""
    large = h > 20
    far, near = jnp.where(large, h, 20), jnp.where(large, 1, h)
    r = 1 / jnp.square(far)
    series = 0.5 * (jnp.log(far) - math.log(2 * math.pi)) - (1 / 12 - r * (1 / 360 - r / 1260)) / far
    return jnp.where(large, series, near * jnp.log(near) - near - jax.lax.lgamma(near))


@frozen_pytree
class CauchyNoise(ClosedProductNoise):
    r"""Cauchy spread noise with independent dimensions, p(y|x) = prod_d b / (pi ((y_d - x_d)^2 + b^2)).

    The heaviest tails here: y has no mean. Its Fourier transform exp(-b |omega|_1) is positive everywhere.
    In one dimension the KL of two shifts is log(1 + (x - x2)^2 / (4 b^2)), and `mmd_kernel` is the Cauchy
    density of scale 2 b at x - x2.

    Args:
      scale: b > 0, in units of x: a number, an array that broadcasts against one event, or one for each example,
        [batch, 1, ...]. A pytree leaf. A concrete scale is checked here; a traced one cannot be, and a scale <= 0
        makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(CauchyNoise(1.0).kl(jnp.full((1, 1), 2.0), jnp.zeros((1, 1))).round(4))
      [0.6931]
    """

    scale: float | jax.Array

    _standard_entropy = math.log(4 * math.pi)
    _transform_is_positive = "exp(-b |omega|_1) is positive everywhere"

    def __post_init__(self):
        check_positive("scale", self.scale)

    @per_example
    def chi_squared(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The chi-squared divergence of p(y|x) from p(y|x2), [batch]."""
        return jnp.expm1(sum_event(jnp.log1p(0.5 * jnp.square(self._distance(x, x2)))))

    @per_example
    def total_variation(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The total variation of p(y|x) and p(y|x2), [batch], for events of one number."""
        return 2 / math.pi * jnp.arctan(0.5 * self._distance_in_one_dimension(x, x2))

    def _standard_sample(self, key, x):
        return jax.random.cauchy(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        return -jnp.log1p(jnp.square(u)) - math.log(math.pi)

    def _standard_transform(self, omega):
        return jnp.exp(-jnp.abs(omega))

    def _standard_kl(self, u):
        return jnp.log1p(0.25 * jnp.square(u))

    def _standard_log_autocorrelation(self, u):
        return -jnp.log1p(0.25 * jnp.square(u)) - math.log(2 * math.pi)
