"""Draws from one key for the whole batch, or from one key for each example."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from spread_jax._threefry import is_typed, laplace, normal, uniform

__all__ = [
    "check_key",
    "check_one_key",
    "draw_normal",
    "example_keys",
    "is_for_examples",
    "laplace",
    "normal",
    "split_key",
    "uniform",
]


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key for each example, a function of its index alone: fold_in(key, index).

    Objectives take such keys in the place of a single one. The noise of an example then does not depend on which
    device, process, shard or micro-batch it is computed in, so that `jax.pmap`, `jax.shard_map` and gradient
    accumulation give what one device gives for the whole batch. (Under `jax.jit` with sharded arrays a single key
    does too: the program is that of the whole batch.)

    Args:
      key: a JAX random key, that of the step.
      indices: [batch] integers, the examples' places in the batch of all devices and processes.

    Returns:
      [batch] keys.

    Raises:
      TypeError: `key` is no key, or the indices are no integers.
      ValueError: they are not of shape [batch].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise, elbo
      >>> keys = example_keys(jax.random.key(0), jnp.arange(4))
      >>> encode = lambda x: (x, jnp.zeros_like(x))
      >>> bound = lambda x, keys: elbo(x, encode, lambda z: z, GaussianNoise(1.0), key=keys).elbo
      >>> x = jnp.arange(8.0).reshape(4, 2)
      >>> bool((bound(x, keys)[2:] == bound(x[2:], keys[2:])).all())
      True
    """
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}.")
    if indices.ndim != 1:
        raise ValueError(f"indices must have shape [batch], got {indices.shape}.")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(check_one_key(key), indices)


def check_key(key: jax.Array, *batches: int) -> jax.Array:
    """The key, typed, refusing what is neither one key nor one for each example of each batch."""
    key = _typed(key)
    for batch in batches:
        if key.shape not in ((), (batch,)):
            raise ValueError(
                f"key must be one random key or one for each of the {batch} examples, got shape {key.shape}."
            )
    return key


def check_one_key(key: jax.Array) -> jax.Array:
    """The key, typed, refusing what is not one key."""
    key = _typed(key)
    if key.ndim:
        raise ValueError(
            f"key must be one random key, got shape {key.shape}: spread and the objectives take one for each example."
        )
    return key


def _typed(key):
    """One key or many, typed: those of jax.random.PRNGKey are arrays of numbers."""
    if is_typed(key):
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "ndim", 0) > 0:
        with contextlib.suppress(TypeError):  # as many numbers as no key has
            return jax.random.wrap_key_data(key)
    got = f"{key.dtype} of shape {key.shape}" if hasattr(key, "dtype") else type(key).__name__
    raise TypeError(f"key must be a JAX random key, such as jax.random.key(0), got {got}.")


def split_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys from one, or [batch] and [batch] from [batch]."""
    if is_for_examples(key):
        pairs = jax.vmap(jax.random.split)(key)
        return pairs[:, 0], pairs[:, 1]
    first, second = jax.random.split(key)
    return first, second


def draw_normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal numbers, those of an example next to one another where each has its key."""
    if not is_for_examples(key):
        return normal(key, shape, dtype)
    rows = (shape[0] // key.shape[0], *shape[1:])
    return jax.vmap(lambda key: normal(key, rows, dtype))(key).reshape(shape)


def is_for_examples(key) -> bool:
    """Whether there is a key for each example."""
    return is_typed(key) and key.ndim == 1
