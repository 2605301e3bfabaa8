"""Frozen dataclass pytrees."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TypeVar

import jax
import jax.numpy as jnp

__all__ = ["frozen_pytree"]

T = TypeVar("T")


def frozen_pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose every field is a pytree child.

    Rebuilding an instance from its leaves bypasses `__post_init__`: checks belong to what a caller
    constructs, not to what jit, vmap or grad pass through (tracers, batched leaves, sentinels).

    Flax's `to_bytes`, `from_bytes` and their like take an instance too, in a program that has imported Flax.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten_with_keys(instance):
        return [(jax.tree_util.GetAttrKey(n), getattr(instance, n)) for n in names], None

    def flatten(instance):
        return [getattr(instance, n) for n in names], None

    def unflatten(_, children):
        instance = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    def new(cls, *args, **kwargs):
        _tell_flax(cls, names, unflatten)
        return object.__new__(cls)

    cls.__new__ = new
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


_KNOWN_TO_FLAX: set[type] = set()


def _tell_flax(cls, names, unflatten):
    """Registers a class with Flax's serialisation before its first instance; nothing here imports Flax."""
    flax = sys.modules.get("flax.serialization")
    register = getattr(flax, "register_serialization_state", None)
    if register is None or cls in _KNOWN_TO_FLAX:
        return
    _KNOWN_TO_FLAX.add(cls)

    def to_state(instance):
        return {name: flax.to_state_dict(_plain(getattr(instance, name))) for name in names}

    def from_state(target, state):
        if set(state) != set(names):
            raise ValueError(
                f"A stored {cls.__name__} must have the fields {', '.join(names)}, got {', '.join(sorted(state))}."
            )
        fields = [(getattr(target, name), state[name]) for name in names]
        return unflatten(None, [_like(value, flax.from_state_dict(_plain(value), new)) for value, new in fields])

    with contextlib.suppress(ValueError):  # the program has registered it already, in a way of its own
        register(cls, to_state, from_state)


def _plain(value):
    """What Flax can store of a field: a function's leaves, and a key's numbers."""
    if isinstance(value, jax.tree_util.Partial):
        return [_plain(leaf) for leaf in jax.tree_util.tree_leaves(value)]
    return jax.random.key_data(value) if _is_key(value) else value


def _like(value, stored):
    """A field as it was, from what `_plain` made of it."""
    if isinstance(value, jax.tree_util.Partial):
        leaves, structure = jax.tree_util.tree_flatten(value)
        return structure.unflatten(_like(leaf, new) for leaf, new in zip(leaves, stored, strict=True))
    return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(value)) if _is_key(value) else stored


def _is_key(value):
    return jnp.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)
