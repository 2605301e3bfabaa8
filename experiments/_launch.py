"""What every experiment does before and around its run: presets, flags, compiler settings, errors."""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import spread_jax
from spread_jax.data import default_cache_dir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spread_jax.training import RunDirectory

C = TypeVar("C")

# Keeps convolutions out of XLA's CPU fusions, where they miss the fast kernels: 1.2 to 1.9 times faster.
_CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def parse(config_type: type[C], presets: Mapping[str, C], default: str, argv: list[str] | None = None) -> C:
    """Reads `--preset NAME --flag value ...` into a config: the preset's values, changed by the flags.

    An unknown preset or flag ends the program with exit code 2 and the nearest name.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=default)
    name = first.parse_known_args(argv)[0].preset
    chosen = presets.get(name, presets[default])  # an unknown name is refused by tyro below
    return tyro.cli(
        config_type,
        default=chosen,
        args=argv,
        prog=_program(config_type),
        description=f"{sys.modules[config_type.__module__].__doc__}\nDefaults shown: preset {chosen.preset}.",
    )


def parse_plain(config_type: type[C], description: str, argv: list[str] | None = None) -> C:
    """Reads flags into a config that has no presets."""
    import tyro

    return tyro.cli(config_type, args=argv, prog=_program(config_type), description=description)


def _program(config_type: type) -> str:
    """The command as a user types it."""
    return f"python -m experiments.{Path(sys.modules[config_type.__module__].__file__).stem}"


def configure_jax() -> None:
    """Compiler flags, memory and the persistent compilation cache; must run before the first array is made."""
    _set_cpu_flag()
    import jax

    if _keep_memory():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    folder = default_cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # only time is lost
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


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

    Understood are, in this order: `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` and `JAX_COORDINATOR_ADDRESS`; a step of Slurm
    (srun); Open MPI and launchers that speak PMI, which need `JAX_COORDINATOR_ADDRESS` unless it is Open MPI 4; TPU
    pods; an indexed Kubernetes job, where the `kubernetes` package is installed; and `SPREAD_JAX_DISTRIBUTED=1`, which
    leaves it all to JAX. A number that `JAX_*` does not give
    is taken from the launcher, so `JAX_COORDINATOR_ADDRESS` alone is enough for any of them.
    """
    read = lambda *names: next((int(environment[name]) for name in names if environment.get(name)), None)
    count = read("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    index = read("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JOB_COMPLETION_INDEX")
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if count == 1:
        return None
    if count is not None:
        if index is None:
            raise UsageError(f"There are {count} processes: set JAX_PROCESS_ID to the number of each, from 0 on.")
        if address:
            settings = {"coordinator_address": address, "num_processes": count, "process_id": index}
            # Several processes on a machine: each takes one accelerator, where the launcher numbers them.
            local = read("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
            own_device = local is not None and "JAX_LOCAL_DEVICE_IDS" not in environment
            return Process(index, count, {**settings, **({"local_device_ids": local} if own_device else {})})
        if "SLURM_STEP_NUM_TASKS" in environment or "OMPI_MCA_orte_hnp_uri" in environment:
            return Process(index, count, {})
        raise UsageError(
            f"There are {count} processes, and nothing tells them where to meet: set JAX_COORDINATOR_ADDRESS to the "
            "host name of process 0 and a free port, the same for all, such as node1:12345."
        )
    if environment.get("SPREAD_JAX_DISTRIBUTED", "0") != "0":
        return Process(index, None, {})
    pod = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if pod or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Process(read("TPU_WORKER_ID"), None, {})
    return Process(index, None, {}) if job and importlib.util.find_spec("kubernetes") else None


def initialize_distributed() -> None:
    """Joins the other processes of the run, if a launcher started several; must run before the first array is made."""
    process = process_of_environment(os.environ)
    if process is None:
        return
    _set_cpu_flag()
    import jax

    try:
        jax.distributed.initialize(**process.settings)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"Process {process.index} of {process.count} could not join the others: {str(error).splitlines()[0]}"
        ) from None


def first_process() -> bool:
    """Whether this process speaks for the run."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _set_cpu_flag() -> None:
    """Adds the flag if this jaxlib knows it: an unknown XLA flag aborts the process."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_FLAG.split("=")[0] in flags or platform.machine() not in ("x86_64", "AMD64"):
        return
    verdict = default_cache_dir() / f"xla-flag-{importlib.metadata.version('jaxlib')}"
    try:
        accepted = verdict.read_text()
    except OSError:
        probe = "import jax; jax.devices('cpu')"
        environment = {**os.environ, "XLA_FLAGS": f"{flags} {_CPU_FLAG}", "JAX_PLATFORMS": "cpu"}
        result = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True)
        accepted = "yes" if result.returncode == 0 else "no"
        try:
            verdict.parent.mkdir(parents=True, exist_ok=True)
            verdict.write_text(accepted)
        except OSError:
            pass
    if accepted == "yes":
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


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"python": platform.python_version(), "spread_jax": spread_jax.__version__}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(main: Callable[[], int | None], *, in_all_processes: bool = False) -> None:
    """Runs an experiment; what a user can cause ends with a sentence on stderr, not a traceback.

    Args:
      main: () -> an exit code, or None for 0.
      in_all_processes: whether it shares its work among processes. Otherwise the first process does it, and the
        others have nothing to do.
    """
    import jax

    from spread_jax.data import DatasetError
    from spread_jax.evaluation import FeaturesError
    from spread_jax.training import (
        CheckpointError,
        NoiseCollapseError,
        NonFiniteLossError,
        RunDirectoryError,
        TrainingInterrupted,
    )

    refusals = (
        CheckpointError,
        DatasetError,
        FeaturesError,
        NoiseCollapseError,
        NonFiniteLossError,
        RunDirectoryError,
        UsageError,
    )
    try:
        if in_all_processes:
            initialize_distributed()
            code = main()
        else:
            process = process_of_environment(os.environ)
            code = main() if process is None or not process.index else 0
    except refusals as error:
        print(f"\nerror: {error}", file=sys.stderr)
        code = 1
    except TrainingInterrupted as interruption:  # who trains has said so and saved
        code = 128 + interruption.signal
    except BrokenPipeError:
        code = 1
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        print(f"\nerror: another process of the run has ended, or cannot be reached: {error}\nStart all of them "
              "again to resume.", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # leaving in good order would wait for the others
    except KeyboardInterrupt:
        print("\nstopped. Repeat the command to start again.", file=sys.stderr)
        code = 130
    except OSError as error:  # a figure on a full disk, say; checkpoints and data have sentences of their own
        print(f"\nerror: {error}. Make room or make it writable, then repeat the command.", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


class UsageError(Exception):
    """A setting that cannot work; the message says what to do."""


def config_from(config_type: type[C], saved: Mapping) -> C:
    """The config that was saved as JSON, and may come from anywhere.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting is of another type than its field.
    """
    hints = typing.get_type_hints(config_type)
    values = {}
    for field in dataclasses.fields(config_type):
        value = saved[field.name]
        if not _is_a(hints[field.name], value):
            raise ValueError(f"{field.name} is {json.dumps(value)[:60]}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_type(**values)


def _is_a(hint, value) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (typing.Union, types.UnionType):
        return any(_is_a(part, value) for part in parts)
    if kind is tuple:
        return isinstance(value, list) and all(_is_a(parts[0], item) for item in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is hint


def finished_steps(run: RunDirectory) -> int:
    """Steps that the results of a run name; 0 where it is not finished."""
    steps = (run.results or {}).get("steps", 0)
    if type(steps) is not int:
        raise UsageError(f"{run.path / 'results.json'} is damaged: its steps are {json.dumps(steps)[:60]}. Delete it.")
    return steps


def require_at_least(config, minimum: float, *names: str) -> None:
    """Refuses a config one of whose named numbers is below the minimum, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}.")


def require_positive(config, *names: str) -> None:
    """Refuses a config one of whose named numbers is not positive and finite, naming the flag."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be positive and finite, got {value}.")


Hook = Callable[[int, Mapping[str, float]], object]


def load_hook(text: str | None) -> Hook | None:
    """The function of (step, metrics) that `--on-log` names, for `RunDirectory.open`; None for None.

    Only ever called with what the user typed: no run's folder names one.

    Args:
      text: `package.module:function` or `path/to/file.py:function`.

    Raises:
      UsageError: its module cannot be imported, or has no such function.
    """
    if text is None:
        return None
    place, _, name = text.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("on_log_of_the_user", place)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            hook = getattr(module, name)
        else:
            hook = pkgutil.resolve_name(text)
        if not callable(hook):
            raise TypeError(f"that is a {type(hook).__name__}")
    except Exception as error:  # of the user's own module, whatever it is
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"--on-log {text} cannot be used, {why}. Give package.module:function or path/to/file.py:function."
        ) from error
    return hook


def prefixed(hook: Hook | None, name: str) -> Hook | None:
    """The hook for one of several runs: metrics are named `<name>/<metric>`."""
    if hook is None:
        return None
    return lambda step, metrics: hook(step, {f"{name}/{metric}": value for metric, value in metrics.items()})


def run_once(
    config, compute: Callable[[RunDirectory, Callable[..., None]], Mapping], *, keep_metrics: bool = False
) -> int:
    """An experiment without checkpoints: opens its folder, computes, writes and prints the results.

    Args:
      config: has `preset`, `seed`, `workdir` and `quiet`; the folder is runs/NAME/<preset>-<seed> unless
        `workdir` is given, NAME being the module of the config.
      compute: (run directory, say) -> the results; what belongs to every result is added here.
      keep_metrics: whether metrics logged before an interruption stay, for `compute` to resume from.
    """
    from spread_jax.evaluation import write_report
    from spread_jax.training import RunDirectory

    name = Path(sys.modules[type(config).__module__].__file__).stem
    say = talker(quiet=config.quiet)
    workdir = Path(config.workdir or f"runs/{name}/{config.preset}-{config.seed}")
    with RunDirectory.open(workdir, as_dict(config), resumable_keys=("workdir", "quiet"), tensorboard=False) as run:
        if run.finished:
            say(f"{workdir} is finished; give another --seed or --workdir to run again.")
            print_result(run.results)
            return 0
        if not keep_metrics:
            run.truncate_metrics(0)
        began, busy = time.perf_counter(), time.process_time()
        found = compute(run, say)
        results = {
            "experiment": name,
            "preset": config.preset,
            "seed": config.seed,
            **found,
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - busy, 2),
            "versions": versions(),
        }
        run.write_results(results)
        write_report(run.path)
        say(f"results, figure and report: {run.path}")
        print_result(results)
    return 0


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a Matplotlib figure as PNG, atomically."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def save_csv(rows: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Writes rows of the same columns as CSV, atomically."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    part.replace(path)


def as_dict(config) -> dict:
    """A config as JSON-ready values."""
    return dataclasses.asdict(config)


def print_result(results: Mapping) -> None:
    """The last line of every experiment."""
    if first_process():
        print("RESULT " + json.dumps(results), flush=True)


def talker(*, quiet: bool) -> Callable[..., None]:
    """say(sentence, always=False): prints unless quiet; the first process speaks for all."""

    def say(sentence: str, *, always: bool = False) -> None:
        if (always or not quiet) and first_process():
            print(sentence, file=sys.stderr, flush=True)

    return say


def silent(message: str | None, done: int, total: int) -> None:
    """Progress of building a cache that nobody wants to see."""


class Progress:
    """Steps of a run on the terminal: a bar with rate and time left, or plain lines elsewhere."""

    def __init__(self, num_steps: int, start_step: int, *, quiet: bool):
        self.num_steps, self.start_step, self.quiet = num_steps, start_step, quiet
        self.began, self.last_line = time.monotonic(), 0.0
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                BarColumn(bar_width=16),  # the whole line fits 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=num_steps, completed=start_step, numbers="compiling")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, headline: str, rate: float) -> None:
        """Shows what is told of a step; plain lines come at most every five seconds."""
        numbers = f"{headline}, {rate:.0f} images/s"
        if self.bar:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif not self.quiet and (time.monotonic() - self.last_line > 5 or step == self.num_steps):
            self.last_line = time.monotonic()
            per_step = (time.monotonic() - self.began) / max(step - self.start_step, 1)
            left = timedelta(seconds=round(per_step * (self.num_steps - step)))
            print(f"step {step}/{self.num_steps}: {numbers}, {left} left", file=sys.stderr, flush=True)

    def note(self, sentence: str) -> None:
        """A line of its own."""
        if self.bar:
            self.bar.console.print(sentence, highlight=False)
        elif not self.quiet:
            print(sentence, file=sys.stderr, flush=True)


def progress(num_steps: int, start_step: int, *, quiet: bool) -> Progress:
    """A `Progress` to be entered."""
    return Progress(num_steps, start_step, quiet=quiet or not first_process())
