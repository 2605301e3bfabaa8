"""Fair timing: each side in a process of its own, in turn, or interleaved in one; medians and their spread."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
_MARK = "MEASURED "


class SideFailed(Exception):
    """A measured process ended with an error; the message is the last line it printed."""


def in_new_process(function: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> dict:
    """What `function(**arguments)` returns in a fresh process, and the process's peak memory.

    Args:
      function: "package.module:name"; it takes and returns JSON-ready values.
      environment: variables to add.
      arguments: of the function.

    Returns:
      The returned dict and `peak_mib`, the largest resident size of the process in MiB.

    Raises:
      SideFailed: the process ended with an error.
    """
    paths = [str(REPOSITORY), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._measure", function, json.dumps(arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise SideFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])


def in_new_processes(function: str, count: int, *, environment: Mapping[str, str] | None = None, **arguments) -> dict:
    """What the first of several fresh processes, started as one run, returns of `function(**arguments)`.

    Args:
      function: as of `in_new_process`; it calls `spread_jax.runtime.initialize_distributed`.
      count: how many.
      environment: variables to add.
      arguments: of the function.

    Raises:
      SideFailed: a process ended with an error.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    start = lambda index: in_new_process(
        function, environment={**(environment or {}), **variables, "JAX_PROCESS_ID": str(index)}, **arguments
    )
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        first, *_ = pool.map(start, range(count))
    return first


def xla_flags() -> str:
    """The XLA flags of this process, without a number of devices, which a measurement chooses."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count"))


def _answer(function: str, arguments: str) -> None:
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(_MARK + json.dumps({**result, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """The largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def seconds_of(function: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of each call, which must not return before its work is done."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return found


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each function, called in turn after one warm-up call of each."""
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name] += seconds_of(function, 1)
    return found


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of measurements made side by side."""
    ratios = np.array(ours) / np.array(theirs)
    return {"ratio": float(np.median(ratios)), "lowest": float(ratios.min()), "highest": float(ratios.max())}


if __name__ == "__main__":
    _answer(*sys.argv[1:])
