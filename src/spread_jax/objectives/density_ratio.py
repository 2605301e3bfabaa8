"""Training by density ratios over many scales of noise: a critic of y and sigma, and what a generator descends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._checks import check_callable
from spread_jax._random import is_for_examples, split_key
from spread_jax.divergences.f_divergences import FDivergence, check_divergence, jensen_shannon, reverse_kl
from spread_jax.noise import GaussianNoise, ScaleLaw, SpreadNoise
from spread_jax.noise.scales import check_law
from spread_jax.objectives._edge import check_sets, one_each

__all__ = [
    "DensityRatioLosses",
    "density_ratio_generator_loss",
    "density_ratio_losses",
    "non_saturating",
    "spread_over_scales",
]


class DensityRatioLosses(NamedTuple):
    """The losses of the two players, each a scalar to be minimised by its own, and how the critic stands.

    Attributes:
      generator: its gradient through `generated` is that of D_w(p||q), where the critic is right.
      critic: minus the lower bound on the critic's divergence, minimised where v = log p~_sigma(y) - log q~_sigma(y).
      divergence: that lower bound itself, the mean over the law of scales, in nats for divergences in nats.
      accuracy: the share of y whose side the sign of v tells, between 0.5 (it cannot tell) and 1.
    """

    generator: jax.Array
    critic: jax.Array
    divergence: jax.Array
    accuracy: jax.Array


def non_saturating(v: jax.Array) -> jax.Array:
    """log(1 + exp(-v)), for the generator: the usual practice. Jensen-Shannon's gradient, exp(-v) times as large."""
    return jax.nn.softplus(-v)


def density_ratio_losses(
    x: jax.Array,
    generated: jax.Array,
    critic: Callable[[jax.Array, jax.Array], jax.Array],
    law: ScaleLaw,
    noise: Callable[[jax.Array], SpreadNoise] = GaussianNoise,
    *,
    key: jax.Array,
    divergence: FDivergence | Callable[[jax.Array], jax.Array] = reverse_kl,
    critic_divergence: FDivergence = jensen_shannon,
    weight: Callable[[jax.Array], jax.Array] | None = None,
) -> DensityRatioLosses:
    r"""Losses of a generator and a critic that tells spread data from spread samples at every scale of noise.

    Each example is spread with a scale of its own, sigma ~ w. The critic minimises the variational bound of
    `critic_divergence` as a function of the log-ratio (of Jensen-Shannon: logistic regression),

      v(y, sigma)  ->  log p~_sigma(y) - log q~_sigma(y),

    and the generator descends on D_w(p||q) = E_w lambda(sigma) D_f(p~_sigma||q~_sigma) along

      grad_theta D_w = E lambda(sigma) grad_y h(v(y, sigma)) . dg/dtheta,   h(v) = f(e^v) - e^v f'(e^v),

    at y = g(z) + sigma epsilon with v held fixed, which is exact where v is: what the density q~ itself adds has
    mean zero. h is -v for reverse KL, -e^v for KL. As v is a log-ratio whatever it was trained by, each of the
    two players has a divergence of its own.

    The critic's gradient goes through `critic` and the generator's through `generated`: take each with respect to
    its own parameters.

    Args:
      x: data [n, *event].
      generated: model samples g(z), [m, *event].
      critic: (y [k, *event], sigma [k]) -> v, [k] or [k, 1], any real numbers. Called once, on data then samples.
      law: w, the law of noise scales.
      noise: sigma [k, 1, ...] -> the spread noise of these scales, one for each example.
      key: a JAX random key, or one for each example if there are as many generated: see `example_keys`.
      divergence: which f the generator descends on, or a function v -> loss such as `non_saturating`, elementwise.
      critic_divergence: which f the critic's bound is of. Both f must be curved: total variation's critic learns the
        sign of the log-ratio alone.
      weight: sigma [k] -> lambda(sigma) > 0, of a scale in the generator's loss; 1 by default. The critic's best v is
        the same under any.

    Returns:
      DensityRatioLosses(generator, critic, divergence, accuracy), scalars.

    Raises:
      TypeError: arrays are not floating point, a divergence, law or noise is none, or what must be callable is not.
      ValueError: empty sets, events of different shapes, a critic that does not return one number each, or a
        divergence whose f is not curved.

    Source: Chen, Zhang, He, Ou, Hernandez-Lobato, Schoelkopf and Barber, DiffRatio, 2025 (arXiv 2502.08005).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import LogUniformScales
      >>> x, law = jnp.zeros((4, 2)), LogUniformScales(0.1, 1.0)
      >>> critic = lambda y, sigma: -y.sum(axis=1) / jnp.square(sigma)
      >>> losses = density_ratio_losses(x, x + 1, critic, law, key=jax.random.key(0))
      >>> bool(losses.critic == -losses.divergence)
      True
    """
    x, generated, key = check_sets(x, generated, key, critic=critic, noise=noise)
    check_law("law", law)
    of_generator = _generator_loss(divergence)
    tight = _tight("critic_divergence", critic_divergence)
    data_key, model_key = split_key(key)
    sides = spread_over_scales(x, law, noise, key=data_key), spread_over_scales(generated, law, noise, key=model_key)
    y, sigma = (jnp.concatenate(parts) for parts in zip(*sides, strict=True))
    v = one_each("critic", critic(y, sigma), y)
    of_data, of_model = v[: x.shape[0]], v[x.shape[0] :]

    gained = critic_divergence.activation(tight(of_data)).mean()
    bound = gained - critic_divergence.conjugate_of_activation(tight(of_model)).mean()
    loss = of_generator(of_model)
    if weight is not None:
        check_callable("weight", weight)
        loss = loss * weight(sigma[x.shape[0] :])
    accuracy = 0.5 * ((of_data > 0).mean(dtype=y.dtype) + (of_model <= 0).mean(dtype=y.dtype))
    return DensityRatioLosses(generator=loss.mean(), critic=-bound, divergence=bound, accuracy=accuracy)


