"""Distances between sets of features.

Everything here runs on the host in NumPy float64: a Fréchet distance is a small difference of large traces, and
float32, JAX's default, leaves it few digits. Features are [n, d], one row for each image, made by any callable.
Memory is bounded by `chunk_size` wherever pairs are visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from spread_jax._checks import check_count
from spread_jax._pytree import frozen_pytree
from spread_jax._random import check_one_key
from spread_jax.divergences import Estimate

__all__ = [
    "Moments",
    "PrecisionRecall",
    "frechet_distance",
    "frechet_infinity",
    "kernel_distance",
    "nearest_neighbours",
    "precision_recall_density_coverage",
]

_CHUNK = 2048
_PAIR_NUMBERS = 2**22  # of features of pairs that are held at once


@frozen_pytree
class Moments:
    r"""Count, mean and scatter of a stream of features; nothing else is kept.

    Args:
      count: examples seen.
      mean: [d].
      scatter: [d, d], the sum over examples of (f - mean) (f - mean)^T.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, equation 2.1: means and
    scatters of two parts are merged without ever forming a sum of squares about zero, which cancels.

    Example:
      >>> import numpy as np
      >>> features = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
      >>> moments = Moments.of(features[:2]).update(features[2:])
      >>> print(moments.mean, moments.covariance[0])
      [2. 2.] [4. 3.]
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """The moments of features [n, d]."""
        features = _check_features("features", features)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray, *, count: int) -> Moments:
        """The moments of a stored mean [d] and unbiased covariance [d, d], as published statistics have them.

        Args:
          mean: [d].
          covariance: [d, d], symmetric.
          count: examples that they were taken from, at least 2. Only `merge` and `update` ask for it: where it is
            unknown, any gives the same Fréchet distance.

        Raises:
          ValueError: another shape, or numbers that no features have as a covariance.

        Example:
          >>> import numpy as np
          >>> p = Moments.from_covariance(np.zeros(2), np.eye(2), count=1000)
          >>> frechet_distance(p, Moments.from_covariance(np.ones(2), 4 * np.eye(2), count=1000))
          4.0
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        count = check_count("count", count)
        if count < 2:
            raise ValueError(f"count must be at least 2, since a covariance needs as many examples, got {count}.")
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise ValueError(
                f"mean must have shape [d] and covariance [d, d], got {mean.shape} and {covariance.shape}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean and covariance must be finite, got NaN or infinity.")
        if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6 * np.abs(covariance).max(initial=0)):
            raise ValueError("covariance must be symmetric, got a matrix that differs from its transpose.")
        if (np.diagonal(covariance) < 0).any():
            raise ValueError("covariance must have no negative variance on its diagonal.")
        return cls(count, mean, covariance * (count - 1))

    def update(self, features: np.ndarray) -> Moments:
        """These moments and those of further features [n, d]."""
        return self.merge(Moments.of(features))

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together.

        Raises:
          ValueError: the features differ in dimension.
          TypeError: `other` are no `Moments`.
        """
        _check_moments("other", other)
        _check_same_dimension("other", other.mean, self.mean)
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], the unbiased estimate; needs at least two examples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 examples, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(p: Moments, q: Moments) -> float:
    r"""Fréchet distance of the Gaussians with the moments of p and q,

      |m_p - m_q|^2 + tr C_p + tr C_q - 2 tr (C_p^{1/2} C_q C_p^{1/2})^{1/2}.

    The last trace is the sum of the singular values of C_p^{1/2} C_q^{1/2}, of real symmetric square roots: it has
    no complex part to throw away, needs no full rank, and rounding moves it by eps, where the square root of an
    eigenvalue that should be zero moves by sqrt(eps). With Inception features this is the FID.

    Args:
      p: moments of one set of features.
      q: moments of the other, of the same dimension.

    Returns:
      The distance, at least 0, in squared units of the features. It is biased upwards by about c / n for n
      examples: compare equal numbers only, or see `frechet_infinity`.

    Raises:
      ValueError: different dimensions, or fewer than two examples.
      TypeError: p or q are no `Moments`: see `Moments.of` and `Moments.from_covariance`.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6.

    Example:
      >>> import numpy as np
      >>> features = np.random.default_rng(0).standard_normal((50, 3))
      >>> print(round(frechet_distance(Moments.of(features), Moments.of(features + 2.0)), 6))
      12.0
    """
    _check_moments("p", p)
    _check_moments("q", q)
    _check_same_dimension("q", q.mean, p.mean)
    first, second = _square_root(p.covariance), _square_root(q.covariance)
    shared = np.linalg.svd(first @ second, compute_uv=False).sum()
    # Traces as sums of squares of the same roots: equal sets then cancel to rounding.
    total = np.square(p.mean - q.mean).sum() + np.square(first).sum() + np.square(second).sum() - 2 * shared
    return max(float(total), 0.0)


