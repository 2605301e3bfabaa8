"""Laws of the noise scale: sigma ~ w(sigma), for divergences over many scales."""

from __future__ import annotations

import abc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_callable, check_count, check_positive, is_concrete
from spread_jax._pytree import frozen_pytree
from spread_jax._random import check_key, is_for_examples

__all__ = ["GridScales", "LogUniformScales", "SampledScales", "ScaleLaw", "check_law"]


class ScaleLaw(abc.ABC):
    r"""A law w of the noise scale: draws for the examples of a batch, a density, and nodes for integrals.

    A divergence over scales, D_w(p||q) = E_{sigma ~ w} lambda(sigma) D(p~_sigma || q~_sigma), is a spread divergence: a
    valid noise of any one scale makes it vanish for p = q alone. A law is a pytree, so its ends can be annealed
    without compiling again.

    Source: He, Chen, Zhang, Barber and Hernandez-Lobato, Training Neural Samplers with Reverse Diffusive KL Divergence,
    AISTATS 2025.

    Example:
      >>> scales, weights = LogUniformScales(0.1, 1.0).quadrature(8)
      >>> print(f"{(weights * scales).sum():.4f}")  # E sigma = (1 - 0.1) / log 10
      0.3909
    """

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """A scale for each example.

        Args:
          x: [batch, *event], floating point: what will be spread.
          key: a JAX random key, or one for each example: see `example_keys`.

        Returns:
          sigma, [batch, 1, ...] in the dtype of x: as a noise takes it, to broadcast against x.

        Raises:
          TypeError: x is not floating point, or `key` no key.
          ValueError: there are more or fewer keys than examples.
        """
        x = check_batch("x", x)
        key = check_key(key, x.shape[0])
        if is_for_examples(key):
            sigma = jax.vmap(lambda key: self._draw(key, (), x.dtype))(key)
        else:
            sigma = self._draw(key, x.shape[:1], x.dtype)
        return sigma.reshape(-1, *(1 for _ in x.shape[1:]))

    @abc.abstractmethod
    def log_prob(self, sigma: jax.Array) -> jax.Array:
        """log w(sigma) in nats, of the shape of sigma: a density over sigma, or a grid's probabilities."""

    def quadrature(self, num_scales: int) -> tuple[jax.Array, jax.Array]:
        """Nodes and weights for which E h(sigma) ~ sum_k weights_k h(scales_k): Gauss-Legendre in log sigma.

        Args:
          num_scales: K; the error falls exponentially with it where h is smooth.

        Returns:
          scales [K] and weights [K].
        """
        nodes, weights = np.polynomial.legendre.leggauss(check_count("num_scales", num_scales))
        low, high = jnp.log(jnp.asarray(self.lowest, float)), jnp.log(jnp.asarray(self.highest, float))
        half = 0.5 * (high - low)
        log_scales = low + half * (1 + jnp.asarray(nodes, half.dtype))
        scales = jnp.exp(log_scales)
        # The density over log sigma is that over sigma, times sigma.
        return scales, half * jnp.asarray(weights, half.dtype) * jnp.exp(self.log_prob(scales) + log_scales)

    @abc.abstractmethod
    def _draw(self, key, shape, dtype):
        """Scales of this shape from one key."""


@frozen_pytree
class LogUniformScales(ScaleLaw):
    """sigma with log sigma uniform on [log lowest, log highest]: every factor of two is as likely.

    Args:
      lowest: > 0, in units of x. What is finer than the lowest noise is seen by nothing.
      highest: above `lowest`. It should cover the data: at the highest scale p~ and q~ have to overlap.
        Both are pytree leaves; concrete ones are checked here.

    Raises:
      ValueError: concrete ends that are not positive, or not in this order.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> law = LogUniformScales(0.05, 1.0)
      >>> law.sample(jnp.zeros((4, 8, 8, 3)), key=jax.random.key(0)).shape
      (4, 1, 1, 1)
    """

    lowest: float | jax.Array
    highest: float | jax.Array

    def __post_init__(self):
        _check_ends(self.lowest, self.highest)

    def log_prob(self, sigma: jax.Array) -> jax.Array:
        """log w(sigma) = -log sigma - log log(highest / lowest) in nats, -inf outside of the ends."""
        sigma = jnp.asarray(sigma)
        low, high = (jnp.asarray(end, sigma.dtype) for end in (self.lowest, self.highest))
        inside = (sigma >= low) & (sigma <= high)
        return jnp.where(inside, -jnp.log(jnp.where(inside, sigma, 1)) - jnp.log(jnp.log(high / low)), -jnp.inf)

    def _draw(self, key, shape, dtype):
        low, high = (jnp.log(jnp.asarray(end, dtype)) for end in (self.lowest, self.highest))
        return jnp.exp(low + (high - low) * jax.random.uniform(key, shape, dtype))


