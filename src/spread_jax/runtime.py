"""A process before its first array: the compiler's settings, caches, the other processes.

Importing it does nothing, and does not import JAX: reading data needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spread_jax._files import open_regular, read_regular, write_atomically
from spread_jax.errors import UsageError

__all__ = [
    "Process",
    "configure",
    "default_cache_dir",
    "first_process",
    "initialize_distributed",
    "jit_for_few_calls",
    "numerics",
    "process_of_environment",
    "versions",
]

# Keeps convolutions out of XLA's CPU fusions, where they miss the fast kernels: 1.2 to 1.9 times faster.
_CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def default_cache_dir() -> Path:
    """$SPREAD_JAX_CACHE, else $XDG_CACHE_HOME/spread_jax, else ~/.cache/spread_jax.

    Raises:
      UsageError: none of them is set and this user has no home folder, as in some containers.

    Example:
      >>> default_cache_dir().is_absolute()
      True
    """
    try:
        if own := os.environ.get("SPREAD_JAX_CACHE"):
            return Path(own).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "spread_jax"
    except RuntimeError:
        raise UsageError(
            "This user has no home folder to keep decoded images in: set the variable SPREAD_JAX_CACHE to a folder."
        ) from None


def configure(cache_dir: str | os.PathLike | None = None) -> None:
    """Makes JAX fast on this machine: a flag of the CPU's compiler, kept memory, compiled programs kept on the disk.

    The command line does so by itself. Call it before the first array is made; settings of the user's stand.

    Args:
      cache_dir: where compiled programs are kept, in a folder `xla`; None for `default_cache_dir()`.

    Example:
      >>> import inspect
      >>> list(inspect.signature(configure).parameters)
      ['cache_dir']
    """
    try:
        folder = Path(cache_dir).expanduser().absolute() if cache_dir is not None else default_cache_dir()
    except (RuntimeError, UsageError):
        folder = None  # only time is lost
    _set_cpu_flag(folder)
    import jax

    if _keep_memory():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    with contextlib.suppress(OSError):
        if folder is not None:
            (folder / "xla").mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _set_cpu_flag(folder: Path | None) -> None:
    """Adds the flag if this jaxlib knows it: an unknown XLA flag aborts the process."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_FLAG.split("=")[0] in flags or platform.machine() not in ("x86_64", "AMD64"):
        return
    verdict = None if folder is None else folder / f"xla-flag-{importlib.metadata.version('jaxlib')}"
    accepted = b""
    if verdict is not None:
        with contextlib.suppress(OSError):
            accepted = read_regular(verdict)
    if accepted not in (b"yes", b"no"):  # not asked yet, or a torn file
        probe = "import jax; jax.devices('cpu')"
        environment = {**os.environ, "XLA_FLAGS": f"{flags} {_CPU_FLAG}", "JAX_PLATFORMS": "cpu"}
        try:
            found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True)
        except OSError:
            return
        accepted = b"yes" if found.returncode == 0 else b"no"
        # What failed for a want of memory, say, is asked again the next time.
        if verdict is not None and (accepted == b"yes" or b"nknown flag" in found.stderr):
            with contextlib.suppress(OSError):
                verdict.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(verdict, accepted)
    if accepted == b"yes":
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}".strip()


def _keep_memory() -> bool:
    """Lets glibc keep memory that was freed for the next time; whether it does.

    A compiled program on a CPU asks for one block for all it computes in between, 50 to 260 MiB for a train step. glibc
    maps a block of over 32 MiB anew each time, so the system clears every page of it again: 18, 14, 11 and 11 % of the
    time of a step at widths 16, 32, 64 and 128 on two cores. Kept is only what the first thread asks for, the arenas of
    the others hold 64 MiB at most, so programs must run in the thread that calls them. One arena for all threads would
    do without that, but cost 12 of 50 ms at width 16. Settings of the user's for malloc stand.
    """
    set_by_user = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        f"MALLOC_{name}_" in os.environ for name in ("MMAP_MAX", "MMAP_THRESHOLD", "TRIM_THRESHOLD")
    )
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(set_option(mmap_max, 0) and set_option(trim_threshold, 2**31 - 1))


def jit_for_few_calls(function: Callable) -> Callable:
    """`jax.jit` of what runs some tens of times in a run: compiled sooner on a CPU, and a few per cent slower there.

    A flag of the user's for XLA's level of optimisation stands.

    Args:
      function: of arrays.

    Returns:
      The compiled function; it may be traced, too.

    Example:
      >>> jit_for_few_calls(lambda x: x + 1)(2).item()
      3
    """
    import jax

    if jax.default_backend() != "cpu" or "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
        return jax.jit(function)
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 1})

    @functools.wraps(function)
    def call(*arguments):
        # Inside a traced function the outermost one's options hold, and others are refused.
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return (function if traced else compiled)(*arguments)

    return call


