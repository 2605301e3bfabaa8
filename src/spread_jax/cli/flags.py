"""Flags as a union over methods and noises: what a method or a noise has no setting for cannot be typed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from spread_jax.errors import UsageError
from spread_jax.models import METHODS, NOISES, DataSettings, FitSettings, Method, with_preset

__all__ = ["Parsed", "RunFlags", "parse_plain", "parse_training"]

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Where a run is kept, and what is told of it."""

    workdir: str | None = None
    """The run's folder; below runs/ by the preset, the seed, and what of objective and noise is not the usual, if not
    given."""
    report_real_images: bool = True
    """Show images of the data set in report.html, as the reconstructions do."""
    on_log: str | None = None
    """A function of (step, metrics) to call for every record, to send it elsewhere: `package.module:function` or
    `path/to/file.py:function`. One that raises is told of once and not called again in that run."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


class Parsed(NamedTuple):
    """What the flags of a training program mean.

    Attributes:
      preset: the name of the preset.
      noise: the name of the noise that was asked for, or None.
      method: with its noise.
      fit: how long it is trained.
      data: on what.
      run: where it is kept.
      extra: flags of the program's own.
    """

    preset: str
    noise: str | None
    method: Method
    fit: FitSettings
    data: DataSettings
    run: RunFlags
    extra: Any


def parse_training(
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Mapping[str, Any]],
    default: str,
    extra: Any = None,
    noise_names: tuple[str, ...] = (),
    objective: bool = True,
) -> Parsed:
    """Reads `--preset NAME --objective NAME --noise NAME --flag value ...`: the preset's values, changed by the flags.

    An unknown preset or flag ends the program with exit code 2 and the nearest name.

    Args:
      argv: the arguments; those of the process if None.
      prog: the command as a user types it.
      description: what --help begins with.
      presets: name -> {setting: value}; see `with_preset`.
      default: the preset that is taken if none is named.
      extra: a frozen dataclass instance with flags of the program's own.
      noise_names: names that --noise takes besides those of `NOISES`; the first is the default.
      objective: whether there is a flag for the method.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", *(("--objective",) if objective else ()), "--noise"):
        first.add_argument(flag)
    typed = vars(first.parse_known_args(argv)[0])
    preset = typed["preset"] or default
    settings = presets.get(preset, presets[default])  # an unknown name is refused by tyro below
    kind = METHODS.get(typed.get("objective") or "spread_elbo", METHODS["spread_elbo"])
    method = with_preset(kind(), settings)
    spreads = "noise" in {field.name for field in dataclasses.fields(kind)}
    noise = typed["noise"] or (noise_names[0] if noise_names else "gaussian")
    if spreads and noise in NOISES:
        method = dataclasses.replace(method, noise=with_preset(NOISES[noise], settings))
    if typed["noise"] and not spreads:
        raise UsageError(f"--objective {kind.name} uses no noise: leave --noise {noise} out.")

    choices = [("preset", presets, preset, "Whose values the other flags start from.")]
    if objective:
        choices += [("objective", METHODS, kind.name, "What is optimised: " + _listed(METHODS))]
    if spreads:
        choices += [
            ("noise", (*noise_names, *NOISES), noise, "The spread noise; the learned ones train against the model.")
        ]
    choice = dataclasses.make_dataclass(
        "Choice",
        [
            (name, Annotated[Literal[tuple(values)], tyro.conf.arg(help=text)], chosen)
            for name, values, chosen, text in choices
        ],
        frozen=True,
    )
    groups = {
        "choice": choice(),
        "method": method,
        "fit": with_preset(FitSettings(), settings),
        "data": with_preset(DataSettings(), settings),
        "run": with_preset(RunFlags(), settings),
        **({} if extra is None else {"extra": with_preset(extra, settings)}),
    }
    flags = dataclasses.make_dataclass("Flags", [(name, type(v), v) for name, v in groups.items()], frozen=True)
    found = tyro.cli(
        flags, args=argv, prog=prog, config=_CONFIG, default=flags(),
        description=f"{description}\nDefaults shown: preset {preset}.",
    )  # fmt: skip
    return Parsed(
        preset,
        noise if spreads else None,
        found.method,
        found.fit,
        found.data,
        found.run,
        getattr(found, "extra", None),
    )


def parse_plain(kind: type, argv: list[str] | None, *, prog: str, description: str) -> Any:
    """Reads flags into a dataclass without presets, its own dataclasses' among them."""
    return tyro.cli(kind, args=argv, prog=prog, config=_CONFIG, description=description)


def _listed(methods: Mapping[str, type[Method]]) -> str:
    return "; ".join(f"{name}, {method.title}" for name, method in methods.items()) + "."
