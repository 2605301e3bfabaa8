"""The statistics of spread maximum likelihood: Fisher information, covariance of estimates, one-sided bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from spread_jax._checks import check_batch, check_callable, check_count, check_positive, check_samples
from spread_jax._random import check_one_key
from spread_jax.divergences.closed_form import gaussian_noise_covariance
from spread_jax.divergences.estimators import Estimate
from spread_jax.divergences.mixtures import log_spread_density
from spread_jax.noise import GaussianNoise, LowRankGaussianNoise, SpreadNoise
from spread_jax.noise._protocol import check_noise

__all__ = [
    "fisher_information",
    "gaussian_fisher_information",
    "gaussian_mle_variance",
    "mle_covariance",
    "sandwich_covariance",
    "spread_fisher_information",
]

LogDensity = Callable[[Any, jax.Array], jax.Array]


def fisher_information(
    log_density: LogDensity, params: Any, samples: jax.Array, *, chunk_size: int | None = None
) -> Estimate:
    r"""Fisher information of a family p_theta, by Monte Carlo over samples of it.

      J(theta) = E_{x ~ p_theta} s s^T,   s = d log p_theta(x) / d theta.

    For the spread family give log p~_theta as `log_density` and spread samples y. Spreading cannot add
    information: J~ <= J in the order of positive semi-definite matrices, where J exists. Samples of another
    distribution give the empirical second moment of the score, the middle of `sandwich_covariance`.

    Args:
      log_density: (params, x [n, *event]) -> [n], in nats; the value of an example must not depend on others.
      params: theta, a pytree of floating-point arrays with P numbers, raveled in the order of
        `jax.flatten_util.ravel_pytree`.
      samples: [N, *event], drawn from p_theta.
      chunk_size: examples whose scores are held at once, all N by default: memory is O(chunk_size P + P^2).

    Returns:
      Estimate(value, standard_error), each [P, P], in nats per product of two units of theta.

    Raises:
      TypeError: samples are not floating point, or `log_density` is not callable.
      ValueError: an empty set, concrete samples that are not finite, params without a number, or a density
        of another shape.

    Source: van der Vaart, Asymptotic Statistics, 1998, section 5.5; Zhang et al., Spread Divergence, ICML
    2020, section on maximum likelihood (consistency and efficiency of the spread estimator).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (4000, 1))
      >>> log_density = lambda mean, x: -0.5 * jnp.square(x[:, 0] - mean)  # N(mean, 1): J = 1
      >>> value, error = fisher_information(log_density, jnp.float32(0.0), x)
      >>> bool(abs(value[0, 0] - 1) < 6 * error[0, 0])
      True
    """
    samples = check_samples("samples", samples)
    one, theta = _one_log_density(log_density, params)
    score = jax.grad(one)

    def moments(x, used):
        scores = jnp.where(used[:, None], jax.vmap(lambda row: score(theta, row))(x), 0)
        return _gram(scores), _gram(jnp.square(scores))

    first, second = _sum_over_chunks(moments, samples, chunk_size)
    count = samples.shape[0]
    value, square = first / count, second / count
    standard_error = jnp.sqrt(jnp.maximum(square - jnp.square(value), 0) / max(count - 1, 1))
    return Estimate(value, jax.lax.stop_gradient(standard_error))


def spread_fisher_information(
    sampler: Callable[..., jax.Array],
    params: Any,
    noise: SpreadNoise,
    *,
    num_samples: int,
    num_model_samples: int,
    key: jax.Array,
    chunk_size: int | None = None,
) -> Estimate:
    r"""Fisher information of the spread of a model that is given only by a sampler, x = g_theta(z).

    The clean family has no density, hence no Fisher information; the spread one has both. Its density is
    taken as the mixture of K = `num_model_samples` spread model samples, moved by theta with z fixed,

      log p~_theta(y) ~ log (1/K) sum_k p(y|g_theta(z_k)),

    and the scores are averaged over y drawn from p~_theta independently of z_1 .. z_K. The mixture's
    error in a score enters squared, and it is correlated with the score: the bias is of order 1/K, of either sign.

    Args:
      sampler: (params, num, key=key) -> [num, *event], reparameterised: differentiable in params.
      params: theta, a pytree with P numbers.
      noise: the spread noise p(y|x).
      num_samples: draws of y.
      num_model_samples: K.
      key: a JAX random key.
      chunk_size: as in `fisher_information`.

    Returns:
      Estimate(value, standard_error), each [P, P]. The standard error is that of the draws of y, given K.

    Raises:
      TypeError: a count is no integer, or the sampler's output is not floating point.
      ValueError: the sampler returns another number of samples.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on maximum likelihood.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> sampler = lambda mean, num, *, key: jnp.full((num, 1), mean)  # a delta, at theta
      >>> options = {"num_samples": 2000, "num_model_samples": 1, "key": jax.random.key(0)}
      >>> value, error = spread_fisher_information(sampler, jnp.float32(1.0), GaussianNoise(0.5), **options)
      >>> bool(abs(value[0, 0] - 4) < 6 * error[0, 0])  # 1 / sigma^2
      True
    """
    check_callable("sampler", sampler)
    check_noise("noise", noise)
    num_samples = check_count("num_samples", num_samples)
    num_model_samples = check_count("num_model_samples", num_model_samples)
    x_key, y_key, model_key = jax.random.split(check_one_key(key), 3)

    def draw(params, num, key):
        x = check_samples("sampler(params, num, key=key)", sampler(params, num, key=key))
        if x.shape[0] != num:
            raise ValueError(f"sampler must return the {num} samples it was asked for, got shape {x.shape}.")
        return x

    def log_density(params, y):
        return log_spread_density(y, draw(params, num_model_samples, model_key), noise)

    y = noise.sample(draw(params, num_samples, x_key), key=y_key)
    return fisher_information(log_density, params, y, chunk_size=chunk_size)


def gaussian_fisher_information(
    mean: Callable[[Any], jax.Array],
    cov: Callable[[Any], jax.Array],
    params: Any,
    *,
    noise: GaussianNoise | LowRankGaussianNoise | None = None,
) -> jax.Array:
    r"""Fisher information of N(m(theta), S(theta)), or of its spread N(m, S + C), in closed form.

      J_ij = d_i m^T S^-1 d_j m + tr(S^-1 d_i S S^-1 d_j S) / 2,

    with S + C in place of S where a noise of covariance C is given. Without noise it is undefined where S is
    singular, as for a model with fewer latents than dimensions; with noise it is finite, and lies below the
    clean one wherever both exist.

    Args:
      mean: params -> m, [X].
      cov: params -> S, [X, X], symmetric, positive semi-definite.
      params: theta, a pytree of floating-point arrays with P numbers.
      noise: Gaussian or low-rank Gaussian spread noise; None for the clean family.

    Returns:
      [P, P], exact. NaN where the covariance is singular to rounding.

    Raises:
      TypeError: `mean` or `cov` is not callable, or the noise is not Gaussian.
      ValueError: shapes that do not fit.

    Source: Kay, Fundamentals of Statistical Signal Processing: Estimation Theory, 1993, appendix 3C.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> line = lambda a: jnp.outer(a, a)  # x = a z: singular in two dimensions
      >>> zero, a = lambda a: jnp.zeros(2), jnp.array([1.0, 0.0])
      >>> print(gaussian_fisher_information(zero, line, a, noise=GaussianNoise(1.0)).round(4))
      [[0.5 0. ]
       [0.  0.5]]
    """
    check_callable("mean", mean)
    check_callable("cov", cov)
    theta, unravel = _ravel(params)
    m = check_batch("mean(params)", mean(params))
    s = check_batch("cov(params)", cov(params))
    size = m.shape[0]
    if m.ndim != 1 or s.shape != (size, size):
        raise ValueError(f"mean and cov must return shapes [X] and [X, X], got {m.shape} and {s.shape}.")
    dm, ds = jax.jacfwd(lambda t: (mean(unravel(t)), cov(unravel(t))))(theta)
    if noise is not None:
        s = s + gaussian_noise_covariance(noise, m)
    chol = jnp.linalg.cholesky(s)
    pivots = jnp.square(jnp.diagonal(chol)) / jnp.diagonal(s)
    # A singular covariance may leave pivots of the size of rounding, whose inverse is noise.
    definite = (pivots > size * jnp.finfo(s.dtype).eps).all()
    solve = lambda b: jax.scipy.linalg.solve_triangular(chol, b, lower=True)
    dm = solve(dm)
    # chol^-1 dS chol^-T, whose inner products are the traces.
    ds = jax.vmap(lambda d: solve(solve(d).T), in_axes=2, out_axes=2)(ds).reshape(size * size, -1)
    return jnp.where(definite, _gram(dm) + 0.5 * _gram(ds), jnp.nan)


def mle_covariance(information: jax.Array, num_examples: int | jax.Array) -> jax.Array:
    r"""Covariance J^-1 / N of a maximum-likelihood estimate of a well-specified model, for large N.

    With the spread family's information it is that of the spread estimator, which exists where the clean
    likelihood does not and tends to the clean one as the noise falls, where that is defined.

    Args:
      information: J, [P, P], symmetric, positive definite: of one example.
      num_examples: N.

    Returns:
      [P, P]; NaN where J is not positive definite, as for parameters that the family does not identify.

    Raises:
      TypeError: `information` is not floating point.
      ValueError: `information` is not square, or a concrete N is not positive.

    Source: van der Vaart, Asymptotic Statistics, 1998, theorem 5.39.

    Example:
      >>> import jax.numpy as jnp
      >>> print(mle_covariance(jnp.array([[4.0]]), 100))
      [[0.0025]]
    """
    information = _check_square("information", information)
    check_positive("num_examples", num_examples)
    chol = jnp.linalg.cholesky(information)
    identity = jnp.eye(information.shape[0], dtype=information.dtype)
    return jax.scipy.linalg.cho_solve((chol, True), identity) / num_examples


def sandwich_covariance(
    log_density: LogDensity, params: Any, samples: jax.Array, *, chunk_size: int | None = None
) -> jax.Array:
    r"""Covariance H^-1 G H^-1 / N of a maximum-likelihood estimate, right for misspecified models too.

      H = -mean of the Hessians of log p_theta,   G = mean of s s^T,   over the samples that were fitted.

    For spread maximum likelihood give log p~_theta and the spread data y. Where the model is right G and H
    agree and this is `mle_covariance` of either.

    Args:
      log_density: (params, x [n, *event]) -> [n], in nats, twice differentiable.
      params: the maximum-likelihood estimate, a pytree with P numbers.
      samples: [N, *event], the data that were fitted.
      chunk_size: examples taken at once, all N by default.

    Returns:
      [P, P].

    Raises:
      TypeError: samples are not floating point, or `log_density` is not callable.
      ValueError: as `fisher_information`.

    Source: White, Maximum Likelihood Estimation of Misspecified Models, Econometrica 1982, theorem 3.2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = 3 * jax.random.normal(jax.random.key(0), (1000, 1))
      >>> log_density = lambda mean, x: -0.5 * jnp.square(x[:, 0] - mean)  # variance 1: wrong
      >>> covariance = sandwich_covariance(log_density, x.mean(), x)
      >>> bool(jnp.allclose(covariance, x.var() / 1000))
      True
    """
    samples = check_samples("samples", samples)
    one, theta = _one_log_density(log_density, params)

    def moments(x, used):
        scores = jnp.where(used[:, None], jax.vmap(lambda row: jax.grad(one)(theta, row))(x), 0)
        total = lambda t: jnp.where(used, jax.vmap(lambda row: one(t, row))(x), 0).sum()
        return _gram(scores), -jax.hessian(total)(theta)

    middle, curvature = _sum_over_chunks(moments, samples, chunk_size)
    half = jnp.linalg.solve(curvature, middle)
    covariance = jnp.linalg.solve(curvature, half.T)
    return 0.5 * (covariance + covariance.T)


def gaussian_mle_variance(
    variance: jax.Array, noise: GaussianNoise, *, spread: Literal["both", "model", "data"] = "both"
) -> jax.Array:
    r"""What maximum likelihood estimates for a Gaussian's variance if noise goes to both sides, or to one.

    The model is N(0, a) and the data have variance v; sigma is the noise scale. The maximiser of the expected
    log-likelihood over a >= 0 is

      both (spread likelihood): v,   model only (a decoder's noise): max(v - sigma^2, 0),
      data only (noise as augmentation): v + sigma^2.

    In several dimensions it holds for each principal direction a linear model has, v the eigenvalues of the
    data's covariance. Only noise on both sides has no bias; the bounds of variational autoencoders add the bias
    of their own encoders.

    Args:
      variance: v >= 0, any shape, floating point.
      noise: Gaussian noise with one scale.
      spread: which side the noise is added to.

    Returns:
      The estimated variance, of the shape of v; the bias is its difference from v.

    Raises:
      TypeError: v is not floating point, or the noise is not Gaussian.
      ValueError: an unknown `spread`, or a noise with several scales.

    Source: Tipping and Bishop, Probabilistic Principal Component Analysis, JRSS B 1999, section 3.2, with the
    noise variance known.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> print(gaussian_mle_variance(jnp.array([0.5, 2.0]), GaussianNoise(1.0), spread="model"))
      [0. 1.]
    """
    if not isinstance(noise, GaussianNoise):
        raise TypeError(f"noise must be GaussianNoise, got {type(noise).__name__}.")
    if jnp.ndim(noise.scale) != 0:
        raise ValueError(f"noise must have one scale, got scales of shape {jnp.shape(noise.scale)}.")
    variance = jnp.asarray(variance)
    if not jnp.issubdtype(variance.dtype, jnp.floating):
        raise TypeError(f"variance must have a floating-point dtype, got {variance.dtype}; convert it first.")
    added = jnp.square(jnp.asarray(noise.scale, variance.dtype))
    if spread == "both":
        return variance
    if spread == "model":
        return jnp.maximum(variance - added, 0)
    if spread == "data":
        return variance + added
    raise ValueError(f"spread must be 'both', 'model' or 'data', got {spread!r}.")


def _ravel(params):
    leaves = jax.tree_util.tree_leaves(params)
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"params must hold floating-point numbers, got a leaf of dtype {dtype}; convert it first.")
    theta, unravel = ravel_pytree(params)
    if theta.size == 0:
        raise ValueError("params must hold at least one number, got none.")
    return theta, unravel


def _one_log_density(log_density, params):
    """(theta [P], x [*event]) -> log p(x), and theta."""
    check_callable("log_density", log_density)
    theta, unravel = _ravel(params)

    def one(theta, row):
        value = jnp.asarray(log_density(unravel(theta), row[None]))
        if value.shape != (1,):
            raise ValueError(f"log_density must return shape [n] = (1,) for one example, got {value.shape}.")
        return value[0]

    return one, theta


def _sum_over_chunks(function, samples, chunk_size):
    """The sum over blocks of function(x [c, *event], used [c]); the last block is padded."""
    count = samples.shape[0]
    edge = count if chunk_size is None else min(check_count("chunk_size", chunk_size), count)
    if edge == count:
        return function(samples, jnp.ones(count, bool))
    num_blocks = -(-count // edge)
    missing = num_blocks * edge - count
    padded = jnp.concatenate([samples, jnp.repeat(samples[-1:], missing, axis=0)])
    used = jnp.arange(num_blocks * edge) < count
    blocks = padded.reshape(num_blocks, edge, *samples.shape[1:]), used.reshape(num_blocks, edge)
    shapes = jax.eval_shape(function, *jax.tree_util.tree_map(lambda leaf: leaf[0], blocks))
    zero = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    add = lambda total, block: (jax.tree_util.tree_map(jnp.add, total, function(*block)), None)
    return jax.lax.scan(add, zero, blocks)[0]


def _gram(a):
    return jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST)


def _check_square(name, value):
    array = check_batch(name, value)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} must have shape [P, P], got {array.shape}.")
    return array
