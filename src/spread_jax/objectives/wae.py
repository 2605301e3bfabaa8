"""The Wasserstein autoencoder with an MMD penalty: the autoencoder peer of spread training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_callable, check_examples, check_non_negative
from spread_jax._random import check_key, draw_normal
from spread_jax.divergences.mmd import InverseMultiquadricKernel, MixtureKernel, mmd_squared
from spread_jax.objectives._edge import Decode, decoded, split_aux

__all__ = ["WaeTerms", "wae_mmd_loss"]


class WaeTerms(NamedTuple):
    """The terms of a Wasserstein autoencoder: loss = mean(reconstruction) + weight * mmd.

    Attributes:
      loss: scalar. The penalty compares sets of latents, so there is no loss of one example.
      reconstruction: [batch], |x - g(e(x))|^2.
      mmd: scalar, the unbiased squared MMD of the encoded batch and prior samples.
    """

    loss: jax.Array
    reconstruction: jax.Array
    mmd: jax.Array


def wae_mmd_loss(
    x: jax.Array,
    encode: Callable[[jax.Array], Any],
    decode: Decode,
    *,
    key: jax.Array,
    weight: float | jax.Array,
    kernel: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    prior_samples: jax.Array | None = None,
    has_aux: bool = False,
) -> Any:
    r"""Loss of a Wasserstein autoencoder with deterministic encoder and decoder, prior N(0, I).

      mean_n |x_n - g(e(x_n))|^2 + weight MMD^2({e(x_n)}, {z_n}),   z_n ~ N(0, I).

    Args:
      x: data [batch, *event], at least two examples.
      encode: e, x [n, *event] -> z [n, *latent].
      decode: g, z [n, *latent] -> x [n, *event].
      key: a JAX random key for the prior samples, or one for each example: see `example_keys`.
      weight: lambda >= 0, in squared units of x; the published CelebA setting is 100.
      kernel: (z, z2) -> [n, m]; by default the published sum of seven inverse multiquadrics with
        c = 2 Z s for s in 0.1, 0.2, 0.5, 1, 2, 5, 10, Z the number of latent dimensions.
      prior_samples: [m, *latent], draws of another prior than N(0, I); at least two.
      has_aux: `encode` and `decode` return (output, aux), such as new batch statistics.

    Returns:
      WaeTerms(loss, reconstruction, mmd). With `has_aux`, (WaeTerms, (encode_aux, decode_aux)).

    Raises:
      TypeError: x is not floating point.
      ValueError: fewer than two examples, a concrete negative weight, or a shape that does not fit.

    Source: Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, algorithm 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((8, 3))
      >>> decode = lambda z: jnp.concatenate([z, z[:, :1]], axis=1)
      >>> wae_mmd_loss(x, lambda x: x[:, :2], decode, key=jax.random.key(0), weight=1.0).reconstruction.shape
      (8,)
    """
    x = check_examples("x", x)
    check_callable("encode", encode)
    check_callable("decode", decode)
    check_non_negative("weight", weight)
    key = check_key(key, x.shape[0])
    encoded, encode_aux = split_aux(encode(x), has_aux, "encode")
    if isinstance(encoded, (tuple, list)):
        raise ValueError(f"encode must return one array z [n, *latent], got a {type(encoded).__name__}.")
    z = check_batch("encode(x)", encoded).astype(x.dtype)
    if z.shape[0] != x.shape[0]:
        raise ValueError(f"encode must return shape [n, *latent] with n = {x.shape[0]}, got {z.shape}.")
    location, decode_aux = decoded(decode, z, x, has_aux)
    if kernel is None:
        size = math.prod(z.shape[1:])
        scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        kernel = MixtureKernel([InverseMultiquadricKernel(2.0 * size * s) for s in scales], [1.0] * len(scales))
    reconstruction = jnp.square(x - location).reshape(x.shape[0], -1).sum(axis=1)
    prior = draw_normal(key, z.shape, z.dtype) if prior_samples is None else prior_samples
    mmd = mmd_squared(z, prior, kernel)
    terms = WaeTerms(loss=reconstruction.mean() + weight * mmd, reconstruction=reconstruction, mmd=mmd)
    return (terms, (encode_aux, decode_aux)) if has_aux else terms
