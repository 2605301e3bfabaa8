"""Trains the small network whose features the distances of `spread-jax evaluate` are taken in.

  spread-jax features --data PATH      a few minutes on 2 cores

The network learns, on the training images, to tell quarter turns apart, to recognise an image in two crops, and the
labels where there are labels. It is written as features/<data>-<fingerprint>.npz in the cache's folder, where
`spread-jax evaluate` finds it (and trains it if it is not there). For the 64x64 synthetic faces the package has such a
file, which is used until you write one of your own. Distances compare only where the fingerprint of the features is
the same; it is in every result.

The last line reports, as a check, Fréchet distances of the validation images to training images: as they are
(expect the lowest), and blurred, noisy, mixed in pairs, or with seven of eight images lost (expect them larger).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from spread_jax.cli.flags import parse_plain
from spread_jax.cli.launch import print_result, talker
from spread_jax.data import open_dataset
from spread_jax.errors import UsageError
from spread_jax.evaluation import Moments, frechet_distance
from spread_jax.models.scores import features_path, train_and_save_features
from spread_jax.runtime import configure, versions

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train on, and how long."""

    data: str = "faces"
    """`faces` (synthetic), `digits`, `celeb_a`, or a path, as for `spread-jax train`."""
    output: Path | None = None
    """The file to write; features/<data>-<fingerprint>.npz in the cache's folder if not given."""
    seed: int = 0
    """Seed of the initial parameters, the batches and the crops."""
    steps: int = 600
    """Adam steps."""
    batch_size: int = 64
    """Images in a step; each is seen three times."""
    width: int = 16
    """Channels of the first convolution; there are 12 times as many features."""
    crop: int | None = None
    """Side of the centre square cut out before resizing; 140 for CelebA if not given."""
    max_examples: int | None = None
    """Use only the first images of each split, this many."""
    cache_dir: str | None = None
    """Folder of decoded images and features; ~/.cache/spread_jax if not given."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


def damage(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Images in [0, 1] as they are, and damaged in four ways that a distance should notice."""
    images = images.astype(np.float32) / 255
    chance = np.random.default_rng(seed)
    blurred = images
    for axis in (1, 2, 1, 2):
        blurred = (np.roll(blurred, -1, axis) + blurred + np.roll(blurred, 1, axis)) / 3
    noise = chance.standard_normal(images.shape, np.float32)
    return {
        "unchanged": images,
        "blurred": blurred,
        "noisy": np.clip(images + 0.1 * noise, 0, 1),
        "mixed": 0.5 * (images + images[::-1]),
        "seven of eight lost": np.tile(images[: max(1, len(images) // 8)], (8, 1, 1, 1)),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains, writes, checks."""
    config = parse_plain(Config, argv, prog="spread-jax features", description=__doc__)
    for name, lowest in (("seed", 0), ("steps", 1), ("batch_size", 1), ("width", 1)):
        if getattr(config, name) < lowest:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {lowest}, got {getattr(config, name)}.")
    configure()
    say = talker(quiet=config.quiet)
    train, validation = (
        open_dataset(
            config.data,
            split,
            crop=config.crop,
            max_examples=config.max_examples,
            cache_dir=config.cache_dir,
            **({"progress": lambda *_: None} if config.quiet else {}),
        )
        for split in ("train", "validation")
    )
    if len(validation) < 2 or len(train) < 16:
        raise UsageError(
            f"{config.data} has {len(train)} training and {len(validation)} validation images: "
            "at least 16 and 2 are needed."
        )
    path = config.output or features_path(train, config.cache_dir)
    network = train_and_save_features(
        train, path, say=say, seed=config.seed, steps=config.steps, batch_size=config.batch_size, width=config.width
    )
    count = min(len(train), len(validation), 2000)
    reference = Moments.of(network(validation.images[:count]))
    damaged = damage(np.asarray(train.images[:count]), config.seed)
    check = {name: frechet_distance(Moments.of(network(images)), reference) for name, images in damaged.items()}
    print_result({
        "experiment": "features",
        "data": train.source,
        "features": str(path),
        "fingerprint": network.fingerprint,
        "dimension": network.dimension,
        **{k: v for k, v in network.config.items() if k in ("train_images", "num_labels", "num_steps", "last_steps")},
        "frechet_distance_to_validation": check,
        "versions": versions(),
    })  # fmt: skip
    return 0
