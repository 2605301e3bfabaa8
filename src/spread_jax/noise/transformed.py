"""Spread noise around a learned location."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from spread_jax._checks import check_batch, check_callable
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._protocol import SpreadNoise, check_noise

__all__ = ["TransformedNoise"]


@frozen_pytree
class TransformedNoise:
    r"""Spread noise y = f(x) + noise, p(y|x) = K(y - f(x)) with K the density of `base`.

    If f is injective and `base` is valid, so is this noise: a learned f decides which differences between the
    data and the model are amplified. Neither the inverse nor the Jacobian of f is ever needed. A method the
    base has in closed form (`entropy`, `kl`, `expected_log_prob`, `mmd_kernel`, `pairwise_log_prob`) exists here
    too.

    Args:
      base: the noise that is added to f(x).
      transform: f, a callable [batch, *event] -> [batch, *event2]. A callable that is a pytree (an Equinox
        module, or `jax.tree_util.Partial(apply, params)` for Flax and Haiku) keeps its parameters as leaves
        of the noise, to be trained. Any other function is wrapped in a Partial without leaves and becomes a
        static part: jit compiles again for a new function object, so define it once.

    Raises:
      TypeError: if `transform` is not callable, or `base` is no spread noise.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on learning the mean transformation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> scale_by = lambda params, x: params["w"] * x
      >>> params = {"w": jnp.float32(2.0)}
      >>> noise = TransformedNoise(GaussianNoise(0.5), jax.tree_util.Partial(scale_by, params))
      >>> loss = lambda noise: noise.log_prob(jnp.ones((1, 2)), jnp.ones((1, 2))).sum()
      >>> print(jax.grad(loss)(noise).transform.args[0]["w"])
      -8.0
    """

    base: SpreadNoise
    transform: Callable[[jax.Array], jax.Array]

    def __post_init__(self):
        check_noise("base", self.base)
        check_callable("transform", self.transform)
        if jax.tree_util.all_leaves([self.transform]):
            object.__setattr__(self, "transform", jax.tree_util.Partial(self.transform))

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y, which is f(x)."""
        x = check_batch("x", x)
        location = check_batch("transform(x)", self.transform(x))
        if location.shape[0] != x.shape[0]:
            raise ValueError(f"transform must keep the batch axis: got {location.shape} for x of shape {x.shape}.")
        return self.base.location(location)

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y ~ p(y|x) from the base noise around f(x), of the shape of f(x)."""
        return self.base.sample(self.location(x), key=key)

    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats, [batch]."""
        return self.base.log_prob(y, self.location(x))

    # Properties, so that hasattr(noise, name) answers for the base.
    @property
    def entropy(self) -> Callable[[jax.Array], jax.Array]:
        """x -> the entropy of p(y|x) in nats, [batch], where the base has it."""
        of_base = self.base.entropy
        return lambda x: of_base(self.location(x))

    @property
    def expected_log_prob(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(x, x2) -> E log p(y|x2) over y ~ p(y|x), [batch], where the base has it."""
        return self._on_locations(self.base.expected_log_prob)

    @property
    def kl(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(x, x2) -> KL(p(y|x) || p(y|x2)), [batch], where the base has it."""
        return self._on_locations(self.base.kl)

    @property
    def mmd_kernel(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(x, x2) -> the integral of p(y|x) p(y|x2) over y, [n, m], where the base has it."""
        return self._on_locations(self.base.mmd_kernel)

    @property
    def pairwise_log_prob(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(y, x) -> log p(y_i|x_j), [m, n], where the base has it."""
        of_base = self.base.pairwise_log_prob
        return lambda y, x: of_base(y, self.location(x))

    def _on_locations(self, of_base: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, x2: of_base(self.location(x), self.location(x2))
