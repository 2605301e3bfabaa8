"""Spread divergences of two sets of samples, with their Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._checks import check_callable, check_count, check_same_event, check_samples
from spread_jax._random import check_one_key
from spread_jax.divergences.f_divergences import FDivergence, check_divergence, kl
from spread_jax.divergences.mixtures import log_spread_density
from spread_jax.noise import SpreadNoise
from spread_jax.noise._protocol import check_noise

__all__ = ["Estimate", "spread_divergence", "spread_kl"]


class Estimate(NamedTuple):
    """A Monte-Carlo estimate.

    Attributes:
      value: scalar, in nats where the divergence is in nats; a matrix for a Fisher information.
      standard_error: of the shape of `value`, the standard deviation of `value` over keys, as estimated from
        its own draws. The draws are spread evenly over the samples, which can only lower the true one below
        this.
    """

    value: jax.Array
    standard_error: jax.Array


def spread_divergence(
    p_samples: jax.Array,
    q_samples: jax.Array,
    noise: SpreadNoise,
    *,
    divergence: FDivergence = kl,
    num_samples: int,
    key: jax.Array,
    chunk_size: int | None = None,
) -> Estimate:
    r"""D_f(p~||q~) of two empirical distributions, both spread with the same noise.

    p~ and q~ are mixtures with one component for each sample, so their log-ratio t(y) is exact, and only the
    integral over y is estimated: unbiasedly, with `num_samples` draws of y from p~ and as many from q~,

      D_f(p~||q~) = E_{y~p~} h(t(y)) / 2 + E_{y~q~} h(t(y)) / 2,   h = divergence.from_mixture.

    Drawing from both sides keeps the integrand between 0 and a multiple of |t| where the textbook form
    E_{q~} f(e^t) rests on draws so rare that none may be seen. The draws are reparameterised: the gradient
    with respect to both sample sets and the noise is an unbiased estimate of the divergence's.

    Args:
      p_samples: [n, *event], samples of p.
      q_samples: [m, *event], samples of q.
      noise: the spread noise p(y|x).
      divergence: which f; see FDivergence.
      num_samples: draws of y from each side. They are spread evenly over the samples of that side.
      key: a JAX random key.
      chunk_size: as in `log_spread_density`, which bounds the memory.

    Returns:
      Estimate(value, standard_error). It estimates the divergence of the two sample sets given, not of what
      they were drawn from: two finite samples of one distribution have a divergence above zero, which
      vanishes as they grow.

    Raises:
      TypeError: samples are not floating point, `divergence` is no FDivergence, or a count is no integer.
      ValueError: an empty set, events of different shapes, or concrete samples that are not finite.

    Source: Zhang et al., Spread Divergence, ICML 2020, section 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> estimate = spread_divergence(zero, one, GaussianNoise(1.0), num_samples=2000, key=jax.random.key(0))
      >>> bool(abs(estimate.value - 0.5) < 6 * estimate.standard_error)
      True
    """
    p_samples, q_samples = check_samples("p_samples", p_samples), check_samples("q_samples", q_samples)
    check_same_event("p_samples", p_samples, "q_samples", q_samples)
    check_noise("noise", noise)
    num_samples = check_count("num_samples", num_samples)
    check_divergence("divergence", divergence)
    p_key, q_key = jax.random.split(check_one_key(key))
    y_p = _draw(p_samples, noise, num_samples, p_key)
    y_q = _draw(q_samples, noise, num_samples, q_key)
    y = jnp.concatenate([y_p, y_q])
    log_density = lambda atoms: log_spread_density(y, atoms, noise, chunk_size=chunk_size)
    log_ratio = log_density(p_samples) - log_density(q_samples)
    terms = divergence.from_mixture(log_ratio).reshape(2, num_samples)
    variances = terms.var(axis=1, ddof=1) if num_samples > 1 else jnp.full(2, jnp.nan, terms.dtype)
    standard_error = 0.5 * _safe_sqrt(variances.sum() / num_samples)
    return Estimate(terms.mean(), jax.lax.stop_gradient(standard_error))


def spread_kl(
    p_samples: jax.Array,
    sampler: Callable[..., jax.Array],
    noise: SpreadNoise,
    *,
    num_samples: int,
    num_model_samples: int,
    key: jax.Array,
    chunk_size: int | None = None,
) -> Estimate:
    r"""KL(p~||p~_model) of data against a model that is given only by a sampler.

    The spread density of the model is an average over K = `num_model_samples` fresh model samples,

      log p~_model(y) ~ log (1/K) sum_k p(y|x_k),

    whose expectation lies below the truth (Jensen): the estimate is an upper bound in expectation, and
    falls to the KL as K grows. It is differentiable in the sampler's parameters, p_samples and the noise.
    How many model samples it takes grows exponentially with the dimensions in which one of them has to fall
    within the noise of y by chance; where that is many, use `spread_elbo`.

    Args:
      p_samples: [n, *event], the data.
      sampler: (num, key=key) -> [num, *event], reparameterised model samples.
      noise: the spread noise p(y|x).
      num_samples: draws of y ~ p~, spread evenly over the data.
      num_model_samples: K; one set of model samples serves all y.
      key: a JAX random key.
      chunk_size: as in `log_spread_density`.

    Returns:
      Estimate(value, standard_error) in nats. The standard error is that of the draws of y, given the K model
      samples.

    Raises:
      TypeError: arrays are not floating point, or a count is no integer.
      ValueError: an empty set, events of different shapes, or a sampler that returns another number of
        samples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> data = jax.random.normal(jax.random.key(1), (500, 1))
      >>> sampler = lambda num, *, key: jax.random.normal(key, (num, 1))
      >>> estimate = spread_kl(
      ...     data, sampler, GaussianNoise(0.5), num_samples=500, num_model_samples=500, key=jax.random.key(0)
      ... )
      >>> bool(abs(estimate.value) < 0.1)
      True
    """
    p_samples = check_samples("p_samples", p_samples)
    check_callable("sampler", sampler)
    check_noise("noise", noise)
    num_samples = check_count("num_samples", num_samples)
    num_model_samples = check_count("num_model_samples", num_model_samples)
    y_key, model_key = jax.random.split(check_one_key(key))
    model_samples = check_samples("sampler(num, key=key)", sampler(num_model_samples, key=model_key))
    if model_samples.shape[0] != num_model_samples:
        raise ValueError(
            f"sampler must return the {num_model_samples} samples it was asked for, got shape {model_samples.shape}."
        )
    check_same_event("p_samples", p_samples, "sampler(num, key=key)", model_samples)
    y = _draw(p_samples, noise, num_samples, y_key)
    log_density = lambda atoms: log_spread_density(y, atoms, noise, chunk_size=chunk_size)
    terms = log_density(p_samples) - log_density(model_samples)
    variance = terms.var(ddof=1) if num_samples > 1 else jnp.asarray(jnp.nan, terms.dtype)
    return Estimate(terms.mean(), jax.lax.stop_gradient(_safe_sqrt(variance / num_samples)))


def _draw(samples, noise, num_samples, key):
    """num_samples draws of y, spread evenly over the samples: each is used floor or ceil of num / n times."""
    index_key, noise_key = jax.random.split(key)
    count = samples.shape[0]
    whole, rest = divmod(num_samples, count)
    locations = [jnp.repeat(samples, whole, axis=0)]
    if rest:
        locations.append(samples[jax.random.permutation(index_key, count)[:rest]])
    return noise.sample(jnp.concatenate(locations), key=noise_key)


def _safe_sqrt(variance):
    return jnp.sqrt(jnp.maximum(variance, 0))
