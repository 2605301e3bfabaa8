"""What noises with independent dimensions share: y = x + scale * epsilon."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.noise._protocol import CheckedNoise, all_pairs, per_example
from spread_jax.noise.validity import positive_everywhere

__all__ = [
    "ClosedProductNoise",
    "ProductNoise",
    "coth_excess",
    "fit_batch",
    "fit_event",
    "in_batch",
    "log1p_excess",
    "log_sinhc",
    "positive_log",
    "sum_event",
]


def sum_event(values: jax.Array) -> jax.Array:
    """[batch, *event] -> [batch]."""
    return values.sum(axis=tuple(range(1, values.ndim)))


def positive_log(scale: jax.Array) -> jax.Array:
    """log(scale), NaN rather than -inf at zero: a degenerate noise has no density."""
    return jnp.where(scale > 0, jnp.log(scale), jnp.nan)


def fit_event(name: str, value, x: jax.Array) -> jax.Array:
    """`value` in x's dtype, after checking that it belongs to one event of x: pairs of examples share it."""
    array = jnp.asarray(value, x.dtype)
    if not _broadcasts(array.shape, x.shape[1:]):
        hint = "; numbers for each example have no matrix of pairs, so use jax.vmap" if array.ndim == x.ndim else ""
        raise ValueError(
            f"{name} must be a number or broadcast against one event of shape {x.shape[1:]}, "
            f"got shape {array.shape}{hint}."
        )
    return array


def fit_batch(name: str, value, x: jax.Array) -> jax.Array:
    """`value` in x's dtype, after checking that it belongs to one event of x or has an entry for each example."""
    array = jnp.asarray(value, x.dtype)
    for_each = array.ndim == x.ndim and array.shape[0] == x.shape[0] and _broadcasts(array.shape[1:], x.shape[1:])
    if not (for_each or _broadcasts(array.shape, x.shape[1:])):
        one_each = (x.shape[0], *(1 for _ in x.shape[1:]))
        raise ValueError(
            f"{name} must be a number or broadcast against one event of shape {x.shape[1:]}, or have one for each "
            f"example, {one_each}, got shape {array.shape}."
        )
    return in_batch(array, x)


def in_batch(array: jax.Array, x: jax.Array) -> jax.Array:
    """A number as it is, anything else with an axis for the batch: as many as x, so that no rank is promoted."""
    return array.reshape((1,) * (x.ndim - array.ndim) + array.shape) if array.ndim else array


def _broadcasts(shape, target):
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _near_zero(a):
    """Where six terms of a series have all digits."""
    return a < (0.1 if jnp.finfo(a.dtype).eps < 1e-10 else 0.5)


def coth_excess(a: jax.Array) -> jax.Array:
    """a coth(a) - 1, near a^2 / 3 at zero and |a| - 1 far from it, without cancellation at either end."""
    a = jnp.abs(a)
    near = _near_zero(a)
    s = jnp.square(jnp.where(near, a, 0))
    series = s * (1 / 3 - s * (1 / 45 - s * (2 / 945 - s * (1 / 4725 - s * (2 / 93555)))))
    far = jnp.where(near, 1, a)
    return jnp.where(near, series, far - 1 + 2 * far * jnp.exp(-2 * far) / -jnp.expm1(-2 * far))


def log_sinhc(a: jax.Array) -> jax.Array:
    """log(sinh(a) / a), near a^2 / 6 at zero and |a| - log |2 a| far from it."""
    a = jnp.abs(a)
    near = _near_zero(a)
    s = jnp.square(jnp.where(near, a, 0))
    series = s * (1 / 6 - s * (1 / 180 - s * (1 / 2835 - s * (1 / 37800 - s * (1 / 467775 - s * (691 / 3831077250))))))
    far = jnp.where(near, 1, a)
    return jnp.where(near, series, far + jnp.log(-jnp.expm1(-2 * far)) - jnp.log(2 * far))


def log1p_excess(h: jax.Array) -> jax.Array:
    """log(1 + h) - h for h >= 0, near -h^2 / 2 at zero: by the series of 2 artanh(s) - h with s = h / (2 + h)."""
    near = _near_zero(h)
    small = jnp.where(near, h, 0)
    s = small / (2 + small)
    q = jnp.square(s)
    series = 2 * s * q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))) - small * s
    return jnp.where(near, series, jnp.log1p(h) - h)


