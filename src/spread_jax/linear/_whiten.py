"""Whitening that does not depend on the units of the columns: second moments of standardised columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.linear._host import library
from spread_jax.linear._moments import centred, host_moments


def _chunk_size(x):
    """Rows of [N, X] in one step: their copy in double precision stays in a CPU's cache."""
    return max(2**15 // x.shape[1], 256)


class Axes(NamedTuple):
    """Principal axes of the standardised columns of a data set.

    Args:
      mean: [X].
      scales: [X], standard deviations of columns; 1 for constant ones.
      axes: [X, min(N, X)], of length one, in standardised coordinates.
      deviations: [min(N, X)], of the signal along the axes, largest first; zero where it is but rounding.
    """

    mean: jax.Array
    scales: jax.Array
    axes: jax.Array
    deviations: jax.Array

    @property
    def rank(self) -> int:
        """How many dimensions the data have; for concrete arrays."""
        return int((self.deviations > 0).sum())

    def redundant(self) -> tuple[list[int], list[int]]:
        """Columns that do not vary, and columns that depend linearly on others before them; for concrete arrays."""
        rows = np.asarray(self.axes * self.deviations)
        basis, constant, dependent = np.zeros((0, rows.shape[1])), [], []
        for index, row in enumerate(rows):
            length = np.linalg.norm(row)
            rest = row - basis.T @ (basis @ row)
            rest = rest - basis.T @ (basis @ rest)
            if length < 0.5:
                constant.append(index)
            elif len(basis) == self.rank or np.linalg.norm(rest) < 1e-6:
                dependent.append(index)
            else:
                basis = np.vstack([basis, rest / np.linalg.norm(rest)])
        return constant, dependent


def principal_axes(x, variance=None) -> Axes:
    """The axes of x [N, X], NumPy (in double precision, in chunks) or JAX; `variance` is that of observation noise.

    Each column is judged by itself: what counts as zero is the rounding of its own values, offset and all, so that
    neither the unit nor the offset of one column decides about another.
    """
    xp = library(x)
    count, size = x.shape
    eps = float(xp.finfo(x.dtype).eps)
    eps_inside = float(np.finfo(np.float64).eps) if xp is np else eps
    if xp is np and count >= size:
        mean, covariance = host_moments(x, _chunk_size(x))
    else:
        rows = (x.astype(np.float64) if xp is np else x) - x[0]
        mean = rows.mean(axis=0)
        rows, mean = rows - mean, x[0] + mean
        # Relative to its largest value no column's square under- or overflows.
        largest = xp.maximum(xp.abs(rows).max(axis=0), xp.finfo(x.dtype).tiny)
        rows = rows / largest
        covariance = None if count < size else rows.T @ rows / count
    if covariance is None:
        squares = xp.square(rows).mean(axis=0)
    else:
        squares = xp.diagonal(covariance)
    scales = xp.sqrt(xp.maximum(squares, 0))
    unit = 1 if xp is np and count >= size else largest
    deviation = scales * unit
    constant = ~(deviation > 4 * eps * xp.abs(mean))
    some_constant = xp is not np or constant.any()
    if some_constant:
        scales, deviation = (xp.where(constant, 1, a) for a in (scales, deviation))
    if covariance is None:
        standard = xp.where(constant, 0, rows / scales)
        _, lengths, axes = xp.linalg.svd(standard, full_matrices=False)
        variances, axes = xp.square(lengths) / count, axes.T
        if variance is not None:
            variances = variances - xp.square(axes / deviation[:, None]).sum(axis=0) * variance
        floor = max(x.shape) * eps_inside
    else:
        correlation = covariance / (scales * scales[:, None])
        if some_constant:
            correlation = xp.where(constant | constant[:, None], 0, correlation)
        if variance is not None:
            correlation = correlation - xp.diag(variance / xp.square(deviation))
        variances, axes = xp.linalg.eigh(correlation)
        variances, axes = variances[::-1], axes[:, ::-1]
        floor = math.sqrt(max(size, 8) * eps_inside)  # squares keep half the digits
    deviations = xp.sqrt(xp.maximum(variances, 0))
    rounding = 4 * eps * (1 + xp.abs(mean) / deviation)
    floor = floor * deviations[0]
    if some_constant or not deviations[-1] > max(floor, rounding.max()):  # what rounds most, rounds no axis more
        rounding = xp.sqrt(xp.square(axes * xp.where(constant, 0, rounding)[:, None]).sum(axis=0))
        deviations = xp.where(deviations > xp.maximum(floor, rounding), deviations, 0)
    return Axes(mean, deviation, axes, deviations)


def principal_components(axes: Axes, count: int):
    """Whitening and its inverse onto the leading principal components of the columns, these in units of x.

    Returns:
      (D [X, count], V [count, X], deviations [count]): V whitens, D V projects onto the components; deviations are
      along orthogonal axes, the first columns of D, which fall in length.
    """
    xp = library(axes.axes)
    from_white, to_white = _axes_of_white(axes)
    largest = xp.maximum(xp.abs(from_white).max(), xp.finfo(from_white.dtype).tiny)
    _, deviations, turn = xp.linalg.svd(from_white / largest, full_matrices=False)
    turn = turn[:count]
    columns = from_white @ turn.T
    largest_entries = xp.take_along_axis(columns, xp.abs(columns).argmax(axis=0)[None], axis=0)[0]
    signs = xp.where(largest_entries < 0, -1, 1).astype(columns.dtype)
    return columns * signs, signs[:, None] * (turn @ to_white), deviations[:count] * largest


def _axes_of_white(axes):
    """(D [X, n], V [n, X]) of all axes, in units of x; zero along those where data do not vary."""
    xp = library(axes.axes)
    if xp is np and axes.deviations[-1] > 0:
        inverse = 1 / axes.deviations
    else:
        inside = axes.deviations > 0
        inverse = xp.where(inside, 1 / xp.where(inside, axes.deviations, 1), 0)
    return axes.scales[:, None] * axes.axes * axes.deviations, (axes.axes * inverse).T / axes.scales


def whiten(x, axes: Axes, count: int, variance=None, dtype=None):
    """x [N, X] along its leading principal components, with a signal of covariance I.

    Args:
      variance: that of observation noise, which counts as no signal.
      dtype: of v; that of x if not given.

    Returns:
      (v [Z, N], D [X, Z], V [Z, X], noise [Z, Z] or None): v = V (x - mean), D V projects onto the components, and
      `noise` is the covariance of observation noise in v.
    """
    host = isinstance(x, np.ndarray)
    if host and count == len(axes.deviations):  # whatever they are along, white data of all axes differ by a turn
        from_white, to_white = _axes_of_white(axes)
    else:
        from_white, to_white, _ = principal_components(axes, count)
    if host:
        dtype = x.dtype if dtype is None else dtype
        v = np.empty((count, len(x)), dtype)
        chunk = _chunk_size(x)
        for start in range(0, len(x), chunk):
            v[:, start : start + chunk] = to_white @ centred(x[start : start + chunk], axes.mean)
        # Squaring x lost digits of its small directions; this restores them, where it is needed.
        if axes.deviations[axes.deviations > 0][-1] < 1e-4 * axes.deviations[0]:
            chunks = (v[:, start : start + chunk] for start in range(0, len(x), chunk))
            covariance = sum((chunk @ chunk.T).astype(np.float64) for chunk in chunks) / len(x)
            noise = 0 if variance is None else variance * to_white @ to_white.T
            factor = np.linalg.cholesky(covariance - noise)
            inverse = np.linalg.inv(factor)
            v = inverse.astype(dtype) @ v
            to_white, from_white = inverse @ to_white, from_white @ factor
    else:
        v = to_white @ (x - axes.mean).T
        covariance = v @ v.T / len(x)
        factor = jnp.linalg.cholesky(covariance if variance is None else covariance - variance * to_white @ to_white.T)
        v = jax.scipy.linalg.solve_triangular(factor, v, lower=True)
        to_white = jax.scipy.linalg.solve_triangular(factor, to_white, lower=True)
        from_white = from_white @ factor
    return v, from_white, to_white, None if variance is None else variance * to_white @ to_white.T
