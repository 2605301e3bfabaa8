r"""Deterministic PCA: the linear model x = F z + m, z ~ N(0, I), fitted by its spread likelihood.

The model's points fill a subspace, so data off it have no likelihood. Spread with noise of standard deviation
sigma, data of mean m and covariance S get the second moments m, S + sigma^2 I exactly, no noise need be drawn,
and the model becomes N(m, F F^T + sigma^2 I): probabilistic PCA whose noise is known. Its maximum likelihood is
F = U Lambda^(1/2), the leading eigenvectors and eigenvalues of S, whatever sigma is. With the noise on the model
only (an ordinary PPCA of known noise on clean data) it is U (Lambda - sigma^2)_+^(1/2): too small.

EM finds the same optimum, at a pace that sigma sets. With t the eigenvalues of the data's second moment (S +
sigma^2 I, or S) and l = t - sigma^2, errors contract in each step by

  t_j / t_i                                   out of the subspace, i in it and j not,
  1 - sigma^2 (l_i + l_k) / (t_i t_k)         within it: the lengths of the columns and their correlations.

For sigma -> 0 the second is 1 - O(sigma^2 / lambda): EM freezes. It is smallest, 1/2, at sigma^2 = lambda.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_count, check_positive
from spread_jax._pytree import frozen_pytree
from spread_jax._random import check_one_key
from spread_jax.divergences import spread_kl_gaussians
from spread_jax.linear._host import promotes_as_numpy
from spread_jax.linear._moments import device_moments, host_moments
from spread_jax.noise import GaussianNoise

__all__ = [
    "Moments",
    "PcaResult",
    "closed_form",
    "em_step",
    "fit",
    "latents",
    "second_moments",
    "spread_kl",
    "spread_log_likelihood",
]


class Moments(NamedTuple):
    """Mean [X] and covariance [X, X] of a data set, the latter divided by N: those of maximum likelihood."""

    mean: jax.Array
    covariance: jax.Array


@frozen_pytree
class PcaResult:
    """A fitted deterministic PCA.

    Args:
      mean: [X], in units of x.
      loadings: F, [X, Z]: orthogonal columns, longest first, their largest entry positive. Columns beyond the
        rank of the data are zero.
      explained_variance: [Z], |F_j|^2, in squared units of x.
      noise_scale: sigma, [].
      num_iterations: [], EM steps taken; 1 for the closed form.
      converged: [], whether the tolerance was met; True for the closed form.
      log_likelihood: [], expected log-density of an example under the spread model, nats.
    """

    mean: jax.Array
    loadings: jax.Array
    explained_variance: jax.Array
    noise_scale: jax.Array
    num_iterations: jax.Array
    converged: jax.Array
    log_likelihood: jax.Array


@promotes_as_numpy
def second_moments(x: jax.Array | np.ndarray, *, chunk_size: int = 8192) -> Moments:
    """Mean and covariance of a data set, in chunks: no copy of x is made.

    A NumPy array stays on the host, so a memory map larger than the memory will do, and is summed in double
    precision; a JAX array is reduced where it lies, also inside jit.

    Args:
      x: [N, X], floating point.
      chunk_size: rows to centre at a time.

    Returns:
      Moments(mean [X], covariance [X, X]); the covariance is divided by N.

    Raises:
      TypeError: if x is not floating point.
      ValueError: if x is not [N, X] with N of at least 1, or is not finite (NumPy only).

    Example:
      >>> import numpy as np
      >>> print(second_moments(np.array([[1.0, 0.0], [3.0, 0.0]])).covariance)
      [[1. 0.]
       [0. 0.]]
    """
    chunk_size = check_count("chunk_size", chunk_size)
    if not isinstance(x, np.ndarray):
        return Moments(*device_moments(_check_matrix("x", check_batch("x", x)), chunk_size))
    mean, covariance = host_moments(_check_matrix("x", x), chunk_size)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("x must be finite, got NaN or infinity (or squares that overflow); remove those rows first.")
    return Moments(jnp.asarray(mean.astype(x.dtype)), jnp.asarray(covariance.astype(x.dtype)))


@promotes_as_numpy
def closed_form(
    covariance: jax.Array, num_components: int, noise_scale: float | jax.Array, *, spread: bool = True
) -> tuple[jax.Array, jax.Array]:
    r"""The loadings of largest likelihood: U Lambda^(1/2) if spread, U (Lambda - sigma^2)_+^(1/2) if not.

    Args:
      covariance: S, [X, X], of the clean data.
      num_components: Z, at most X.
      noise_scale: sigma > 0, in units of x. With `spread` the answer does not depend on it.
      spread: noise on data and model; on the model only if False.

    Returns:
      loadings [X, Z] and explained variance [Z] = |F_j|^2. Their derivatives need distinct eigenvalues.

    Raises:
      TypeError: if the covariance is not floating point.
      ValueError: if the covariance is not square, or num_components exceeds X.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic PCA; Tipping and Bishop,
      Probabilistic Principal Component Analysis, 1999, for a known noise.

    Example:
      >>> import jax.numpy as jnp
      >>> for spread in (True, False):
      ...     print(closed_form(jnp.diag(jnp.array([4.0, 1.0])), 2, 0.5, spread=spread)[1])
      [4. 1.]
      [3.75 0.75]
    """
    covariance = _check_covariance(covariance)
    num_components = _check_components(num_components, covariance.shape[0], "the number of dimensions of x")
    check_positive("noise_scale", noise_scale)
    values, vectors = jnp.linalg.eigh(covariance)
    values, vectors = values[::-1][:num_components], vectors[:, ::-1][:, :num_components]
    # Below this an eigenvalue is the rounding of a zero.
    floor = covariance.shape[0] * jnp.finfo(covariance.dtype).eps * values[0]
    values = jnp.where(values > floor, values, 0)
    if not spread:
        values = jnp.maximum(values - jnp.square(jnp.asarray(noise_scale, values.dtype)), 0)
    return _fix_signs(vectors) * _safe_sqrt(values), values


@promotes_as_numpy
def em_step(
    loadings: jax.Array, covariance: jax.Array, noise_scale: float | jax.Array, *, spread: bool = True
) -> jax.Array:
    r"""One exact step of EM: F <- E[y z^T] E[z z^T]^-1, from the data's moments.

    With W = (F^T F + sigma^2 I)^-1 F^T, the posterior of z is N(W (y - m), sigma^2 (F^T F + sigma^2 I)^-1), so

      F <- T W^T (sigma^2 (F^T F + sigma^2 I)^-1 + W T W^T)^-1,    T = S + sigma^2 I, or S if not spread.

    For observed data x = F z + m + gamma epsilon, give S, gamma and spread=False for the ordinary EM; to spread
    such data by sigma besides, give S + sigma^2 I and (gamma^2 + sigma^2)^(1/2), spread=False.

    Args:
      loadings: F, [X, Z].
      covariance: S, [X, X], of the clean data.
      noise_scale: sigma > 0, in units of x.
      spread: noise on data and model; on the model only if False.

    Returns:
      The next F, [X, Z].

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    Source: Zhang et al., Spread Divergence, ICML 2020, sections on deterministic PCA and on spread EM.

    Example:
      >>> import jax.numpy as jnp
      >>> print(em_step(jnp.array([[2.0]]), jnp.array([[4.0]]), 1.0).round(4))  # the optimum stays
      [[2.]]
    """
    loadings, covariance = _check_loadings(loadings, covariance)
    check_positive("noise_scale", noise_scale)
    return _em_step(loadings, covariance, _square_like(noise_scale, loadings), spread)[0]


@promotes_as_numpy
def spread_log_likelihood(
    loadings: jax.Array, covariance: jax.Array, noise_scale: float | jax.Array, *, spread: bool = True
) -> jax.Array:
    r"""Expected log-density of an example, -(X log 2 pi + log |C| + tr(C^-1 T)) / 2 with C = F F^T + sigma^2 I.

    T = S + sigma^2 I integrates the noise on the data exactly; T = S if not spread. No X x X matrix is inverted.

    Args:
      loadings: F, [X, Z].
      covariance: S, [X, X], of the data about the model's mean.
      noise_scale: sigma > 0, in units of x.
      spread: noise on data and model; on the model only if False.

    Returns:
      Scalar, nats per example.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{spread_log_likelihood(jnp.ones((1, 1)), jnp.ones((1, 1)), 1.0):.4f}")  # N(0, 2) of itself
      -1.7655
    """
    loadings, covariance = _check_loadings(loadings, covariance)
    check_positive("noise_scale", noise_scale)
    return _log_likelihood(loadings, covariance, _square_like(noise_scale, loadings), spread)


@promotes_as_numpy
def spread_kl(loadings: jax.Array, covariance: jax.Array, noise_scale: float | jax.Array) -> jax.Array:
    """KL(N(m, S + sigma^2 I) || N(m, F F^T + sigma^2 I)) in nats: from data of these moments to the model.

    Finite also for singular S and F F^T on different subspaces; zero at `closed_form` if S has rank Z.

    Args:
      loadings: F, [X, Z].
      covariance: S, [X, X].
      noise_scale: sigma > 0, in units of x.

    Returns:
      Scalar.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{spread_kl(jnp.ones((1, 1)), jnp.ones((1, 1)), 0.1):.4f}")
      0.0000
    """
    loadings, covariance = _check_loadings(loadings, covariance)
    mean = jnp.zeros(len(loadings), loadings.dtype)
    return spread_kl_gaussians(mean, covariance, mean, _product(loadings, loadings.T), GaussianNoise(noise_scale))


@promotes_as_numpy
def latents(y: jax.Array, result: PcaResult, *, noise_scale: float | jax.Array | None = None) -> jax.Array:
    r"""The posterior mean of z, (F^T F + sigma^2 I)^-1 F^T (y - m).

    Its limit sigma -> 0, which noise_scale = 0 gives, is the pseudo-inverse F^+ (x - m): the z of a clean x.

    Args:
      y: [batch, X].
      result: a fitted model.
      noise_scale: sigma >= 0, the noise on y; that of the fit if None.

    Returns:
      [batch, Z].

    Raises:
      TypeError: if y is not floating point.
      ValueError: if y is not [batch, X].

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[2.0, 0.0], [-2.0, 0.0]])
      >>> result = fit(x, 1, 2.0)
      >>> print(latents(x, result)[0].round(4), latents(x, result, noise_scale=0.0)[0].round(4))
      [0.5] [1.]
    """
    y = _check_matrix("y", check_batch("y", y))
    if y.shape[1] != result.mean.shape[0]:
        raise ValueError(f"y must have shape [batch, {result.mean.shape[0]}] to fit the result, got {y.shape}.")
    variance = _square_like(result.noise_scale if noise_scale is None else noise_scale, result.loadings)
    weights, _ = _posterior(result.loadings, variance)
    return (y - result.mean.astype(y.dtype)) @ weights.T.astype(y.dtype)


@promotes_as_numpy
def fit(
    x: jax.Array | np.ndarray,
    num_components: int,
    noise_scale: float | jax.Array,
    *,
    method: Literal["closed_form", "em"] = "closed_form",
    spread: bool = True,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    chunk_size: int = 8192,
    key: jax.Array | None = None,
) -> PcaResult:
    r"""Fits x = F z + m by the spread likelihood, in closed form or by EM.

    Data of more dimensions than examples are first expressed in the span of the examples; other data pass
    through `second_moments` once, in chunks. EM is there to be compared: it stops when the likelihood is
    stationary, |T C^-1 F - F| <= tolerance |F|, and not when its steps are small, which they also are where it
    freezes.

    Args:
      x: [N, X], floating point; NumPy (also a memory map) or JAX.
      num_components: Z, at most min(N, X).
      noise_scale: sigma > 0, in units of x.
      method: "closed_form" or "em".
      spread: noise on data and model; on the model only if False.
      max_iterations: EM steps at most.
      tolerance: relative residual of the stationarity at which EM stops.
      chunk_size: rows to centre at a time.
      key: a JAX random key, needed by EM for its random start.

    Returns:
      PcaResult. Under jit, num_components, method, spread, max_iterations and chunk_size are static.

    Raises:
      TypeError: if x is not floating point, or EM has no key.
      ValueError: if x is not [N, X] or not finite, the method is unknown, num_components exceeds min(N, X), or
        noise_scale or tolerance is not positive.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic PCA.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (500, 2)) @ jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> result = fit(x, 2, 0.5)
      >>> result.loadings.shape, bool(jnp.abs(latents(x, result, noise_scale=0.0).std(axis=0) - 1).max() < 1e-4)
      ((3, 2), True)
    """
    if method not in ("closed_form", "em"):
        raise ValueError(f"method must be 'closed_form' or 'em', got {method!r}.")
    if not isinstance(x, np.ndarray):
        x = check_batch("x", x)
    x = _check_matrix("x", x)
    num_components = _check_components(num_components, min(x.shape), f"min(N, X) of x, whose shape is {x.shape}")
    check_positive("noise_scale", noise_scale)
    check_positive("tolerance", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    if method == "em" and key is None:
        raise TypeError("key must be a JAX random key for method='em', got None.")
    key = None if key is None else check_one_key(key)
    if x.shape[0] < x.shape[1]:
        mean, basis, covariance = _small_moments(jnp.asarray(x))
        if isinstance(x, np.ndarray) and not np.isfinite(covariance).all():
            raise ValueError("x must be finite, got NaN or infinity; remove those rows first.")
    else:
        mean, covariance = second_moments(x, chunk_size=chunk_size)
        basis = None
    return _fit(
        mean,
        covariance,
        basis,
        jnp.asarray(noise_scale, covariance.dtype),
        jnp.asarray(tolerance, covariance.dtype),
        key if method == "em" else None,
        num_components=num_components,
        spread=spread,
        max_iterations=max_iterations,
    )


@jax.jit
def _small_moments(x):
    """Mean, an orthonormal basis [X, N] of the centred examples, and their covariance in it [N, N]."""
    mean = x.mean(axis=0)
    basis, r = jnp.linalg.qr((x - mean).T)
    return mean, basis, _product(r, r.T) / len(x)


@functools.partial(jax.jit, static_argnames=("num_components", "spread", "max_iterations"))
def _fit(mean, covariance, basis, noise_scale, tolerance, key, *, num_components, spread, max_iterations):
    variance = jnp.square(noise_scale)
    if key is None:
        loadings, explained = closed_form(covariance, num_components, noise_scale, spread=spread)
        num_iterations, converged = jnp.ones((), jnp.int32), jnp.ones((), bool)
    else:
        loadings, num_iterations, converged = _em(
            covariance, variance, tolerance, key, num_components, spread, max_iterations
        )
        # F is known up to a rotation of z: the one whose columns are orthogonal.
        vectors, lengths, _ = jnp.linalg.svd(loadings, full_matrices=False)
        loadings, explained = _fix_signs(vectors) * lengths, jnp.square(lengths)
    log_likelihood = _log_likelihood(loadings, covariance, variance, spread)
    if basis is not None:
        loadings = _fix_signs(_product(basis, loadings))
        # The dimensions that no example uses.
        rest = basis.shape[0] - basis.shape[1]
        log_likelihood -= 0.5 * rest * (math.log(2 * math.pi) + jnp.log(variance) + (1 if spread else 0))
    return PcaResult(mean, loadings, explained, noise_scale, num_iterations, converged, log_likelihood)


def _em(covariance, variance, tolerance, key, num_components, spread, max_iterations):
    """EM from random loadings of the data's size: loadings, steps taken, whether the tolerance was met."""
    size = covariance.shape[0]
    scale = jnp.sqrt(jnp.trace(covariance) / size)
    start = scale * jax.random.normal(key, (size, num_components), covariance.dtype)

    def unfinished(carry):
        _, num_iterations, converged = carry
        return ~converged & (num_iterations < max_iterations)

    def step(carry):
        loadings, num_iterations, _ = carry
        following, residual = _em_step(loadings, covariance, variance, spread)
        converged = residual <= tolerance
        # The residual belongs to the loadings the step began from: those are what is returned.
        return jnp.where(converged, loadings, following), num_iterations + 1, converged

    return jax.lax.while_loop(unfinished, step, (start, jnp.zeros((), jnp.int32), jnp.zeros((), bool)))