def frechet_infinity(
    p_features: np.ndarray,
    q_features: np.ndarray,
    *,
    key: jax.Array,
    num_sizes: int = 5,
    num_blocks: int = 8,
) -> Estimate:
    r"""Fréchet distance extrapolated to infinitely many examples.

    The distance of n examples from each side exceeds that of the distributions by about c / n. It is taken at
    several n between a quarter and all of the examples, averaged at each n over disjoint subsets, and the line
    a + c / n through them, weighted by the number of subsets, is read off at 1 / n = 0. Both sides shrink
    together, so the bias of a small set of real images is removed as well.

    Args:
      p_features: [n, d].
      q_features: [m, d]; the smaller of n and m counts, the rest of the larger set is left unused.
      key: a JAX random key, for the subsets.
      num_sizes: how many n, at least 2.
      num_blocks: parts of the data that are left out in turn for the standard error, at least 2.

    Returns:
      Estimate(value, standard_error). The error is a delete-a-block jackknife over the whole procedure: the
      subsets share examples, so the residuals of the line would understate it. The value can be negative.

    Raises:
      ValueError: different dimensions, or too few examples.

    Source: Chong and Forsyth, Effectively Unbiased FID, CVPR 2020, section 4, there with one side only.

    Example:
      >>> import jax, numpy as np
      >>> p, q = np.random.default_rng(0).standard_normal((2, 400, 3))
      >>> estimate = frechet_infinity(p, q, key=jax.random.key(0))
      >>> bool(abs(estimate.value) < 5 * estimate.standard_error)
      True
    """
    p_features, q_features = _check_pair("p_features", p_features, "q_features", q_features)
    num_sizes, num_blocks = check_count("num_sizes", num_sizes), check_count("num_blocks", num_blocks)
    count = min(len(p_features), len(q_features))
    if min(num_sizes, num_blocks) < 2 or count < 8 * num_blocks:
        raise ValueError(
            "num_sizes and num_blocks must be at least 2, and each side must hold at least 8 examples for each "
            f"block, got {num_sizes}, {num_blocks} and {count} examples; pass more examples or fewer blocks."
        )
    chance = _generator(key)
    p_features, q_features = (f[chance.permutation(len(f))[:count]] for f in (p_features, q_features))
    blocks = np.array_split(np.arange(count), num_blocks)
    whole = _extrapolate(p_features, q_features, num_sizes)
    left_out = np.array([
        _extrapolate(np.delete(p_features, block, axis=0), np.delete(q_features, block, axis=0), num_sizes)
        for block in blocks
    ])  # fmt: skip
    variance = (num_blocks - 1) / num_blocks * np.square(left_out - left_out.mean()).sum()
    return Estimate(whole, math.sqrt(variance))


def kernel_distance(
    p_features: np.ndarray,
    q_features: np.ndarray,
    *,
    num_subsets: int | None = None,
    subset_size: int = 1000,
    key: jax.Array | None = None,
    chunk_size: int = _CHUNK,
) -> Estimate:
    r"""Unbiased squared MMD with the kernel (<f, f'> / d + 1)^3. With Inception features this is the KID.

    Without `num_subsets`, all pairs of all examples are used once, and the standard error is that of the
    two-sample U-statistic with its second-order part, so that it holds for equal distributions too (where it errs
    on the large side, by about a quarter). With it, the mean over random subsets, as the literature prints it; the
    subsets share examples, so the standard error of that recipe is about the choice of subsets only.

    Args:
      p_features: [n, d].
      q_features: [m, d].
      num_subsets: how many random subsets to average; None for all pairs.
      subset_size: examples of each side in a subset.
      key: a JAX random key, needed for subsets.
      chunk_size: edge of a block of pairs.

    Returns:
      Estimate(value, standard_error). The value is unbiased for any n and m, and can be negative.

    Raises:
      ValueError: different dimensions, fewer than four examples, a subset larger than a side, or no key for
        subsets.

    Source: Binkowski et al., Demystifying MMD GANs, ICLR 2018, section 4.

    Example:
      >>> import numpy as np
      >>> p, q = np.random.default_rng(0).standard_normal((2, 100, 3))
      >>> estimate = kernel_distance(p, q + 1)
      >>> bool(estimate.value > 5 * estimate.standard_error)
      True
    """
    p_features, q_features = _check_pair("p_features", p_features, "q_features", q_features)
    chunk_size = check_count("chunk_size", chunk_size)
    smaller = min(len(p_features), len(q_features))
    if num_subsets is None:
        if smaller < 4:
            raise ValueError(f"p_features and q_features must hold at least 4 examples each, got {smaller}.")
        return _u_statistic(p_features, q_features, chunk_size)
    num_subsets, subset_size = check_count("num_subsets", num_subsets), check_count("subset_size", subset_size)
    if not 4 <= subset_size <= smaller:
        raise ValueError(f"subset_size must be between 4 and the smaller side's {smaller}, got {subset_size}.")
    if key is None:
        raise ValueError("key must be a JAX random key where num_subsets is given, got None.")
    chance = _generator(key)
    draw = lambda features: features[chance.choice(len(features), subset_size, replace=False)]
    values = np.array([
        _u_statistic(draw(p_features), draw(q_features), chunk_size).value for _ in range(num_subsets)
    ])  # fmt: skip
    error = values.std(ddof=1) / math.sqrt(num_subsets) if num_subsets > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


