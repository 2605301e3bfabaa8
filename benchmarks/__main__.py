"""Speed and memory against peers, in one run.

  python -m benchmarks                     every part, about 15 minutes on 2 cores
  python -m benchmarks --part density      one part: step density mmd elbo loader devices start

Ratios are what counts: seconds depend on the machine, and on a busy machine mean nothing. Each part prints its tables
and writes PART.json and PART.md. PyTorch and Grain are compared with if they are installed.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import _report, density, devices, elbo, loader, mmd, start, step

PARTS = {
    "start": start,
    "step": step,
    "elbo": elbo,
    "density": density,
    "mmd": mmd,
    "loader": loader,
    "devices": devices,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run; each part's own settings follow."""

    part: Literal["all", "step", "density", "mmd", "elbo", "loader", "devices", "start"] = "all"
    """Which part."""
    out: Path = Path("docs/benchmarks")
    """Folder for the tables."""
    step: step.Config = dataclasses.field(default_factory=step.Config)
    density: density.Config = dataclasses.field(default_factory=density.Config)
    mmd: mmd.Config = dataclasses.field(default_factory=mmd.Config)
    elbo: elbo.Config = dataclasses.field(default_factory=elbo.Config)
    loader: loader.Config = dataclasses.field(default_factory=loader.Config)
    devices: devices.Config = dataclasses.field(default_factory=devices.Config)
    start: start.Config = dataclasses.field(default_factory=start.Config)


def main(argv: list[str] | None = None) -> None:
    """Runs the parts asked for."""
    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(Config, args=argv, prog="python -m benchmarks", description=__doc__)
    machine = _report.Machine.now()
    if not machine.idle and PARTS.get(config.part) is not devices:
        print(f"warning: this machine is busy (load {machine.load:.2f}): its times mean nothing.", file=sys.stderr)
    from spread_jax import runtime

    runtime.configure()
    for name, part in PARTS.items():
        if config.part not in (name, "all"):
            continue
        print(f"{name} ...", flush=True)
        tables = part.run(getattr(config, name))
        command = shlex.join(["python", "-m", "benchmarks", "--part", name, *_other_flags(argv)])
        timed = part is not devices
        _report.write(config.out, name, part.TITLE, part.NOTES, tables, machine, command, timed=timed)


def _other_flags(argv: list[str]) -> list[str]:
    """The flags besides the part and the folder."""
    kept = list(argv)
    for flag in ("--part", "--out"):
        while flag in kept:
            at = kept.index(flag)
            del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    main()
