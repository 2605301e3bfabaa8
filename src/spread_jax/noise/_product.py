"""What noises with independent dimensions share: y = x + scale * epsilon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_same_event, check_same_shape

__all__ = ["ClosedProductNoise", "ProductNoise", "coth_excess", "fit_event", "positive_log", "sum_event"]


def sum_event(values: jax.Array) -> jax.Array:
    """[batch, *event] -> [batch]."""
    return values.sum(axis=tuple(range(1, values.ndim)))


def positive_log(scale: jax.Array) -> jax.Array:
    """log(scale), NaN rather than -inf at zero: a degenerate noise has no density."""
    return jnp.where(scale > 0, jnp.log(scale), jnp.nan)


def fit_event(name: str, value, x: jax.Array) -> jax.Array:
    """`value` in x's dtype, after checking that it belongs to one event of x."""
    array = jnp.asarray(value, x.dtype)
    event = x.shape[1:]
    try:
        fits = np.broadcast_shapes(array.shape, event) == event
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be a number or broadcast against one event of shape {event}, got shape {array.shape}."
        )
    return array


def coth_excess(a: jax.Array) -> jax.Array:
    """a coth(a) - 1, near a^2 / 3 at zero and |a| - 1 far from it, without cancellation at either end."""
    a = jnp.abs(a)
    near = a < (0.1 if jnp.finfo(a.dtype).eps < 1e-10 else 0.5)
    s = jnp.square(jnp.where(near, a, 0))
    series = s * (1 / 3 - s * (1 / 45 - s * (2 / 945 - s * (1 / 4725 - s * (2 / 93555)))))
    far = jnp.where(near, 1, a)
    return jnp.where(near, series, far - 1 + 2 * far * jnp.exp(-2 * far) / -jnp.expm1(-2 * far))


class ProductNoise:
    """p(y|x) = prod_d K((y_d - x_d) / s_d) / s_d, with one standard density K for each dimension.

    A subclass has a field `scale` and defines the standard sample, log K and the Fourier transform of K.
    """

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y = x + scale * epsilon, differentiable in x and scale.

        Args:
          x: [batch, *event], floating point.
          key: a JAX random key.

        Returns:
          y with the shape and dtype of x.
        """
        x = check_batch("x", x)
        return x + self._scale_like(x) * self._standard_sample(key, x)

    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats.

        Args:
          y: [batch, *event].
          x: [batch, *event], the locations.

        Returns:
          [batch]; NaN where a traced scale is not positive.
        """
        y, x = check_batch("y", y), check_batch("x", x)
        check_same_shape("y", y, "x", x)
        difference = y - x
        scale = self._scale_like(difference)
        return sum_event(self._standard_log_density(difference / scale) - positive_log(scale))

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y, which is x."""
        return x

    def characteristic_function(self, omega: jax.Array) -> jax.Array:
        """The Fourier transform of the kernel, E exp(i <omega, y - x>): real, because the kernel is even.

        Args:
          omega: [batch, *event], frequencies in radians per unit of x.

        Returns:
          [batch].
        """
        omega = check_batch("omega", omega)
        factors = self._standard_transform(self._scale_like(omega) * omega)
        return factors.prod(axis=tuple(range(1, factors.ndim)))

    def _scale_like(self, x):
        return fit_event("scale", self.scale, x)


class ClosedProductNoise(ProductNoise):
    """A product noise with closed integrals: KL of two shifts, entropy, autocorrelation."""

    def kl(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """KL(p(y|x) || p(y|x2)) in nats: the spread KL of two deltas.

        Args:
          x: [batch, *event].
          x2: [batch, *event].

        Returns:
          [batch], exact.
        """
        x, x2 = check_batch("x", x), check_batch("x2", x2)
        check_same_shape("x", x, "x2", x2)
        difference = x - x2
        return sum_event(self._standard_kl(difference / self._scale_like(difference)))

    def entropy(self, x: jax.Array) -> jax.Array:
        """The entropy of p(y|x) in nats, [batch]; it depends on the shape of x only."""
        x = check_batch("x", x)
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

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y: the autocorrelation of the noise.

        The squared L2 distance of two spread distributions is the squared MMD with this kernel.

        Args:
          x: [n, *event].
          x2: [m, *event].

        Returns:
          [n, m].
        """
        x, x2 = check_batch("x", x), check_batch("x2", x2)
        check_same_event("x", x, "x2", x2)
        scale = self._scale_like(x)
        one_row = lambda row: sum_event(self._standard_log_autocorrelation((row - x2) / scale) - positive_log(scale))
        return jnp.exp(jax.vmap(one_row)(x))
