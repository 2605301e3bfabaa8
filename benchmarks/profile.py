"""Where the time of a train step goes: a trace for a viewer, and its costliest operations here.

  python -m benchmarks.profile                              the demo's step
  python -m benchmarks.profile --width 128 --batch-size 100 the published one

Open the folder with TensorBoard's profile plugin or xprof, or drop its trace.json.gz on ui.perfetto.dev.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from pathlib import Path

import tyro

from benchmarks import step
from benchmarks._report import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """What is traced."""

    width: int = 16
    """Channels of the encoder's first convolution."""
    batch_size: int = 32
    """Images in a batch."""
    dtype: str = "float32"
    """Compute dtype of the convolutions."""
    native: bool = False
    """XLA's own convolution gradients."""
    steps: int = 5
    """Steps in the trace."""
    top: int = 10
    """Operations to print."""
    cores: int = 1
    """Of the CPU. XLA does not record the time of convolutions and products that it splits over threads."""
    out: Path = Path("runs/profile")
    """Folder of the trace."""


def origins(hlo: str) -> dict[str, str]:
    """{instruction of a compiled program: the operation in the source it comes from, or "" where XLA made it}.

    Example:
      >>> origins('%dot.3 = f32[2]{0} dot(%a), metadata={op_name="jit(step)/dot_general" stack_frame_id=1}')
      {'dot.3': 'dot_general'}
    """
    # A loop or a call is the sum of the operations inside, which are counted by themselves.
    lines = re.findall(r"^\s*(?:ROOT )?%?((?!while|call|conditional)[\w.-]+) = (.*)$", hlo, flags=re.M)
    names = {name: re.search(r'op_name="([^"]*)"', line) for name, line in lines}
    return {name: re.sub(r"^(jit\([^)]*\)/)+", "", found[1]) if found else "" for name, found in names.items()}


def operation_seconds(trace: Path, known: dict[str, str]) -> dict[str, float]:
    """Seconds of each instruction of `known`, over all threads or streams of a trace."""
    from jax.profiler import ProfileData

    seconds: dict[str, float] = collections.defaultdict(float)
    for file in trace.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op", event.name)
                    if name in known:
                        seconds[name] += event.duration_ns * 1e-9
    return dict(seconds)


def run(config: Config) -> list[Table]:
    """Writes the trace; the table of the costliest operations."""
    import jax

    model = step.build(config.width, dtype=config.dtype, native=config.native)
    state = model.initial_state()
    batch = jax.device_put(step.images(config.batch_size))
    compiled = model.train_step.lower(state, batch).compile()
    state = jax.block_until_ready(compiled(state, batch)[0])
    config.out.mkdir(parents=True, exist_ok=True)
    before = set(config.out.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(config.out)):
        for _ in range(config.steps):
            state = jax.block_until_ready(compiled(state, batch)[0])
    (written,) = set(config.out.rglob("*.xplane.pb")) - before
    known = origins(compiled.as_text())
    seconds = operation_seconds(written.parent, known)
    total = sum(seconds.values())
    costliest = sorted(seconds, key=seconds.get, reverse=True)[: config.top]
    rows = [
        {
            "ms / step": 1e3 * seconds[name] / config.steps,
            "share": seconds[name] / total,
            "operation": name,
            "from": known[name] or "-",
        }
        for name in costliest
    ]
    title = f"{config.top} costliest of {len(seconds)} operations, {1e3 * total / config.steps:.1f} ms a step in all"
    return [Table(title, rows)]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    config = tyro.cli(Config, args=argv, prog="python -m benchmarks.profile", description=__doc__)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(config.cores, 1)])
    from spread_jax import runtime

    runtime.configure()
    for table in run(config):
        print(table.as_markdown())
    print(f"\ntrace: {config.out}")


if __name__ == "__main__":
    main()
