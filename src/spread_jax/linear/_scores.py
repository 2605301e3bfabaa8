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
# Of chi-square with seven degrees of freedom, the errors of d, one in twenty is above this.
_ALIKE = 14.0
# In NumPy the values of a source are counted on a grid that is even in u / (8 + |u|): a score needs no more than its
# law, and a step is 0.03 about zero, 2 at u = 50.
_BEND, _HALF = 8.0, 256
_PLACES = np.clip(np.arange(-_HALF, _HALF + 1) / _HALF, 0.5 / _HALF - 1, 1 - 0.5 / _HALF)
_GRID = _BEND * _PLACES / (1 - np.abs(_PLACES))


class AnyLaw:
    """u, u / (c + u^2) and 1 / (c + u^2): in their span lies, nearly, the score of any law of unit variance.

    Students' laws have the former as scores, at all scales c; the differences to u are what light tails need, and
    the latter, even in u, what skewed laws need. The first three functions always count, the others where the data
    say so.
    """

    # Functions, those that always count, and those that are even.
    size, kept, even = 7, 3, (2, 5)
    # Whether a grid shows all of them.
    smooth = True
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

    @functools.cached_property
    def on_grid(self):
        """What `project` averages, at the points of the grid: [points, 2 K^2 + 3 K]."""
        f, slope = (a[:, 0] for a in self.functions(_GRID[None]))
        off = slope - f * _GRID
        gram = lambda a: (a[:, None] * a).reshape(-1, a.shape[1])
        return np.concatenate([gram(f), gram(off), f, off, slope]).T

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
    size, kept, even, smooth = 2, 1, (), False
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

    For one example an estimate of d is off by f' - f psi; u is taken for psi, which is what remains where it matters.
    Sources whose laws a test cannot tell apart share one score, which all their examples estimate.

    Args:
      w: [Z, Z].
      v_blocks: whitened data in blocks.
      count: examples in them.

    Returns:
      (coefficients [Z, K], E psi' [Z]).

    Source: D. T. Pham and P. Garat, Blind separation of mixture of independent sources through a quasi-maximum
      likelihood approach, IEEE Trans. Signal Processing 45, 1997, for scores as projections.
    """

    def statistics(u, weights):
        f, slope = law.functions(u)
        off = slope - f * u
        # One weight for all, as in NumPy, is left to the sums.
        weigh, of_sum = (lambda a: a * weights, 1) if weights.ndim else (lambda a: a, weights)
        gram = lambda a: a.transpose(1, 0, 2) @ weigh(a).transpose(1, 2, 0) * of_sum
        mean = lambda a: weigh(a).sum(axis=2).T * of_sum
        return gram(f), gram(off), mean(f), mean(off), mean(slope)

    if law.smooth and isinstance(v_blocks, list):
        sums = _histogram(w, v_blocks) @ law.on_grid
        squares, means = sums[:, : 2 * law.size**2], sums[:, 2 * law.size**2 :]
        covariance, noise = (a.reshape(-1, law.size, law.size) for a in np.split(squares, 2, axis=1))
        f, off, d = np.split(means, 3, axis=1)
    else:
        of_block = lambda v, weights: statistics(w.astype(v.dtype) @ v, weights)
        covariance, noise, f, off, d = mean_over(of_block, v_blocks)
    covariance = covariance - f[:, :, None] * f[:, None, :]
    noise = noise - off[:, :, None] * off[:, None, :]
    combine = _combine_alike if law.even and len(w) > 1 else _combine
    coefficients = combine(law, covariance, noise, d, count, len(w))
    return coefficients, (coefficients * d).sum(axis=1)


def _histogram(w, v_blocks):
    """The sources u = W v, counted on the grid: [Z, points], rows that sum to one."""
    offsets = (len(_GRID) * np.arange(len(w)) + _HALF + 0.5)[:, None]  # a half, so that truncation rounds
    counts = np.zeros(len(w) * len(_GRID), int)
    for v, _ in v_blocks:
        u = w.astype(v.dtype) @ v
        place = np.abs(u)
        place += _BEND
        np.divide(u, place, out=place)
        place *= _HALF
        place += offsets.astype(v.dtype)
        counts += np.bincount(place.ravel().astype(int), minlength=len(counts))
    counts = counts.reshape(len(w), -1)
    return counts / counts[0].sum()


def _combine(law, covariance, noise, d, count, num_sources):
    """Coefficients [n, K] from B [n, K, K], the covariance of errors of d for one example [n, K, K], and d [n, K].

    The first `law.kept` functions get the coefficients that the data ask for. In the rest of the span, the coefficient
    of each direction, t standard errors from zero, is shrunk by 1 - log(Z q) / t^2, to zero if that is negative, with q
    the mean square of f' - f u over that of f: chance makes t^2 as large as twice that, where Z sources are turned and
    f oscillates q^1/2 times. Half of it is right on the whole: a score that is too smooth costs more than a rough one.

    Args:
      count: examples, one number or [n].
      num_sources: Z, one number or [n].
    """
    xp, size, kept = library(d), law.size, law.kept
    count, num_sources = (xp.asarray(a, d.dtype).reshape(-1, 1) for a in (count, num_sources))
    lengths = xp.sqrt(xp.maximum(xp.diagonal(covariance, axis1=1, axis2=2), _RIDGE))
    outer = lengths[:, :, None] * lengths[:, None, :]
    noise = noise / outer
    # What is not known of d counts as if f varied by as much: some f hardly varies where a law is discrete.
    b = covariance / outer + noise / count[:, :, None] + _RIDGE * xp.eye(size, dtype=d.dtype)
    d = d / lengths
    solved = xp.linalg.solve(b[:, :kept, :kept], xp.concatenate([d[:, :kept, None], b[:, :kept, kept:]], axis=2))
    if size == kept:
        return solved[:, :, 0] / lengths
    first = xp.concatenate([solved[:, :, 0], xp.zeros_like(d[:, kept:])], axis=1)
    # The rows of T are orthogonal to the kept functions, then of length one, then of independent errors.
    eye = xp.broadcast_to(xp.eye(size - kept, dtype=d.dtype), (len(d), size - kept, size - kept))
    t = xp.concatenate([-xp.swapaxes(solved[:, :, 1:], 1, 2), eye], axis=2)
    t = xp.linalg.solve(xp.linalg.cholesky(t @ b @ xp.swapaxes(t, 1, 2)), t)
    values, axes = xp.linalg.eigh(t @ noise @ xp.swapaxes(t, 1, 2))
    t = xp.swapaxes(axes, 1, 2) @ t
    along = (t @ d[:, :, None])[:, :, 0]
    threshold = xp.log(xp.maximum(num_sources * values, 2)) * xp.maximum(values, 0) / count
    square = along * along
    counts = square > threshold  # an even function has a square of 0 in a common score, which divides nothing
    along = xp.where(counts, 1 - threshold / xp.where(counts, square, 1), 0) * along
    return (first + (along[:, None, :] @ t)[:, 0]) / lengths


def _combine_alike(law, covariance, noise, d, count, num_sources):
    """`_combine`, but with the same coefficients for all sources whose laws cannot be told from each other.

    The tails are heavy or light as E f' - E f u is positive or negative for f = u / (c + u^2): those of either kind are
    compared with what they have in common. Signs of sources are arbitrary, so that a common score is odd; a source that
    is skewed is told apart by that.
    """
    xp = library(d)
    odd = np.array([index not in law.even for index in range(law.size)], float).astype(d.dtype)
    both = np.outer(odd, odd) + np.diag(1 - odd)
    nobody = np.diag(1 + np.arange(law.size)).astype(d.dtype)
    lengths = xp.sqrt(xp.maximum(xp.diagonal(noise, axis1=1, axis2=2), _RIDGE))
    outer = lengths[:, :, None] * lengths[:, None, :]
    precision = count * xp.linalg.inv(noise / outer + 1e-4 * xp.eye(law.size, dtype=d.dtype)) / outer
    light = (d[:, 1] < covariance[:, 0, 1]).astype(int)

    def together(alike):
        members = (alike * (light == np.arange(2)[:, None])).astype(d.dtype)
        totals = members.sum(axis=1)
        share = members / xp.maximum(totals, 1)[:, None]
        mean = lambda a: (share @ a.reshape(num_sources, -1)).reshape(2, *a.shape[1:])
        # Of nobody, something whose eigenvalues differ: derivatives of equal ones would be no numbers.
        empty = (totals == 0)[:, None, None]
        squares = xp.where(empty, xp.eye(law.size, dtype=d.dtype), mean(covariance) * both)
        return (squares, xp.where(empty, nobody, mean(noise) * both), mean(d) * odd), count * totals + 1

    def fits(common):
        rest = d - (covariance @ common[:, :, None])[:, :, 0]
        return (rest * (precision @ rest[:, :, None])[:, :, 0]).sum(axis=1) < _ALIKE

    means, totals = together(xp.ones(num_sources))
    counts = xp.concatenate([xp.full(num_sources, count, d.dtype), totals.astype(d.dtype)])
    own_and_common = map(xp.concatenate, zip((covariance, noise, d), means, strict=True))
    found = _combine(law, *own_and_common, counts, np.append(np.full(num_sources, num_sources), [1, 1]))
    own, common = found[:num_sources], found[num_sources:][light]
    alike = fits(common)
    mixed = lambda side: 0 < (alike & (light == side)).sum() < (light == side).sum()
    if xp is jnp or mixed(0) or mixed(1):  # those of another law have had a say: once more without them
        common = _combine(law, *together(alike)[0], together(alike)[1], 1)[light]
        alike = alike & fits(common)
    return xp.where(alike[:, None], common, own)


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
