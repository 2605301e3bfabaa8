"""A training state as named leaves: what a checkpoint stores of each, and how it becomes that leaf again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._files import reason

PyTree = Any

_LISTED = 8  # names of leaves printed in one message


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be trusted."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What the seal records of one leaf; it decides whether a model fits a checkpoint."""

    kind: str  # "array", "key" (typed random key) or "number" (of Python or NumPy, no array)
    dtype: str
    shape: tuple[int, ...]
    impl: str | None = None  # of a random key
    stored_shape: tuple[int, ...] | None = None  # of a random key: its words are a last axis

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LeafSpec:
        stored = fields.get("stored_shape")
        spec = cls(
            kind=fields["kind"],
            dtype=fields["dtype"],
            shape=tuple(fields["shape"]),
            impl=fields.get("impl"),
            stored_shape=None if stored is None else tuple(stored),
        )
        # Of another writer than this module: whatever follows may rely on these.
        texts = (spec.kind, spec.dtype, spec.impl if spec.kind == "key" else "")
        sizes = (*spec.shape, *(spec.stored_shape or ()))
        if spec.kind not in ("array", "key", "number") or not all(isinstance(text, str) for text in texts):
            raise ValueError("a leaf is of no known kind")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("a leaf has an impossible shape")
        return spec

    @property
    def array_shape(self) -> tuple[int, ...]:
        return self.shape if self.stored_shape is None else self.stored_shape

    def accepts(self, wanted: LeafSpec) -> bool:
        if (self.kind, self.dtype, self.shape) == (wanted.kind, wanted.dtype, wanted.shape):
            return True
        # A number traced by jax.eval_shape becomes an array without axes, and the reverse.
        return (
            {self.kind, wanted.kind} == {"number", "array"}
            and self.shape == wanted.shape == ()
            and np.dtype(self.dtype).kind == np.dtype(wanted.dtype).kind
        )

    def __str__(self) -> str:
        kind = {"array": "", "key": "", "number": "number "}[self.kind]
        return f"{kind}{self.dtype}{list(self.shape)}"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex | np.generic)


def spec_of(name: str, leaf: Any) -> LeafSpec:
    """What a seal says of a leaf.

    Raises:
      CheckpointError: a checkpoint cannot hold it.
    """
    if _is_number(leaf):
        return LeafSpec("number", np.asarray(leaf).dtype.name, ())
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(
            f"leaf {name!r} of the state is a {type(leaf).__name__}; a checkpoint holds arrays, "
            "random keys and numbers: remove the leaf or make it static in its pytree."
        )
    shape = tuple(leaf.shape)
    if is_key(leaf):
        return LeafSpec("key", str(leaf.dtype), shape)
    dtype = np.dtype(leaf.dtype)
    if dtype.kind in "OSUMm":
        raise CheckpointError(f"leaf {name!r} of the state has dtype {dtype}; a checkpoint holds numbers only.")
    return LeafSpec("array", dtype.name, shape)


def named_leaves(state: PyTree) -> tuple[dict[str, Any], Any]:
    """Names every leaf by its path, ``params/Dense_0/kernel``; two leaves never share a name."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "." for path, _ in paths]
    if len(set(names)) < len(names):  # e.g. {"a/b": x, "a": {"b": y}}
        names = [jax.tree_util.keystr(path) for path, _ in paths]
    return dict(zip(names, (leaf for _, leaf in paths), strict=True)), treedef


def to_arrays(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, LeafSpec]]:
    """The arrays Orbax writes, and the description of every leaf."""
    arrays, specs = {}, {}
    for name, leaf in leaves.items():
        spec = spec_of(name, leaf)
        if spec.kind == "key":
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(f"leaf {name!r} of the state is an abstract random key.")
            impl = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
            spec = dataclasses.replace(spec, impl=impl, stored_shape=tuple(leaf.shape))
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(f"leaf {name!r} of the state is abstract: it holds no values.")
        elif not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        specs[name] = spec
        if math.prod(spec.array_shape):  # there is nothing to store of an array without elements
            arrays[name] = leaf
    return arrays, specs


def placement_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a restored leaf must live, or None for the default device, uncommitted."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    sharding = getattr(leaf, "sharding", None)
    # A mesh without devices, as eval_shape reports it under jax.set_mesh, places nothing.
    mesh = getattr(sharding, "mesh", None)
    return None if isinstance(mesh, jax.sharding.AbstractMesh) else sharding


def check_fit(saved: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec], where: str) -> None:
    """Refuses a checkpoint of another model, naming the leaves that differ."""
    differences = []
    for name in [*wanted, *(n for n in saved if n not in wanted)]:
        if name not in saved:
            differences.append(f"{name}: not in the checkpoint, {wanted[name]} in the model")
        elif name not in wanted:
            differences.append(f"{name}: {saved[name]} in the checkpoint, not in the model")
        elif not saved[name].accepts(wanted[name]):
            differences.append(f"{name}: {saved[name]} in the checkpoint, {wanted[name]} in the model")
    if differences:
        shown = "\n  ".join(differences[:_LISTED])
        rest = len(differences) - _LISTED
        more = f"\n  and {rest} more" if rest > 0 else ""
        raise CheckpointError(
            f"{where} holds another model; {len(differences)} leaves differ:\n  {shown}{more}\n"
            "Restore with the configuration it was saved with, or use another folder."
        )


def holds(value: Any, spec: LeafSpec) -> bool:
    """Whether a stored array is what the seal says; it is, unless another program wrote the seal."""
    dtype = np.dtype(np.uint32) if spec.kind == "key" else np.dtype(spec.dtype)
    return tuple(np.shape(value)) == spec.array_shape and np.dtype(value.dtype) == dtype


def to_leaf(name: str, value: Any, saved: LeafSpec, wanted: Any) -> Any:
    """Turns the stored array into a leaf of the type, dtype and placement of ``wanted``."""
    placement = placement_of(wanted)
    if saved.kind == "key":
        if placement is None:
            value = jnp.array(value)
        try:
            key = jax.random.wrap_key_data(value, impl=saved.impl)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the random key {name!r} cannot be restored: {reason(error)}") from error
        if key.dtype != wanted.dtype:
            raise CheckpointError(f"the random key {name!r} is a {key.dtype} where its seal says {saved.dtype}.")
        return key if placement is None else jax.device_put(key, placement)
    if _is_number(wanted):
        return type(wanted)(np.asarray(value).item())
    if saved.kind == "number":
        number = np.asarray(value)
        value = number.astype(wanted.dtype)
        if number.dtype.kind in "iu" and value != number:
            raise CheckpointError(f"leaf {name!r} was saved as the number {number}, which {wanted.dtype} cannot hold.")
    if isinstance(wanted, np.ndarray):
        return np.array(value)
    if isinstance(value, jax.Array):  # Orbax has placed it
        return value
    value = jnp.array(value, dtype=wanted.dtype)  # a copy: never an alias of the reader's buffer
    return value if placement is None else jax.device_put(value, placement)
