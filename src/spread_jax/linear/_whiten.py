"""Whitening that does not depend on the units of the columns: second moments of standardised columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.linear._host import library
from spread_jax.linear._moments import host_moments

_CHUNK = 8192


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
        mean, covariance = host_moments(x, _CHUNK)
    else:
        centred = (x.astype(np.float64) if xp is np else x) - x[0]
        mean = centred.mean(axis=0)
        centred, mean = centred - mean, x[0] + mean
        # Relative to its largest value no column's square under- or overflows.
        largest = xp.maximum(xp.abs(centred).max(axis=0), xp.finfo(x.dtype).tiny)
        centred = centred / largest
        covariance = None if count < size else centred.T @ centred / count
    if covariance is None:
        squares = xp.square(centred).mean(axis=0)
    else:
        squares = xp.diagonal(covariance)
    scales = xp.sqrt(xp.maximum(squares, 0))
    unit = 1 if xp is np and count >= size else largest
    constant = ~(scales * unit > 4 * eps * xp.abs(mean))
    scales = xp.where(constant, 1, scales)
    if covariance is None:
        standard = xp.where(constant, 0, centred / scales)
        _, lengths, axes = xp.linalg.svd(standard, full_matrices=False)
        variances, axes = xp.square(lengths) / count, axes.T
        if variance is not None:
            variances = variances - xp.square(axes / (scales * unit)[:, None]).sum(axis=0) * variance
        floor = max(x.shape) * eps_inside
    else:
        correlation = xp.where(constant | constant[:, None], 0, covariance / scales / scales[:, None])
        if variance is not None:
            correlation = correlation - xp.diag(variance / xp.square(scales * unit))
        variances, axes = xp.linalg.eigh(correlation)
        variances, axes = variances[::-1], axes[:, ::-1]
        floor = math.sqrt(max(size, 8) * eps_inside)  # squares keep half the digits
    deviations = xp.sqrt(xp.maximum(variances, 0))
    rounding = xp.where(constant, 0, eps * (1 + xp.abs(mean) / (scales * unit)))
    rounding = 4 * xp.sqrt(xp.square(axes * rounding[:, None]).sum(axis=0))
    deviations = xp.where(deviations > xp.maximum(floor * deviations[0], rounding), deviations, 0)
    return Axes(mean, xp.where(constant, 1, scales * unit), axes, deviations)


def principal_components(axes: Axes, count: int):
    """Whitening and its inverse onto the leading principal components of the columns, these in units of x.

    Returns:
      (D [X, count], V [count, X], deviations [count]): V whitens, D V projects onto the components; deviations are
      along orthogonal axes, the first columns of D, which fall in length.
    """
    xp = library(axes.axes)
    inside = axes.deviations > 0
    from_white = axes.scales[:, None] * axes.axes * axes.deviations
    inverse = xp.where(inside, 1 / xp.where(inside, axes.deviations, 1), 0)
    to_white = (axes.axes * inverse).T / axes.scales
    largest = xp.maximum(xp.abs(from_white).max(), xp.finfo(from_white.dtype).tiny)
    _, deviations, turn = xp.linalg.svd(from_white / largest, full_matrices=False)
    turn = turn[:count]
    columns = from_white @ turn.T
    largest_entries = xp.take_along_axis(columns, xp.abs(columns).argmax(axis=0)[None], axis=0)[0]
    signs = xp.where(largest_entries < 0, -1, 1).astype(columns.dtype)
    return columns * signs, signs[:, None] * (turn @ to_white), deviations[:count] * largest


def whiten(x, axes: Axes, count: int, variance=None, dtype=None):
    """x [N, X] along its leading principal components, with a signal of covariance I.

    Args:
      variance: that of observation noise, which counts as no signal.
      dtype: of v; that of x if not given.

    Returns:
      (v [Z, N], D [X, Z], V [Z, X], noise [Z, Z] or None): v = V (x - mean), D V projects onto the components, and
      `noise` is the covariance of observation noise in v.
    """
    from_white, to_white, _ = principal_components(axes, count)
    if isinstance(x, np.ndarray):
        dtype = x.dtype if dtype is None else dtype
        v = np.empty((count, len(x)), dtype)
        for start in range(0, len(x), _CHUNK):
            v[:, start : start + _CHUNK] = to_white @ (x[start : start + _CHUNK] - axes.mean).T
        starts = range(0, len(x), _CHUNK)
        chunks = (v[:, start : start + _CHUNK] for start in starts)
        covariance = sum((chunk @ chunk.T).astype(np.float64) for chunk in chunks) / len(x)
        factor = np.linalg.cholesky(covariance if variance is None else covariance - variance * to_white @ to_white.T)
        inverse = np.linalg.inv(factor)
        # Squaring x lost digits of its small directions; this restores them, where it is needed.
        if np.abs(factor - np.eye(count)).max() > 1e-5:
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
