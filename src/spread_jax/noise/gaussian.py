"""Gaussian spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_positive, check_same_event
from spread_jax._pairwise import flatten_events, squared_distances
from spread_jax._pytree import frozen_pytree
from spread_jax._random import normal
from spread_jax.noise._product import ClosedProductNoise, positive_log

__all__ = ["GaussianNoise"]


@frozen_pytree
class GaussianNoise(ClosedProductNoise):
    r"""Gaussian spread noise, p(y|x) = N(y; x, sigma^2 I).

    Its Fourier transform exp(-sigma^2 |omega|^2 / 2) is positive everywhere, so spreading with it keeps two
    different distributions different. The KL of two shifts is |x - x2|^2 / (2 sigma^2), and `mmd_kernel` is
    N(x; x2, 2 sigma^2 I).

    Args:
      scale: sigma > 0, the standard deviation, in units of x: a number, or an array that broadcasts against
        one event (a scale for each dimension). It is a pytree leaf, to be annealed, vmapped or trained. A
        concrete scale is checked here; a traced one cannot be, and a scale <= 0 makes `log_prob` NaN at once.

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

    def __post_init__(self):
        check_positive("scale", self.scale)

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
        y, x = check_batch("y", y), check_batch("x", x)
        check_same_event("y", y, "x", x)
        scale = self._scale_like(x)
        size = math.prod(x.shape[1:])
        if scale.size == 1:
            square = jnp.square(scale.reshape(()))
            distances = squared_distances(flatten_events(y), flatten_events(x), negligible=negligible * square) / square
            log_scales = size * positive_log(scale.reshape(()))
        else:
            u, v, constant = self.standardise(y, x)
            return constant - 0.5 * squared_distances(u, v, negligible=negligible)
        return -0.5 * distances - log_scales - 0.5 * size * math.log(2 * math.pi)

    def standardise(self, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Coordinates, centred on x, in which this is a unit Gaussian: log p(y_i|x_j) = c - |u_i - v_j|^2 / 2.

        Args:
          y: [m, *event].
          x: [n, *event].

        Returns:
          u [m, X], v [n, X] and c, a scalar in nats.
        """
        y, x = check_batch("y", y), check_batch("x", x)
        check_same_event("y", y, "x", x)
        scale = self._scale_like(x)
        centre = jax.lax.stop_gradient(x.mean(axis=0))
        log_scales = jnp.broadcast_to(positive_log(scale), x.shape[1:]).sum()
        constant = -log_scales - 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi)
        return flatten_events((y - centre) / scale), flatten_events((x - centre) / scale), constant

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y, N(x; x2, 2 sigma^2 I).

        The squared L2 distance of two spread distributions is the squared MMD with this kernel.

        Args:
          x: [n, *event].
          x2: [m, *event].

        Returns:
          [n, m].
        """
        x, x2 = check_batch("x", x), check_batch("x2", x2)
        check_same_event("x", x, "x2", x2)
        # A kernel is a number and no logarithm of one: its relative error is a few eps.
        return jnp.exp(GaussianNoise(self.scale * math.sqrt(2.0))._pairwise_log_prob(x, x2, negligible=8))

    def _standard_sample(self, key, x):
        return normal(key, x.shape, x.dtype)

    def _standard_log_density(self, u):
        return -0.5 * jnp.square(u) - 0.5 * math.log(2 * math.pi)

    def _standard_transform(self, omega):
        return jnp.exp(-0.5 * jnp.square(omega))

    def _standard_kl(self, u):
        return 0.5 * jnp.square(u)
