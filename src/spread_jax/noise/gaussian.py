"""Gaussian spread noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_positive, check_same_shape
from spread_jax._pytree import frozen_pytree

__all__ = ["GaussianNoise"]


@frozen_pytree
class GaussianNoise:
    r"""Gaussian spread noise, p(y|x) = N(y; x, sigma^2 I).

    Its Fourier transform exp(-sigma^2 |omega|^2 / 2) is positive everywhere, so spreading with it keeps two
    different distributions different.

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

    def __post_init__(self):
        check_positive("scale", self.scale)

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y = x + sigma * epsilon with epsilon ~ N(0, I).

        Args:
          x: [batch, *event], floating point.
          key: a JAX random key.

        Returns:
          y with the shape and dtype of x.
        """
        x = check_batch("x", x)
        return x + self._scale_like(x) * jax.random.normal(key, x.shape, x.dtype)

    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log N(y; x, sigma^2 I) in nats.

        Args:
          y: [batch, *event].
          x: [batch, *event], the locations.

        Returns:
          [batch].
        """
        y, x = check_batch("y", y), check_batch("x", x)
        check_same_shape("y", y, "x", x)
        difference = y - x
        scale = self._scale_like(difference)
        density = -0.5 * jnp.square(difference / scale) - _positive_log(scale) - 0.5 * math.log(2 * math.pi)
        return _sum_event(density)

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y, which is x."""
        return x

    def expected_log_prob(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """E log N(y; x2, sigma^2 I) over y ~ N(x, sigma^2 I): log N(x; x2, sigma^2 I) - X / 2, in nats.

        Args:
          x: [batch, *event], the locations y is spread from.
          x2: [batch, *event], the locations whose density is averaged.

        Returns:
          [batch]; X is the number of dimensions of an event.
        """
        x = check_batch("x", x)
        return self.log_prob(x, x2) - 0.5 * math.prod(x.shape[1:])

    def characteristic_function(self, omega: jax.Array) -> jax.Array:
        """The Fourier transform of the kernel, exp(-sigma^2 |omega|^2 / 2).

        Args:
          omega: [batch, *event], frequencies in radians per unit of x.

        Returns:
          [batch], real and positive.
        """
        omega = check_batch("omega", omega)
        return jnp.exp(-0.5 * _sum_event(jnp.square(self._scale_like(omega) * omega)))

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y, N(x; x2, 2 sigma^2 I).

        Args:
          x: [n, *event].
          x2: [m, *event].

        Returns:
          [n, m].

        Source: the squared L2 distance of two spread distributions is the squared MMD with this kernel.
        """
        x, x2 = check_batch("x", x), check_batch("x2", x2)
        if x.shape[1:] != x2.shape[1:]:
            raise ValueError(f"x and x2 must share their event shape, got {x.shape[1:]} and {x2.shape[1:]}.")
        pair_noise = GaussianNoise(self.scale * math.sqrt(2.0))
        one_row = lambda row: pair_noise.log_prob(jnp.broadcast_to(row, x2.shape), x2)
        return jnp.exp(jax.lax.map(one_row, x))

    def _scale_like(self, x: jax.Array) -> jax.Array:
        """sigma in x's dtype, after checking that it belongs to one event."""
        scale = jnp.asarray(self.scale, x.dtype)
        event = x.shape[1:]
        try:
            fits = np.broadcast_shapes(scale.shape, event) == event
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"scale must be a number or broadcast against one event of shape {event}, got shape {scale.shape}."
            )
        return scale


def _sum_event(values: jax.Array) -> jax.Array:
    return values.reshape(values.shape[0], -1).sum(axis=1)


def _positive_log(scale: jax.Array) -> jax.Array:
    """log(scale), NaN rather than -inf at zero: a degenerate noise has no density."""
    return jnp.where(scale > 0, jnp.log(scale), jnp.nan)
