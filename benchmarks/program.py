"""What a train step becomes on a GPU and on a TPU, compiled for ones that need not be there.

  pip install 'jax[cuda12]' 'jax[tpu]'       the compilers; no driver, no device
  python -m benchmarks.program               the published model on an H200 and a TPU v5e, about 6 minutes on 2 cores

For the GPU it counts the routines that are asked of cuDNN and cuBLAS, their multiplications, and what all operations
read and write; for the TPU it adds up the cycles that its compiler expects. Nothing is run: what comes out is the work,
not the time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import _report, gpu, step
from benchmarks._report import Table

TITLE = "The train step as compiled for an H200 and a TPU v5e"
NOTES = """\
Compiled for devices that need not be there, and not run. "native" means XLA's own convolutions and gradients,
"custom" this library's; MiB is what a step allocates besides the state and the batch.

H200: forward, input gradient and kernel gradient count the calls of cuDNN's three routines. TFLOP are those of the
calls of cuDNN and cuBLAS as they stand, zeros included; "/ needed" is their ratio to three forward passes. GB is what
all operations read and write, each from memory. "least ms" adds up, over operations, the longer of the two times that
this takes at the data sheet's 4.8 TB/s and 989 (bfloat16), 495 (tf32) or 67 (float32) TFLOP/s. No run is that fast:
the number serves to compare programs.

TPU v5e: million cycles and GB are the compiler's own estimates."""
BYTES_PER_SECOND = 4.8e12
FLOPS_PER_SECOND = {"bfloat16": 989e12, "tf32": 495e12, "float32": 67e12}
# Compute capability, sizes and versions that XLA's passes ask for.
H200 = """\
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
PLUGINS = {"h200": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "v5e": ("libtpu",)}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(.*)")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_ROUTINES = {"convForward": "forward", "convBackwardInput": "input", "convBackwardFilter": "kernel"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    width: int = 128
    """Channels of the encoder's first convolution."""
    batch_sizes: tuple[int, ...] = (100, 1024)
    """Images in a batch."""
    precisions: tuple[Literal["float32", "tf32", "bfloat16"], ...] = ("bfloat16", "tf32")
    """Which precisions on the GPU; on the TPU it is bfloat16."""
    targets: tuple[Literal["h200", "v5e"], ...] = ("h200", "v5e")
    """Which devices."""
    out: Path = Path("docs/benchmarks")
    """Folder for program.json and program.md."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Attributes:
      routine: "forward", "input" or "kernel" of a convolution, "product", or "" of all others.
      flops: multiplications and additions of a routine or product.
      bytes: read and written.
    """

    routine: str
    flops: float
    bytes: int


def operations(text: str) -> list[Operation]:
    """The operations of a compiled program's text that take time, in order."""
    products, shapes, found, entry = {}, {}, [], False
    computation = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            entry = line.startswith("ENTRY")
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, arguments, settings = match.groups()
        shapes[name] = shape
        arguments = re.findall(r"%([\w.\-]+)", arguments)
        if operation == "dot":
            products[computation] = products.get(computation, 0.0) + _product_flops(
                shape, shapes[arguments[0]], settings
            )
        if not entry or operation in _FREE:
            continue
        size = _size(shape) + sum(_size(shapes[argument]) for argument in arguments)
        called = re.search(r"calls=%?([\w.\-]+)", settings)
        target = re.search(r'custom_call_target="([^"]+)"', settings)
        target = target.group(1) if target else ""
        if target.startswith("__cudnn$conv"):
            routine = _ROUTINES.get(target.removeprefix("__cudnn$"), "forward")  # or forward with a bias
            flops = _convolution_flops(routine, shape, [shapes[argument] for argument in arguments[:2]], settings)
            found.append(Operation(routine, flops, size))
        elif target.startswith("__cublas"):
            found.append(Operation("product", _product_flops(shape, shapes[arguments[0]], settings), size))
        elif operation == "dot" or (called and called.group(1) in products):
            flops = products[called.group(1)] if called else _product_flops(shape, shapes[arguments[0]], settings)
            found.append(Operation("product", flops, size))
        else:
            found.append(Operation("", 0.0, size))
    return found


def _arrays(shape):
    return [(dtype, [int(n) for n in sizes.split(",") if n]) for dtype, sizes in _ARRAY.findall(shape)]


def _size(shape):
    return sum(_BYTES[dtype] * math.prod(sizes) for dtype, sizes in _arrays(shape))