@functools.partial(jax.jit, static_argnames="spread")
def _em_step(loadings, covariance, variance, spread):
    """The next loadings, and the stationarity residual |T C^-1 F - F| / |F| of the given ones."""
    weights, posterior_covariance = _posterior(loadings, variance)
    cross = _product(covariance, weights.T)  # E[y z^T]
    if spread:
        cross = cross + variance * weights.T
    second = posterior_covariance + _product(weights, cross)  # E[z z^T]
    # C^-1 F = W^T: the cross moment is T C^-1 F. Zero loadings, of constant data, are stationary.
    residual = jnp.sqrt(jnp.square(cross - loadings).sum() / _or_one(jnp.square(loadings).sum()))
    return _solve(second, cross.T).T, residual


@functools.partial(jax.jit, static_argnames="spread")
def _log_likelihood(loadings, covariance, variance, spread):
    size = loadings.shape[0]
    weights, posterior_covariance = _posterior(loadings, variance)
    # tr(C^-1 T) as a sum of squares, |y - F W y|^2 / sigma^2 + |W y|^2, whose terms do not cancel.
    residual = covariance - _product(loadings, _product(weights, covariance))
    squares = jnp.trace(residual) - (_product(residual, weights.T) * loadings).sum()
    trace = squares / variance + (_product(weights, covariance) * weights).sum()
    if spread:  # sigma^2 tr C^-1 = X - tr(W F)
        trace = trace + size - (weights * loadings.T).sum()
    log_det = size * jnp.log(variance) - jnp.linalg.slogdet(posterior_covariance)[1]
    return -0.5 * (size * math.log(2 * math.pi) + log_det + trace)


