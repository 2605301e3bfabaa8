"""How long one waits: for the import, and for the first step of the demo."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import _measure
from benchmarks._report import Table

TITLE = "Start-up time"
NOTES = """\
Import: whole processes in turn, `import jax, jax.numpy` with and without `spread_jax`. Demo (seed 0): from the
command to the line of its first step, with an empty cache of images and compiled programs, and with the cache that
this left."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    rounds: int = 9
    """Processes for each side of the import."""
    demo_rounds: int = 3
    """Starts of the demo with a filled cache; 0 to leave the demo out."""
    demo_flags: tuple[str, ...] = ()
    """More flags for the demo."""


def first_step(cache: Path, workdir: Path, flags: tuple[str, ...] = ()) -> float:
    """Seconds from the command to the first step's line; the demo is then ended."""
    command = [sys.executable, "-m", "experiments.celeba", "--preset", "demo", "--record-every", "1"]
    environment = {**os.environ, "SPREAD_JAX_CACHE": str(cache)}
    began, lines = time.perf_counter(), []
    demo = subprocess.Popen(
        [*command, "--workdir", str(workdir), *flags],
        cwd=_measure.REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in demo.stderr:
            lines.append(line)
            if line.startswith("step "):
                return time.perf_counter() - began
        raise _measure.SideFailed(f"the demo took no step: {''.join(lines[-3:])}")
    finally:
        demo.kill()
        demo.wait()
        demo.stderr.close()


def run(config: Config) -> list[Table]:
    """Seconds of the import and of the first step."""
    programs = {"import jax": "import jax, jax.numpy", "and spread_jax": "import jax, jax.numpy, spread_jax"}
    calls = {
        name: (lambda program=program: subprocess.run([sys.executable, "-c", program], check=True))
        for name, program in programs.items()
    }
    seconds = _measure.interleaved(calls, config.rounds)
    without, with_ours = (np.array(found) for found in seconds.values())
    tables = [
        Table(
            "Import, median",
            [
                {"process": name, "s": float(np.median(found)), "lowest": min(found), "highest": max(found)}
                for name, found in {**seconds, "difference": list(with_ours - without)}.items()
            ],
        )
    ]
    if config.demo_rounds:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            times = [
                first_step(folder / "cache", folder / f"run-{i}", config.demo_flags)
                for i in range(config.demo_rounds + 1)
            ]
        warm = times[1:]
        rows = [{"cache": "new", "s": times[0], "lowest": times[0], "highest": times[0]}]
        rows.append({"cache": "filled", "s": float(np.median(warm)), "lowest": min(warm), "highest": max(warm)})
        tables.append(Table("First step of the demo", rows))
    return tables
