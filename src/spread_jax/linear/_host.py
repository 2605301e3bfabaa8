"""One algorithm for two array libraries: NumPy on the host, which compiles nothing, and JAX where the data lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Numbers in one chunk of data: they stay in a CPU's cache.
CHUNK = 2**15


def promotes_as_numpy(function):
    """`function` with NumPy's promotion of ranks and dtypes in JAX too, whatever the caller has forbidden."""

    @functools.wraps(function)
    def public(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return public


def library(array):
    """numpy for a NumPy array, jax.numpy for any other."""
    return np if isinstance(array, np.ndarray) else jnp


def while_loop(going, body, carry, xp):
    """jax.lax.while_loop, a plain loop in NumPy."""
    if xp is jnp:
        return jax.lax.while_loop(going, body, carry)
    while going(carry):
        carry = body(carry)
    return carry


def cond(predicate, yes, no, operand, xp):
    """jax.lax.cond, a plain choice in NumPy."""
    if xp is jnp:
        return jax.lax.cond(predicate, yes, no, operand)
    return yes(operand) if predicate else no(operand)


def blocks(v, arrays: int = 1):
    """Splits [Z, N] into blocks [Z, n] with weights that sum to one over all; `arrays` are as large in one step.

    In NumPy a list of views. In JAX [blocks, Z, n] and [blocks, n], zero where padded; neighbouring columns go to
    different blocks, so that columns laid out over devices stay where they are.
    """
    size, count = v.shape
    width = max(CHUNK // (size * arrays), 256)
    if library(v) is np:
        return [(v[:, start : start + width], v.dtype.type(1 / count)) for start in range(0, count, width)]
    num = -(-count // (4 * width))
    width = -(-count // num)
    v = jnp.pad(v, ((0, 0), (0, num * width - count)))
    weights = (jnp.arange(num * width) < count).astype(v.dtype) / count
    split = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], width, num), -1, 0)
    return split(v), split(weights)


def mean_over(statistics, v_blocks):
    """The sum of `statistics(v [Z, n], weights)`, a tuple of arrays, over blocks; in NumPy in double precision."""
    if isinstance(v_blocks, list):
        total = None
        for block in v_blocks:
            found = [np.asarray(value, np.float64) for value in statistics(*block)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return tuple(total)
    v, weights = v_blocks
    if v.shape[0] == 1:
        return statistics(v[0], weights[0])

    def step(total, block):
        return jax.tree.map(jnp.add, total, statistics(*block)), None

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(statistics, v[0], weights[0]))
    return jax.lax.scan(step, start, (v, weights))[0]


def some_columns(v, most):
    """At most so many columns of [Z, N], spread over all and at no regular distance: a period in them is not met."""
    count = v.shape[1]
    if count <= most:
        return v
    index = np.arange(most)
    return v[:, ((index + (index * 0.6180339887498949) % 1) * (count / most)).astype(int)]
