"""What a train step becomes on a GPU, compiled for one that need not be there.

  pip install 'jax[cuda12]'                  the compiler; no driver, no GPU
  python -m benchmarks.program               the published model on an H200, about a minute on 2 cores

Counts the routines that are asked of cuDNN and cuBLAS, their multiplications, and what all operations read and write,
for this library's convolutions and for XLA's own. Nothing is run: what comes out is the work, not the time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import _report, gpu, step
from benchmarks._report import Table

TITLE = "The train step as compiled for an H200"
NOTES = """\
Compiled without a GPU and not run. forward, input and kernel gradient are calls of cuDNN's three routines. TFLOP are
those of cuDNN's and cuBLAS' calls as they stand, zeros included; "/ needed" is their ratio to three forward passes. GB
is what all operations read and write, each from memory. least ms adds up the longer of both for every operation, at the
data sheet's 4.8 TB/s and 989 (bfloat16), 495 (tf32) or 67 (float32) TFLOP/s: no run is as fast, it is there to compare
programs by. MiB are allocated beside the state and the batch. "native" are XLA's own convolutions and gradients,
"custom" this library's."""
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
    """Which precisions."""
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
            routine = _ROUTINES.get(target.removeprefix("__cudnn$"), "forward")
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


def compiled_for(target: str, width: int, batch_size: int, precision: str, *, native: bool):
    """The step's compiled program for a GPU that is described by XLA's `GpuTargetConfigProto` as text."""
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices
    placed = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("device",)), jax.sharding.PartitionSpec())
    dtype, matmul_precision = gpu.PRECISIONS[precision]
    trainee = step.build(width, dtype=dtype, native=native)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
    images = jax.ShapeDtypeStruct((batch_size, 64, 64, 3), "uint8")
    arguments = jax.tree.map(abstract, (jax.eval_shape(trainee.initial_state), images))
    with jax.default_matmul_precision(matmul_precision):
        lowered = trainee.train_step.lower(*arguments)
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})  # which would measure


def summary(found: list[Operation], needed: float, precision: str) -> dict:
    """Calls, work and bound of a program."""
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


def main(argv: list[str] | None = None) -> None:
    """Compiles every program and writes the table."""
    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(Config, args=argv, prog="python -m benchmarks.program", description=__doc__)
    if not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        sys.exit("There is no CUDA compiler for jax here: pip install 'jax[cuda12]'. It needs no GPU.")
    rows = []
    for precision, batch_size, native in itertools.product(config.precisions, config.batch_sizes, (True, False)):
        compiled = compiled_for(H200, config.width, batch_size, precision, native=native)
        found = operations(compiled.as_text())
        row = {"precision": precision, "batch": batch_size, "convolutions": "native" if native else "custom"}
        row |= summary(found, gpu.step_flops(config.width, batch_size), precision)
        row["MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        rows.append(row)
        print(row, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.program", *argv])
    table = Table(f"Width {config.width}", rows)
    _report.write(config.out, "program", TITLE, NOTES, [table], _report.Machine.now(), command, timed=False)


if __name__ == "__main__":
    main()
