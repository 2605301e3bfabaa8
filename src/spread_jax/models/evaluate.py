"""Evaluates any generator: samples against held-out images, bounds on their likelihood, a look for memorised images."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spread_jax.data import Dataset
from spread_jax.evaluation import annealed_importance_sampling, held_out_bound, nearest_neighbours
from spread_jax.models import scores
from spread_jax.models.latents import LatentDensity, LatentMixture, Posteriors, fit_mixture
from spread_jax.models.method import SettingError, to_unit
from spread_jax.models.run import Trained, encode, sample
from spread_jax.objectives import spread_importance_bound

__all__ = ["EvaluateSettings", "evaluate", "fitted_latents", "posteriors"]

_DRAWN = 2048  # samples in memory as floats


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """How thoroughly a generator is evaluated.

    Example:
      >>> EvaluateSettings(samples=1000).importance_samples
      50
    """

    features: str | None = None
    """`inception`, or a file made by `spread-jax features`; that of the run's data, trained if need be, if not
    given."""
    samples: int = 10_000
    """Held-out images to compare with, at most, and as many samples."""
    mixture_components: int = 10
    """Gaussians in the mixture that is fitted to the aggregate posterior, for samples whose latents are drawn from it
    beside those from the prior, or the other way round where the run ended with a mixture; 0 for samples of one kind.
    For methods with an encoder."""
    latent_examples: int = 5000
    """Training images whose posteriors it is fitted to, at most."""
    importance_examples: int = 200
    """Held-out images for the importance-weighted bound; 0 for none."""
    importance_samples: int = 50
    """K, draws of z for each of them."""
    annealed_examples: int = 0
    """Held-out images for annealed importance sampling, which is slow; 0 for none."""
    annealed_steps: int = 500
    """Its intermediate distributions."""
    annealed_chains: int = 8
    """Its chains for each image."""
    feature_steps: int = 600
    """Training steps of the features, where they are trained here."""
    seed: int = 0
    """Seed of samples, noise and subsets."""

    def validate(self) -> None:
        """Refuses numbers that cannot work.

        Raises:
          SettingError: it names the setting.
        """
        lowest = {"samples": scores.FEWEST}
        lowest |= dict.fromkeys(("importance_samples", "annealed_steps", "annealed_chains", "feature_steps"), 1)
        lowest |= dict.fromkeys(("seed", "importance_examples", "annealed_examples", "mixture_components"), 0)
        lowest |= {"latent_examples": 1}
        for name, minimum in lowest.items():
            if not getattr(self, name) >= minimum:
                raise SettingError(name, f"must be at least {minimum}, got {getattr(self, name)}.")


def evaluate(
    run: Trained,
    splits: Mapping[str, Dataset],
    settings: EvaluateSettings = EvaluateSettings(),
    *,
    cache_dir: str | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Everything that can be measured of a generator.

    Args:
      run: what `fit` or `open_run` returned.
      splits: the `train` and `test` splits of what it was trained on.
      settings: how thoroughly.
      cache_dir: where the features of a data set are kept; ~/.cache/spread_jax if None.
      say: called with sentences for people.

    Returns:
      (named numbers, pictures). The numbers are

        frechet_distance     of samples and held-out images; frechet_infinity is extrapolated to infinitely many
        kernel_distance      unbiased, with its standard error
        precision, recall, density, coverage; sharpness over that of real images (1 is as sharp)
        real_*               the same for training against held-out images: what a perfect generator would get
        mixture_*            the same for samples whose latents are from a mixture fitted to the aggregate posterior;
                             prior_* in its place, from the prior, where `sample` draws from a mixture itself
        importance_bound     on the spread log-likelihood of held-out images, nats per example at the last noise, where
                             an encoder of spread images was trained; annealed importance sampling needs none
        memorised_share      of samples nearer to a training image than 99 % of the held-out images are: expect 0.01

      The pictures, uint8 [rows, 6, height, width, channels], are samples and the training images nearest in features.

    Raises:
      SettingError: a setting cannot work.
      UsageError: there are too few images.
    """
    settings.validate()
    train, test = splits["train"], splits["test"]
    scores.require_enough(train, test)
    extract = scores.find_features(settings.features, train, cache_dir=cache_dir, steps=settings.feature_steps, say=say)
    count = min(settings.samples, len(test))
    fit_latents = functools.partial(
        fitted_latents, run, train, components=settings.mixture_components, count=settings.latent_examples
    )
    density = run.latents
    if density is None and run.method.mixture_latents:  # of a step before the last
        density = fit_latents(components=settings.mixture_components or EvaluateSettings.mixture_components)
    told = "the prior" if density is None else "a mixture"
    say(
        f"{count} samples of step {int(run.state.step)}, latents from {told}, against {count} held-out images; "
        f"features: {extract.name}"
    )
    samples = draw_bytes(run, count, settings.seed, density)
    held_out = np.asarray(test.images[:count])
    sample_features, held_out_features = extract(samples), extract(held_out)
    train_features = scores.features_of(extract, train.images)
    # A random part of the training images, as large as the held-out part, stands for a perfect generator.
    some = scores.random_rows(len(train), count, settings.seed)
    key = jax.random.key(settings.seed)
    found = scores.distances(sample_features, held_out_features, infinity_key=key)
    if len(some) == count:
        real = scores.distances(train_features[some], held_out_features, infinity_key=key)
        found |= {f"real_{name}": value for name, value in real.items()}
    found |= scores.sharpness(samples, held_out)
    told = found["frechet_distance"], found.get("real_frechet_distance", math.nan)
    say(f"Fréchet distance {told[0]:.2f} (training images: {told[1]:.2f}), sharpness {found['sharpness']:.2f}")
    if run.has_encoder and settings.mixture_components:
        other, name = (fit_latents(), "mixture") if density is None else (None, "prior")
        others = draw_bytes(run, count, settings.seed, other)
        of_others = scores.sample_scores(others, held_out, held_out_features, extract)
        found |= {f"{name}_{of}": value for of, value in of_others.items()}
        told = "a fitted mixture" if density is None else "the prior"
        say(f"latents from {told}: Fréchet distance {of_others['frechet_distance']:.2f}")

    # Memorisation: do samples lie nearer to training images than unseen real images do?
    neighbours, distances = nearest_neighbours(sample_features, train_features, k=min(5, len(train)))
    _, of_held_out = nearest_neighbours(held_out_features, train_features)
    found |= {
        "memorised_share": float((distances[:, 0] < np.quantile(of_held_out, 0.01)).mean()),
        "nearest_training_distance_median": float(np.median(distances[:, 0])),
        "real_nearest_training_distance_median": float(np.median(of_held_out)),
    }
    rows = [np.concatenate([samples[i][None], train.images[np.array(neighbours[i])]]) for i in range(min(8, count))]
    numbers = {
        "step": int(run.state.step),
        "samples": count,
        "features": extract.name,
        "features_fingerprint": extract.fingerprint,
        **found,
        **likelihoods(run, test, settings, say),
        "seed": settings.seed,
    }
    return numbers, np.stack(rows)


