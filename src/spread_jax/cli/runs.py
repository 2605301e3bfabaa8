"""Lists runs with their state and key numbers.

spread-jax runs                 all below runs/
spread-jax runs FOLDER ...

A table on a terminal (without colours where NO_COLOR is set), else one line for each run with tabs between columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from datetime import datetime
from pathlib import Path

import tyro

from spread_jax._files import read_json
from spread_jax.cli.flags import parse_plain
from spread_jax.errors import UsageError
from spread_jax.training import SavedRun

# What may head a run, the first three that it has.
_NUMBERS = {
    "evaluation.frechet_distance": "Fréchet distance",
    "evaluation.importance_bound_nats": "importance bound, nats",
    "held_out_elbo_nats": "held-out ELBO, nats",
    "held_out_reconstruction_mse": "reconstruction error",
    "held_out_divergence_bound_nats": "divergence at least, nats",
    "largest_deviation": "largest deviation, standard errors",
    "bound_nats": "bound, nats",
}
_COLUMNS = ("run", "state", "step", "started from", "last written", "numbers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Where to look."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Folders to search for runs, with everything below them."""


def describe(folder: Path, root: Path) -> tuple[str, ...]:
    """The columns of one run."""
    config = _read(folder / "config.json")
    results = _read(folder / "results.json")
    step = results.get("steps") or SavedRun(folder, config, results, None).last_step
    found = [f"{label} {value:.4g}" for name, label in _NUMBERS.items()
             if isinstance(value := _value(results, name), (int, float)) and abs(value) < 1e300]  # fmt: skip
    preset = f"{config.get('preset', 'no preset')}, seed {config.get('seed', '?')}"
    files = (path.lstat().st_mtime for path in folder.iterdir() if path.is_file())
    written = max(files, default=folder.stat().st_mtime)
    row = (
        str(folder.relative_to(root)) if folder != root else folder.name,
        "finished" if results else "unfinished",
        str(step or ""),
        preset,
        datetime.fromtimestamp(written).isoformat(sep=" ", timespec="minutes"),
        ", ".join(found[:3]),
    )
    # A run from elsewhere may be named anything, escape sequences of the terminal too.
    return tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row)


def find(root: Path) -> list[tuple[str, ...]]:
    """The runs below a folder, newest last; a run's own folders are not searched."""
    rows, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            waiting += [folder / name for name, is_folder in names.items() if is_folder and name != "checkpoints"]
            if "config.json" in names:
                rows.append(describe(folder, root))
    return sorted(rows, key=lambda row: row[4])


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _value(results: dict, name: str):
    for part in name.split("."):
        results = results.get(part) if isinstance(results, dict) else None
    return results


def main(argv: list[str] | None = None) -> int:
    """Searches and prints."""
    config = parse_plain(Config, argv, prog="spread-jax runs", description=__doc__)
    rows = []
    for root in config.folders:
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder: name one that holds runs, or train one with `spread-jax train`.")
        rows += find(root)
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*_COLUMNS, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        if not rows:
            print("no runs here")
    else:
        for row in (_COLUMNS, *rows):
            print("\t".join(row))
    return 0
