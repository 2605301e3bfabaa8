"""Mean and covariance of many rows, a chunk at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["centred", "device_moments", "host_moments"]


def host_moments(x: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [X] and covariance [X, X] of [N, X] in float64; x may be a memory map larger than the memory.

    Chunks have means of their own and are then joined: exact for data that drift from chunk to chunk too. What is
    summed is the difference to the first row, so that constant columns have a variance of zero exactly.
    """
    origin = np.array(x[0], np.float64)
    mean, scatter = 0, 0
    for start in range(0, len(x), chunk_size):
        # Features first: sums and differences along the examples then take a step at a time.
        features = centred(x[start : start + chunk_size], origin)
        chunk_mean = features.mean(axis=1)
        features -= chunk_mean[:, None]
        products = features @ features.T
        if start:
            difference, count = chunk_mean - mean, start + features.shape[1]
            products += np.outer(difference, difference) * (features.shape[1] * start / count)
            chunk_mean = mean + difference * (features.shape[1] / count)
        mean, scatter = chunk_mean, scatter + products
    return origin + mean, scatter / len(x)


def centred(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(x - mean)^T of [N, X] in float64, [X, N] in rows."""
    return np.subtract(x.T, mean[:, None], out=np.empty(x.shape[::-1]))


@functools.partial(jax.jit, static_argnums=1)
def device_moments(x: jax.Array, chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """Mean [X] and covariance [X, X] of [N, X] where it lies, in its dtype; works under jit, vmap and grad."""
    num_examples, width = x.shape
    chunk_size = min(chunk_size, num_examples)
    shift = x.mean(axis=0)

    def add(carry, rows):
        total, scatter = carry
        rows = rows - shift
        return total + rows.sum(axis=0), scatter + jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)

    def add_chunk(index, carry):
        return add(carry, jax.lax.dynamic_slice_in_dim(x, index * chunk_size, chunk_size))

    num_chunks = num_examples // chunk_size
    carry = (jnp.zeros(width, x.dtype), jnp.zeros((width, width), x.dtype))
    carry = jax.lax.fori_loop(0, num_chunks, add_chunk, carry)
    if num_examples % chunk_size:
        carry = add(carry, x[num_chunks * chunk_size :])
    # The rest of the mean, which a sum of many rows loses in float32.
    total, scatter = carry
    rest = total / num_examples
    return shift + rest, scatter / num_examples - jnp.outer(rest, rest)
