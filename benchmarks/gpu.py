"""An accelerator in one call: step, density and ELBO, precisions, batches, gradients, against PyTorch and the peak.

  python -m benchmarks.gpu                   under 8 minutes
  python -m benchmarks.gpu --budget 200      shorter: what no longer fits is named and left out

On a CPU the sizes are small by themselves, and it only shows that it works. Rows are printed as they come and gpu.json
and gpu.md written after each, so that an interrupted call keeps what it has measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks import _measure, _report, density, elbo, step
from benchmarks._report import Table

TITLE = "On an accelerator"
NOTES = """\
Rates are of whole train steps. FLOP/s counts three forward passes of the convolutions and dense layers, and its share
is of the rate of one large matrix product in the same precision, measured in the same run. "native" are XLA's own
convolution gradients, "custom" this library's. PyTorch runs in processes of its own, before."""
# Name, compute dtype, matmul precision of JAX.
PRECISIONS = {
    "float32": ("float32", "highest"),
    "tf32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the call."""

    width: int = 128
    """Channels of the encoder's first convolution."""
    batch_sizes: tuple[int, ...] = (100, 256, 512, 1024, 2048)
    """Images in a batch; precisions and gradients are compared at the first."""
    precisions: tuple[Literal["float32", "tf32", "bfloat16"], ...] = ("float32", "tf32", "bfloat16")
    """Which precisions; float32 only at the first batch size."""
    steps: int = 20
    """Timed steps of each row."""
    size: int = 20_000
    """N of the density."""
    matmul_size: int = 8192
    """Side of the matrices of the peak."""
    budget: float = 420.0
    """Seconds after which no new row is begun."""
    out: Path = Path("docs/benchmarks")
    """Folder for gpu.json and gpu.md."""
    torch: bool = True
    """Measure PyTorch, if it is installed."""


WITHOUT_ACCELERATOR = Config(
    width=2, batch_sizes=(4, 8), steps=2, size=500, matmul_size=256, budget=120.0, out=Path("runs/bench-gpu")
)


def step_flops(width: int, batch_size: int) -> float:
    """Floating-point operations of a train step: three forward passes, two for each multiplication and addition.

    Example:
      >>> round(step_flops(128, 1) / 3e9, 2)  # the encoder 1.28 of these
      3.0
    """
    channels = [3, width, 2 * width, 4 * width, 8 * width]
    sides = (32, 16, 8, 4)
    encoder = sum(25 * a * b * n * n for (a, b), n in zip(itertools.pairwise(channels), sides, strict=True))
    encoder += 2 * 16 * 8 * width * step.LATENT_DIM
    channels = [8 * width, 4 * width, 2 * width, width, width // 2]
    generator = 16 * 8 * width * step.LATENT_DIM
    generator += sum(25 * a * b * n * n for (a, b), n in zip(itertools.pairwise(channels), (4, 8, 16, 32), strict=True))
    generator += 25 * channels[-1] * 3 * 64 * 64
    return 6.0 * batch_size * (encoder + generator)


def peak_flops(size: int) -> dict[str, float]:
    """FLOP/s of one square matrix product in each precision."""
    import jax
    import jax.numpy as jnp

    found = {}
    for name, (dtype, precision) in PRECISIONS.items():
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(lambda a, p=precision: jnp.matmul(a, a, precision=p))
        jax.block_until_ready(product(a))
        found[name] = 2.0 * size**3 / min(_measure.seconds_of(lambda f=product, a=a: jax.block_until_ready(f(a)), 5))
    return found


class Call:
    """The rows so far, and the time left for more."""

    def __init__(self, config: Config, machine: _report.Machine, command: str):
        self.config, self.machine, self.command = config, machine, command
        self.began = time.perf_counter()
        self.tables: dict[str, list[dict]] = {}

    def row(self, table: str, head: dict, measure: Callable[[], dict]) -> dict:
        """Adds the row that `measure` completes, or one that says why it is missing."""
        if time.perf_counter() - self.began > self.config.budget:
            found = {"note": "left out: no time"}
        else:
            try:
                found = measure()
            except Exception as error:  # out of memory, an operation that a backend lacks: the rest still counts
                reason = str(error).strip().splitlines() or [type(error).__name__]
                found = {"note": f"failed: {reason[0][:120]}".replace("|", "/")}
        row = {**head, **found}
        self.tables.setdefault(table, []).append(row)
        print(row, flush=True)
        self.write()
        return row

    def write(self, show: bool = False) -> None:
        """Writes what there is."""
        tables = [Table(title, rows) for title, rows in self.tables.items()]
        _report.write(self.config.out, "gpu", TITLE, NOTES, tables, self.machine, self.command, show=show)


def main(argv: list[str] | None = None) -> None:
    """Measures everything that fits the budget."""
    argv = sys.argv[1:] if argv is None else argv
    # PyTorch's processes come first, and need the accelerator's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    without = jax.default_backend() == "cpu"
    sizes = WITHOUT_ACCELERATOR if without else Config()
    config = tyro.cli(Config, default=sizes, args=argv, prog="python -m benchmarks.gpu", description=__doc__)
    if without:
        print(
            f"There is no accelerator: sizes are small, to see that all works. Tables go to {config.out}.", flush=True
        )
    machine = _report.Machine.now()
    call = Call(config, machine, shlex.join(["python", "-m", "benchmarks.gpu", *argv]))
    _peers(config, call)
    device = jax.devices()[0].device_kind
    peaks = peak_flops(config.matmul_size)
    call.tables["Peak"] = [
        {"device": device, "precision": name, "TFLOP/s": rate / 1e12} for name, rate in peaks.items()
    ]
    first, *others = config.batch_sizes
    plan = [(name, native, first) for name in config.precisions for native in (False, True)]
    plan += [
        (name, False, batch_size) for batch_size in others for name in config.precisions[::-1] if name != "float32"
    ]
    for name, native, batch_size in plan:
        _own_step(config, call, peaks, name, native, batch_size)
    _density(config, call)
    _elbo(config, call)
    call.write(show=True)


def _peers(config, call):
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch is not installed: its rows are left out.", flush=True)
        return
    if not config.torch:
        return
    first, *others = config.batch_sizes
    variants = [("contiguous", name, first) for name in config.precisions]
    variants += [("channels_last", "bfloat16", first), ("compile", "tf32", first), ("compile", "bfloat16", first)]
    # PyTorch's best at one large batch too: what it takes to compile forbids more.
    variants += [("compile", "bfloat16", batch_size) for batch_size in others if batch_size == 1024]
    for variant, name, batch_size in variants:

        def measure(variant=variant, name=name, batch_size=batch_size):
            found = _measure.in_new_process(
                "benchmarks.step:measure_torch",
                width=config.width,
                batch_size=batch_size,
                steps=config.steps,
                variant=variant,
                precision=name,
            )
            return _rates(found, config.width, batch_size)

        head = {"side": f"PyTorch, {variant}", "precision": name, "gradients": "cuDNN's", "batch": batch_size}
        call.row("Train steps", head, measure)


def _own_step(config, call, peaks, name, native, batch_size):
    dtype, precision = PRECISIONS[name]

    def measure():
        found = step.measure_jax(
            config.width, batch_size, config.steps, dtype=dtype, native=native, precision=precision, configure=False
        )
        rates = _rates(found, config.width, batch_size)
        return {**rates, "share of peak": rates["TFLOP/s"] * 1e12 / peaks[name]}

    gradients = "native" if native else "custom"
    head = {"side": "spread_jax", "precision": name, "gradients": gradients, "batch": batch_size}
    call.row("Train steps", head, measure)


def _rates(found, width, batch_size):
    seconds = float(np.median(found["seconds"]))
    return {
        "ms": 1e3 * seconds,
        "images/s": batch_size / seconds,
        "TFLOP/s": step_flops(width, batch_size) / seconds / 1e12,
        "compile s": found["compile_seconds"],
    }


def _density(config, call):
    floor = None
    for name in (density.FLOOR, density.OURS, density.GRADIENT):

        def measure(name=name):
            function, allocated = density.sides([name], config.size, 64)[name]
            function()
            return {"ms": 1e3 * float(np.median(_measure.seconds_of(function, 5))), "MiB": allocated}

        row = call.row(f"log_spread_density, N = {config.size:,}, 64 dimensions", {"side": name}, measure)
        floor = row.get("ms") if name == density.FLOOR else floor
        if floor and "ms" in row:
            row[f"side / {density.FLOOR}"] = row["ms"] / floor


def _elbo(config, call):
    def measure():
        settings = elbo.Config(config.width, config.batch_sizes[0], config.steps)
        (table,) = elbo.run(settings)
        return {row["side"]: row["side / plain"] for row in table.rows}

    call.row("Loss and gradient, time / plain ELBO", {"width": config.width, "batch": config.batch_sizes[0]}, measure)


if __name__ == "__main__":
    main()
