"""How long and on what a method is trained."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from spread_jax.data import Dataset, Loader, open_dataset
from spread_jax.models.method import SettingError
from spread_jax.training import make_mesh

__all__ = ["SPLITS", "DataSettings", "FitSettings", "open_splits"]

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How long a method is trained, on how many devices, and what is kept of it.

    Example:
      >>> FitSettings(steps=100, batch_size=8).seed
      0
    """

    seed: int = 0
    """Seed of the data order, the initial parameters and the noise."""
    steps: int = 2400
    """Optimiser steps of the model; other players take their own between them."""
    batch_size: int = 32
    """Images in a batch, over all devices and processes."""
    accumulate: int = 1
    """Parts of a batch computed one after another, to save memory; batch statistics are then those of a part."""
    devices: int | None = None
    """Devices over all processes; all there are if not given."""
    model_parallel: int = 1
    """Devices that share one copy of wide networks, each with a part of the output channels."""
    record_every: int = 20
    """Steps of all players between lines of metrics.jsonl."""
    sample_every: int = 600
    """Steps of all players between sample grids and held-out evaluations."""
    save_every: int = 600
    """Steps of all players between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, besides the best."""
    held_out_examples: int = 500
    """Images of the test split in the final evaluation, of the validation split in the ones before."""
    mixture_samples: bool = False
    """At the end of a run with an encoder, fit a mixture of ten Gaussians to the aggregate posterior of the training
    images: `sample` draws z from it, and there is a second grid of samples."""

    def validate(self) -> None:
        """Refuses numbers that cannot work.

        Raises:
          SettingError: it names the setting.
        """
        for name in (
            "steps", "batch_size", "accumulate", "model_parallel", "record_every", "sample_every", "save_every", "keep",
            "held_out_examples",
        ):  # fmt: skip
            if not getattr(self, name) >= 1:
                raise SettingError(name, f"must be at least 1, got {getattr(self, name)}.")
        if not self.seed >= 0:
            raise SettingError("seed", f"must be at least 0, got {self.seed}.")

    def mesh(self) -> Mesh:
        """The devices to train on; refuses what cannot be divided among them."""
        try:
            mesh = make_mesh(self.devices, model_parallel=self.model_parallel)
        except ValueError as error:
            hint = " To make devices of a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=8."
            raise SettingError(
                "devices",
                f"= {self.devices or 'all'} with model_parallel = {self.model_parallel}: {error}"
                f"{hint if jax.default_backend() == 'cpu' else ''}",
            ) from None
        parts = mesh.shape["data"] * self.accumulate
        if self.batch_size % parts:
            raise SettingError(
                "batch_size",
                f"must be a multiple of {parts}, the number of parts that {mesh.shape['data']} devices with "
                f"accumulate = {self.accumulate} cut a batch into, got {self.batch_size}.",
            )
        return mesh

    def loader(self, dataset: Dataset) -> Loader:
        """The batches of this process."""
        return Loader(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What a method is trained on.

    Example:
      >>> DataSettings("photographs/", image_size=32).crop is None
      True
    """

    data: str = "faces"
    """`faces` (synthetic), `digits`, `mnist`, `celeb_a`, or the path of a folder or zip of images, of idx files or of a
    prepared TFDS folder."""
    image_size: int | None = None
    """Height and width that images are brought to, in pixels: 16, 32, 64, 128 or 256, or 28, 56, 112 or 224; 64 if not
    given, 28 for digits."""
    crop: int | None = None
    """Side of the centre square cut out before resizing; 140 for CelebA if not given."""
    max_examples: int | None = None
    """Use only the first images of each split, this many."""
    channels: int | None = None
    """1 or 3; what suits the data if not given."""
    cache_dir: str | None = None
    """Folder of decoded images; ~/.cache/spread_jax if not given."""


def open_splits(settings: DataSettings, *, quiet: bool = False) -> dict[str, Dataset]:
    """The training, validation and test images.

    Args:
      settings: where they are.
      quiet: whether to say nothing while they are decoded.

    Returns:
      Split -> data set.

    Raises:
      DatasetError: they cannot be opened; the message says what to do.
    """
    open_split = functools.partial(
        open_dataset,
        settings.data,
        image_size=settings.image_size,
        crop=settings.crop,
        channels=settings.channels,
        max_examples=settings.max_examples,
        cache_dir=settings.cache_dir,
        **({"progress": lambda *_: None} if quiet else {}),
    )
    return {split: open_split(split) for split in SPLITS}
