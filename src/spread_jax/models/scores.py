"""What is measured on a generator's samples, with which features, and how several seeds become a mean and an error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from spread_jax.data import Dataset, faces, render_faces
from spread_jax.errors import UsageError
from spread_jax.evaluation import (
    FeatureNetwork,
    Moments,
    frechet_distance,
    frechet_infinity,
    inception_features,
    kernel_distance,
    packaged_features,
    precision_recall_density_coverage,
    relative_sharpness,
    train_features,
)
from spread_jax.runtime import default_cache_dir

__all__ = [
    "FEWEST",
    "Features",
    "distances",
    "features_of",
    "features_path",
    "find_features",
    "mean_and_error",
    "random_rows",
    "require_enough",
    "sample_scores",
    "sharpness",
    "to_bytes",
    "train_and_save_features",
]

FEWEST = 16
_FEWEST_FOR_INFINITY = 64
_EXTRACTED = 2048  # images in memory as an array, out of a data set


class Features(Protocol):
    """A feature extractor that says what it is: distances compare only where the fingerprint is the same."""

    name: str
    fingerprint: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features [n, d] of images."""


def features_path(dataset: Dataset, cache_dir: str | None) -> Path:
    """Where the features of a data set are kept.

    Example:
      >>> features_path(Dataset.from_array(np.zeros((2, 8, 8, 1), np.uint8)), "cache").parent.name
      'features'
    """
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return folder / "features" / f"{dataset.name}-{dataset.fingerprint}.npz"


def train_and_save_features(
    dataset: Dataset,
    path: Path,
    *,
    say: Callable[..., None],
    seed: int = 0,
    steps: int = 600,
    batch_size: int = 64,
    width: int = 16,
) -> FeatureNetwork:
    """Trains on a split's images, and labels if it has them, and writes the file."""
    labels = dataset.labels if dataset.labels is not None and dataset.labels.ndim == 1 else None
    began = time.monotonic()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        told = ", ".join(f"{n.removesuffix('_accuracy')} {v:.2f}" for n, v in metrics.items() if "accuracy" in n)
        say(f"features: step {step}/{steps}: accuracy {told}, {time.monotonic() - began:.0f} s")

    network = train_features(
        dataset.images,
        labels,
        key=jax.random.key(seed),
        num_steps=steps,
        batch_size=batch_size,
        width=width,
        data=dataset.name,
        data_fingerprint=dataset.fingerprint,
        on_step=on_step,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save(path)
    say(f"features: {network.fingerprint} in {path}")
    return network


def find_features(
    wanted: str | None,
    train: Dataset,
    *,
    cache_dir: str | None,
    steps: int,
    say: Callable[..., None],
) -> Features:
    """The extractor that was asked for, or that of the data: one's own, the package's, or trained now.

    Args:
      wanted: `inception`, a file made by `spread-jax features`, or None for the features of the data.
      train: the training split.
      cache_dir: where the features of a data set are kept.
      steps: of training, where they are trained.
      say: called with sentences for people.
    """
    if wanted == "inception":
        return inception_features()
    if wanted is not None:
        network = FeatureNetwork.load(wanted)
        if network.image_shape != train.image_shape:
            raise UsageError(
                f"{wanted} takes images {network.image_shape}, the run's are {train.image_shape}: pass "
                "features that were trained on its data, or leave --features out."
            )
        return network
    path = features_path(train, cache_dir)
    if path.exists():
        return FeatureNetwork.load(path)
    if _are_synthetic_faces(train):
        return packaged_features()
    say(f"features: none for this data yet, training them; `spread-jax features --data {train.name}`")
    return train_and_save_features(train, path, say=say, steps=steps)


def _are_synthetic_faces(train: Dataset) -> bool:
    """Whether these are the images of the package's features. Another processor may round a pixel differently."""
    if train.name != "faces" or (len(train), *train.image_shape) != (faces.NUM_EXAMPLES["train"], 64, 64, 3):
        return False
    rendered = render_faces(faces.factors_at(0, "train", 0, 4))
    return np.abs(np.subtract(train.images[:4], rendered, dtype=int)).max() <= 1


def require_enough(train: Dataset, test: Dataset) -> None:
    """Refuses splits too small for a distance.

    Example:
      >>> require_enough(*(Dataset.from_array(np.zeros((16, 8, 8, 1), np.uint8)) for _ in range(2)))
    """
    if min(len(test), len(train)) < FEWEST:
        raise UsageError(
            f"{train.source} has {len(train)} training and {len(test)} test images: {FEWEST} of each are needed."
        )


def features_of(extract: Features, images: np.ndarray) -> np.ndarray:
    """Features of all images of a data set, a part at a time.

    Example:
      >>> features_of(lambda images: images.reshape(len(images), -1)[:, :2], np.zeros((5, 8, 8, 1), np.uint8)).shape
      (5, 2)
    """
    return np.concatenate([
        extract(np.asarray(images[i : i + _EXTRACTED])) for i in range(0, len(images), _EXTRACTED)
    ])  # fmt: skip


def random_rows(length: int, count: int, seed: int) -> np.ndarray:
    """Indices of `count` of the training images, at most all: they stand for a perfect generator.

    Example:
      >>> random_rows(10, 3, seed=0).tolist()
      [2, 4, 6]
    """
    return np.sort(np.random.default_rng(seed).permutation(length)[:count])


def distances(fake: np.ndarray, real: np.ndarray, *, infinity_key: jax.Array | None = None) -> dict[str, float | None]:
    """Every distance of two equally large sets of features [n, d].

    Args:
      fake: features of samples.
      real: features of held-out images.
      infinity_key: where given, the Fréchet distance is also extrapolated to infinitely many examples, which takes
        longer than the rest; None there if there are too few.

    Example:
      >>> features = np.random.default_rng(0).normal(size=(30, 2))
      >>> sorted(distances(features, features))[:4]
      ['coverage', 'density', 'frechet_distance', 'kernel_distance']
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
    """Variance of the Laplacian of samples over that of real images.

    Example:
      >>> images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1), np.uint8)
      >>> sharpness(images, images)["sharpness"]
      1.0
    """
    found = relative_sharpness(samples, real)
    return {"sharpness": found.value, "sharpness_standard_error": found.standard_error}


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8, as a file would hold them: what every extractor sees.

    Example:
      >>> to_bytes(np.array([-0.5, 0.5, 1.0])).tolist()
      [0, 128, 255]
    """
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def sample_scores(samples: np.ndarray, held_out: np.ndarray, held_out_features: np.ndarray, extract: Features) -> dict:
    """Distances and sharpness of uint8 samples against as many held-out images.

    Example:
      >>> images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8)
      >>> extract = lambda images: images.reshape(len(images), -1)[:, :2].astype(float)
      >>> sample_scores(images, images, extract(images), extract)["precision"]
      1.0
    """
    return {**distances(extract(samples), held_out_features), **sharpness(samples, held_out)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and its standard error, None of one seed.

    Example:
      >>> mean_and_error([1.0, 3.0])
      (2.0, 1.0)
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error
