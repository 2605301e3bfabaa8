"""Spread noise around a learned location."""

from __future__ import annotations

from collections.abc import Callable

import jax

from spread_jax._checks import check_batch, check_callable
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._protocol import SpreadNoise, check_noise, example_axes
from spread_jax.noise.validity import SpreadCondition, check_valid_spread

__all__ = ["TransformedNoise"]


def _of_base(name):
    """A method of the base at the locations of its arguments; a property, so that hasattr answers for the base."""

    def method(self):
        of_base = getattr(self.base, name)
        return lambda *x: of_base(*(self.location(each) for each in x))

    return property(method, doc=f"`{name}` of the base at f(x), where the base has it.")


@frozen_pytree
class TransformedNoise:
    r"""Spread noise y = f(x) + noise, p(y|x) = K(y - f(x)) with K the density of `base`.

    If f is injective and `base` is valid, so is this noise: a learned f decides which differences between the
    data and the model are amplified. Neither the inverse nor the Jacobian of f is ever needed. A method the
    base has in closed form (`entropy`, `kl`, `expected_log_prob`, `mmd_kernel`, `pairwise_log_prob` and others)
    exists here too.

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

    def spread_conditions(self):
        """The conditions of validity, for `check_valid_spread`: those of the base, and that f is injective."""
        yield from check_valid_spread(self.base).conditions
        yield SpreadCondition(
            "transform", None, "f must be injective, which its code cannot show; make it so by design"
        )

    def example_axes(self, x: jax.Array) -> list[int | None]:
        """Of each leaf, 0 if it has an entry for each example of x, or None."""
        of_base = example_axes(self.base, jax.eval_shape(self.location, x))
        return of_base + [None] * len(jax.tree_util.tree_leaves(self.transform))

    entropy = _of_base("entropy")
    kl = _of_base("kl")
    squared_hellinger = _of_base("squared_hellinger")
    chi_squared = _of_base("chi_squared")
    total_variation = _of_base("total_variation")
    expected_log_prob = _of_base("expected_log_prob")
    mmd_kernel = _of_base("mmd_kernel")
    log_mmd_kernel = _of_base("log_mmd_kernel")

    @property
    def pairwise_log_prob(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(y, x) -> log p(y_i|x_j), [m, n], where the base has it."""
        of_base = self.base.pairwise_log_prob
        return lambda y, x: of_base(y, self.location(x))
