"""Evidence lower bounds on the spread log-likelihood, and the ordinary one on clean data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._random import draw_normal
from spread_jax.noise import SpreadNoise
from spread_jax.noise._protocol import repeat_noise
from spread_jax.objectives._edge import Decode, Encode, check_bound, decoded, log_prior, posterior, spread_or_given

__all__ = ["ElboTerms", "elbo", "spread_elbo"]


class ElboTerms(NamedTuple):
    """The terms of an evidence lower bound, each [batch], in nats: elbo = log_likelihood - kl.

    Attributes:
      elbo: the lower bound on log p~(y), or log p(x) for clean data.
      log_likelihood: E_{q(z|y)} log p(y|g(z)).
      kl: KL(q(z|y) || N(0, I)), exact; of another prior, by the draws of z.
    """

    elbo: jax.Array
    log_likelihood: jax.Array
    kl: jax.Array

    def weighted(self, kl_weight: float | jax.Array) -> jax.Array:
        """log_likelihood - kl_weight * kl, [batch]: what a beta-VAE maximises, or a warm-up of the KL.

        It is a bound for weights of at least 1 only; report `elbo`, whatever was trained.

        Source: Higgins et al., beta-VAE, ICLR 2017, equation 4.
        """
        return self.log_likelihood - kl_weight * self.kl


def spread_elbo(
    x: jax.Array,
    encode: Encode,
    decode: Decode,
    noise: SpreadNoise,
    *,
    key: jax.Array,
    num_spread_samples: int = 1,
    num_latent_samples: int = 1,
    low_variance: bool = False,
    prior_log_prob: Callable[[jax.Array], jax.Array] | None = None,
    spread_samples: jax.Array | None = None,
    has_aux: bool = False,
) -> Any:
    r"""Evidence lower bound on the spread log-likelihood of a model with deterministic outputs, x = g(z).

    For each example x, with y ~ p(y|x) (`num_spread_samples` draws) and z ~ q(z|y) (`num_latent_samples`
    draws for each y),

      E_{p(y|x)} log p~(y)  >=  E_{p(y|x)} [ E_{q(z|y)} log p(y|g(z)) - KL(q(z|y) || N(0, I)) ].

    The mean of this bound over the data is, up to a constant, minus an upper bound on KL(p~ || p~_theta).
    `encode` and `decode` are called exactly once, with the sample axes folded into the batch axis (the
    samples of one example stay neighbours), so batch normalisation sees one batch.

    Args:
      x: data [batch, *event], floating point.
      encode: y [n, *event] -> (mean, log_std) of the Gaussian q(z|y), each [n, *latent].
      decode: z [n, *latent] -> x = g(z) [n, *event].
      noise: the spread noise p(y|x), the same for data and model.
      key: a JAX random key, or one for each example: see `example_keys`.
      num_spread_samples: S_y, draws of y for each example.
      num_latent_samples: S_z, draws of z for each y.
      low_variance: replace log p(y|g(z)) by its expectation over a fresh y' ~ p(y'|x), in closed form
        (log N(x; g(z), sigma^2 I) - X / 2 for Gaussian noise). The encoder still sees the noisy y. The noise off
        the manifold, X - Z of its X dimensions, then no longer enters the gradient: its variance falls by the
        order of X / Z (for a linear model with Z = 2: not at all at X = 4, 10 times at X = 40, 100 times at
        X = 400). It changes the objective: z depends on y through q(z|y), and what is dropped is
        their covariance, E <y - x, g(z)> / sigma^2 for Gaussian noise, positive near the optimum. So the value
        is lower, the encoder is no longer rewarded for fitting the noise, and the maximiser is biased: for data
        x = a z of variance v it is |a|^2 = v^2 / (v + sigma^2) - sigma^2 in place of v. Harmless where sigma
        is small beside the data's spread along the manifold; report the bound with False.
      prior_log_prob: log p(z) of another prior than N(0, I), normalised, z [n, *latent] -> [n]. The KL's share of it
        is then the mean over the draws of z; the entropy of q(z|y) stays exact.
      spread_samples: y [batch * num_spread_samples, *event], drawn already (see `spread`; those of an example are
        neighbours), for a caller who uses y elsewhere too. Nothing is drawn in their place, and `key` is that of
        the latents alone.
      has_aux: `encode` and `decode` return (output, aux), such as new batch statistics.

    Returns:
      ElboTerms, each [batch], averaged over the draws of that example, in nats. With `has_aux`,
      (ElboTerms, (encode_aux, decode_aux)).

    Raises:
      TypeError: x is not floating point, `noise` is no spread noise, a sample count is not an integer, or
        `low_variance` is asked of a noise without `expected_log_prob`.
      ValueError: an empty batch, or a shape that does not fit; the message names what was returned by whom.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on training implicit models (delta-VAE).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> x = jnp.ones((8, 3))
      >>> encode = lambda y: (y[:, :2], jnp.zeros((y.shape[0], 2)))
      >>> decode = lambda z: jnp.concatenate([z, z[:, :1]], axis=1)
      >>> terms = spread_elbo(x, encode, decode, GaussianNoise(0.5), key=jax.random.key(0))
      >>> terms.elbo.shape
      (8,)
    """
    counts = {"num_spread_samples": num_spread_samples, "num_latent_samples": num_latent_samples}
    x, key = check_bound(x, encode, decode, noise, key, low_variance=low_variance, **counts)
    y, key = spread_or_given(x, noise, key, num_spread_samples, spread_samples)
    noise = repeat_noise(noise, x, num_spread_samples * num_latent_samples)
    if low_variance:
        target, score = jnp.repeat(x, num_spread_samples, axis=0), noise.expected_log_prob
    else:
        target, score = y, noise.log_prob
    return _bound(x, y, target, score, encode, decode, key, num_latent_samples, prior_log_prob, has_aux)


def elbo(
    x: jax.Array,
    encode: Encode,
    decode: Decode,
    noise: SpreadNoise,
    *,
    key: jax.Array,
    num_latent_samples: int = 1,
    prior_log_prob: Callable[[jax.Array], jax.Array] | None = None,
    has_aux: bool = False,
) -> Any:
    r"""Evidence lower bound on the log-likelihood of clean data: the ordinary variational autoencoder.

      log p(x)  >=  E_{q(z|x)} log p(x|g(z)) - KL(q(z|x) || N(0, I)),

    with `noise` as the decoder's distribution. The model is spread and the data are not, so its optimum is
    biased as an estimate of a deterministic g: `spread_elbo` spreads both.

    Args:
      x: data [batch, *event], floating point.
      encode: x [n, *event] -> (mean, log_std) of the Gaussian q(z|x), each [n, *latent].
      decode: z [n, *latent] -> the location of the decoder's distribution [n, *event].
      noise: the decoder's distribution p(x|g(z)).
      key: a JAX random key, or one for each example: see `example_keys`.
      num_latent_samples: S_z, draws of z for each x.
      prior_log_prob: log p(z) of another prior than N(0, I), normalised, z [n, *latent] -> [n]. The KL's share of it
        is then the mean over the draws of z; the entropy of q(z|y) stays exact.
      has_aux: `encode` and `decode` return (output, aux), such as new batch statistics.

    Returns:
      ElboTerms, each [batch], in nats. With `has_aux`, (ElboTerms, (encode_aux, decode_aux)).

    Raises:
      TypeError: x is not floating point, `noise` is no spread noise, or the sample count is not an integer.
      ValueError: an empty batch, or a shape that does not fit; the message names what was returned by whom.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, equation 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> encode = lambda x: (x[:, :1], jnp.zeros((x.shape[0], 1)))
      >>> decode = lambda z: jnp.concatenate([z, z], axis=1)
      >>> elbo(jnp.ones((4, 2)), encode, decode, GaussianNoise(1.0), key=jax.random.key(0)).kl.shape
      (4,)
    """
    x, key = check_bound(x, encode, decode, noise, key, num_latent_samples=num_latent_samples)
    score = repeat_noise(noise, x, num_latent_samples).log_prob
    return _bound(x, x, x, score, encode, decode, key, num_latent_samples, prior_log_prob, has_aux)


def _bound(x, y, target, score, encode, decode, key, num_latent_samples, prior_log_prob, has_aux):
    """The bound of y under q(z|y), whose likelihood term is score(target, g(z))."""
    mean, log_std, encode_aux = posterior(encode, y, has_aux)
    mean_s = jnp.repeat(mean, num_latent_samples, axis=0)
    std_s = jnp.repeat(jnp.exp(log_std), num_latent_samples, axis=0)
    z = mean_s + std_s * draw_normal(key, mean_s.shape, mean_s.dtype)

    target = jnp.repeat(target, num_latent_samples, axis=0)
    location, decode_aux = decoded(decode, z, target, has_aux)
    log_likelihood = score(target, location).reshape(x.shape[0], -1).mean(axis=1)

    if prior_log_prob is None:
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_std) - 1 - 2 * log_std)
        kl = divergence.reshape(x.shape[0], -1).sum(axis=1) / (y.shape[0] // x.shape[0])
    else:
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).reshape(y.shape[0], -1).sum(axis=1)
        of_prior = log_prior(prior_log_prob, z).reshape(x.shape[0], -1).mean(axis=1)
        kl = -entropy.reshape(x.shape[0], -1).mean(axis=1) - of_prior
    terms = ElboTerms(elbo=log_likelihood - kl, log_likelihood=log_likelihood, kl=kl)
    return (terms, (encode_aux, decode_aux)) if has_aux else terms