@frozen_pytree
class GridScales(ScaleLaw):
    """sigma among K scales, all as likely or by weights; a single one gives the spread divergence of that scale.

    Args:
      scales: [K] > 0, in units of x, or one number.
      weights: [K] > 0, normalised here; equal by default. Both are pytree leaves.

    Raises:
      ValueError: concrete numbers that are not positive, or shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(GridScales(jnp.array([0.1, 0.5, 1.0])).quadrature(3)[0])
      [0.1 0.5 1. ]
    """

    scales: float | jax.Array
    weights: jax.Array | None = None

    def __post_init__(self):
        check_positive("scales", self.scales)
        if jnp.ndim(self.scales) > 1 or jnp.size(self.scales) == 0:
            raise ValueError(f"scales must have shape [K], got {jnp.shape(self.scales)}.")
        if self.weights is not None:
            check_positive("weights", self.weights)
            if jnp.shape(self.weights) != jnp.shape(self.scales):
                raise ValueError(
                    f"weights must have one number for each scale, {jnp.shape(self.scales)}, got "
                    f"{jnp.shape(self.weights)}."
                )

    def log_prob(self, sigma: jax.Array) -> jax.Array:
        """The logarithm of the probability of sigma, -inf of what is not on the grid."""
        sigma = jnp.asarray(sigma)
        scales, weights = self._grid(sigma.dtype)
        found = jax.vmap(lambda s: jnp.where(s == scales, weights, 0).sum())(sigma.reshape(-1))
        return jnp.log(found).reshape(sigma.shape)

    def quadrature(self, num_scales: int) -> tuple[jax.Array, jax.Array]:
        """The grid itself with its probabilities, whatever `num_scales` is: the mean over it is exact."""
        return self._grid(float)

    def _grid(self, dtype):
        scales = jnp.atleast_1d(jnp.asarray(self.scales, dtype))
        weights = jnp.ones_like(scales) if self.weights is None else jnp.atleast_1d(jnp.asarray(self.weights, dtype))
        return scales, weights / weights.sum()

    def _draw(self, key, shape, dtype):
        scales, weights = self._grid(dtype)
        return scales[jax.random.categorical(key, jnp.log(weights), shape=shape)]


@frozen_pytree
class SampledScales(ScaleLaw):
    """A law by a sampler and its density.

    Args:
      sampler: (key, shape, dtype) -> sigma of that shape, within the ends.
      log_density: sigma -> log w(sigma), elementwise, normalised on [lowest, highest].
        Callables that are pytrees keep their numbers as leaves; any other one is static, so define it once.
      lowest: > 0, where the law begins.
      highest: above `lowest`, where it ends.

    Raises:
      TypeError: what must be callable is not.
      ValueError: concrete ends that are not positive, or not in this order.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sampler = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, 0.5, 1.0)
      >>> law = SampledScales(sampler, lambda sigma: jnp.full(sigma.shape, jnp.log(2.0)), 0.5, 1.0)
      >>> scales, weights = law.quadrature(8)
      >>> print(f"{(weights * scales).sum():.4f}")
      0.7500
    """

    sampler: Callable[..., jax.Array]
    log_density: Callable[[jax.Array], jax.Array]
    lowest: float | jax.Array
    highest: float | jax.Array

    def __post_init__(self):
        for name in ("sampler", "log_density"):
            function = getattr(self, name)
            check_callable(name, function)
            if jax.tree_util.all_leaves([function]):
                object.__setattr__(self, name, jax.tree_util.Partial(function))
        _check_ends(self.lowest, self.highest)

    def log_prob(self, sigma: jax.Array) -> jax.Array:
        """log w(sigma) in nats."""
        return self.log_density(jnp.asarray(sigma))

    def _draw(self, key, shape, dtype):
        sigma = jnp.asarray(self.sampler(key, shape, dtype))
        if sigma.shape != shape:
            raise ValueError(f"sampler must return scales of shape {shape}, got {sigma.shape}.")
        return sigma.astype(dtype)


def check_law(name: str, value) -> None:
    """Refuses what is no law of scales."""
    if not isinstance(value, ScaleLaw):
        raise TypeError(
            f"{name} must be a law of noise scales, such as spread_jax.LogUniformScales(0.05, 1.0), got "
            f"{type(value).__name__}."
        )


def _check_ends(lowest, highest):
    check_positive("lowest", lowest)
    check_positive("highest", highest)
    if is_concrete(lowest) and is_concrete(highest) and not (np.asarray(lowest) < np.asarray(highest)).all():
        raise ValueError(f"lowest must be below highest, got {lowest} and {highest}; for one scale use GridScales.")
