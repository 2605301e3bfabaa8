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
from typing import ClassVar

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


@dataclasses.dataclass(frozen=True)
class AnyLaw:
    """u, u / (c + u^2) and 1 / (c + u^2): in their span lies, nearly, the score of any law of unit variance.

    Students' laws have the former as scores, at all scales c; the differences to u are what light tails need, and
    the latter, even in u, what skewed laws need. The first three functions always count, the others where the data
    say so.

    Args:
      least: the smallest scale c.
    """

    least: float

    # Functions, those that always count, and those that are even.
    size: ClassVar[int] = 7
    kept: ClassVar[int] = 3
    even: ClassVar[list[int]] = [2, 5]
    # Whether a grid shows all of them.
    smooth: ClassVar[bool] = True
    # Two sources whose share in each other is uncertain by more than this variance cannot be told apart: turned by any
    # angle they explain the data as well. Of Gaussian sources, chance seldom makes it smaller.
    untold: ClassVar[float] = 0.01

    @classmethod
    def of(cls, num_sources: int, count: int) -> AnyLaw:
        """The functions that N examples of Z sources can bear."""
        # The averages of f' over a window of width c^1/2 must be sure for all pairs of sources at once. In steps, so
        # that few tables serve all N.
        octaves = round(12 * math.log2(30 * num_sources / count)) / 12
        return cls(min(max(2 ** (octaves * 2 / 3), 0.02), 0.3))

    @property
    def widths(self):
        """(c, index of u / (c + u^2), index of 1 / (c + u^2))."""
        return (1.5, 1, 2), (self.least, 3, None), (math.sqrt(1.5 * self.least), 4, 5), (8.0, 6, None)

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
        scales, odd, even = zip(*self.widths, strict=True)
        # Of u / (c + u^2) and of 1 / (c + u^2), [Z, 2, 4].
        which = np.array([odd, [0 if index is None else index for index in even]])
        weights = coefficients[:, which] * (which > 0).astype(u.dtype)
        r = 1 / ((u * u)[:, None] + np.array(scales, u.dtype)[:, None])
        both = weights @ r if library(u) is np else (weights[:, :, :, None] * r[:, None]).sum(axis=2)
        return u * (both[:, 0] + coefficients[:, :1]) + both[:, 1]


@functools.lru_cache(maxsize=16)
def _on_grid(law):
    """What `project` averages for `AnyLaw`, at the points of the grid, [points, 2 K^2 + 3 K], and the unit [K] of each
    function in it: its standard deviation under the Gaussian law.
    """
    f, slope = (a[:, 0] for a in law.functions(_GRID[None]))
    weights = np.exp(-0.5 * np.square(_GRID)) * np.gradient(_GRID)
    units = np.sqrt(np.cov(f, aweights=weights).diagonal())[:, None]
    f, slope = f / units, slope / units
    off = slope - f * _GRID
    gram = lambda a: (a[:, None] * a).reshape(-1, a.shape[1])
    return np.concatenate([gram(f), gram(off), slope, f, off]).T, units[:, 0]


