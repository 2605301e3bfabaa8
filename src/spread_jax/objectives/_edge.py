"""What an objective is given, and what the caller's networks return, is checked here: bodies are mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_callable, check_count, check_examples, check_same_event, check_samples
from spread_jax._random import check_key, split_key
from spread_jax.divergences.f_divergences import check_divergence
from spread_jax.noise import SpreadNoise, spread
from spread_jax.noise._protocol import check_noise

__all__ = [
    "check_bound",
    "check_game",
    "check_sets",
    "decoded",
    "log_prior",
    "one_each",
    "posterior",
    "split_aux",
    "spread_or_given",
]

Encode = Callable[[jax.Array], Any]
Decode = Callable[[jax.Array], Any]


def check_bound(
    x, encode, decode, noise, key, *, low_variance: bool = False, **counts: int
) -> tuple[jax.Array, jax.Array]:
    """x and key of a bound on the likelihood."""
    x = check_examples("x", x)
    check_callable("encode", encode)
    check_callable("decode", decode)
    check_noise("noise", noise)
    if low_variance and not hasattr(noise, "expected_log_prob"):
        raise TypeError(
            f"low_variance=True needs a noise with a closed-form expected_log_prob(x, x2); "
            f"{type(noise).__name__} has none, so pass low_variance=False."
        )
    for name, count in counts.items():
        check_count(name, count)
    return x, check_key(key, x.shape[0])


def check_game(x, generated, critic, noise, divergence, key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, generated and key of a game in which a critic bounds a divergence."""
    check_noise("noise", noise)
    check_divergence("divergence", divergence)
    return check_sets(x, generated, key, critic=critic)


def check_sets(x, generated, key, **networks: Callable) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, generated and key of an objective that compares the spread of two sets."""
    x, generated = check_samples("x", x), check_samples("generated", generated)
    check_same_event("x", x, "generated", generated)
    for name, network in networks.items():
        check_callable(name, network)
    return x, generated, check_key(key, x.shape[0], generated.shape[0])


def spread_or_given(x, noise: SpreadNoise, key, num: int, given) -> tuple[jax.Array, jax.Array]:
    """y [batch * num, *event], and the key of what is drawn next."""
    if given is None:
        spread_key, key = split_key(key)
        return spread(x, noise, key=spread_key, num_samples=num), key
    y = check_batch("spread_samples", given)
    if y.shape[0] != x.shape[0] * num:
        raise ValueError(
            f"spread_samples must have num_spread_samples = {num} rows for each of the {x.shape[0]} examples, "
            f"got shape {y.shape}."
        )
    return y, key


def posterior(encode: Encode, y: jax.Array, has_aux: bool) -> tuple[jax.Array, jax.Array, Any]:
    """Mean and log_std [n, *latent] of q(z|y), in the dtype of y, and what encode returned beside them."""
    encoded, aux = split_aux(encode(y), has_aux, "encode")
    if not (isinstance(encoded, (tuple, list)) and len(encoded) == 2):
        raise ValueError(f"encode must return (mean, log_std), got {type(encoded).__name__}.")
    mean, log_std = (jnp.asarray(part).astype(y.dtype) for part in encoded)
    if mean.shape != log_std.shape or mean.ndim == 0 or mean.shape[0] != y.shape[0]:
        raise ValueError(
            f"encode must return mean and log_std of one shape [n, *latent] with n = {y.shape[0]}, "
            f"got {mean.shape} and {log_std.shape}."
        )
    return mean, log_std, aux


def decoded(decode: Decode, z: jax.Array, like: jax.Array, has_aux: bool) -> tuple[jax.Array, Any]:
    """g(z) of the shape and dtype of `like`, and what decode returned beside it."""
    x, aux = split_aux(decode(z), has_aux, "decode")
    if getattr(x, "shape", None) != like.shape:
        raise ValueError(
            f"decode must return shape [n, *event] = {like.shape} for z of shape {z.shape}, "
            f"got {getattr(x, 'shape', type(x).__name__)}."
        )
    # Compute dtypes may be lower; the objective itself is in the data's.
    return x.astype(like.dtype), aux


def log_prior(prior_log_prob: Callable, z: jax.Array) -> jax.Array:
    """log p(z) of a caller's prior, [n]."""
    check_callable("prior_log_prob", prior_log_prob)
    return one_each("prior_log_prob", prior_log_prob(z), z)


def one_each(name: str, returned, like: jax.Array) -> jax.Array:
    """What a callable returned as one number for each example of `like`, [n], in its dtype."""
    value, n = jnp.asarray(returned), like.shape[0]
    if value.shape not in ((n,), (n, 1)):
        raise ValueError(f"{name} must return shape ({n},) or ({n}, 1), got {value.shape}.")
    return value.reshape(-1).astype(like.dtype)


def split_aux(returned, has_aux: bool, name: str) -> tuple[Any, Any]:
    """(output, aux) of a network; aux is None without `has_aux`."""
    if not has_aux:
        return returned, None
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"with has_aux=True {name} must return (output, aux), got {type(returned).__name__}.")
    return returned