class ProductNoise(CheckedNoise):
    """p(y|x) = prod_d K((y_d - x_d) / s_d) / s_d, with one standard density K for each dimension.

    A subclass has a field `scale` and defines the standard sample, log K and the Fourier transform of K, with the
    sentence by which that is positive.
    """

    _transform_is_positive: ClassVar[str]

    @per_example
    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y = x + scale * epsilon, differentiable in x and scale.

        Args:
          x: [batch, *event], floating point.
          key: a JAX random key.

        Returns:
          y with the shape and dtype of x.
        """
        return x + self._scale_like(x) * self._standard_sample(key, x)

    @per_example
    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats.

        Args:
          y: [batch, *event].
          x: [batch, *event], the locations.

        Returns:
          [batch]; NaN where a traced scale is not positive.
        """
        difference = y - x
        scale = self._scale_like(difference)
        return sum_event(self._standard_log_density(difference / scale) - positive_log(scale))

    @per_example
    def characteristic_function(self, omega: jax.Array) -> jax.Array:
        """The Fourier transform of the kernel, E exp(i <omega, y - x>): real, because the kernel is even.

        Args:
          omega: [batch, *event], frequencies in radians per unit of x.

        Returns:
          [batch].
        """
        factors = self._standard_transform(self._scale_like(omega) * omega)
        return factors.prod(axis=tuple(range(1, factors.ndim)))

    def spread_conditions(self):
        """The conditions of validity, for `check_valid_spread`."""
        return positive_everywhere(self, self._transform_is_positive)

    def _scale_like(self, x):
        return fit_batch("scale", self.scale, x)

    def _distance(self, x, x2):
        """|x - x2| in scales, [batch, *event]."""
        difference = x - x2
        return jnp.abs(difference / self._scale_like(difference))

    def _distance_in_one_dimension(self, x, x2):
        """As `_distance`, [batch], for events of one number."""
        if math.prod(x.shape[1:]) != 1:
            raise ValueError(
                f"{type(self).__name__} has a closed form of the total variation for events of one number, got shape "
                f"{x.shape}; estimate it with spread_divergence(..., divergence=total_variation)."
            )
        return self._distance(x, x2).reshape(-1)


class ClosedProductNoise(ProductNoise):
    """A product noise with closed integrals: KL of two shifts, entropy, autocorrelation."""

    _standard_entropy: ClassVar[float]

    @per_example
    def kl(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """KL(p(y|x) || p(y|x2)) in nats: the spread KL of two deltas.

        Args:
          x: [batch, *event].
          x2: [batch, *event].

        Returns:
          [batch], exact.
        """
        difference = x - x2
        return sum_event(self._standard_kl(difference / self._scale_like(difference)))

    @per_example
    def entropy(self, x: jax.Array) -> jax.Array:
        """The entropy of p(y|x) in nats, [batch]; it depends on the shape of x only."""
        return sum_event(jnp.broadcast_to(self._standard_entropy + positive_log(self._scale_like(x)), x.shape))

    def expected_log_prob(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """E log p(y|x2) over y ~ p(y|x), in nats: minus the KL of the two, minus the entropy.

        Args:
          x: [batch, *event], the locations y is spread from.
          x2: [batch, *event], the locations whose density is averaged.

        Returns:
          [batch].
        """
        return -self.kl(x, x2) - self.entropy(x)

    @all_pairs
    def log_mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The logarithm of `mmd_kernel`, [n, m], which can be held in any number of dimensions."""
        scale = in_batch(fit_event("scale", self.scale, x), x)
        of_difference = lambda u: sum_event(self._standard_log_autocorrelation(u / scale) - positive_log(scale))
        return jax.vmap(lambda row: of_difference(row[None] - x2))(x)

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y: the autocorrelation of the noise.

        The squared L2 distance of two spread distributions is the squared MMD with this kernel. In many dimensions
        it is too large or too small a number to be held: see `log_mmd_kernel`.

        Args:
          x: [n, *event].
          x2: [m, *event].

        Returns:
          [n, m].
        """
        return jnp.exp(self.log_mmd_kernel(x, x2))