def posteriors(run: Trained, dataset: Dataset, *, count: int, seed: int = 0) -> Posteriors:
    """q(z|y) of a split's first images, y drawn once for each.

    Args:
      run: a generator with an encoder.
      dataset: the split.
      count: images at most.
      seed: of the noise on the images.

    Returns:
      Their means and standard deviations.

    Raises:
      ValueError: the method has no encoder.
    """
    found = encode(run, dataset.images[: min(count, len(dataset))], seed=seed)
    return Posteriors(np.asarray(found.mean), np.asarray(found.std))


def fitted_latents(
    run: Trained, train: Dataset, *, components: int = 10, count: int = 5000, seed: int = 0
) -> LatentMixture:
    """A mixture of Gaussians fitted to the aggregate posterior, to draw z from in place of the prior.

    Args:
      run: a generator with an encoder.
      train: the training split.
      components: Gaussians in the mixture; fewer where there are fewer images.
      count: training images whose posteriors it is fitted to, at most.
      seed: of the draws and of EM's start.

    Returns:
      Its sampler and density.

    Raises:
      ValueError: the method has no encoder.
    """
    found = posteriors(run, train, count=count, seed=seed)
    return fit_mixture(found, components=min(components, len(found.mean)), seed=seed)


def draw_bytes(run: Trained, num: int, seed: int, density: LatentDensity | None = None, **options: Any) -> np.ndarray:
    """uint8 samples [num, height, width, channels], as an image file would hold them."""
    images = []
    for start in range(0, num, _DRAWN):
        # Parts of their own seeds: the latents of one seed are made anew from its first on.
        part, of_part = min(_DRAWN, num - start), seed + 1_000_003 * (start // _DRAWN)
        latents = "prior" if density is None else density.sample
        images.append(scores.to_bytes(sample(run, part, seed=of_part, latents=latents, **options)))
    return np.concatenate(images)


def likelihoods(
    run: Trained, test: Dataset, settings: EvaluateSettings, say: Callable[[str], None]
) -> dict[str, float]:
    """The importance-weighted bound, and annealed importance sampling, of held-out images.

    Of images spread by the run's last noise, or of the images themselves under a decoder's distribution: see
    `Method.scored_noise`. The first needs an encoder of these.
    """
    method, state = run.method, run.state
    noise = method.scored_noise(state)
    if noise is None:
        return {}
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    decode = method.network("generator", state.params, state.variables, train=False)
    found: dict[str, float] = {"noise_scale": float(method.noise_scale_of(state))}

    if settings.importance_examples and run.has_encoder:
        encode = method.network("encoder", state.params, state.variables, train=False)

        @jax.jit
        def bound(batch, *, key):
            return spread_importance_bound(
                to_unit(batch), encode, decode, noise, key=key, num_samples=settings.importance_samples
            )

        images = test.images[: settings.importance_examples]
        result = held_out_bound(bound, images, batch_size=10, key=key)
        found |= {
            "importance_bound_nats": result.value,
            "importance_bound_standard_error": result.standard_error,
            "importance_effective_sample_size": result.effective_sample_size,
            "importance_samples": settings.importance_samples,
            "importance_examples": len(images),
        }
        say(f"importance-weighted bound: {result.value:.1f} ± {result.standard_error:.1f} nats")
    if settings.annealed_examples:

        @jax.jit
        def annealed(batch, *, key):
            noise_key, chain_key = jax.random.split(key)
            y = noise.sample(to_unit(batch), key=noise_key)
            return annealed_importance_sampling(
                y, decode, noise, method.latent_dim,
                num_steps=settings.annealed_steps, num_chains=settings.annealed_chains, key=chain_key,
            )  # fmt: skip

        images = test.images[: settings.annealed_examples]
        terms = []

        def kept(batch, *, key):
            terms.append(annealed(batch, key=key))
            return terms[-1].log_likelihood

        result = held_out_bound(kept, images, batch_size=4, key=key)
        found |= {
            "annealed_log_likelihood_nats": result.value,
            "annealed_log_likelihood_standard_error": result.standard_error,
            "annealed_acceptance_rate": float(np.mean([t.acceptance_rate for t in terms])),
            "annealed_effective_sample_size": float(np.mean([t.effective_sample_size for t in terms])),
            "annealed_examples": len(images),
        }
        say(f"annealed importance sampling: {result.value:.1f} ± {result.standard_error:.1f} nats")
    return found