def _product_flops(result, left, settings):
    dimensions = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]', settings).group(1)
    contracted = [int(n) for n in dimensions.replace('"', "").split(",") if n]
    sizes = _arrays(left)[0][1]
    return 2.0 * math.prod(_arrays(result)[0][1]) * math.prod(sizes[n] for n in contracted)


def _convolution_flops(routine, result, arguments, settings):
    """Of the forward convolution between the same image, kernel and output: all three have as many."""
    result, first, second = (_arrays(shape)[0][1] for shape in (result, *arguments))
    image, output = {"forward": (first, result), "input": (result, first), "kernel": (first, second)}[routine]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", settings).groups()
    taps = [int(n) for n in re.search(r"window=\{size=([\dx]+)", settings).group(1).split("x")]
    return 2.0 * math.prod(output) * image[labels[0].index("f")] * math.prod(taps)


def devices_of(target: str) -> list:
    """A device that is described and not there."""
    from jax.experimental import topologies

    if target == "v5e":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200).devices


def compiled_for(target: str, width: int, batch_size: int, precision: str, *, native: bool):
    """The step's compiled program for a device that need not be there."""
    import jax

    mesh = jax.sharding.Mesh(devices_of(target), ("device",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    dtype, matmul_precision = gpu.PRECISIONS[precision]
    trainee = step.build(width, dtype=dtype, native=native)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
    images = jax.ShapeDtypeStruct((batch_size, 64, 64, 3), "uint8")
    arguments = jax.tree.map(abstract, (jax.eval_shape(trainee.initial_state), images))
    with jax.default_matmul_precision(matmul_precision):
        lowered = trainee.train_step.lower(*arguments)
    # Autotuning would measure.
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0} if target == "h200" else None)


def summary(found: list[Operation], needed: float, precision: str) -> dict:
    """Calls, work and bound of a GPU's program."""
    flops = sum(operation.flops for operation in found)
    seconds = sum(max(o.flops / FLOPS_PER_SECOND[precision], o.bytes / BYTES_PER_SECOND) for o in found)
    names = {"forward": "forward", "input": "input gradient", "kernel": "kernel gradient", "product": "products"}
    return {
        **{name: sum(o.routine == routine for o in found) for routine, name in names.items()},
        "others": sum(not o.routine for o in found),
        "TFLOP": flops / 1e12,
        "/ needed": flops / needed,
        "GB": sum(operation.bytes for operation in found) / 1e9,
        "least ms": 1e3 * seconds,
    }


def expected_cycles(text: str) -> int:
    """The sum of what a TPU's compiler expects of its operations.

    Example:
      >>> expected_cycles('backend_config={"estimated_cycles":"70"}, backend_config={"estimated_cycles":"5"}')
      75
    """
    return sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', text))


def row(config: Config, target: str, batch_size: int, precision: str, *, native: bool) -> dict:
    """One program's numbers."""
    compiled = compiled_for(target, config.width, batch_size, precision, native=native)
    head = {"precision": precision, "batch": batch_size, "convolutions": "native" if native else "custom"}
    if target == "v5e":
        accessed = compiled.cost_analysis()["bytes accessed"]
        numbers = {"million cycles": expected_cycles(compiled.as_text()) / 1e6, "GB": accessed / 1e9}
    else:
        numbers = summary(operations(compiled.as_text()), gpu.step_flops(config.width, batch_size), precision)
    return {**head, **numbers, "MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20}


def main(argv: list[str] | None = None) -> None:
    """Compiles every program and writes the tables."""
    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(Config, args=argv, prog="python -m benchmarks.program", description=__doc__)
    for target in config.targets:
        if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS[target]):
            extra = {"h200": "cuda12", "v5e": "tpu"}[target]
            sys.exit(
                f"There is no compiler for {target} here: pip install 'jax[{extra}]', which needs no such device, or "
                "leave it out with --targets."
            )
    import jax

    # Else JAX would look for the devices whose plugins are installed, and libtpu ask the machine's host what it is.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    tables = []
    for target in config.targets:
        rows = []
        precisions = config.precisions if target == "h200" else ("bfloat16",)
        for precision, batch_size, native in itertools.product(precisions, config.batch_sizes, (True, False)):
            rows.append(row(config, target, batch_size, precision, native=native))
            print(target, rows[-1], flush=True)
        tables.append(Table(f"{'H200' if target == 'h200' else 'TPU v5e'}, width {config.width}", rows))
    command = shlex.join(["python", "-m", "benchmarks.program", *argv])
    _report.write(config.out, "program", TITLE, NOTES, tables, _report.Machine.now(), command, timed=False)


if __name__ == "__main__":
    main()
