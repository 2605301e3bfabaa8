"""Evidence lower bounds on the spread log-likelihood, and the ordinary one on clean data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._checks import check_callable, check_count, check_examples
from spread_jax._random import check_key, draw_noise, draw_normal, split_key
from spread_jax.noise import SpreadNoise
from spread_jax.noise._protocol import check_noise

__all__ = ["ElboTerms", "elbo", "spread_elbo"]

Encode = Callable[[jax.Array], Any]
Decode = Callable[[jax.Array], Any]


class ElboTerms(NamedTuple):
    """The terms of an evidence lower bound, each [batch], in nats: elbo = log_likelihood - kl.

    Attributes:
      elbo: the lower bound on log p~(y), or log p(x) for clean data.
      log_likelihood: E_{q(z|y)} log p(y|g(z)).
      kl: KL(q(z|y) || N(0, I)), exact.
    """

    elbo: jax.Array
    log_likelihood: jax.Array
    kl: jax.Array


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
    x = check_examples("x", x)
    check_noise("noise", noise)
    num_spread_samples = check_count("num_spread_samples", num_spread_samples)
    if low_variance and not hasattr(noise, "expected_log_prob"):
        raise TypeError(
            f"low_variance=True needs a noise with a closed-form expected_log_prob(x, x2); "
            f"{type(noise).__name__} has none, so pass low_variance=False."
        )
    check_key(key, x.shape[0])
    spread_key, latent_key = split_key(key)
    location = jnp.repeat(x, num_spread_samples, axis=0)
    y = draw_noise(noise, location, spread_key)
    target, score = (location, noise.expected_log_prob) if low_variance else (y, noise.log_prob)
    return _bound(y, target, score, encode, decode, latent_key, num_latent_samples, x.shape[0], has_aux)


def elbo(
    x: jax.Array,
    encode: Encode,
    decode: Decode,
    noise: SpreadNoise,
    *,
    key: jax.Array,
    num_latent_samples: int = 1,
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
    x = check_examples("x", x)
    check_noise("noise", noise)
    check_key(key, x.shape[0])
    return _bound(x, x, noise.log_prob, encode, decode, key, num_latent_samples, x.shape[0], has_aux)


def _bound(y, target, score, encode, decode, key, num_latent_samples, batch, has_aux):
    """The bound of y under q(z|y), whose likelihood term is score(target, g(z))."""
    num_latent_samples = check_count("num_latent_samples", num_latent_samples)
    check_callable("encode", encode)
    check_callable("decode", decode)
    encoded = encode(y)
    encoded, encode_aux = _split_aux(encoded, has_aux, "encode")
    mean, log_std = _check_posterior(encoded, y)

    mean_s = jnp.repeat(mean, num_latent_samples, axis=0)
    std_s = jnp.repeat(jnp.exp(log_std), num_latent_samples, axis=0)
    z = mean_s + std_s * draw_normal(key, mean_s.shape, mean_s.dtype)

    decoded, decode_aux = _split_aux(decode(z), has_aux, "decode")
    target = jnp.repeat(target, num_latent_samples, axis=0)
    if getattr(decoded, "shape", None) != target.shape:
        raise ValueError(
            f"decode must return shape [n, *event] = {target.shape} for z of shape {z.shape}, "
            f"got {getattr(decoded, 'shape', type(decoded).__name__)}."
        )
    # Compute dtypes may be lower; the bound itself is in the data's.
    log_likelihood = score(target, decoded.astype(target.dtype)).reshape(batch, -1).mean(axis=1)

    divergence = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_std) - 1 - 2 * log_std)
    kl = divergence.reshape(batch, -1).sum(axis=1) / (y.shape[0] // batch)
    terms = ElboTerms(elbo=log_likelihood - kl, log_likelihood=log_likelihood, kl=kl)
    return (terms, (encode_aux, decode_aux)) if has_aux else terms


def _split_aux(returned, has_aux, name):
    if not has_aux:
        return returned, None
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"with has_aux=True {name} must return (output, aux), got {type(returned).__name__}.")
    return returned


def _check_posterior(encoded, y):
    if not (isinstance(encoded, (tuple, list)) and len(encoded) == 2):
        raise ValueError(f"encode must return (mean, log_std), got {type(encoded).__name__}.")
    mean, log_std = (jnp.asarray(part).astype(y.dtype) for part in encoded)
    if mean.shape != log_std.shape or mean.ndim == 0 or mean.shape[0] != y.shape[0]:
        raise ValueError(
            f"encode must return mean and log_std of one shape [n, *latent] with n = {y.shape[0]}, "
            f"got {mean.shape} and {log_std.shape}."
        )
    return mean, log_std
