"""Squared distances between two sets of points, as matrix products that keep their digits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

__all__ = ["exp2", "flatten_events", "is_product", "product", "split_distances", "squared_distances", "squares"]

# Up to here one subtraction for each dimension is both exact and as fast as a matrix product.
_DIRECT_DIMENSIONS = 8
# The polynomial with value 1 at zero of least relative error to 2^f on [-1/2, 1/2], 9.1e-8 (Lawson's algorithm).
_EXP2 = (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0)


def flatten_events(x: jax.Array) -> jax.Array:
    """[n, *event] -> [n, X], of an empty set too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def squared_distances(y: jax.Array, x: jax.Array, *, negligible: jax.Array | float = 0.0) -> jax.Array:
    r"""|y_i - x_j|^2 for all pairs.

    The textbook product form |y|^2 + |x|^2 - 2 <y, x> loses all digits below eps |x|^2: with sigma = 0.01 and
    x of 64 unit dimensions that is 0.04 nats of a log-density in float32. Here both sets are centred on x, and
    where that loss matters each number is split, y = h + l, into a multiple h of a power of two and a small rest
    l. The grid is such that every partial sum of |h_i|^2 + |h'_j|^2 - 2 <h_i, h'_j> fits the mantissa, so the
    large part |h_i - h'_j|^2 is exact in any order of summation, and only the small cross terms are rounded: the
    error falls by 2^11 / sqrt(X) in float32 (2^25 / sqrt(X) in float64) for three products in place of one.

    Args:
      y: [m, X].
      x: [n, X].
      negligible: a squared length. If no centred point is longer, one product is formed, whose error is a few
        eps of that.

    Returns:
      [m, n], non-negative. Derivatives in both modes are matrix products too.
    """
    if not is_product(y):
        return sum(
            (jnp.square(y[:, k, None] - x[None, :, k]) for k in range(y.shape[1])),
            start=jnp.zeros((y.shape[0], x.shape[0]), y.dtype),
        )
    return _distances_by_products(y, x, jnp.asarray(negligible, y.dtype))


def is_product(y: jax.Array) -> bool:
    """Whether pairs of y [m, X] and another set are matrix products, or subtracted dimension by dimension."""
    return y.shape[1] > _DIRECT_DIMENSIONS


def split_distances(y: jax.Array, x: jax.Array) -> jax.Array:
    """`squared_distances` of sets known to be so wide that three products are needed."""
    return _distances_by_products(y, x, None)


@jax.custom_jvp
def _distances_by_products(y, x, negligible):
    y, x = _centre(y, x)
    largest = jnp.maximum(squares(y).max(), squares(x).max())
    if negligible is None:
        return _by_split_products(y, x, largest)
    return jax.lax.cond(largest <= negligible, _by_one_product, _by_split_products, y, x, largest)


def _by_one_product(y, x, largest):
    del largest
    return jnp.maximum(_sums_less_products(squares(y), squares(x), (-2 * y, x)), 0)


def _by_split_products(y, x, largest):
    _, exponent = jnp.frexp(jnp.sqrt(largest))
    # 4 (2^bits)^2, and a factor 4 for what rounding to the grid adds to a norm, stay within the mantissa.
    bits = (jnp.finfo(y.dtype).nmant + 1 - 4) // 2
    grid = jnp.ldexp(jnp.ones((), y.dtype), exponent - bits)
    y_high, x_high = jnp.round(y / grid) * grid, jnp.round(x / grid) * grid
    y_low, x_low = y - y_high, x - x_high
    exact = _sums_less_products(squares(y_high), squares(x_high), (-2 * y_high, x_high))
    rest_y = (y_low * (y_high + y)).sum(axis=1)  # 2 <h, l> + |l|^2 = <l, h + y>
    rest_x = (x_low * (x_high + x)).sum(axis=1)
    cross = _sums_less_products(rest_y, rest_x, (-2 * y_high, x_low), (-2 * y_low, x))
    return jnp.maximum(exact + cross, 0)


def _sums_less_products(of_y, of_x, *factors):
    """of_y_i + of_x_j + sum of <a_i, b_j>."""
    return _join(*factors, (of_y, jnp.ones_like(of_x)), (jnp.ones_like(of_y), of_x))


def _join(*factors):
    """The sum of <a_i, b_j> over pairs of factors as one product: outer sums of their own cost XLA's CPU more."""
    side = lambda k: jnp.concatenate([f[k].reshape(len(f[k]), -1) for f in factors], axis=1)
    return product(side(0), side(1))


@_distances_by_products.defjvp
def _distances_by_products_jvp(primals, tangents):
    (y, x, _), (dy, dx, _) = primals, tangents
    distances = _distances_by_products(*primals)
    y, x = _centre(y, x)
    # d|y - x|^2 / 2 = (<y, dy> - <dy, x>) + (<x, dx> - <y, dx>): a product must be linear in one factor only.
    by_y = _join((-dy, x), ((y * dy).sum(axis=1), jnp.ones_like(x[:, 0])))
    by_x = _join((-y, dx), (jnp.ones_like(y[:, 0]), (x * dx).sum(axis=1)))
    return distances, 2 * (by_y + by_x)


def _centre(y, x):
    centre = jax.lax.stop_gradient(x.mean(axis=0, keepdims=True))
    return y - centre, x - centre


def squares(x: jax.Array) -> jax.Array:
    """|x|^2 of each row."""
    return jnp.square(x).sum(axis=1)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in full precision."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def exp2(x: jax.Array) -> jax.Array:
    """2^x for x of at most 127 (a larger one gives a number of at least 2^127): for what is summed beside 1.

    In float32 on a CPU results below 2^-126 are zero or of that size; any others have two correct roundings.
    """
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    return jax.lax.platform_dependent(x, cpu=_exp2_by_polynomial, default=jnp.exp2)


@exp2.defjvp
def _exp2_jvp(primals, tangents):
    value = exp2(*primals)
    return value, math.log(2) * value * tangents[0]


def _exp2_by_polynomial(x):
    """2^x = 2^n 2^f, n the nearest integer: a polynomial on [-1/2, 1/2], n added to its exponent.

    XLA's exponential takes 0.68 ns a pair of one CPU core after a product in blocks, this 0.30.
    """
    x = jnp.where(x < -127, -127, jnp.where(x > 128, 128, x))  # NaN stays; -127 gives the bits of zero
    # A number whose mantissa ends at the unit: adding it rounds, and leaves n in the last bits. XLA would take it off
    # again at once, were it to see that it is a constant.
    shift = jax.lax.optimization_barrier(jnp.float32(1.5 * 2**23))
    shifted = x + shift
    fraction = x - (shifted - shift)
    power = jnp.full_like(x, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * fraction + coefficient
    as_int = lambda a: jax.lax.bitcast_convert_type(a, jnp.int32)
    return jax.lax.bitcast_convert_type(as_int(power) + (as_int(shifted) << 23), jnp.float32)
