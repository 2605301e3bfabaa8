"""Evaluates a finished run: samples against held-out images, bounds, a look for memorised images.

  spread-jax evaluate runs/celeba/demo-0                          features trained on the run's own data
  spread-jax evaluate runs/celeba/demo-0 --features inception     the literature's FID and KID

Adds `evaluation` to the run's results.json, draws neighbours.png and writes report.html. Numbers that begin with
`real_` are of training images: what a perfect generator would get; those that begin with `mixture_`, of samples whose
latents are from a mixture fitted to the aggregate posterior; with `prior_`, from the prior, where the run itself ended
with such a mixture.

Features of the run's own data are trained once for each data set, about a minute on 2 cores, see `spread-jax features`;
those of the 64x64 synthetic faces come with the package. Distances compare only where `features_fingerprint` is the
same. The rest takes about half a minute for the demo. Expect a distance that falls as training goes on, and stays well
above real_frechet_distance.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import tyro

from spread_jax.cli._runs import data_of, open_split_of
from spread_jax.cli.flags import parse_plain
from spread_jax.cli.launch import print_result, talker
from spread_jax.evaluation import image_grid, save_image, write_report
from spread_jax.models import EvaluateSettings, evaluate, open_run
from spread_jax.runtime import configure, versions
from spread_jax.training import RunDirectory

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as printed when it was trained."""
    settings: EvaluateSettings = EvaluateSettings()  # noqa: RUF009 (frozen)
    """How thoroughly."""
    data: str | None = None
    """Where the run's data is now; where it was if not given."""
    cache_dir: str | None = None
    """Folder of decoded images and features; ~/.cache/spread_jax if not given."""
    real_images: bool = True
    """Draw nearest training images and show real images in the report."""
    step: int | None = None
    """Evaluate the checkpoint of this step; the newest sound one if not given."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


def main(argv: list[str] | None = None) -> int:
    """Evaluates, adds to the results, reports."""
    config = parse_plain(Config, argv, prog="spread-jax evaluate", description=__doc__)
    config.settings.validate()
    configure()
    say = talker(quiet=config.quiet)
    with RunDirectory.reopen(config.run) as folder:
        folder.require_finished()
        began = time.perf_counter()
        run = open_run(folder.path, step=config.step)
        data = data_of(run, config.data, config.cache_dir)
        splits = {split: open_split_of(data, run, split, quiet=config.quiet) for split in ("train", "test")}
        found, rows = evaluate(run, splits, config.settings, cache_dir=config.cache_dir, say=say)
        picture = folder.save_figure_path(
            "neighbours.png",
            caption="First in each row a sample, then the training images nearest in features.",
            section="Nearest training images",
            grid=True,
            real_images=True,
        )
        if config.real_images:
            save_image(image_grid(np.concatenate(rows), columns=rows.shape[1]), picture)
        else:
            picture.unlink(missing_ok=True)
        found["seconds"] = round(time.perf_counter() - began, 2)
        folder.update_results({"evaluation": found})
        report = write_report(folder.path, real_images=config.real_images)
        say(f"results: {folder.path}/results.json, report: {report}")
    print_result({"experiment": "evaluate", "run": str(config.run), **found, "versions": versions()})
    return 0
