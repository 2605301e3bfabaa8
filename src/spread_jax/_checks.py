"""What a caller passes is checked once, at the public edge; the message names the argument."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "check_batch",
    "check_count",
    "check_positive",
    "check_same_event",
    "check_same_shape",
    "check_samples",
]


def check_batch(name: str, value) -> jax.Array:
    """Returns `value` as an array, refusing anything but a floating-point [batch, *event] array."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating-point dtype, got {array.dtype}; "
            f"convert it first, for example {name}.astype(jnp.float32)."
        )
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape [batch, *event], got a scalar.")
    return array


def check_same_shape(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    """Refuses two arrays of different shapes: a silent broadcast would mix examples."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape [batch, *event], got {value.shape} and {other.shape}."
        )


def check_positive(name: str, value) -> None:
    """Refuses concrete numbers that are not positive and finite; traced numbers pass unchecked."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number) and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a number, got {array.dtype}.")
    array = array.astype(np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        shown = float(array) if array.ndim == 0 else f"an array with minimum {array.min()}"
        raise ValueError(f"{name} must be positive and finite, got {shown}.")


def check_count(name: str, value) -> int:
    """Returns `value` as an int, refusing what is not a static integer of at least one."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer, got {type(value).__name__}.") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
    return count


def check_samples(name: str, value) -> jax.Array:
    """Returns `value` as [num, *event] samples, refusing an empty set and concrete non-finite numbers."""
    array = check_batch(name, value)
    if array.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {array.shape}.")
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return array
    with jax.ensure_compile_time_eval():
        finite = bool(jnp.isfinite(array).all())
    if not finite:
        raise ValueError(f"{name} must be finite, got NaN or infinity; remove those samples first.")
    return array


def check_same_event(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    """Refuses two sets of samples whose events differ in shape; their numbers of samples may differ."""
    if value.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"{name} and {other_name} must share their event shape, got {value.shape[1:]} and {other.shape[1:]}."
        )
