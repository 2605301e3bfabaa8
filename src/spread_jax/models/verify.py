"""The learned log-ratio as a judge of samples: the best of several, or rejection."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.models.density_ratio import DensityRatio
from spread_jax.models.run import Trained, as_trained, in_batches, sample

__all__ = ["best_of", "log_ratios", "rejection_sample"]


def log_ratios(run: Trained, images: np.ndarray, *, seed: int = 0, draws: int = 8) -> np.ndarray:
    r"""How much likelier as data than as samples the critic finds images: the mean of v(x + sigma eps, sigma) over w.

      v(y, sigma) = log p~_sigma(y) - log q~_sigma(y)   where the critic is right.

    Each image is seen at `draws` scales, the same quantiles of the law for all of them, with the same noise: what
    differs is the images.

    Args:
      run: what `fit` or `open_run` returned for `DensityRatio` or `DensityRatioVae`, or a run's folder.
      images: [n, height, width, channels], uint8 or floats in [0, 1].
      seed: of the noise.
      draws: scales at which each is seen.

    Returns:
      float32 [n], in nats.

    Raises:
      ValueError: the method has no critic of log-ratios, images of another shape, or draws is below 1.

    Source: Azadi et al., Discriminator Rejection Sampling, ICLR 2019, section 3.
    """
    run = as_trained(run)
    method = run.method
    if not isinstance(method, DensityRatio):
        raise ValueError(f"run must have a critic of log-ratios, as density_ratio has, got {method.title}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != tuple(method.image_shape):
        raise ValueError(f"images must have shape (n, *{method.image_shape}), got {images.shape}.")
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    low, high = np.log(method.lowest_noise_scale), np.log(method.highest_noise_scale)
    scales = np.exp(low + (high - low) * (np.arange(draws) + 0.5) / draws).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), draws)

    @jax.jit
    def mean_ratio(state, x):
        critic = method.network("critic", state.params, state.variables, train=False)
        at = lambda sigma, key: critic(x + sigma * jax.random.normal(key, x.shape[1:]), jnp.full(len(x), sigma))
        return jax.lax.map(lambda drawn: at(*drawn), (scales, keys)).mean(axis=0)

    return in_batches(lambda x: (mean_ratio(run.state, x),), images)[0]


def best_of(run: Trained, num: int, *, candidates: int = 4, seed: int = 0, latents: Any = None) -> np.ndarray:
    r"""Of every few samples that which the critic finds likest to data.

      x_i = g(z_ij) with the largest v(g(z_ij)) among j = 1 .. candidates.

    Args:
      run: as `log_ratios` takes it.
      num: how many to return.
      candidates: samples that each is the best of; 1 for all.
      seed: of latents and noise; the candidates are `sample`'s of this seed.
      latents: where z is from, as `sample` takes it.

    Returns:
      float32 [num, height, width, channels] in [0, 1].

    Raises:
      ValueError: as `log_ratios`, or a number is below 1.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}.")
    run = as_trained(run)
    images = sample(run, num * candidates, seed=seed, latents=latents)
    told = log_ratios(run, images, seed=seed).reshape(num, candidates)
    return images[np.arange(num) * candidates + told.argmax(axis=1)]


def rejection_sample(run: Trained, num: int, *, rate: float = 0.5, seed: int = 0, latents: Any = None) -> np.ndarray:
    r"""Samples accepted with a probability that grows with what `log_ratios` says of them.

      P(accept x) = min(1, exp(v(x) - c)),   c such that the mean over samples is the rate.

    With the exact ratio and c at its maximum this would draw from the data's distribution; a higher rate cuts off less.

    Args:
      run: as `log_ratios` takes it.
      num: how many to return.
      rate: the share of samples that is accepted, in (0, 1].
      seed: of latents, noise and acceptance.
      latents: where z is from, as `sample` takes it; of a sampler the first z must not depend on how many are drawn.

    Returns:
      float32 [num, height, width, channels] in [0, 1].

    Raises:
      ValueError: as `log_ratios`, `rate` is out of range, or the critic's numbers are not finite.

    Source: Azadi et al., Discriminator Rejection Sampling, ICLR 2019, algorithm 1.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}.")
    run = as_trained(run)
    drawn, cut = math.ceil(num / rate), None
    while True:
        images = sample(run, drawn, seed=seed, latents=latents)  # the first are those of the round before
        told = log_ratios(run, images, seed=seed).astype(np.float64)
        if not np.isfinite(told).all():
            raise ValueError(
                f"run has a critic that gives no finite number at step {int(run.state.step)}: use another."
            )
        cut = _cut(told, rate) if cut is None else cut
        accepted = np.random.default_rng(seed).random(drawn) < np.exp(told - cut)
        if accepted.sum() >= num:
            return images[accepted][:num]
        drawn = math.ceil(1.25 * drawn)


def _cut(told: np.ndarray, rate: float) -> float:
    """c at which min(1, e^(v - c)) has the mean `rate`, by bisection."""
    low, high = told.min(), told.max() - np.log(rate)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, np.exp(told - middle)).mean() > rate else (low, middle)
    return high
