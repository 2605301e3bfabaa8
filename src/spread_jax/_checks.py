"""What a caller passes is checked once, at the public edge; the message names the argument."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "at_least_float32",
    "at_least_float32_dtype",
    "check_batch",
    "check_callable",
    "check_count",
    "check_examples",
    "check_non_negative",
    "check_positive",
    "check_same_event",
    "check_same_shape",
    "check_samples",
    "is_concrete",
]


def check_batch(name: str, value) -> jax.Array:
    """Returns `value` as an array, refusing anything but a floating-point [batch, *event] array."""
    if value is None or isinstance(value, (str, bytes)) or callable(value):
        raise TypeError(f"{name} must be a floating-point array, got {type(value).__name__}.")
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating-point dtype, got {array.dtype}; "
            f"convert it first, for example {name}.astype(jnp.float32)."
        )
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape [batch, *event], got a scalar.")
    return array


def at_least_float32_dtype(dtype):
    """The floating-point dtype, float32 if it is narrower: also where JAX is told to promote nothing."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def at_least_float32(array: jax.Array) -> jax.Array:
    """The array, in float32 if its dtype is narrower."""
    return array.astype(at_least_float32_dtype(array.dtype))


def check_same_shape(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    """Refuses two arrays of different shapes: a silent broadcast would mix examples."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape [batch, *event], got {value.shape} and {other.shape}."
        )


def check_examples(name: str, value) -> jax.Array:
    """Returns `value` as [batch, *event], refusing an empty batch. Non-finite numbers pass: training reports them."""
    array = check_batch(name, value)
    if array.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one example, got shape {array.shape}.")
    return array


def check_callable(name: str, value) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}.")


def check_positive(name: str, value) -> None:
    """Refuses concrete numbers that are not positive and finite; traced numbers pass unchecked."""
    _check_sign(name, value, "positive and finite", lambda array: array > 0)


def check_non_negative(name: str, value) -> None:
    """Refuses concrete numbers that are negative or not finite; traced numbers pass unchecked."""
    _check_sign(name, value, "at least 0 and finite", lambda array: array >= 0)


def _check_sign(name, value, words, holds):
    if value is None or isinstance(value, (str, bytes, complex, list, tuple, dict)):
        hint = "; make an array of it first" if isinstance(value, (list, tuple)) else ""
        raise TypeError(f"{name} must be a number or an array, got {type(value).__name__}{hint}.")
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return
    array = np.asarray(value)
    real = np.issubdtype(array.dtype, np.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not real:
        raise TypeError(f"{name} must be a real number, got {array.dtype}.")
    array = array.astype(np.float64)
    if not (np.isfinite(array).all() and holds(array).all()):
        shown = float(array) if array.ndim == 0 else f"an array with minimum {array.min()}"
        raise ValueError(f"{name} must be {words}, got {shown}.")


def check_count(name: str, value) -> int:
    """Returns `value` as an int, refusing what is not a static integer of at least one."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer, got {type(value).__name__}.") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
    return count


def is_concrete(array) -> bool:
    """Whether numbers can be looked at here: not traced, and not spread over other processes."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def check_samples(name: str, value) -> jax.Array:
    """Returns `value` as [num, *event] samples, refusing an empty set and concrete non-finite numbers."""
    array = check_batch(name, value)
    if array.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {array.shape}.")
    if not is_concrete(array):
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