class PrecisionRecall(NamedTuple):
    """How two sets of features cover each other, by balls that reach to the k-th neighbour in the same set.

    Attributes:
      precision: share of fake examples in some real ball: are they like real ones?
      recall: share of real examples in some fake ball: is every kind of real one produced?
      density: mean number of real balls around a fake example, over k; can exceed 1, outliers count little.
      coverage: share of real balls that hold a fake example; outliers among the fake do not raise it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: np.ndarray, fake: np.ndarray, *, k: int = 5, chunk_size: int = _CHUNK
) -> PrecisionRecall:
    """Precision, recall, density and coverage of fake examples against real ones.

    Args:
      real: features [n, d] of real images.
      fake: features [m, d] of generated images. Use n = m: each number depends on both.
      k: which neighbour the balls reach to, itself not counted.
      chunk_size: edge of a block of pairs.

    Returns:
      PrecisionRecall(precision, recall, density, coverage).

    Raises:
      ValueError: different dimensions, or not more than k examples on a side.

    Source: precision and recall Kynkaanniemi et al., NeurIPS 2019, section 2; density and coverage Naeem et al.,
    ICML 2020, section 3.

    Example:
      >>> import numpy as np
      >>> real, fake = np.random.default_rng(0).standard_normal((2, 200, 2))
      >>> scores = precision_recall_density_coverage(real, fake)
      >>> bool(scores.coverage > 0.9), precision_recall_density_coverage(real, fake + 50).coverage
      (True, 0.0)
    """
    real, fake = _check_pair("real", real, "fake", fake)
    k, chunk_size = check_count("k", k), check_count("chunk_size", chunk_size)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"real and fake must hold more than k = {k} examples, got {len(real)} and {len(fake)}.")
    radii = [_neighbours(f, f, k + 1, chunk_size)[1][:, k] for f in (real, fake)]
    real_balls_around_fake = np.zeros(len(fake), np.int64)
    fake_in_real_ball, real_in_fake_ball = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, columns, squares, error in _blocks(real, fake, chunk_size):
        within = lambda radii: _at_most(squares, error, radii, real[rows], fake[columns])  # noqa: B023
        inside = within(radii[0][rows, None])
        real_balls_around_fake[columns] += inside.sum(axis=0)
        fake_in_real_ball[rows] |= inside.any(axis=1)
        real_in_fake_ball[rows] |= within(radii[1][None, columns]).any(axis=1)
    return PrecisionRecall(
        precision=float((real_balls_around_fake > 0).mean()),
        recall=float(real_in_fake_ball.mean()),
        density=float(real_balls_around_fake.mean() / k),
        coverage=float(fake_in_real_ball.mean()),
    )


def nearest_neighbours(
    x: np.ndarray, others: np.ndarray, *, k: int = 1, chunk_size: int = _CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `others` to each row of x.

    Args:
      x: [n, d].
      others: [m, d].
      k: how many, at most m.
      chunk_size: edge of a block of pairs.

    Returns:
      (indices into others [n, k], Euclidean distances [n, k]), nearest first.

    Raises:
      ValueError: different dimensions, or fewer than k others.

    Example:
      >>> import numpy as np
      >>> indices, distances = nearest_neighbours(np.array([[0.9]]), np.array([[0.0], [1.0], [5.0]]), k=2)
      >>> print(indices, distances)
      [[1 0]] [[0.1 0.9]]
    """
    x, others = _check_pair("x", x, "others", others)
    k, chunk_size = check_count("k", k), check_count("chunk_size", chunk_size)
    if k > len(others):
        raise ValueError(f"k must be at most the number of others, {len(others)}, got {k}.")
    indices, squares = _neighbours(x, others, k, chunk_size)
    return indices, np.sqrt(squares)


