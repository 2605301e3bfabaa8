"""What is measured on a generator's samples, with which features, and how several seeds become a mean and an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from experiments import _launch
from experiments import features as feature_training
from spread_jax.data import Dataset
from spread_jax.evaluation import (
    FeatureNetwork,
    Moments,
    frechet_distance,
    frechet_infinity,
    inception_features,
    kernel_distance,
    precision_recall_density_coverage,
    relative_sharpness,
)

FEWEST = 16
_FEWEST_FOR_INFINITY = 64
_EXTRACTED = 2048  # images in memory as an array, out of a data set


class Features(Protocol):
    """A feature extractor that says what it is: distances compare only where the fingerprint is the same."""

    name: str
    fingerprint: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features [n, d] of images."""


def find_features(
    wanted: str | None,
    train: Dataset,
    *,
    cache_dir: str | None,
    steps: int,
    say: Callable[..., None],
) -> Features:
    """The extractor that was asked for, or that of the data, trained now if there is none yet.

    Args:
      wanted: `inception`, a file made by experiments.features, or None for the features of the data.
      train: the training split.
      cache_dir: where the features of a data set are kept.
      steps: of training, where they are trained.
      say: as made by `_launch.talker`.
    """
    if wanted == "inception":
        return inception_features()
    if wanted is not None:
        network = FeatureNetwork.load(wanted)
        if network.image_shape != train.image_shape:
            raise _launch.UsageError(
                f"{wanted} takes images {network.image_shape}, the run's are {train.image_shape}: pass "
                "features that were trained on its data, or leave --features out."
            )
        return network
    path = feature_training.default_path(train, cache_dir)
    if path.exists():
        return FeatureNetwork.load(path)
    say(f"features: none for this data yet, training them; `python -m experiments.features --data {train.name}`")
    return feature_training.train_and_save(train, path, say=say, steps=steps)


def require_enough(train: Dataset, test: Dataset) -> None:
    """Refuses splits too small for a distance."""
    if min(len(test), len(train)) < FEWEST:
        raise _launch.UsageError(
            f"{train.source} has {len(train)} training and {len(test)} test images: {FEWEST} of each are needed."
        )


def features_of(extract: Features, images: np.ndarray) -> np.ndarray:
    """Features of all images of a data set, a part at a time."""
    return np.concatenate([
        extract(np.asarray(images[i : i + _EXTRACTED])) for i in range(0, len(images), _EXTRACTED)
    ])  # fmt: skip


def random_rows(length: int, count: int, seed: int) -> np.ndarray:
    """Indices of `count` of the training images, at most all: they stand for a perfect generator."""
    return np.sort(np.random.default_rng(seed).permutation(length)[:count])


def distances(fake: np.ndarray, real: np.ndarray, *, infinity_key: jax.Array | None = None) -> dict[str, float | None]:
    """Every distance of two equally large sets of features [n, d].

    Args:
      fake: features of samples.
      real: features of held-out images.
      infinity_key: where given, the Fréchet distance is also extrapolated to infinitely many examples, which takes
        longer than the rest; None there if there are too few.
    """
    kernel = kernel_distance(fake, real)
    found = {"frechet_distance": frechet_distance(Moments.of(fake), Moments.of(real))}
    if infinity_key is not None:
        infinity = (
            frechet_infinity(fake, real, key=infinity_key)._asdict()
            if len(fake) >= _FEWEST_FOR_INFINITY
            else {"value": None, "standard_error": None}
        )
        found |= {
            "frechet_infinity": infinity["value"],
            "frechet_infinity_standard_error": infinity["standard_error"],
        }
    return {
        **found,
        "kernel_distance": kernel.value,
        "kernel_distance_standard_error": kernel.standard_error,
        **precision_recall_density_coverage(real, fake)._asdict(),
    }


def sharpness(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Variance of the Laplacian of samples over that of real images."""
    found = relative_sharpness(samples, real)
    return {"sharpness": found.value, "sharpness_standard_error": found.standard_error}


def as_stored(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8, as a file would hold them: what every extractor sees."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def sample_images(
    generate: Callable[[jax.Array], jax.Array], latents: np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """uint8 images g(z) [n, height, width, channels] of latents [n, Z]; one shape, one compilation."""
    count = len(latents)
    parts = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count
        parts.append(as_stored(np.asarray(generate(latents[rows])))[: count - start])
    return np.concatenate(parts)


def sample_scores(samples: np.ndarray, held_out: np.ndarray, held_out_features: np.ndarray, extract: Features) -> dict:
    """Distances and sharpness of uint8 samples against as many held-out images."""
    return {**distances(extract(samples), held_out_features), **sharpness(samples, held_out)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and its standard error, None of one seed."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error
