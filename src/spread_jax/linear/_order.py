"""The order and the signs of components, which the data leave open, by a rule that rounding does not decide."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# Variances closer than this, relative to the larger, count as equal; so do the sizes of entries of one column.
MARGIN = 0.05


def stable_order(mixing):
    """The order and the signs that put the columns of A in the library's order.

    The column that explains most variance, |a_j|^2, comes first. Columns whose variances follow each other within
    `MARGIN` are ordered by their cosine with a fixed direction, (cos 1, cos 2, ...), in which columns that differ
    differ by far more than a rounding. In each column the first entry within `MARGIN` of the largest is positive.

    Args:
      mixing: [X, Z], NumPy or JAX; JAX also under jit and vmap.

    Returns:
      (order [Z], signs [Z]): the columns in order are (mixing * signs)[:, order].
    """
    xp = np if isinstance(mixing, np.ndarray) else jnp
    tiny = xp.finfo(mixing.dtype).tiny
    # Relative to the largest entry of all, so that no square under- or overflows.
    sizes = xp.abs(mixing)
    largest = xp.maximum(sizes.max(), tiny)
    columns, sizes = mixing / largest, sizes / largest
    first = xp.argmax(sizes >= (1 - MARGIN) * sizes.max(axis=0), axis=0)
    signs = xp.where(columns[first, np.arange(columns.shape[1])] < 0, -1, 1).astype(mixing.dtype)
    variances = xp.square(columns).sum(axis=0)
    by_variance = xp.argsort(-variances)
    falling = variances[by_variance]
    apart = falling[1:] < (1 - MARGIN) * falling[:-1]
    if xp is np and apart.all():
        return by_variance, signs
    group = xp.concatenate([np.zeros(1, bool), apart]).cumsum()
    direction = np.cos(np.arange(1.0, len(mixing) + 1))
    direction = (direction / np.linalg.norm(direction)).astype(mixing.dtype)
    cosines = signs * (direction @ columns) / xp.sqrt(xp.maximum(variances, tiny))
    return by_variance[xp.argsort(group - 0.25 * cosines[by_variance])], signs
