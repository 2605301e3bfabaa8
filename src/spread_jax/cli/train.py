"""Trains a deterministic generator x = g(z) of images by minimising a spread divergence.

Data and model are spread by the same noise. `demo` and `small` compare them at many scales of noise, by a critic;
`published` is the paper's delta-VAE, which maximises the evidence lower bound on the spread likelihood. The noise of
that may be learned, to discriminate. Every other way is one flag away.

  spread-jax train --data FOLDER                                  a folder or zip of your own images
  spread-jax train --preset demo                                  synthetic faces, needs no download
  spread-jax train --data FOLDER --image-size 32 --steps 1000     smaller images, fewer steps
  spread-jax train --noise low_rank ...                           gaussian, laplace, low_rank, transformed
  spread-jax train --objective spread_elbo ...                    or elbo, importance, wae_mmd, spread_gan,
                                                                  density_ratio, density_ratio_vae, score_difference

--help shows the settings of the objective and the noise that are named beside it. The same command again resumes an
interrupted run, or says that it is finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spread_jax.cli.flags import Parsed, parse_training
from spread_jax.cli.launch import load_hook, print_result, run_program
from spread_jax.models import PRESETS, fit
from spread_jax.runtime import configure

__all__ = ["main", "train"]


def main(argv: list[str] | None = None) -> int:
    """Trains, or resumes, or says that the run is finished."""
    return train(argv, experiment="train", prog="spread-jax train", description=__doc__, default="small")


def train(
    argv: list[str] | None,
    *,
    experiment: str,
    prog: str,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] = PRESETS,
    default: str,
) -> int:
    """A program that trains one generator: flags, data, `fit`, the RESULT line.

    Args:
      argv: the arguments; those of the process if None.
      experiment: its name in results and below runs/.
      prog: the command as a user types it.
      description: what --help begins with.
      presets: name -> {setting: value}.
      default: the preset that is taken if none is named.

    Returns:
      The exit code.
    """
    flags = parse_training(argv, prog=prog, description=description, presets=presets, default=default)
    configure()
    on_log = load_hook(flags.run.on_log)
    trained = fit(
        flags.method,
        flags.data,
        flags.run.workdir or default_workdir(flags, experiment, presets),
        flags.fit,
        about={"experiment": experiment, "preset": flags.preset},
        pictures=flags.run.pictures,
        real_images=flags.run.report_real_images,
        on_log=on_log,
        quiet=flags.run.quiet,
    )
    print_result(trained.results)
    return 0


def default_workdir(flags: Parsed, experiment: str, presets: Mapping[str, Mapping[str, Any]]) -> Path:
    """runs/<experiment>/<preset>-<seed>, and objective and noise where they are not the preset's."""
    usual = (presets[flags.preset].get("objective", "spread_elbo"), "gaussian")
    unusual = [name for name in (flags.objective, *flags.noises) if name not in usual]
    return Path("runs", experiment, "-".join([flags.preset, str(flags.fit.seed), *unusual]))


if __name__ == "__main__":
    run_program(main, in_all_processes=True)
