"""What a spread noise is, and how its draws and numbers follow the examples of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_count, check_same_event, check_same_shape
from spread_jax._random import check_key, check_one_key, is_for_examples

__all__ = ["SpreadNoise", "all_pairs", "check_noise", "example_axes", "per_example", "repeat_noise", "spread"]


@runtime_checkable
class SpreadNoise(Protocol):
    """A spread noise p(y|x): anything with these three methods works in every objective.

    The first axis of x and y is the batch, all others are the event. A noise is a pytree, so its numbers can
    be annealed, vmapped or trained. Where a closed form exists a noise also offers

      - `expected_log_prob(x, x2)` -> [batch], the integral of p(y|x) log p(y|x2) over y, in nats;
      - `kl(x, x2)`, `squared_hellinger(x, x2)`, `chi_squared(x, x2)`, `total_variation(x, x2)` -> [batch], the
        divergences of p(y|x) from p(y|x2), the first in nats;
      - `entropy(x)` -> [batch], in nats;
      - `characteristic_function(omega)` -> [batch], the Fourier transform of a stationary kernel;
      - `mmd_kernel(x, x2)` -> [n, m], the integral of p(y|x) p(y|x2) over y, and `log_mmd_kernel(x, x2)`;
      - `pairwise_log_prob(y, x)` -> [m, n], log p(y_i|x_j), where all pairs are cheaper than one by one;
      - `standardise(y, x)` -> (u [m, X], v [n, X], c), where log p(y_i|x_j) = c - |u_i - v_j|^2 / 2;
      - `covariance(x)` -> [X, X], that of Gaussian noise on events [X] like those of x [batch, X];
      - `spread_conditions()` -> the `SpreadCondition`s of its validity, for `check_valid_spread`.
    """

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y ~ p(y|x), of the shape of x."""
        ...

    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats, one number for each example: [batch]."""
        ...

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y: x itself, or f(x) for a transformed noise."""
        ...


def check_noise(name: str, noise) -> None:
    """Refuses what lacks a method of a spread noise."""
    if not isinstance(noise, SpreadNoise):
        raise TypeError(
            f"{name} must be a spread noise, such as spread_jax.GaussianNoise(0.5), with methods sample, log_prob and "
            f"location, got {type(noise).__name__}."
        )


def per_example(method: Callable) -> Callable:
    """The public edge of a method of arrays [batch, *event], which must be floating point and of one shape."""
    return _checked(method, check_same_shape)


def all_pairs(method: Callable) -> Callable:
    """The public edge of a method of all pairs of two sets of examples, which must have the same event."""
    return _checked(method, check_same_event)


def _checked(method, check_together):
    signature = inspect.signature(method)
    kinds = signature.parameters.items()
    names = [name for name, parameter in kinds if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(method)
    def public(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        for name in names:
            arguments[name] = self._array(name, arguments[name])
        if len(names) == 2:
            check_together(names[0], arguments[names[0]], names[1], arguments[names[1]])
        if "key" in arguments:
            arguments["key"] = check_one_key(arguments["key"])
        return method(**arguments)

    return public


class CheckedNoise:
    """What noises of floating-point events share; a noise of others has an `_array` of its own."""

    _array = staticmethod(check_batch)

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y, which is x."""
        return x

    def example_axes(self, x: jax.Array) -> list[int | None]:
        """Of each leaf, 0 if it has an entry for each example of x, or None."""
        return [0 if jnp.ndim(leaf) == x.ndim else None for leaf in jax.tree_util.tree_leaves(self)]


def example_axes(noise: SpreadNoise, x: jax.Array) -> list[int | None]:
    """Of each leaf of a noise, 0 if it has an entry for each example of x, or None; of any other noise, None of all."""
    if hasattr(noise, "example_axes"):
        return noise.example_axes(x)
    return [None] * len(jax.tree_util.tree_leaves(noise))


def repeat_noise(noise: SpreadNoise, x: jax.Array, count: int) -> SpreadNoise:
    """The noise of jnp.repeat(x, count, axis=0): numbers for each example are repeated with their examples."""
    leaves, structure = jax.tree_util.tree_flatten(noise)
    axes = example_axes(noise, x)
    if count == 1 or not any(axis == 0 for axis in axes):
        return noise
    leaves = [jnp.repeat(leaf, count, axis=0) if axis == 0 else leaf for leaf, axis in zip(leaves, axes, strict=True)]
    return jax.tree_util.tree_unflatten(structure, leaves)


def spread(x: jax.Array, noise: SpreadNoise, *, key: jax.Array, num_samples: int = 1) -> jax.Array:
    """Draws y ~ p(y|x), with one key for all examples or one for each.

    Args:
      x: [batch, *event].
      noise: the spread noise p(y|x).
      key: a JAX random key, or one for each example: see `example_keys`.
      num_samples: S_y, draws for each example.

    Returns:
      y, [batch * S_y, *event]: the draws of an example are neighbours.

    Raises:
      TypeError: `noise` is no spread noise, `key` no key, or the count no integer.
      ValueError: x is a scalar, or there are more or fewer keys than examples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> spread(jnp.ones((4, 2)), GaussianNoise(0.5), key=jax.random.key(0), num_samples=3).shape
      (12, 2)
    """
    check_noise("noise", noise)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("x must have shape [batch, *event], got a scalar.")
    key = check_key(key, x.shape[0])
    num_samples = check_count("num_samples", num_samples)
    noise, x = repeat_noise(noise, x, num_samples), jnp.repeat(x, num_samples, axis=0)
    if not is_for_examples(key):
        return noise.sample(x, key=key)
    in_rows = lambda leaf: jnp.reshape(leaf, (key.shape[0], num_samples, *leaf.shape[1:]))
    leaves, structure = jax.tree_util.tree_flatten(noise)
    axes = example_axes(noise, x)
    leaves = [in_rows(leaf) if axis == 0 else leaf for leaf, axis in zip(leaves, axes, strict=True)]
    one = lambda leaves, x, key: jax.tree_util.tree_unflatten(structure, leaves).sample(x, key=key)
    y = jax.vmap(one, in_axes=(axes, 0, 0))(leaves, in_rows(x), key)
    return y.reshape(x.shape[0], *y.shape[2:])
