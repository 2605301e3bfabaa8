"""Draws samples from a trained generator: one grid, or a folder of PNG files.

spread-jax sample runs/celeba/demo-0                       a grid of 64 in the run's folder
spread-jax sample runs/celeba/demo-0 --num 1000 --folder samples/
spread-jax sample runs/celeba/demo-0 --best-of 4           of every four that which the critic finds best
spread-jax sample runs/celeba/small-0 --truncation 0.8     fewer odd samples, and less varied ones
spread-jax sample runs/mine --latents mixture              latents from a mixture fitted to the encoded training images
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from spread_jax._progress import tell
from spread_jax.cli._runs import data_of, open_split_of
from spread_jax.cli.flags import parse_plain
from spread_jax.cli.launch import print_result
from spread_jax.errors import UsageError
from spread_jax.evaluation import image_grid, save_image
from spread_jax.models import best_of, fitted_latents, open_run, sample
from spread_jax.runtime import configure

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as printed when it was trained."""
    num: int = 64
    """How many samples."""
    seed: int = 0
    """Seed of the latents; from the prior, sample i of a seed does not depend on how many are drawn."""
    latents: Literal["prior", "mixture"] | None = None
    """Draw z from N(0, I), or from a mixture of Gaussians that is fitted now to the aggregate posterior of the training
    images; if not given, from the mixture that the run has, or N(0, I) where it has none."""
    truncation: float = 1.0
    """Multiply the latents' standard deviations by this, in (0, 1]: fewer odd samples, less variety."""
    best_of: int = 1
    """Of every so many samples draw that which the critic finds likest to data, for runs with a critic of log-ratios;
    1 for all."""
    mixture_components: int = 10
    """Gaussians in the mixture."""
    step: int | None = None
    """Draw from the checkpoint of this step; the newest sound one if not given."""
    grid: Path | None = None
    """Where the grid goes; samples_seed<seed>.png in the run's folder if not given."""
    folder: Path | None = None
    """Write each sample as a PNG of its own into this folder instead of a grid."""
    columns: int | None = None
    """Samples in a row of the grid; about the square root of their number if not given."""
    data: str | None = None
    """Where the run's data is now, for the mixture; where it was if not given."""
    cache_dir: str | None = None
    """Folder of decoded images; ~/.cache/spread_jax if not given."""


def main(argv: list[str] | None = None) -> int:
    """Draws and writes."""
    config = parse_plain(Config, argv, prog="spread-jax sample", description=__doc__)
    for name, lowest in (("num", 1), ("columns", 1), ("best_of", 1), ("mixture_components", 1), ("seed", 0)):
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}.")
    if not 0 < config.truncation <= 1:
        raise UsageError(f"--truncation must be in (0, 1], got {config.truncation}.")
    if config.best_of > 1 and config.truncation < 1:
        raise UsageError("--best-of chooses among samples that are not truncated: leave --truncation out.")
    configure()
    run = open_run(config.run, step=config.step)
    latents: Any = config.latents
    if config.latents == "mixture":
        if not run.has_encoder:
            raise UsageError(f"{config.run} has no encoder to fit a mixture with: draw from the prior.")
        train = open_split_of(data_of(run, config.data, config.cache_dir), run, "train")
        run.latents, latents = fitted_latents(run, train, components=config.mixture_components), None
    elif config.latents is None and run.latents is None and run.method.mixture_latents:
        tell(
            f"{config.run} has no mixture of latents at step {int(run.state.step)}, so z is drawn from N(0, I), which "
            "its generator was not trained on: --latents mixture fits one."
        )
    if config.best_of > 1:
        try:
            images = best_of(run, config.num, candidates=config.best_of, seed=config.seed, latents=latents)
        except ValueError as error:
            raise UsageError(f"--best-of cannot be used: {error}") from None
    else:
        images = sample(run, config.num, seed=config.seed, latents=latents, truncation=config.truncation)
    try:
        if config.folder is not None:
            config.folder.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images):
                save_image(image_grid(image[None], padding=0), config.folder / f"{index:06d}.png")
            written = config.folder
        else:
            name = f"_{config.latents}" if config.latents else ""
            name += f"_truncation_{config.truncation}" if config.truncation < 1 else ""
            name += f"_best_of_{config.best_of}" if config.best_of > 1 else ""
            written = config.grid or config.run / f"samples{name}_seed{config.seed}.png"
            written.parent.mkdir(parents=True, exist_ok=True)
            save_image(image_grid(images, columns=config.columns), written)
    except OSError as error:
        raise UsageError(f"The samples could not be written: {error}. Choose another place.") from None
    print_result({"experiment": "sample", "run": str(config.run), "step": int(run.state.step), "num": config.num,
                  "seed": config.seed, "latents": config.latents, "truncation": config.truncation,
                  "best_of": config.best_of, "written": str(written)})  # fmt: skip
    return 0
