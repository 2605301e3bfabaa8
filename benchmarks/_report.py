"""What every benchmark writes: a table, the machine, the versions and the command."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from spread_jax._files import write_atomically

PACKAGES = ("spread-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "grain", "scikit-learn")
# Load for each core above which other work disturbs the times.
_BUSY = 0.25


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of the same columns.

    Attributes:
      title: what is compared, in one line.
      rows: a mapping of column to value for each row; None prints as a dash.
    """

    title: str
    rows: Sequence[Mapping]

    def as_markdown(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [self.title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in self.rows]
        return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and beside what a benchmark ran; taken before it makes load of its own.

    Attributes:
      processor: its kind.
      cores: that this process may use.
      load: processes running or waiting in the last minute, before the start.
      versions: of each package.
    """

    processor: str
    cores: int
    load: float
    versions: Mapping[str, str]

    @classmethod
    def now(cls) -> Machine:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(_processor(), cores, os.getloadavg()[0], {"python": platform.python_version(), **_versions()})

    @property
    def idle(self) -> bool:
        """Whether its times mean something."""
        return self.load <= _BUSY * self.cores

    def describe(self, *, timed: bool = True) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        busy = " **The machine was busy: these times mean nothing.**" if timed and not self.idle else ""
        return f"{self.processor}, {self.cores} cores, load {self.load:.2f} at the start; {versions}.{busy}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(
    folder: Path,
    name: str,
    title: str,
    notes: str,
    tables: Sequence[Table],
    machine: Machine,
    command: str,
    *,
    show: bool = True,
    timed: bool = True,
) -> None:
    """Writes NAME.json and NAME.md into the folder, and prints the latter; a busy machine matters where it is timed."""
    text = "\n\n".join(
        [
            f"# {title}",
            f"`{command}`. {machine.describe(timed=timed)}",
            notes,
            *(table.as_markdown() for table in tables),
        ]
    )
    results = {
        "command": command,
        "machine": {**dataclasses.asdict(machine), "idle": machine.idle},
        "tables": [{"title": table.title, "rows": [dict(row) for row in table.rows]} for table in tables],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(results, indent=2) + "\n")
    write_atomically(folder / f"{name}.md", text + "\n")
    if show:
        print(f"\n{text}\n", flush=True)