def density_ratio_generator_loss(
    generated: jax.Array,
    critic: Callable[[jax.Array, jax.Array], jax.Array],
    law: ScaleLaw,
    noise: Callable[[jax.Array], SpreadNoise] = GaussianNoise,
    *,
    key: jax.Array,
    divergence: FDivergence | Callable[[jax.Array], jax.Array] = reverse_kl,
    weight: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    r"""The generator's loss of `density_ratio_losses`, which needs no data: half the critic's work in its steps.

      lambda(sigma) h(v(y, sigma)),   y = g(z) + sigma epsilon.

    Args:
      generated: model samples g(z), [m, *event].
      critic: (y [m, *event], sigma [m]) -> v, [m] or [m, 1].
      law: w, the law of noise scales.
      noise: sigma [m, 1, ...] -> the spread noise of these scales, one for each example.
      key: a JAX random key, or one for each example: see `example_keys`.
      divergence: which f the generator descends on, or a function v -> loss, as in `density_ratio_losses`.
      weight: sigma [m] -> lambda(sigma) > 0; 1 by default.

    Returns:
      [m], a term for each sample.

    Raises:
      TypeError: samples are not floating point, the law is none, or what must be callable is not.
      ValueError: an empty set, or a critic that does not return one number each.

    Source: Chen et al., DiffRatio, 2025 (arXiv 2502.08005).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import LogUniformScales
      >>> critic = lambda y, sigma: -y.sum(axis=1) / jnp.square(sigma)
      >>> law = LogUniformScales(0.1, 1.0)
      >>> density_ratio_generator_loss(jnp.ones((4, 2)), critic, law, key=jax.random.key(0)).shape
      (4,)
    """
    generated, _, key = check_sets(generated, generated, key, critic=critic, noise=noise)
    check_law("law", law)
    y, sigma = spread_over_scales(generated, law, noise, key=key)
    loss = _generator_loss(divergence)(one_each("critic", critic(y, sigma), y))
    if weight is not None:
        check_callable("weight", weight)
        loss = loss * weight(sigma)
    return loss


def spread_over_scales(
    x: jax.Array,
    law: ScaleLaw,
    noise: Callable[[jax.Array], SpreadNoise] = GaussianNoise,
    *,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """y ~ p(y|x) with a scale for each example, sigma ~ w.

    Args:
      x: [batch, *event].
      law: w.
      noise: sigma [batch, 1, ...] -> the spread noise of these scales.
      key: a JAX random key, or one for each example: see `example_keys`.

    Returns:
      y [batch, *event] and sigma [batch].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import LogUniformScales
      >>> y, sigma = spread_over_scales(jnp.zeros((4, 2)), LogUniformScales(0.1, 1.0), key=jax.random.key(0))
      >>> y.shape, sigma.shape
      ((4, 2), (4,))
    """
    scale_key, noise_key = split_key(key)
    sigma = law.sample(x, key=scale_key)
    if is_for_examples(noise_key):
        one = lambda x, sigma, key: noise(sigma).sample(x[None], key=key)[0]
        y = jax.vmap(one)(x, sigma, noise_key)
    else:
        y = noise(sigma).sample(x, key=noise_key)
    return y, sigma.reshape(-1)


def _generator_loss(divergence):
    """h(v) of a divergence, or the function that was given in its place."""
    if isinstance(divergence, FDivergence):
        tight = _tight("divergence", divergence)
        return lambda v: -divergence.conjugate_of_activation(tight(v))
    check_callable("divergence", divergence)
    return divergence


def _tight(name, divergence):
    """The critic of a divergence from the log-ratio."""
    check_divergence(name, divergence)
    if divergence.tight is None:
        raise ValueError(
            f"{name} must have a curved f, for the log-ratio to decide, and that of {divergence.name} is straight; use "
            "another, such as jensen_shannon."
        )
    return divergence.tight
