"""One train step on 1, 2, 4 and 8 devices: the same numbers, the overhead, what is sent."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from benchmarks import _measure, step
from benchmarks._report import Table

TITLE = "A train step split over devices"
NOTES = """\
The CelebA model under jit, the state on every device, the batch split by NamedSharding. The devices are parts of one
CPU, so the whole work is the same and a ratio above 1 is overhead, not scaling. Differences are relative to one
device, of the loss and of the gradient's norm. Sent is the size of the all-reduced arrays of the compiled program,
gradients and batch statistics, for each device and step."""
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Devices, each a part of the CPU."""
    width: int = 16
    """Channels of the encoder's first convolution."""
    batch_size: int = 32
    """Images in the batch over all devices."""
    repeats: int = 15
    """Timed steps for each count."""


def all_reduced_bytes(hlo: str) -> int:
    """Bytes of the results of the all-reduces in a compiled program, each counted once.

    Example:
      >>> all_reduced_bytes("  %a = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%x, %y), channel_id=1")
      32
    """
    total = 0
    for result in re.findall(r" = (.*?) all-reduce(?:-start)?\(", hlo):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            total += _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total


def measure(counts: list[int], width: int, batch_size: int, repeats: int, flags: bool = True) -> dict:
    """Loss, gradient, seconds and communication for each number of devices; needs as many devices."""
    if flags:
        from experiments import _launch

        _launch.configure_jax()
    import jax
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    model = step.build(width)
    initial = model.initial_state()

    def one_step(state, batch):
        (loss, output), gradient = jax.value_and_grad(model.loss, has_aux=True)(
            state.params, state.model_state, batch, key=state.key, step=state.step
        )
        updates, opt_state = model.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return loss, gradient, (params, opt_state, output.model_state)

    calls, found = {}, {}
    for count in counts:
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        state = jax.device_put(initial, NamedSharding(mesh, PartitionSpec()))
        batch = jax.device_put(step.images(batch_size), NamedSharding(mesh, PartitionSpec("data")))
        compiled = jax.jit(one_step).lower(state, batch).compile()
        calls[count] = lambda f=compiled, a=(state, batch): jax.block_until_ready(f(*a))
        loss, gradient, _ = calls[count]()
        flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])
        found[count] = float(loss), flat, all_reduced_bytes(compiled.as_text())
    seconds = _measure.interleaved(calls, repeats)
    loss_1, gradient_1, _ = found[counts[0]]
    rows = []
    for count, (loss, gradient, sent) in found.items():
        ratio = _measure.ratio(seconds[count], seconds[counts[0]])
        rows.append({
            "devices": count,
            "ms": 1e3 * float(np.median(seconds[count])),
            f"time / {counts[0]} device": ratio["ratio"],
            "lowest": ratio["lowest"],
            "highest": ratio["highest"],
            "loss differs by": abs(loss / loss_1 - 1),
            "gradient differs by": float(np.linalg.norm(gradient - gradient_1) / np.linalg.norm(gradient_1)),
            "MiB sent": sent / 2**20,
            "gradient MiB": gradient.size * 4 / 2**20,
        })  # fmt: skip
    return {"rows": rows}


def run(config: Config) -> list[Table]:
    """The table, measured in a process that has the devices."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={max(config.counts)}",
    }
    found = _measure.in_new_process(
        "benchmarks.devices:measure",
        environment=environment,
        counts=config.counts,
        width=config.width,
        batch_size=config.batch_size,
        repeats=config.repeats,
    )
    return [Table(f"Width {config.width}, batch {config.batch_size}", found["rows"])]
