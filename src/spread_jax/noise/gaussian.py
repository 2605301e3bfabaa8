"""Gaussian spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_positive
from spread_jax._pairwise import flatten_events, squared_distances
from spread_jax._pytree import frozen_pytree
from spread_jax._threefry import normal
from spread_jax.noise._product import ClosedProductNoise, fit_event, in_batch, positive_log
from spread_jax.noise._protocol import all_pairs

__all__ = ["GaussianNoise"]


class GaussianShifts:
    """What all Gaussian noises know of two shifts: functions of their KL, half of a squared Mahalanobis distance."""

    def squared_hellinger(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The squared Hellinger distance of p(y|x) and p(y|x2), [batch]."""
        return -jnp.expm1(-0.25 * self.kl(x, x2))

    def chi_squared(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The chi-squared divergence of p(y|x) from p(y|x2), [batch]."""
        return jnp.expm1(2 * self.kl(x, x2))

    def total_variation(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The total variation of p(y|x) and p(y|x2), [batch]."""
        square = 0.25 * self.kl(x, x2)
        apart = square != 0  # the root of zero has no derivative; NaN stays NaN
        return jnp.where(apart, jax.lax.erf(jnp.sqrt(jnp.where(apart, square, 1))), 0)


@frozen_pytree
class GaussianNoise(GaussianShifts, ClosedProductNoise):
    r"""Gaussian spread noise, p(y|x) = N(y; x, sigma^2 I).

    Its Fourier transform exp(-sigma^2 |omega|^2 / 2) is positive everywhere, so spreading with it keeps two
    different distributions different. The KL of two shifts is |x - x2|^2 / (2 sigma^2), and `mmd_kernel` is
    N(x; x2, 2 sigma^2 I).

    Args:
      scale: sigma > 0, the standard deviation, in units of x: a number, an array that broadcasts against
        one event (a scale for each dimension), or one for each example, [batch, 1, ...]. It is a pytree leaf, to be
        annealed, vmapped or trained. A concrete scale is checked here; a traced one cannot be, and a scale <= 0
        makes `log_prob` NaN at once.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite.

    Source: Zhang et al., Spread Divergence, ICML 2020, section 3 (stationary spread divergences).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> noise, x = GaussianNoise(0.5), jnp.zeros((3, 2))
      >>> y = noise.sample(x, key=jax.random.key(0))
      >>> noise.log_prob(y, x).shape
      (3,)
    """

    scale: float | jax.Array

    _standard_entropy = 0.5 * math.log(2 * math.pi) + 0.5
    _transform_is_positive = "exp(-sigma^2 |omega|^2 / 2) is positive everywhere"

    def __post_init__(self):
        check_positive("scale", self.scale)

    def covariance(self, x: jax.Array) -> jax.Array:
        """The covariance of p(y|x), [X, X], for events [X]."""
        return jnp.diag(jnp.square(jnp.broadcast_to(fit_event("scale", self.scale, x), x.shape[1:])))

    @all_pairs
    def pairwise_log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y_i|x_j) for all pairs, in nats, by matrix products that keep the digits of near pairs.

        Args:
          y: [m, *event].
          x: [n, *event].

        Returns:
          [m, n].
        """
        # The rounding of one product, 16 eps X nats at most, is then that of the density of a point 4 sigma off.
        return self._pairwise_log_prob(y, x, negligible=16 * math.prod(x.shape[1:]))

    def _pairwise_log_prob(self, y, x, *, negligible):
        """As `pairwise_log_prob`, with the squared length in scales whose rounding does not matter."""
        scale = fit_event("scale", self.scale, x)
        size = math.prod(x.shape[1:])
        if scale.size == 1:
            square = jnp.square(scale.reshape(()))
            distances = squared_distances(flatten_events(y), flatten_events(x), negligible=negligible * square) / square
            log_scales = size * positive_log(scale.reshape(()))
        else:
            u, v, constant = self.standardise(y, x)
            return constant - 0.5 * squared_distances(u, v, negligible=negligible)
        return -0.5 * distances - log_scales - 0.5 * size * math.log(2 * math.pi)

    @all_pairs
    def standardise(self, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Coordinates, centred on x, in which this is a unit Gaussian: log p(y_i|x_j) = c - |u_i - v_j|^2 / 2.

        Args:
          y: [m, *event].
          x: [n, *event].

        Returns:
          u [m, X], v [n, X] and c, a scalar in nats.
        """
        scale = fit_event("scale", self.scale, x)
        centre = jax.lax.stop_gradient(x.mean(axis=0, keepdims=True))
        log_scales = jnp.broadcast_to(positive_log(scale), x.shape[1:]).sum()
        constant = -log_scales - 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi)
        scale = in_batch(scale, x)
        return flatten_events((y - centre) / scale), flatten_events((x - centre) / scale), constant

    @all_pairs
    def log_mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """log N(x; x2, 2 sigma^2 I), [n, m]: the logarithm of `mmd_kernel`, which can be held in any dimensions."""
        # The logarithm of a kernel: the relative error of the kernel itself is a few eps.
        return GaussianNoise(self.scale * math.sqrt(2.0))._pairwise_log_prob(x, x2, negligible=8)

    def _standard_sample(self, key, x):
        return normal(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        return -0.5 * jnp.square(u) - 0.5 * math.log(2 * math.pi)

    def _standard_transform(self, omega):
        return jnp.exp(-0.5 * jnp.square(omega))

    def _standard_kl(self, u):
        return 0.5 * jnp.square(u)