@jax.jit
def _posterior(loadings, variance):
    """W = (F^T F + sigma^2 I)^-1 F^T [Z, X], and the posterior covariance sigma^2 (F^T F + sigma^2 I)^-1 [Z, Z].

    Columns are scaled to length one, so that short ones keep their digits beside long ones. sigma^2 below the
    rounding of those unit lengths is raised to it: it keeps parallel columns from a singular matrix, and
    sigma = 0 is the pseudo-inverse.
    """
    squares = jnp.square(loadings).sum(axis=0)
    squares = jnp.where(squares > 0, squares, _or_one(variance))
    unit = loadings / jnp.sqrt(squares)
    ridge = jnp.maximum(variance / squares, 4 * jnp.finfo(loadings.dtype).eps)
    matrix = _product(unit.T, unit) + jnp.diag(ridge)
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    weights = jax.scipy.linalg.cho_solve(factor, unit.T) / jnp.sqrt(squares)[:, None]
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(len(matrix), dtype=matrix.dtype))
    return weights, variance * inverse / jnp.sqrt(jnp.outer(squares, squares))


def _solve(matrix, right):
    """matrix^-1 right for a positive definite matrix, its diagonal scaled to one first."""
    scale = 1 / jnp.sqrt(jnp.diagonal(matrix))
    factor = jax.scipy.linalg.cho_factor(matrix * jnp.outer(scale, scale), lower=True)
    return scale[:, None] * jax.scipy.linalg.cho_solve(factor, scale[:, None] * right)


