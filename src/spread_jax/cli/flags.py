"""Flags as a union over methods and noises: what a method or a noise has no setting for cannot be typed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from spread_jax.errors import UsageError
from spread_jax.models import METHODS, NOISES, DataSettings, FitSettings, Method, with_preset

__all__ = ["Parsed", "RunFlags", "parse_plain", "parse_training"]

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Where a run is stored, and what is reported about it."""

    workdir: str | None = None
    """The run's folder; if not given, one below runs/ named by the preset, the seed, and the objective and noise where
    they are not the default."""
    pictures: bool = True
    """Draw samples, reconstructions, interpolations and curves while training."""
    report_real_images: bool = True
    """Show images of the data set in report.html, as the reconstructions do."""
    on_log: str | None = None
    """A function of (step, metrics) to call for every record, to send it elsewhere: `package.module:function` or
    `path/to/file.py:function`. If it raises, the error is reported once and it is not called again in that run."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


class Parsed(NamedTuple):
    """What the flags of a training program mean.

    Attributes:
      preset: the name of the preset.
      objective: the name of the method.
      noises: the names of the noises that were asked for; () of a method without noise.
      settings: setting -> value, flat, of every method and noise that there are flags for.
      fit: how long it is trained.
      data: on what.
      run: where it is kept.
      extra: flags of the program's own.
    """

    preset: str
    objective: str
    noises: tuple[str, ...]
    settings: Mapping[str, Any]
    fit: FitSettings
    data: DataSettings
    run: RunFlags
    extra: Any

    @property
    def method(self) -> Method:
        """The method that was asked for, with the first of its noises."""
        return self.build(self.objective, *self.noises[:1])

    def build(self, objective: str, noise: str = "gaussian", **changes: Any) -> Method:
        """A method with a noise and those of the settings that they have.

        Args:
          objective: a name of `METHODS`.
          noise: a name of `NOISES`; a method without noise does not look at it.
          changes: settings in place of those that were typed.
        """
        method = METHODS[objective]()
        if _noises_of(type(method)):
            method = dataclasses.replace(method, noise=NOISES[noise])
        return with_preset(method, {**self.settings, **changes})


def parse_training(
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Mapping[str, Any]],
    default: str,
    extra: Any = None,
    all_noises: bool = False,
    all_methods: bool = False,
) -> Parsed:
    """Reads `--preset NAME --objective NAME --noise NAME --flag value ...`: the preset's values, changed by the flags.

    An unknown preset or flag ends the program with exit code 2 and the nearest name.

    Args:
      argv: the arguments; those of the process if None.
      prog: the command as a user types it.
      description: what --help begins with.
      presets: name -> {setting: value}; see `with_preset`. "objective" among them is the method that is taken if
        neither one nor a noise is named.
      default: the preset that is taken if none is named.
      extra: a frozen dataclass instance with flags of the program's own.
      all_noises: whether --noise takes `all`, those that the method can be trained with, and this is its default.
      all_methods: whether there are flags for the settings of every method and noise, and none to choose one.
    """
    argv = sys.argv[1:] if argv is None else argv
    choices = {
        "preset": (default, presets, "The settings that the other flags start from."),
        "objective": ("spread_elbo", METHODS, "What is optimised: " + _listed(METHODS)),
        "noise": ("gaussian", NOISES, "The spread noise; the learned ones train against the model."),
    }
    if all_noises:
        choices["noise"] = ("all", ("all", *NOISES), choices["noise"][2])
    if all_methods:
        del choices["objective"], choices["noise"]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in choices:
        first.add_argument(f"--{name}")
    typed = vars(first.parse_known_args(argv)[0])
    settings = presets[typed["preset"] if typed["preset"] in presets else default]
    if "objective" in choices and not typed.get("noise"):  # which belongs to the paper's own objective
        choices["objective"] = (settings.get("objective", "spread_elbo"), *choices["objective"][1:])
    # A name that there is not is refused by tyro below.
    chosen = {name: typed[name] if typed[name] in names else usual for name, (usual, names, _) in choices.items()}
    kind = METHODS[chosen.get("objective", "spread_elbo")]
    if not _noises_of(kind):
        if typed["noise"]:
            raise UsageError(f"--objective {kind.name} uses no noise: leave --noise {typed['noise']} out.")
        del chosen["noise"]
    noise = chosen.get("noise", "all")
    noises = _noises_of(kind) if noise == "all" else (noise,)

    choice = [
        (name, Annotated[Literal[tuple(choices[name][1])], tyro.conf.arg(help=choices[name][2])], value)
        for name, value in chosen.items()
    ]
    groups = {
        "choice": dataclasses.make_dataclass("Choice", choice, frozen=True)(),
        "method": _union("Methods", list(METHODS.values()) if all_methods else [kind])(),
        "noise": _union("Noises", [type(NOISES[name]) for name in noises])(),
        "fit": FitSettings(),
        "data": DataSettings(),
        "run": RunFlags(),
        **({} if extra is None else {"extra": extra}),
    }
    groups = {name: with_preset(group, settings) for name, group in groups.items()}
    flags = dataclasses.make_dataclass("Flags", [(name, type(v), v) for name, v in groups.items()], frozen=True)
    found = tyro.cli(
        flags, args=argv, prog=prog, config=_CONFIG, default=flags(),
        description=f"{description}\nDefaults shown: preset {chosen['preset']}.",
    )  # fmt: skip
    return Parsed(
        chosen["preset"],
        kind.name,
        noises,
        {**_settings_of(found.method), **_settings_of(found.noise)},
        found.fit,
        found.data,
        found.run,
        getattr(found, "extra", None),
    )


def _noises_of(kind: type[Method]) -> tuple[str, ...]:
    """Names of the noises that a method can be trained with; () of one without noise."""
    if "noise" not in {field.name for field in dataclasses.fields(kind)}:
        return ()
    return tuple(name for name, noise in NOISES.items() if kind.learns_noise or not noise.learned)


def _union(name: str, kinds: list[type]) -> type:
    """A dataclass with the settings of all of them, what --help says of each among them."""
    fields = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            copy = dataclasses.field(default=field.default, default_factory=field.default_factory)
            fields.setdefault(field.name, (field.name, hints[field.name], copy))
    # They are its bases for their texts; one that another derives from comes with that.
    bases = [kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)]
    return dataclasses.make_dataclass(name, fields.values(), bases=tuple(bases), frozen=True)


def _settings_of(value: Any) -> dict[str, Any]:
    """What of a method or noise there are flags for."""
    without = ("image_shape", "networks", "noise")
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name not in without}


def parse_plain(kind: type, argv: list[str] | None, *, prog: str, description: str) -> Any:
    """Reads flags into a dataclass without presets, its own dataclasses' among them."""
    return tyro.cli(kind, args=argv, prog=prog, config=_CONFIG, description=description)


def _listed(methods: Mapping[str, type[Method]]) -> str:
    return "; ".join(f"{name}, {method.title}" for name, method in methods.items()) + "."
