"""Importance-weighted bounds on the spread log-likelihood."""

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

__all__ = ["BoundTerms", "spread_importance_bound"]


class BoundTerms(NamedTuple):
    """What an importance-weighted bound returns for each example, each [batch].

    Attributes:
      bound: a lower bound on the spread log-likelihood, in nats.
      effective_sample_size: (sum w)^2 / sum w^2 of the importance weights, between 1 and the number of draws, or 0 if
        all of them vanish. Where it is near 1 a single draw decides, and more draws still raise the bound.
    """

    bound: jax.Array
    effective_sample_size: jax.Array


def spread_importance_bound(
    x: jax.Array,
    encode: Encode,
    decode: Decode,
    noise: SpreadNoise,
    *,
    key: jax.Array,
    num_samples: int,
    num_spread_samples: int = 1,
    prior_log_prob: Callable[[jax.Array], jax.Array] | None = None,
    spread_samples: jax.Array | None = None,
    has_aux: bool = False,
) -> Any:
    r"""Importance-weighted bound on the spread log-likelihood of a model x = g(z), z ~ N(0, I).

    With y ~ p(y|x) and K = `num_samples` draws z_k ~ q(z|y),

      E log p~(y)  >=  E log (1/K) sum_k p(y|g(z_k)) p(z_k) / q(z_k|y),

    which is the spread ELBO for K = 1, does not fall as K grows (on average), and reaches log p~(y) in the
    limit. `encode` and `decode` are called exactly once, with the sample axes folded into the batch axis.

    Args:
      x: data [batch, *event], floating point.
      encode: y [n, *event] -> (mean, log_std) of the Gaussian q(z|y), each [n, *latent].
      decode: z [n, *latent] -> x = g(z) [n, *event].
      noise: the spread noise p(y|x), the same for data and model.
      key: a JAX random key, or one for each example: see `example_keys`.
      num_samples: K, draws of z for each y.
      num_spread_samples: draws of y for each example, over which both terms are averaged.
      prior_log_prob: log p(z) of another prior than N(0, I), normalised, z [n, *latent] -> [n].
      spread_samples: y [batch * num_spread_samples, *event], drawn already (see `spread`; those of an example are
        neighbours), for a caller who uses y elsewhere too. Nothing is drawn in their place, and `key` is that of
        the latents alone.
      has_aux: `encode` and `decode` return (output, aux), such as new batch statistics.

    Returns:
      BoundTerms(bound, effective_sample_size), each [batch]. With `has_aux`,
      (BoundTerms, (encode_aux, decode_aux)).

    Raises:
      TypeError: x is not floating point, `noise` is no spread noise, or a sample count is not an integer.
      ValueError: an empty batch, or a shape that does not fit; the message names what was returned by whom.

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, equation 8.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> encode = lambda y: (y[:, :1], jnp.zeros((y.shape[0], 1)))
      >>> decode = lambda z: jnp.concatenate([z, z], axis=1)
      >>> x, noise = jnp.ones((8, 2)), GaussianNoise(0.5)
      >>> spread_importance_bound(x, encode, decode, noise, key=jax.random.key(0), num_samples=5).bound.shape
      (8,)
    """
    counts = {"num_samples": num_samples, "num_spread_samples": num_spread_samples}
    x, key = check_bound(x, encode, decode, noise, key, **counts)
    y, key = spread_or_given(x, noise, key, num_spread_samples, spread_samples)
    mean, log_std, encode_aux = posterior(encode, y, has_aux)
    mean, log_std, target = (jnp.repeat(part, num_samples, axis=0) for part in (mean, log_std, y))
    epsilon = draw_normal(key, mean.shape, mean.dtype)
    z = mean + jnp.exp(log_std) * epsilon
    location, decode_aux = decoded(decode, z, target, has_aux)
    log_likelihood = repeat_noise(noise, x, num_spread_samples * num_samples).log_prob(target, location)
    if prior_log_prob is None:
        # log p(z) - log q(z|y), whose constants cancel.
        latent = 0.5 * (jnp.square(epsilon) - jnp.square(z)) + log_std
        log_weights = log_likelihood + latent.reshape(latent.shape[0], -1).sum(axis=1)
    else:
        latent = 0.5 * jnp.square(epsilon) + log_std + 0.5 * math.log(2 * math.pi)  # -log q(z|y)
        latent = latent.reshape(latent.shape[0], -1).sum(axis=1)
        log_weights = log_likelihood + latent + log_prior(prior_log_prob, z)
    log_weights = log_weights.reshape(x.shape[0], num_spread_samples, num_samples)

    bound = jax.nn.logsumexp(log_weights, axis=2) - math.log(num_samples)
    largest = jax.lax.stop_gradient(log_weights.max(axis=2, keepdims=True))
    weights = jnp.where(largest > -jnp.inf, jnp.exp(log_weights - jnp.where(largest > -jnp.inf, largest, 0)), 0)
    total, squares = weights.sum(axis=2), jnp.square(weights).sum(axis=2)
    size = jnp.where(squares == 0, 0, jnp.square(total) / jnp.where(squares == 0, 1, squares))
    terms = BoundTerms(bound=bound.mean(axis=1), effective_sample_size=size.mean(axis=1))
    return (terms, (encode_aux, decode_aux)) if has_aux else terms