def _check_features(name: str, value) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape [n, d] with n and d > 0, got {array.shape}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity; look for images that are not finite.")
    return array


def _check_moments(name: str, value) -> None:
    if not isinstance(value, Moments):
        raise TypeError(
            f"{name} must be Moments, got {type(value).__name__}; make them with Moments.of(features) or "
            "Moments.from_covariance(mean, covariance, count=...)."
        )


def _check_pair(name: str, value, other_name: str, other) -> tuple[np.ndarray, np.ndarray]:
    first, second = _check_features(name, value), _check_features(other_name, other)
    _check_same_dimension(other_name, second[0], first[0])
    return first, second


def _check_same_dimension(name: str, value: np.ndarray, reference: np.ndarray) -> None:
    if value.shape != reference.shape:
        raise ValueError(f"{name} must have features of dimension {reference.shape[0]}, got {value.shape[0]}.")


def _generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator, seeded by a JAX key: subsets are drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(check_one_key(key))))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _frechet_distance_of(p: np.ndarray, q: np.ndarray) -> float:
    """The Fréchet distance of two sets of n features, by [n, n] matrices where they are smaller than [d, d].

    With centred features X / sqrt(n - 1) in place of the covariances' roots, the singular values of X_p X_q^T are
    those of C_p^{1/2} C_q^{1/2}.
    """
    if len(p) >= p.shape[1]:
        return frechet_distance(Moments.of(p), Moments.of(q))
    first, second = ((f - f.mean(axis=0)) / math.sqrt(len(f) - 1) for f in (p, q))
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    total = np.square(p.mean(axis=0) - q.mean(axis=0)).sum() + np.square(first).sum() + np.square(second).sum()
    return float(total - 2 * shared)


def _extrapolate(p: np.ndarray, q: np.ndarray, num_sizes: int) -> float:
    """The intercept of the weighted line through (1 / n, mean distance of disjoint subsets of n)."""
    count = len(p)
    sizes = np.unique(np.rint(1 / np.linspace(1 / count, 4 / count, num_sizes)).astype(int))
    distances, weights = [], []
    for size in sizes:
        parts = count // size
        subsets = [slice(i * size, (i + 1) * size) for i in range(parts)]
        distances.append(np.mean([_frechet_distance_of(p[s], q[s]) for s in subsets]))
        weights.append(parts * size)  # the variance of a distance falls like 1 / n, that of their mean by parts
    return float(np.polyfit(1 / sizes, distances, 1, w=np.sqrt(weights))[1])


