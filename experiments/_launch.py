# ruff: noqa: F401  what experiments call here under names of their own
"""What every experiment does before and around its run: presets, flags, compiler settings, errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spread_jax._progress import Progress
from spread_jax.cli.launch import Hook, load_hook, prefixed, print_result, run_program, talker
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_csv, save_figure
from spread_jax.runtime import configure as configure_jax
from spread_jax.runtime import (
    first_process,
    initialize_distributed,
    jit_for_few_calls,
    process_of_environment,
    versions,
)

if TYPE_CHECKING:
    from spread_jax.training import RunDirectory

C = TypeVar("C")


def parse(config_type: type[C], presets: Mapping[str, C], default: str, argv: list[str] | None = None) -> C:
    """Reads `--preset NAME --flag value ...` into a config: the preset's values, changed by the flags.

    An unknown preset or flag ends the program with exit code 2 and the nearest name.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=default)
    name = first.parse_known_args(argv)[0].preset
    chosen = presets.get(name, presets[default])  # an unknown name is refused by tyro below
    return tyro.cli(
        config_type,
        default=chosen,
        args=argv,
        prog=_program(config_type),
        description=f"{sys.modules[config_type.__module__].__doc__}\nDefaults shown: preset {chosen.preset}.",
    )


def parse_plain(config_type: type[C], description: str, argv: list[str] | None = None) -> C:
    """Reads flags into a config that has no presets."""
    import tyro

    return tyro.cli(config_type, args=argv, prog=_program(config_type), description=description)


def _program(config_type: type) -> str:
    """The command as a user types it."""
    return f"python -m experiments.{Path(sys.modules[config_type.__module__].__file__).stem}"


def config_from(config_type: type[C], saved: Mapping) -> C:
    """The config that was saved as JSON, and may come from anywhere.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting is of another type than its field.
    """
    hints = typing.get_type_hints(config_type)
    values = {}
    for field in dataclasses.fields(config_type):
        value = saved[field.name]
        if not _is_a(hints[field.name], value):
            raise ValueError(f"{field.name} is {json.dumps(value)[:60]}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_type(**values)


def _is_a(hint, value) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (typing.Union, types.UnionType):
        return any(_is_a(part, value) for part in parts)
    if kind is tuple:
        return isinstance(value, list) and all(_is_a(parts[0], item) for item in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is hint


def finished_steps(run: RunDirectory) -> int:
    """Steps that the results of a run name; 0 where it is not finished."""
    return run.finished_steps


def require_at_least(config, minimum: float, *names: str) -> None:
    """Refuses a config one of whose named numbers is below the minimum, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}.")


def require_positive(config, *names: str) -> None:
    """Refuses a config one of whose named numbers is not positive and finite, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be positive and finite, got {value}.")


def run_once(
    config, compute: Callable[[RunDirectory, Callable[..., None]], Mapping], *, keep_metrics: bool = False
) -> int:
    """An experiment without checkpoints: opens its folder, computes, writes and prints the results.

    Args:
      config: has `preset`, `seed`, `workdir` and `quiet`; the folder is runs/NAME/<preset>-<seed> unless
        `workdir` is given, NAME being the module of the config.
      compute: (run directory, say) -> the results; what belongs to every result is added here.
      keep_metrics: whether metrics logged before an interruption stay, for `compute` to resume from.
    """
    from spread_jax.evaluation import write_report
    from spread_jax.training import RunDirectory

    name = Path(sys.modules[type(config).__module__].__file__).stem
    say = talker(quiet=config.quiet)
    workdir = Path(config.workdir or f"runs/{name}/{config.preset}-{config.seed}")
    with RunDirectory.open(workdir, as_dict(config), resumable_keys=("workdir", "quiet"), tensorboard=False) as run:
        if run.finished:
            if not (run.path / "report.html").exists():  # a crash, or a full disk, came between the two
                write_report(run.path)
            say(f"{workdir} is finished; give another --seed or --workdir to run again.")
            print_result(run.results)
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
            "versions": versions(),
        }
        run.write_results(results)
        write_report(run.path)
        say(f"results, figure and report: {run.path}")
        print_result(results)
    return 0


def as_dict(config) -> dict:
    """A config as JSON-ready values."""
    return dataclasses.asdict(config)


def silent(message: str | None, done: int, total: int) -> None:
    """Progress of building a cache that nobody wants to see."""


class _Steps(Progress):
    """Steps of a run on the terminal."""

    def __init__(self, num_steps: int, start_step: int, *, quiet: bool):
        super().__init__("step", quiet=quiet)
        self.num_steps, self.start_step = num_steps, start_step

    def __enter__(self) -> _Steps:
        super().__enter__()
        super().update(self.start_step, self.num_steps, "compiling")
        return self

    def update(self, step: int, headline: str, rate: float) -> None:
        super().update(step, self.num_steps, f"{headline}, {rate:.0f} images/s")


progress, run = _Steps, run_program
