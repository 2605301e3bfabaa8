"""One algorithm for two array libraries: NumPy on the host, which compiles nothing, and JAX where the data lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Numbers in one block of data: in NumPy they stay in the fastest cache of a CPU, in JAX a step of a scan pays off.
NUMPY_BLOCK, JAX_BLOCK = 2**13, 2**17


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


@functools.lru_cache(maxsize=8)
def normal_draws(seed, shape):
    """Standard normal numbers of NumPy's RandomState; a generator takes longer to seed than a small fit takes."""
    found = np.random.RandomState(seed).normal(size=shape)
    found.flags.writeable = False
    return found


def within(value, low, high, xp):
    """A number, not below `low` nor above `high`; NumPy's own functions take long for one number."""
    return jnp.clip(value, low, high) if xp is jnp else min(max(value, low), high)


def blocks(v, arrays: int = 1):
    """Splits [Z, N] into blocks [Z, n] for `mean_over`; `arrays` are as large in one step.

    In NumPy a list of views. In JAX [blocks, Z, n] and weights [blocks, n] that sum to one over all, zero where padded;
    neighbouring columns go to different blocks, so that columns laid out over devices stay where they are.
    """
    size, count = v.shape
    if library(v) is np:
        width = max(NUMPY_BLOCK // size, 256)
        return [v[:, start : start + width] for start in range(0, count, width)]
    num = -(-count // max(JAX_BLOCK // (size * arrays), 1024))
    width = -(-count // num)
    v = jnp.pad(v, ((0, 0), (0, num * width - count)))
    weights = (jnp.arange(num * width) < count).astype(v.dtype) / count
    split = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], width, num), -1, 0)
    return split(v), split(weights)


def mean_over(statistics, v_blocks):
    """The mean of `statistics(v [Z, n], weigh)`, a tuple of sums over examples, each of one factor in `weigh(...)`.

    In NumPy in double precision, and `weigh` does nothing.
    """
    if isinstance(v_blocks, list):
        found = [[np.asarray(value, np.float64) for value in statistics(v, _as_it_is)] for v in v_blocks]
        count = sum(v.shape[1] for v in v_blocks)
        return tuple((values[0] if len(values) == 1 else sum(values)) / count for values in zip(*found, strict=True))
    of_block = lambda v, weights: statistics(v, lambda a: a * weights)
    v, weights = v_blocks
    if v.shape[0] == 1:
        return of_block(v[0], weights[0])

    def step(total, block):
        return jax.tree.map(jnp.add, total, of_block(*block)), None

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_block, v[0], weights[0]))
    return jax.lax.scan(step, start, (v, weights))[0]


def _as_it_is(array):
    return array


def some_columns(v, most):
    """At most so many columns of [Z, N], spread over all and at no regular distance: a period in them is not met."""
    count = v.shape[1]
    if count <= most:
        return v
    index = np.arange(most)
    return v[:, ((index + (index * 0.6180339887498949) % 1) * (count / most)).astype(int)]
