"""How far an estimated mixing matrix is from the true one, whose columns have no order, sign or (perhaps) length."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch
from spread_jax.linear._host import promotes_as_numpy

__all__ = ["amari_distance", "match_columns", "mixing_error"]

Kind = Literal["raw", "direction"]


def match_columns(estimate: np.ndarray, truth: np.ndarray, *, kind: Kind = "raw") -> np.ndarray:
    r"""The columns of the estimate in the order, and with the signs, of the truth.

    The signed permutation that minimises sum |A_est - A| over all of them, found exactly as a linear assignment.
    Runs on the host, not inside jit.

    Args:
      estimate: [X, Z].
      truth: A, [X, Z].
      kind: "raw", or "direction", which first gives each column of the estimate the length of the column of
        A that it is compared with.

    Returns:
      [X, Z], float64: permuted, signed and (for "direction") rescaled estimate.

    Raises:
      ImportError: if SciPy is not installed.
      ValueError: if shapes differ or are not [X, Z], an entry is not finite, or the kind is unknown.

    Example:
      >>> import numpy as np
      >>> truth = np.array([[1.0, 0.0], [1.0, 2.0]])
      >>> print(match_columns(np.array([[0.0, -1.0], [2.0, -1.0]]), truth))
      [[1. 0.]
       [1. 2.]]
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('match_columns needs SciPy: pip install "spread-jax[eval]".') from error
    estimate, truth = _check_pair(estimate, truth)
    if kind not in ("raw", "direction"):
        raise ValueError(f"kind must be 'raw' or 'direction', got {kind!r}.")
    # candidates[:, j, k]: column k of the estimate as an estimate of column j of the truth.
    candidates = np.broadcast_to(estimate[:, None, :], (*truth.shape, truth.shape[1]))
    if kind == "direction":
        length = np.linalg.norm(estimate, axis=0)
        wanted = np.linalg.norm(truth, axis=0)
        candidates = candidates * (wanted[:, None] / np.where(length > 0, length, 1))
    same = np.abs(candidates - truth[:, :, None]).sum(axis=0)
    opposite = np.abs(candidates + truth[:, :, None]).sum(axis=0)
    rows, columns = linear_sum_assignment(np.minimum(same, opposite))
    signs = np.where(same[rows, columns] <= opposite[rows, columns], 1.0, -1.0)
    return candidates[:, rows, columns] * signs + 0.0  # no negative zeros


def mixing_error(estimate: np.ndarray, truth: np.ndarray, *, kind: Kind = "raw") -> float:
    r"""Relative error of a mixing matrix, mean |A_est - A| / mean |A| over entries, after the best signed permutation.

    Where all |A_ij| are equal, as in the paper's +-1 matrices, this is its mean of |A_est - A| / |A|; unlike
    that it is defined where A has zeros. Runs on the host, not inside jit.

    Args:
      estimate: [X, Z].
      truth: A, [X, Z], not all zero.
      kind: "raw" counts errors of length; "direction" gives the estimate's columns the lengths of A's first.

    Returns:
      A number without unit; 0 for a perfect estimate.

    Raises:
      ImportError: if SciPy is not installed.
      ValueError: if shapes differ or are not [X, Z], an entry is not finite, the truth is zero, or the kind is
        unknown.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic ICA.

    Example:
      >>> import numpy as np
      >>> truth = np.array([[1.0, -1.0], [1.0, 1.0]])
      >>> [round(mixing_error(1.5 * truth[:, ::-1], truth, kind=kind), 3) for kind in ("raw", "direction")]
      [0.5, 0.0]
    """
    matched = match_columns(estimate, truth, kind=kind)
    truth = np.asarray(truth, np.float64)
    size = np.abs(truth).mean()
    if size == 0:
        raise ValueError("truth must have an entry that is not zero.")
    return float(np.abs(matched - truth).mean() / size)


@promotes_as_numpy
def amari_distance(unmixing: jax.Array, mixing: jax.Array) -> jax.Array:
    r"""How far P = |W A| is from a scaled permutation: 0 if the sources are separated, at most 1.

      sum_i (sum_j P_ij / max_j P_ij - 1) + sum_j (sum_i P_ij / max_i P_ij - 1), over 2 Z (Z - 1).

    It ignores order, sign and length of the columns, needs no matching, and works under jit, vmap and grad.

    Args:
      unmixing: W, [Z, X], estimated.
      mixing: A, [X, Z], true.

    Returns:
      Scalar. NaN if a row or a column of W A is zero.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    Source: Amari, Cichocki and Yang, A New Learning Algorithm for Blind Signal Separation, 1996, normalised.

    Example:
      >>> import jax.numpy as jnp
      >>> print(amari_distance(jnp.array([[0.0, 2.0], [-1.0, 0.0]]), jnp.eye(2)))
      0.0
    """
    unmixing, mixing = check_batch("unmixing", unmixing), check_batch("mixing", mixing)
    if unmixing.ndim != 2 or unmixing.shape != mixing.shape[::-1]:
        raise ValueError(f"unmixing must have shape [Z, X] and mixing [X, Z], got {unmixing.shape} and {mixing.shape}.")
    product = jnp.abs(jnp.matmul(unmixing, mixing, precision=jax.lax.Precision.HIGHEST))
    num_sources = len(product)
    if num_sources == 1:
        return jnp.zeros((), product.dtype)
    rows = (product / product.max(axis=1, keepdims=True)).sum() - num_sources
    columns = (product / product.max(axis=0, keepdims=True)).sum() - num_sources
    return (rows + columns) / (2 * num_sources * (num_sources - 1))


def _check_pair(estimate, truth):
    estimate, truth = np.asarray(estimate, np.float64), np.asarray(truth, np.float64)
    if truth.ndim != 2 or estimate.shape != truth.shape or not truth.size:
        raise ValueError(f"estimate and truth must have the same shape [X, Z], got {estimate.shape} and {truth.shape}.")
    for name, value in (("estimate", estimate), ("truth", truth)):
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    return estimate, truth