@dataclasses.dataclass(frozen=True)
class NamedLaw:
    """The spread score of a law that is given and, where the data say that the law is wrong, u.

    Args:
      table: [Z or 1, points], as `score_table` makes it.
    """

    table: jax.Array | np.ndarray
    size: ClassVar[int] = 2
    kept: ClassVar[int] = 1
    even: ClassVar[list[int]] = []
    smooth: ClassVar[bool] = False
    untold: ClassVar[float] = 0.2  # nothing of the law is estimated: chance does not look like a law

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
      (coefficients [Z, K], E psi' [Z], Var psi [Z]).

    Source: D. T. Pham and P. Garat, Blind separation of mixture of independent sources through a quasi-maximum
      likelihood approach, IEEE Trans. Signal Processing 45, 1997, for scores as projections.
    """
    xp, size = library(w), law.size
    if law.smooth:
        on_grid, units = _on_grid(law)
        counts, units = _histogram(w, v_blocks), units.astype(w.dtype)
        if xp is np:  # few sources reach the ends of the grid
            reached = np.flatnonzero(counts.any(axis=0))
            reached = slice(reached[0], reached[-1] + 1)
            sums = counts[:, reached] @ on_grid[reached]
        else:
            sums = counts @ xp.asarray(on_grid, w.dtype)
    else:

        def statistics(v, weigh):
            u = w.astype(v.dtype) @ v
            f, slope = law.functions(u)
            off = slope - f * u
            gram = lambda a: (a.transpose(1, 0, 2) @ weigh(a).transpose(1, 2, 0)).reshape(len(u), -1)
            return (xp.concatenate([gram(f), gram(off), *(weigh(a).sum(axis=2).T for a in (slope, f, off))], axis=1),)

        sums, units = mean_over(statistics, v_blocks)[0], 1
    means = sums[:, -2 * size :].reshape(-1, 2, size)
    products = (means[:, :, :, None] * means[:, :, None, :]).reshape(len(w), -1)
    moments = xp.concatenate([sums[:, : 2 * size * size] - products, sums[:, 2 * size * size : -2 * size]], axis=1)
    combine = _combine_alike if law.even and len(w) > 1 else _combine
    coefficients = combine(law, moments, count, len(w))
    covariance, _, d = _parts(law, moments)
    variance = (coefficients * (covariance @ coefficients[:, :, None])[:, :, 0]).sum(axis=1)
    return coefficients / units, (coefficients * d).sum(axis=1), variance


def _parts(law, moments):
    """B [n, K, K], the covariance of errors of d for one example [n, K, K], and d [n, K], of their row each."""
    square = law.size**2
    matrix = lambda a: a.reshape(-1, law.size, law.size)
    return matrix(moments[:, :square]), matrix(moments[:, square : 2 * square]), moments[:, 2 * square :]


def _histogram(w, v_blocks):
    """The sources u = W v, counted on the grid: [Z, points], rows that sum to one."""
    offsets = (len(_GRID) * np.arange(len(w)) + _HALF)[:, None]
    if not isinstance(v_blocks, list):
        # Each example counts at the two points beside it, so that derivatives go through.
        def statistics(v, weigh):
            u = w @ v
            place = _HALF * u / (_BEND + jnp.abs(u))
            below = jnp.clip(jnp.floor(place), -_HALF, _HALF - 1)
            index, share = below.astype(int) + offsets, place - below
            counts = jnp.zeros(len(w) * len(_GRID), v.dtype)
            return (counts.at[index].add(weigh(1 - share)).at[index + 1].add(weigh(share)),)

        return mean_over(statistics, v_blocks)[0].reshape(len(w), -1)
    counts = 0
    for v in v_blocks:
        u = w.astype(v.dtype) @ v
        place = np.abs(u)
        place += _BEND
        np.divide(u, place, out=place)
        place *= _HALF
        place += (offsets + 0.5).astype(v.dtype)  # a half, so that truncation rounds
        counts = counts + np.bincount(place.ravel().astype(int), minlength=len(w) * len(_GRID))
    return counts.reshape(len(w), -1) / sum(v.shape[1] for v in v_blocks)


def _combine(law, moments, count, num_sources):
    """Coefficients [n, K] from the moments of n sources, as in `_parts`.

    The first `law.kept` functions get the coefficients that the data ask for. In the rest of the span, the coefficient
    of each direction, t standard errors from zero, is shrunk by 1 - log(Z q) / t^2, to zero if that is negative, with q
    the mean square of f' - f u over that of f: chance makes t^2 as large as twice that, where Z sources are turned and
    f oscillates q^1/2 times. Half of it is right on the whole: a score that is too smooth costs more than a rough one.

    Args:
      count: examples, one number or [n, 1].
      num_sources: Z, one number or [n, 1].
    """
    xp, kept = library(moments), law.kept
    covariance, noise, d = _parts(law, moments)
    # What is not known of d counts as if f varied by as much: some f hardly varies where a law is discrete.
    b = (
        covariance
        + noise / xp.asarray(count, d.dtype).reshape(-1, 1, 1)
        + np.asarray(_RIDGE * np.eye(law.size), d.dtype)
    )
    # Directions of length one, each orthogonal to the functions before it; the rest then turned to independent errors.
    directions = xp.linalg.inv(xp.linalg.cholesky(b))
    along = (directions @ d[:, :, None])[:, :, 0]
    rest = directions[:, kept:]
    values, axes = xp.linalg.eigh(rest @ noise @ xp.swapaxes(rest, 1, 2))
    turned = (along[:, None, kept:] @ axes)[:, 0]
    threshold = xp.log(xp.maximum(num_sources * values, 2)) * xp.maximum(values, 0) / count
    square = turned * turned
    counts = square > threshold  # an even function has a square of 0 in a common score, which divides nothing
    turned = xp.where(counts, 1 - threshold / xp.where(counts, square, 1), 0) * turned
    along = xp.concatenate([along[:, :kept], (axes @ turned[:, :, None])[:, :, 0]], axis=1)
    return (along[:, None, :] @ directions)[:, 0]


def _combine_alike(law, moments, count, num_sources):
    """`_combine`, but with the same coefficients for all sources whose laws cannot be told from each other.

    The tails are heavy or light as E f' - E f u is positive or negative for f = u / (c + u^2): those of either kind are
    compared with what they have in common. Signs of sources are arbitrary, so that a common score is odd; a source that
    is skewed is told apart by that.
    """
    xp, dtype = library(moments), moments.dtype
    covariance, noise, d = _parts(law, moments)
    mask, nobody, more, most = _of_odd_scores(law, dtype)
    precision = xp.linalg.inv(noise * more + most)
    sides = (d[:, 1] < covariance[:, 0, 1]) == np.array([[False], [True]])

    def together(alike):
        members = xp.where(alike, sides, False).astype(dtype)
        totals = members.sum(axis=1, keepdims=True)
        means = (members @ moments) * mask / xp.maximum(totals, 1)
        return xp.where(totals > 0, means, nobody), count * totals + 1

    def fits(common):
        rest = d - (covariance @ common[:, :, None])[:, :, 0]
        return count * xp.vecdot(rest, (precision @ rest[:, :, None])[:, :, 0]) < _ALIKE

    def of_side(found):
        return xp.where(sides[1][:, None], found[1], found[0])

    means, counts = together(True)
    counts = xp.concatenate([xp.full((num_sources, 1), count, dtype), counts])
    chances = np.array([[num_sources]] * num_sources + [[1], [1]], dtype)
    found = _combine(law, xp.concatenate([moments, means]), counts, chances)
    own, common = found[:num_sources], of_side(found[num_sources:])
    alike = fits(common)
    if xp is jnp or not alike.all():
        # Those of another law have had a say: once more without them, if more than one is left.
        left = xp.where(alike, sides, False)
        several = left.sum(axis=1) > 1
        if xp is jnp or (several & (left != sides).any(axis=1)).any():
            common = of_side(_combine(law, *together(alike), 1))
            alike = alike & fits(common)
        alike = alike & xp.where(sides[1], several[1], several[0])
    return xp.where(alike[:, None], common, own)


@functools.lru_cache(maxsize=16)
def _of_odd_scores(law, dtype):
    """Constants of `_combine_alike`.

    Returns:
      What the moments of sources of either sign are multiplied by, 0 or 1; moments of nobody, whose eigenvalues differ:
      derivatives of equal ones would be no numbers; and by what the covariance of errors is multiplied and how much is
      added to it, so that it has an inverse.
    """
    odd, eye = np.ones(law.size), np.eye(law.size)
    odd[law.even] = 0
    both = (np.outer(odd, odd) + np.diag(1 - odd)).ravel()
    nobody = np.concatenate([eye.ravel(), np.diag(1.0 + np.arange(law.size)).ravel(), np.zeros(law.size)])
    return tuple(a.astype(dtype) for a in (np.concatenate([both, both, odd]), nobody, 1 + 1e-4 * eye, 1e-9 * eye))


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