def _fix_signs(columns):
    """Makes the largest entry of each column positive."""
    largest = jnp.take_along_axis(columns, jnp.abs(columns).argmax(axis=0)[None], axis=0)
    return columns * jnp.where(largest < 0, -1, 1).astype(columns.dtype)


def _or_one(squares):
    return jnp.where(squares > 0, squares, 1)


def _safe_sqrt(values):
    """The square root, with derivative zero at zero."""
    return jnp.where(values > 0, jnp.sqrt(_or_one(values)), 0)


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _square_like(noise_scale, array):
    return jnp.square(jnp.asarray(noise_scale, array.dtype))


def _check_matrix(name, value):
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating-point dtype, got {value.dtype}; "
            f"convert it first, for example {name}.astype(np.float32)."
        )
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must have shape [N, X], N and X at least 1, got {value.shape}.")
    return value


def _check_components(num_components, limit, what):
    num_components = check_count("num_components", num_components)
    if num_components > limit:
        raise ValueError(f"num_components must be at most {limit}, {what}, got {num_components}.")
    return num_components


def _check_covariance(value):
    covariance = check_batch("covariance", value)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not covariance.size:
        raise ValueError(f"covariance must have shape [X, X], got {covariance.shape}.")
    return covariance


def _check_loadings(loadings, covariance):
    loadings, covariance = check_batch("loadings", loadings), _check_covariance(covariance)
    if loadings.ndim != 2 or loadings.shape[0] != covariance.shape[0] or not loadings.size:
        raise ValueError(
            f"loadings must have shape [{covariance.shape[0]}, Z] to fit covariance, got {loadings.shape}."
        )
    return loadings, covariance
