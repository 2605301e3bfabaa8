"""Training by scores over many scales of noise: the difference of two denoisers moves the generator's samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spread_jax._checks import check_callable, check_examples, check_positive
from spread_jax._random import check_key
from spread_jax.noise import ScaleLaw
from spread_jax.noise._product import sum_event
from spread_jax.noise.scales import check_law
from spread_jax.objectives.density_ratio import spread_over_scales

__all__ = ["ScoreDifferenceTerms", "denoising_loss", "preconditioned", "score_difference_loss"]

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


class ScoreDifferenceTerms(NamedTuple):
    """What a generator descends on, and how far its scores are from the data's.

    Attributes:
      loss: [batch]; the gradient of its mean through `generated` is that of D_w, the value has no meaning.
      squared_difference: [batch], |grad log q~_sigma(y) - grad log p~_sigma(y)|^2, in squared inverse units of x: its
        mean is the Fisher divergence over the law of scales, which vanishes where model and data agree.
    """

    loss: jax.Array
    squared_difference: jax.Array


def score_difference_loss(
    generated: jax.Array,
    denoise_data: Denoise,
    denoise_model: Denoise,
    law: ScaleLaw,
    *,
    key: jax.Array,
    weight: Callable[[jax.Array], jax.Array] | None = None,
) -> ScoreDifferenceTerms:
    r"""Loss of a generator on D_w = E_w lambda(sigma) KL(q~_sigma||p~_sigma), Gaussian noise, by two denoisers.

    By Tweedie's formula a denoiser, the mean of x given y = x + sigma epsilon, tells the score of the spread
    distribution, grad_y log p~_sigma(y) = (E[x|y] - y) / sigma^2. So with one of the data and one of the samples,

      grad_theta D_w = E lambda(sigma) (E_q[x|y] - E_p[x|y]) / sigma^2 . dg/dtheta,   y = g(z) + sigma epsilon.

    It is the gradient of `density_ratio_losses` for reverse KL, with two denoisers in place of a critic.

    Args:
      generated: model samples g(z), [batch, *event].
      denoise_data: (y [batch, *event], sigma [batch]) -> E_p[x|y], [batch, *event]; held fixed.
      denoise_model: the same of the model's samples, E_q[x|y]; held fixed. Train both by `denoising_loss`.
      law: w, the law of noise scales.
      key: a JAX random key, or one for each example: see `example_keys`.
      weight: sigma [batch] -> lambda(sigma) > 0; 1 by default. sigma^2 gives all scales gradients of about one size.

    Returns:
      ScoreDifferenceTerms(loss, squared_difference), each [batch].

    Raises:
      TypeError: `generated` is not floating point, a denoiser is not callable, or `law` is no law of scales.
      ValueError: an empty batch, or a denoiser that returns another shape.

    Source: Luo et al., Diff-Instruct, NeurIPS 2023, equation 3.6; Yin et al., One-step Diffusion with Distribution
    Matching Distillation, CVPR 2024.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GridScales
      >>> x = jnp.ones((4, 2))
      >>> gaussian = lambda mean: lambda y, sigma: mean + (y - mean) / (1 + jnp.square(sigma))[:, None]
      >>> terms = score_difference_loss(x, gaussian(0.0), gaussian(1.0), GridScales(1.0), key=jax.random.key(0))
      >>> print(terms.squared_difference.round(4))  # |(1 - 0) / (1 + 1)|^2 in each of two dimensions
      [0.5 0.5 0.5 0.5]
    """
    generated = check_examples("generated", generated)
    check_law("law", law)
    key = check_key(key, generated.shape[0])
    y, sigma = jax.lax.stop_gradient(spread_over_scales(generated, law, key=key))
    of_data = _denoised("denoise_data", denoise_data, y, sigma)
    of_model = _denoised("denoise_model", denoise_model, y, sigma)
    difference = jax.lax.stop_gradient((of_model - of_data) / _like(jnp.square(sigma), y))
    direction = difference if weight is None else difference * _like(_weights(weight, sigma), y)
    return ScoreDifferenceTerms(sum_event(direction * generated), sum_event(jnp.square(difference)))


def denoising_loss(
    x: jax.Array,
    denoise: Denoise,
    law: ScaleLaw,
    *,
    key: jax.Array,
    weight: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    r"""lambda(sigma) |denoise(x + sigma epsilon, sigma) - x|^2, least for the mean of x given y: [batch].

    Args:
      x: [batch, *event], data or the model's samples, which are held fixed.
      denoise: (y [batch, *event], sigma [batch]) -> [batch, *event], such as one of `preconditioned`.
      law: w, the law of noise scales.
      key: a JAX random key, or one for each example: see `example_keys`.
      weight: sigma [batch] -> lambda(sigma) > 0; 1 by default. The best denoiser is the same under any; with that of
        `preconditioned` a network has errors of one size at all scales.

    Returns:
      [batch], in squared units of x.

    Raises:
      TypeError: x is not floating point, `denoise` is not callable, or `law` is no law of scales.
      ValueError: an empty batch, or a denoiser that returns another shape.

    Source: Vincent, A Connection Between Score Matching and Denoising Autoencoders, Neural Computation 2011.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GridScales
      >>> loss = denoising_loss(jnp.ones((3, 2)), lambda y, sigma: 0 * y, GridScales(0.5), key=jax.random.key(0))
      >>> print(loss)
      [2. 2. 2.]
    """
    x = jax.lax.stop_gradient(check_examples("x", x))
    check_law("law", law)
    key = check_key(key, x.shape[0])
    y, sigma = spread_over_scales(x, law, key=key)
    error = sum_event(jnp.square(_denoised("denoise", denoise, y, sigma) - x))
    return error if weight is None else error * _weights(weight, sigma)


def preconditioned(
    network: Denoise, *, data_scale: float | jax.Array, data_mean: float | jax.Array = 0.0
) -> tuple[Denoise, Callable[[jax.Array], jax.Array]]:
    r"""A denoiser from a network whose inputs and targets have unit variance at every scale, and its loss's weight.

      denoise(y, sigma) = m + (s / t)^2 u + (s sigma / t) network(u / t, sigma),   u = y - m,   t^2 = s^2 + sigma^2.

    A network that returns zero gives the denoiser of N(m, s^2 I).

    Args:
      network: (u [batch, *event], sigma [batch]) -> [batch, *event].
      data_scale: s > 0, the standard deviation of the data, in units of x.
      data_mean: m, their mean.

    Returns:
      denoise and the weight (s^2 + sigma^2) / (s sigma)^2 for `denoising_loss`, with which the network's own squared
      error is what is minimised.

    Raises:
      TypeError: `network` is not callable.
      ValueError: a concrete `data_scale` is not positive.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022, table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> denoise, weight = preconditioned(lambda u, sigma: 0 * u, data_scale=1.0)
      >>> print(denoise(jnp.ones((1, 2)), jnp.ones(1)).round(4), weight(jnp.ones(1)))
      [[0.5 0.5]] [2.]
    """
    check_callable("network", network)
    check_positive("data_scale", data_scale)

    def denoise(y, sigma):
        s, m = jnp.asarray(data_scale, y.dtype), jnp.asarray(data_mean, y.dtype)
        noise = _like(sigma, y)
        total = jnp.sqrt(jnp.square(s) + jnp.square(noise))
        u = y - m
        residual = _checked("network", network(u / total, sigma), y)
        return m + jnp.square(s / total) * u + (s * noise / total) * residual

    def weight(sigma):
        s = jnp.asarray(data_scale, sigma.dtype)
        return 1 / jnp.square(s) + 1 / jnp.square(sigma)

    return denoise, weight


def _denoised(name, denoise, y, sigma):
    check_callable(name, denoise)
    return _checked(name, denoise(y, sigma), y)


def _checked(name, returned, y):
    if getattr(returned, "shape", None) != y.shape:
        raise ValueError(
            f"{name} must return the shape of y, {y.shape}, got {getattr(returned, 'shape', type(returned).__name__)}."
        )
    return returned.astype(y.dtype)


def _weights(weight, sigma):
    check_callable("weight", weight)
    return weight(sigma)


def _like(sigma, y):
    """[batch] -> [batch, 1, ...]."""
    return sigma.reshape(-1, *(1 for _ in y.shape[1:]))
