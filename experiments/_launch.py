"""What the experiments without images share: presets and flags, limits, one computation in a run's folder."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from spread_jax import runtime
from spread_jax.cli import launch
from spread_jax.errors import UsageError
from spread_jax.evaluation import write_report
from spread_jax.training import RunDirectory

C = TypeVar("C")


def parse(config_type: type[C], presets: Mapping[str, C], default: str, argv: list[str] | None = None) -> C:
    """Reads `--preset NAME --flag value ...` into a config: the preset's values, changed by the flags.

    An unknown preset or flag ends the program with exit code 2 and the nearest name.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=default)
    name = first.parse_known_args(argv)[0].preset
    chosen = presets.get(name, presets[default])  # an unknown name is refused by tyro below
    return tyro.cli(
        config_type,
        default=chosen,
        args=argv,
        prog=f"python -m experiments.{_name(config_type)}",
        description=f"{sys.modules[config_type.__module__].__doc__}\nDefaults shown: preset {chosen.preset}.",
    )


def _name(config_type: type) -> str:
    """Of the experiment, which is `__main__` where it is run."""
    return Path(sys.modules[config_type.__module__].__file__).stem


def require_at_least(config: Any, minimum: float, *names: str) -> None:
    """Refuses a config one of whose named numbers is below the minimum, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}.")


def require_positive(config: Any, *names: str) -> None:
    """Refuses a config one of whose named numbers is not positive and finite, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be positive and finite, got {value}.")


def run_once(
    config: Any, compute: Callable[[RunDirectory, Callable[..., None]], Mapping], *, keep_metrics: bool = False
) -> int:
    """An experiment without checkpoints: opens its folder, computes, writes and prints the results.

    Args:
      config: has `preset`, `seed`, `workdir` and `quiet`; the folder is runs/NAME/<preset>-<seed> unless
        `workdir` is given, NAME being the module of the config.
      compute: (run directory, say) -> the results; what belongs to every result is added here.
      keep_metrics: whether metrics logged before an interruption stay, for `compute` to resume from.
    """
    runtime.configure()
    name, say = _name(type(config)), launch.talker(quiet=config.quiet)
    workdir = Path(config.workdir or f"runs/{name}/{config.preset}-{config.seed}")
    saved = dataclasses.asdict(config)
    with RunDirectory.open(workdir, saved, resumable_keys=("workdir", "quiet"), tensorboard=False) as run:
        if run.finished:
            if not (run.path / "report.html").exists():  # a crash has cost it
                write_report(run.path)
            say(f"{workdir} is finished; give another --seed or --workdir to run again.")
            launch.print_result(run.results)
            return 0
        if not keep_metrics:
            run.truncate_metrics(0)
        began, busy = time.perf_counter(), time.process_time()
        found = compute(run, say)
        results = {
            "experiment": name,
            "preset": config.preset,
            "seed": config.seed,
            **found,
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - busy, 2),
            "versions": runtime.versions(),
        }
        run.write_results(results)
        write_report(run.path)
        say(f"results, figure and report: {run.path}")
        launch.print_result(results)
    return 0