def _blocks(x: np.ndarray, y: np.ndarray, chunk_size: int) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Rows, columns, squared distances and bounds on their rounding error of each block of pairs.

    By a matrix product, which is fast; what hangs on the last digits of two distances is decided by `_squares`.
    """
    centre = y.mean(axis=0)
    x, y = x - centre, y - centre
    x_squares, y_squares = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    # Of three sums of d products, and of the centring.
    rounding = 4 * (x.shape[1] + 8) * np.finfo(np.float64).eps
    for rows in _slices(len(x), chunk_size):
        for columns in _slices(len(y), chunk_size):
            sums = x_squares[rows, None] + y_squares[None, columns]
            yield rows, columns, sums - 2 * (x[rows] @ y[columns].T), rounding * sums


def _squares(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of the pairs x[rows], y[columns], to rounding of each: equal pairs have equal numbers."""
    found = np.empty(len(rows))
    for part in _slices(len(rows), max(_PAIR_NUMBERS // x.shape[1], 1)):
        found[part] = np.square(x[rows[part]] - y[columns[part]]).sum(axis=1)
    return found


def _at_most(squares, error, radii, x, y) -> np.ndarray:
    """Whether the squared distances of x and y are at most the squared radii, ties included."""
    inside = squares <= radii
    rows, columns = np.nonzero(np.abs(squares - radii) <= error)
    inside[rows, columns] = _squares(x, y, rows, columns) <= np.broadcast_to(radii, squares.shape)[rows, columns]
    return inside


def _slices(count: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size))


def _neighbours(x: np.ndarray, others: np.ndarray, k: int, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and squared distances [n, k], nearest first; only k candidates of each row are kept."""
    indices = np.zeros((len(x), k), np.int64)
    squares = np.full((len(x), k), np.inf)
    for rows, columns, approximate, error in _blocks(x, others, chunk_size):
        block = np.full(approximate.shape, np.inf)

        def evaluate(which, x=x[rows], y=others[columns], block=block):
            block[which] = _squares(x, y, *which)

        # Those that look nearest bound the k-th distance; then all that may be nearer yet.
        count = min(k, block.shape[1])
        nearest = np.argpartition(approximate, count - 1, axis=1)[:, :count]
        evaluate((np.repeat(np.arange(len(block)), count), nearest.ravel()))
        best = np.sort(np.concatenate([squares[rows], np.take_along_axis(block, nearest, axis=1)], axis=1), axis=1)
        bound = best[:, k - 1, None]
        evaluate(np.nonzero((approximate - error < bound) & (bound > 0) & np.isinf(block)))
        own = np.broadcast_to(np.arange(columns.start, columns.stop), block.shape)
        candidates = np.concatenate([squares[rows], block], axis=1)
        candidate_indices = np.concatenate([indices[rows], own], axis=1)
        kept = np.argpartition(candidates, k - 1, axis=1)[:, :k]
        squares[rows] = np.take_along_axis(candidates, kept, axis=1)
        indices[rows] = np.take_along_axis(candidate_indices, kept, axis=1)
    order = np.argsort(squares, axis=1, kind="stable")
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(squares, order, axis=1)


class _KernelSums(NamedTuple):
    rows: np.ndarray  # [n], sums over columns
    columns: np.ndarray  # [m]
    squares: float


def _kernel_sums(x: np.ndarray, y: np.ndarray, chunk_size: int, *, without_diagonal: bool) -> _KernelSums:
    rows, columns, total = np.zeros(len(x)), np.zeros(len(y)), 0.0
    for i in _slices(len(x), chunk_size):
        for j in _slices(len(y), chunk_size):
            kernel = (x[i] @ y[j].T / x.shape[1] + 1) ** 3
            if without_diagonal and i == j:
                np.fill_diagonal(kernel, 0)
            rows[i] += kernel.sum(axis=1)
            columns[j] += kernel.sum(axis=0)
            total += np.square(kernel).sum()
    return _KernelSums(rows, columns, float(total))


def _u_statistic(p: np.ndarray, q: np.ndarray, chunk_size: int) -> Estimate:
    """Unbiased squared MMD and its standard error.

    With h_p(x) = E k(x, x') - E k(x, y) and the kernels' doubly centred variances V, the Hoeffding decomposition has
    variance 4 Var h_p / n + 4 Var h_q / m + second order, where second order is
    2 V_pp / (n (n - 1)) + 2 V_qq / (m (m - 1)) + 4 V_pq / (n m). The sample variance of the estimated h has twice
    the second order in it, in expectation: once is right and once is taken off. What is left varies around the second
    order alone where the distributions are equal, and may come out negative: it is kept from falling below.
    """
    n, m = len(p), len(q)
    pp = _kernel_sums(p, p, chunk_size, without_diagonal=True)
    qq = _kernel_sums(q, q, chunk_size, without_diagonal=True)
    pq = _kernel_sums(p, q, chunk_size, without_diagonal=False)
    value = pp.rows.sum() / (n * (n - 1)) + qq.rows.sum() / (m * (m - 1)) - 2 * pq.rows.sum() / (n * m)
    second = (
        2 * _centred_variance(pp, n) / (n * (n - 1))
        + 2 * _centred_variance(qq, m) / (m * (m - 1))
        + 4 * _centred_variance_of_pairs(pq) / (n * m)
    )
    h_p = pp.rows / (n - 1) - pq.rows / m
    h_q = qq.rows / (m - 1) - pq.columns / n
    variance = 4 * h_p.var(ddof=1) / n + 4 * h_q.var(ddof=1) / m - second
    return Estimate(float(value), float(math.sqrt(max(variance, second))))


def _centred_variance(sums: _KernelSums, n: int) -> float:
    """Unbiased variance of the doubly centred kernel from pairs of different index (Szekely and Rizzo, 2014)."""
    total = sums.rows.sum()
    value = sums.squares - 2 * np.square(sums.rows).sum() / (n - 2) + total**2 / ((n - 1) * (n - 2))
    return max(float(value) / (n * (n - 3)), 0.0)


def _centred_variance_of_pairs(sums: _KernelSums) -> float:
    """The same from all pairs of two independent sets."""
    n, m = len(sums.rows), len(sums.columns)
    value = sums.squares - np.square(sums.rows).sum() / m - np.square(sums.columns).sum() / n
    value += sums.rows.sum() ** 2 / (n * m)
    return max(float(value) / ((n - 1) * (m - 1)), 0.0)