# --- several processes


class Process(NamedTuple):
    """What the environment says of this process.

    Attributes:
      index: its number among those of the run, or None where only JAX finds out.
      count: how many there are, or None.
      settings: what `jax.distributed.initialize` is told; what is left out it finds by itself.
    """

    index: int | None
    count: int | None
    settings: Mapping[str, Any]


def process_of_environment(environment: Mapping[str, str]) -> Process | None:
    """Which of a run's processes a launcher has started this one as; None for a run of one process.

    Understood are, in this order: `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; a step of Slurm (srun); Open MPI and
    launchers that speak PMI, which need `JAX_COORDINATOR_ADDRESS` unless it is Open MPI 4; TPU pods; an indexed
    Kubernetes job, where the `kubernetes` package is installed; and `SPREAD_JAX_DISTRIBUTED=1`, which leaves it all
    to JAX. A number that `JAX_*` does not give is taken from the launcher.

    Args:
      environment: such as `os.environ`.

    Returns:
      The process, or None.

    Raises:
      UsageError: something is missing, or a number is none.

    Example:
      >>> process_of_environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"})
      Process(index=3, count=4, settings={})
    """

    def read(*names: str) -> int | None:
        name = next((name for name in names if environment.get(name)), None)
        try:
            return None if name is None else int(environment[name])
        except ValueError:
            raise UsageError(f"{name} is {environment[name]!r}: it must be a whole number.") from None

    count = read("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    index = read("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JOB_COMPLETION_INDEX")
    if count == 1:
        return None
    if count is not None:
        if index is None:
            raise UsageError(f"There are {count} processes: set JAX_PROCESS_ID to the number of each, from 0 on.")
        # JAX finds these by itself, and takes the address from the variable where it is set.
        found_by_jax = "SLURM_STEP_NUM_TASKS" in environment or "OMPI_MCA_orte_hnp_uri" in environment
        if found_by_jax and "JAX_NUM_PROCESSES" not in environment:
            return Process(index, count, {})
        if not environment.get("JAX_COORDINATOR_ADDRESS"):
            raise UsageError(
                f"There are {count} processes, and nothing tells them where to meet: set JAX_COORDINATOR_ADDRESS to "
                "the host name of process 0 and a free port, the same for all, such as node1:12345."
            )
        # Several processes on a machine: each takes one accelerator, where the launcher numbers them.
        local = read("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
        own_device = local is not None and "JAX_LOCAL_DEVICE_IDS" not in environment
        settings = {"num_processes": count, "process_id": index}
        return Process(index, count, {**settings, **({"local_device_ids": local} if own_device else {})})
    if environment.get("SPREAD_JAX_DISTRIBUTED", "0") != "0":
        return Process(index, None, {})
    pod = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if pod or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Process(read("TPU_WORKER_ID"), None, {})
    return Process(index, None, {}) if job and importlib.util.find_spec("kubernetes") else None


def initialize_distributed() -> None:
    """Joins the other processes of the run, if a launcher started several; must run before the first array is made.

    Raises:
      UsageError: the others cannot be joined.

    Example:
      >>> import jax
      >>> initialize_distributed()  # one process: nothing to do
      >>> jax.distributed.is_initialized()
      False
    """
    process = process_of_environment(os.environ)
    if process is None:
        return
    try:
        folder = default_cache_dir()
    except UsageError:
        folder = None
    _set_cpu_flag(folder)
    import jax

    try:
        jax.distributed.initialize(**process.settings)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"Process {process.index} of {process.count} could not join the others: {str(error).splitlines()[0]}"
        ) from None


def first_process() -> bool:
    """Whether this process speaks for the run.

    Example:
      >>> first_process()
      True
    """
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


# --- what results depend on


def versions() -> dict[str, str]:
    """The versions a result depends on.

    Example:
      >>> "jaxlib" in versions()
      True
    """
    from spread_jax import __version__

    found = {"python": platform.python_version(), "spread_jax": __version__}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def numerics() -> dict[str, str]:
    """What the bits of a result depend on beside the program: the compiler, its flags, the kind of device.

    Example:
      >>> sorted(numerics())
      ['XLA_FLAGS', 'device', 'jax', 'jaxlib', 'matmul precision']
    """
    import jax

    device = jax.local_devices()[0]
    return {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "XLA_FLAGS": " ".join(sorted(flag for flag in os.environ.get("XLA_FLAGS", "").split())),
        "matmul precision": str(jax.config.jax_default_matmul_precision or "default"),
    }


def _processor() -> str:
    """The name of this machine's processor: XLA compiles for what it can do."""
    with contextlib.suppress(OSError), open_regular("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(b"model name"):
                return line.split(b":", 1)[1].strip().decode(errors="replace")
    return platform.processor() or platform.machine()
