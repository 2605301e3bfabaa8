"""The score of a source, -(log p)', as the best combination of a few functions: estimated, or of a law that is named.

For any function f of a source with density p, E[psi f] = E f' with psi the score. So the combination of functions f_k
that is nearest to psi in the mean square has coefficients c = B^-1 d with B_kl = Cov(f_k, f_l) and d_k = E f_k', which
averages over data estimate: no density is needed, nor whether tails are heavy or light. It also is the combination
whose estimating equation, E[psi(u_i) u_j] = 0, has the least variance.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.linear._host import library, mean_over
from spread_jax.linear.sources import Source

# psi~ is tabulated at these arguments (standard deviations of a source) and continued linearly outside.
_REACH = 10.0
_POINTS = 2049
_STEP = 2 * _REACH / (_POINTS - 1)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
# What a squared length of a function, in units of its own, is certain to.
_RIDGE = 1e-5


class AnyLaw:
    """u, u / (c + u^2) and 1 / (c + u^2): in their span lies, nearly, the score of any law of unit variance.

    Students' laws have the former as scores, at all scales c; the differences to u are what light tails need, and
    the latter, even in u, what skewed laws need. The first two functions always count, the others where the data
    say so.
    """

    size, kept = 7, 2
    # Two sources whose share in each other is uncertain by more than this variance cannot be told apart: turned by any
    # angle they explain the data as well. Of Gaussian sources, chance seldom makes it smaller.
    untold = 0.01

    def __init__(self, num_sources: int, count: int):
        # The averages of f' over a window of width c^1/2 must be sure for all pairs of sources at once.
        least = min(max((30 * num_sources / count) ** (2 / 3), 0.02), 0.3)
        # (c, index of u / (c + u^2), index of 1 / (c + u^2))
        self.widths = ((1.5, 1, 2), (least, 3, None), (math.sqrt(1.5 * least), 4, 5), (8.0, 6, None))

    def functions(self, u):
        """(f, f') at u [Z, n]: each [7, Z, n]."""
        xp = library(u)
        square = u * u
        values, slopes = [None] * 7, [None] * 7
        values[0], slopes[0] = u, xp.ones_like(u)
        for c, odd, even in self.widths:
            r = 1 / (square + c)
            values[odd] = u * r
            slopes[odd] = r - 2 * values[odd] * values[odd]
            if even is not None:
                values[even], slopes[even] = r, -2 * values[odd] * r
        return xp.stack(values), xp.stack(slopes)

    def score(self, coefficients, u):
        """The combination with coefficients [Z, 7] at u [Z, n]."""
        square = u * u
        column = lambda index: coefficients[:, index, None]
        odd_part, even_part = column(0), 0
        for c, odd, even in self.widths:
            r = 1 / (square + c)
            odd_part = odd_part + column(odd) * r
            if even is not None:
                even_part = even_part + column(even) * r
        return u * odd_part + even_part


@dataclasses.dataclass(frozen=True)
class NamedLaw:
    """The spread score of a law that is given and, where the data say that the law is wrong, u.

    Args:
      table: [Z or 1, points], as `score_table` makes it.
    """

    table: jax.Array | np.ndarray
    size, kept = 2, 1
    untold = 0.2  # nothing of the law is estimated: chance does not look like a law

    def functions(self, u):
        """(f, f') at u [Z, n]: each [2, Z, n]."""
        xp = library(u)
        psi, slope = look_up(self.table, u)
        return xp.stack([psi, u]), xp.stack([slope, xp.ones_like(u)])

    def score(self, coefficients, u):
        """The combination with coefficients [Z, 2] at u [Z, n]."""
        return coefficients[:, 0, None] * look_up(self.table, u)[0] + coefficients[:, 1, None] * u


def project(law, w, v_blocks, count):
    """The best combination of a law's functions for each source, from u = W v.

    The first `law.kept` functions get the coefficients that data of this size ask for. In the rest of the span, the
    coefficient of each direction, t standard errors from zero, is shrunk by 1 - 2 log(Z q) / t^2, to zero if that is
    negative, with q the mean square of f' - f u over that of f: so large t gets by chance where Z sources are turned
    and f oscillates q^1/2 times.

    Args:
      w: [Z, Z].
      v_blocks: whitened data in blocks.
      count: examples in them.

    Returns:
      (coefficients [Z, K], E psi' [Z]).

    Source: D. T. Pham and P. Garat, Blind separation of mixture of independent sources through a quasi-maximum
      likelihood approach, IEEE Trans. Signal Processing 45, 1997, for scores as projections.
    """
    xp, kept, size = library(w), law.kept, law.size

    def statistics(v, weights):
        u = w.astype(v.dtype) @ v
        f, slope = law.functions(u)
        # Per example, an estimate of d is off by f' - f psi; with u for psi, which is what remains where it matters.
        off = slope - f * u
        # One weight for all, as in NumPy, is left to the sums.
        weigh, of_sum = (lambda a: a * weights, 1) if weights.ndim else (lambda a: a, weights)
        gram = lambda a: a.transpose(1, 0, 2) @ weigh(a).transpose(1, 2, 0) * of_sum
        mean = lambda a: weigh(a).sum(axis=2).T * of_sum
        return gram(f), gram(off), mean(f), mean(off), mean(slope)

    covariance, noise, f, off, d = mean_over(statistics, v_blocks)
    covariance = covariance - f[:, :, None] * f[:, None, :]
    noise = noise - off[:, :, None] * off[:, None, :]
    lengths = xp.sqrt(xp.maximum(xp.diagonal(covariance, axis1=1, axis2=2), _RIDGE))
    outer = lengths[:, :, None] * lengths[:, None, :]
    b, v = covariance / outer + _RIDGE * xp.eye(size, dtype=covariance.dtype), noise / outer
    d = d / lengths
    first = xp.linalg.solve(b[:, :kept, :kept], d[:, :kept, None])
    if size == kept:
        coefficients = first[:, :, 0]
    else:
        # T takes the rest to what is orthogonal to the kept functions.
        onto = -xp.linalg.solve(b[:, :kept, :kept], b[:, :kept, kept:])
        eye = xp.broadcast_to(xp.eye(size - kept, dtype=b.dtype), (len(w), size - kept, size - kept))
        t = xp.concatenate([onto, eye], axis=1)
        transposed = xp.swapaxes(t, 1, 2)
        values, axes = xp.linalg.eigh(transposed @ b @ t)
        root = axes / xp.sqrt(xp.maximum(values, _RIDGE))[:, None, :]  # T root: orthonormal
        t = t @ root
        values, axes = xp.linalg.eigh(xp.swapaxes(t, 1, 2) @ v @ t)
        t = t @ axes
        along = (xp.swapaxes(t, 1, 2) @ d[:, :, None])[:, :, 0]
        error = xp.maximum(values, 0) / count
        threshold = 2 * xp.log(xp.maximum(len(w) * values, 2))
        share = xp.maximum(0, 1 - threshold * error / xp.maximum(along * along, 1e-30))
        coefficients = (t @ (share * along)[:, :, None])[:, :, 0]
        coefficients = coefficients + xp.concatenate([first[:, :, 0], xp.zeros_like(d[:, kept:])], axis=1)
    coefficients = coefficients / lengths
    return coefficients, (coefficients * (d * lengths)).sum(axis=1)


@functools.partial(jax.jit, static_argnames="dtype")
def score_table(source: Source, model_scale: jax.Array, data_scale: jax.Array, dtype) -> jax.Array:
    """psi~(u) = E psi_s(u + d epsilon), epsilon ~ N(0, 1), on the grid of u: [rows, points].

    Sources are spread with scale s and the data with scale d in the same coordinates (s = d unless the data bring
    noise of their own): psi~ is the score that the spread likelihood averages over the data. By 21-node
    Gauss-Hermite quadrature, for rows of (s, d).
    """
    s, d = jnp.asarray(model_scale, dtype), jnp.asarray(data_scale, dtype)
    margin = _POINTS  # psi_s is needed as far out as the largest node, 7.85 d, reaches
    wide = jnp.asarray(_STEP * (np.arange(_POINTS + 2 * margin) - margin) - _REACH, dtype)
    grid = wide[margin : margin + _POINTS]
    psi = source.spread_score(wide[None, :], s[:, None])

    def add(total, node_and_weight):
        node, weight = node_and_weight
        position = (grid + node * d[:, None] - wide[0]) / _STEP
        return total + weight * _interpolate(psi, position)[0], None

    nodes = jnp.asarray(_NODES, dtype), jnp.asarray(_WEIGHTS / _WEIGHTS.sum(), dtype)
    return jax.lax.scan(add, jnp.zeros((len(d), _POINTS), dtype), nodes)[0]


def _interpolate(rows, position):
    """Value and rise per step at fractional positions of rows, linear within and beyond them."""
    xp = library(position)
    index = xp.clip(position.astype(np.int32), 0, rows.shape[1] - 2)
    take = np.take_along_axis if xp is np else functools.partial(jnp.take_along_axis, mode="promise_in_bounds")
    low = take(rows, index, axis=1)
    rise = take(rows, index + 1, axis=1) - low
    return low + (position - index.astype(position.dtype)) * rise, rise


def look_up(table, u):
    """(psi~(u), psi~'(u)) for u [Z, n] from the rows of a table [Z or 1, points]; each [Z, n]."""
    table = library(u).broadcast_to(table, (len(u), table.shape[1]))
    psi, rise = _interpolate(table, (u + _REACH) / _STEP)
    return psi, rise / _STEP
