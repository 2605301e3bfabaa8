"""Frozen dataclass pytrees."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax

__all__ = ["frozen_pytree"]

T = TypeVar("T")


def frozen_pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose every field is a pytree child.

    Rebuilding an instance from its leaves bypasses `__post_init__`: checks belong to what a caller
    constructs, not to what jit, vmap or grad pass through (tracers, batched leaves, sentinels).
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

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
