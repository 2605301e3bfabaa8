"""Adversarial bounds on spread divergences: a spread GAN for any f."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._random import split_key
from spread_jax.divergences.f_divergences import FDivergence, jensen_shannon
from spread_jax.noise import SpreadNoise, spread
from spread_jax.objectives._edge import check_game, one_each

__all__ = ["GanLosses", "spread_gan_losses"]


class GanLosses(NamedTuple):
    """The losses of a spread GAN, each a scalar to be minimised by its own player.

    Attributes:
      generator: -E_{q~} T, the non-saturating part of the bound that depends on the generator with its sign
        chosen so that samples move where the critic sees more data than model (the usual practice).
      critic: minus the lower bound on the divergence.
      divergence: the lower bound on D_f(p~||q~) itself, in nats for divergences in nats. A generator that
        minimises this plays the exact minimax game.
    """

    generator: jax.Array
    critic: jax.Array
    divergence: jax.Array


def spread_gan_losses(
    x: jax.Array,
    generated: jax.Array,
    critic: Callable[[jax.Array], jax.Array],
    noise: SpreadNoise,
    *,
    key: jax.Array,
    divergence: FDivergence = jensen_shannon,
) -> GanLosses:
    r"""Losses of a GAN whose critic sees spread data and spread samples only.

    With y ~ p~ (data plus noise), y' ~ q~ (generated plus noise), v the critic's output and T =
    activation(v),

      D_f(p~||q~)  >=  E T(y) - E f*(T(y')),

    which is finite and has gradients where the supports of data and model do not meet. Adding noise to a
    critic's inputs ("instance noise") is this objective with Gaussian noise.

    The critic's gradient goes through `critic` and the generator's through `generated`: take each with
    respect to its own parameters, and `jax.lax.stop_gradient` costs nothing where the other is constant.

    Args:
      x: data [n, *event].
      generated: model samples g(z), [m, *event].
      critic: y [k, *event] -> v, [k] or [k, 1], any real numbers. Called once, on data then samples.
      noise: the spread noise p(y|x).
      key: a JAX random key, or one for each example if there are as many generated: see `example_keys`.
      divergence: which f.

    Returns:
      GanLosses(generator, critic, divergence), scalars.

    Raises:
      TypeError: arrays are not floating point, or `divergence` is no FDivergence.
      ValueError: empty sets, events of different shapes, or a critic that does not return one number each.

    Source: Nowozin, Cseke and Tomioka, f-GAN, NIPS 2016, equation 6; Sønderby et al., Amortised MAP
    Inference, ICLR 2017 (instance noise).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> x, critic = jnp.zeros((4, 2)), lambda y: y.sum(axis=1)
      >>> losses = spread_gan_losses(x, x + 1, critic, GaussianNoise(1.0), key=jax.random.key(0))
      >>> bool(losses.critic == -losses.divergence)
      True
    """
    x, generated, key = check_game(x, generated, critic, noise, divergence, key)
    data_key, model_key = split_key(key)
    y = jnp.concatenate([spread(x, noise, key=data_key), spread(generated, noise, key=model_key)])
    v = one_each("critic", critic(y), y)
    of_data, of_model = v[: x.shape[0]], v[x.shape[0] :]
    bound = divergence.activation(of_data).mean() - divergence.conjugate_of_activation(of_model).mean()
    return GanLosses(generator=-divergence.activation(of_model).mean(), critic=-bound, divergence=bound)
