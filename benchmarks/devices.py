"""One train step on several devices and in several processes: the same numbers, and what is sent."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import _measure, step
from benchmarks._report import Table

TITLE = "A train step split over devices and processes"
NOTES = """\
The CelebA model under jit, seed 0: `spread_jax.training.parallel` places state and batches, batch statistics are
taken over the whole batch, and every row has the same examples and noise. Devices are parts of one CPU and processes
talk over gloo, so times would say nothing about accelerators and are left out. Differences are relative to one
device: in the loss and the gradient (as a vector) of the first step, and the largest one in the losses of the steps
of SGD that follow. MiB is the size of what the compiled program of one device all-reduces in a step (gradients and
batch statistics), and of its other collectives, which are needed where parameters are cut over devices. `model` is
the number of devices that share a copy of the parameters."""
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_OTHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_RATE = 1e-6  # of SGD, in nats for 64x64 images


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Devices of one process, each a part of the CPU."""
    model_parallel: tuple[int, ...] = (2,)
    """Devices that share a copy of the parameters, of the most devices; besides 1."""
    processes: tuple[int, ...] = (1, 2, 4)
    """Processes of one device; 1 is the first of the devices."""
    width: int = 16
    """Channels of the encoder's first convolution."""
    batch_size: int = 32
    """Images in the batch over all devices."""
    steps: int = 20
    """Steps of SGD."""


def sent_bytes(hlo: str, *operations: str) -> int:
    """Bytes of the results of collective operations in a compiled program, each counted once.

    Example:
      >>> sent_bytes("  %a = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%x, %y), channel_id=1", "all-reduce")
      32
    """
    total = 0
    for result in re.findall(rf" = (.*?) (?:{'|'.join(operations)})(?:-start)?\(", hlo):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            total += _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total


def measure(layouts: list[tuple[int, int]], width: int, batch_size: int, steps: int, folder: str) -> dict:
    """Losses, the first gradient and communication on (devices, model parallel), for this process's part of each."""
    from spread_jax.runtime import initialize_distributed

    initialize_distributed()
    import jax

    from spread_jax.training import local_copy, make_mesh, place_batch, place_state, state_shardings

    model = step.build(width)
    own = batch_size // jax.process_count()
    images = step.images(batch_size)[jax.process_index() * own :][:own]

    def one_step(mesh, state, batch):
        key = jax.random.fold_in(state.key, state.step)
        (loss, output), gradient = jax.value_and_grad(model.loss, has_aux=True)(
            state.params, state.variables, batch, key=key, step=state.step
        )
        params = jax.tree.map(lambda old, slope: old - _RATE * slope, state.params, gradient)
        variables = {**state.variables, **output.variables}
        new = dataclasses.replace(state, params=params, variables=variables, step=state.step + 1)
        return jax.lax.with_sharding_constraint(new, state_shardings(new, mesh)), loss, gradient

    rows = []
    for devices, parts in layouts:
        mesh = make_mesh(devices, model_parallel=parts)
        state, batch = place_state(model.initial_state(), mesh), place_batch(images, mesh)
        compiled = jax.jit(functools.partial(one_step, mesh)).lower(state, batch).compile()
        losses = []
        for number in range(steps + 1):
            state, loss, gradient = compiled(state, batch)
            losses.append(float(loss))
            if number == 0:
                leaves = jax.tree.leaves(local_copy(gradient))
                first = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
        name = f"{devices}-{parts}-{jax.process_count()}"
        if jax.process_index() == 0:
            np.savez(Path(folder, name), losses=losses, gradient=first)
        text = compiled.as_text()
        rows.append({
            "devices": devices,
            "model": parts,
            "processes": jax.process_count(),
            "name": name,
            "all-reduced": sent_bytes(text, "all-reduce"),
            "others": sent_bytes(text, *_OTHERS),
        })  # fmt: skip
    return {"rows": rows}


def run(config: Config) -> list[Table]:
    """The table, measured in processes that have the devices."""
    layouts = [(count, 1) for count in config.counts]
    layouts += [(max(config.counts), parts) for parts in config.model_parallel]
    arguments = {"width": config.width, "batch_size": config.batch_size, "steps": config.steps}
    with tempfile.TemporaryDirectory() as folder:

        def measured(processes, devices, layouts):
            flags = f"--xla_force_host_platform_device_count={devices} {_measure.xla_flags()}".strip()
            environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            return _measure.in_new_processes(
                "benchmarks.devices:measure", processes, environment=environment,
                layouts=layouts, folder=folder, **arguments,
            )["rows"]  # fmt: skip

        found = measured(1, max(config.counts), layouts)
        for count in config.processes:
            if count > 1:
                found += measured(count, 1, [(count, 1)])
        saved = {row["name"]: np.load(Path(folder, f"{row['name']}.npz")) for row in found}
        one = saved[found[0]["name"]]
        return [Table(f"Width {config.width}, batch {config.batch_size}, {config.steps} steps of SGD", [
            {
                **{name: row[name] for name in ("devices", "model", "processes")},
                "loss differs by": abs(saved[row["name"]]["losses"][0] / one["losses"][0] - 1),
                "gradient differs by": _distance(saved[row["name"]]["gradient"], one["gradient"]),
                "losses after SGD differ by": np.abs(saved[row["name"]]["losses"] / one["losses"] - 1)[1:].max(),
                "MiB all-reduced": row["all-reduced"] / 2**20,
                "MiB otherwise": row["others"] / 2**20,
                "gradient MiB": one["gradient"].size * 4 / 2**20,
            }
            for row in found
        ])]  # fmt: skip


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
