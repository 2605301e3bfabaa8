"""What every program does around its work: errors as sentences, exit codes, what is printed, hooks."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping

import jax

from spread_jax._progress import tell
from spread_jax.data import DatasetError
from spread_jax.errors import UsageError
from spread_jax.evaluation import FeaturesError
from spread_jax.models import SettingError
from spread_jax.noise import NoiseCollapseError
from spread_jax.runtime import first_process, initialize_distributed, process_of_environment
from spread_jax.training import (
    CheckpointError,
    NonFiniteLossError,
    RunDirectoryError,
    TrainingInterrupted,
)

__all__ = ["Hook", "load_hook", "prefixed", "print_result", "run_program", "talker"]

Hook = Callable[[int, Mapping[str, float]], object]

_REFUSALS = (
    CheckpointError,
    DatasetError,
    FeaturesError,
    NoiseCollapseError,
    NonFiniteLossError,
    RunDirectoryError,
    UsageError,
)


def run_program(main: Callable[[], int | None], *, in_all_processes: bool = False) -> None:
    """Runs a program to its exit; what a user can cause ends with a sentence on stderr, not a traceback.

    Args:
      main: () -> an exit code, or None for 0.
      in_all_processes: whether it shares its work among processes. Otherwise the first process does it, and the
        others have nothing to do.

    Raises:
      SystemExit: always.

    Example:
      >>> run_program(lambda: 3)
      Traceback (most recent call last):
      SystemExit: 3
    """
    try:
        if in_all_processes:
            initialize_distributed()
            code = main()
        else:
            process = process_of_environment(os.environ)
            code = main() if process is None or not process.index else 0
    except _REFUSALS as error:
        tell(f"\nerror: {error}")
        code = 1
    except SettingError as error:
        tell(f"\nerror: --{error.setting.replace('_', '-')} {error.problem}")
        code = 1
    except TrainingInterrupted as interruption:  # who trains has said so and saved
        code = 128 + interruption.signal
    except BrokenPipeError:  # whoever read the output has seen enough
        code = 1
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        tell(f"\nerror: another process of the run has ended, or cannot be reached: {error}\nStart all of them again "
             "to resume.")  # fmt: skip
        os._exit(1)  # leaving in good order would wait for the others
    except KeyboardInterrupt:
        tell("\nstopped. Repeat the command to start again.")
        code = 130
    except OSError as error:  # a figure on a full disk, say; checkpoints and data have sentences of their own
        where = "" if error.filename is None else f"{error.filename} cannot be used: "
        tell(f"\nerror: {where}{error.strerror or error}. Make room or make it writable, then repeat the command.")
        code = 1
    _leave_broken_streams()
    sys.exit(code or 0)


def _leave_broken_streams() -> None:
    """Python would end with a message and code 120 for what a closed pipe or a full disk has left unwritten."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
            except (OSError, ValueError):
                pass


def print_result(results: Mapping) -> None:
    """Prints the last line of a program, `RESULT` and JSON, on stdout; a closed stdout is not an error.

    Args:
      results: numbers, strings, lists and mappings of them.

    Example:
      >>> print_result({"steps": 3})
      RESULT {"steps": 3}
    """
    if not first_process() or sys.stdout is None:
        return
    try:
        print("RESULT " + json.dumps(results), flush=True)
    except BrokenPipeError:
        pass
    except (OSError, ValueError) as error:
        tell(f"the results could not be printed: {error}.")


def talker(*, quiet: bool) -> Callable[..., None]:
    """say(sentence, always=False): prints on stderr unless quiet; the first process speaks for all.

    Args:
      quiet: whether only what is said always is printed.

    Returns:
      The function.

    Example:
      >>> say = talker(quiet=True)
      >>> say("Nobody reads this.")
    """

    def say(sentence: str, *, always: bool = False) -> None:
        if (always or not quiet) and first_process():
            tell(sentence)

    return say


def load_hook(text: str | None) -> Hook | None:
    """The function of (step, metrics) that a flag names, for `RunDirectory.open`; None for None.

    Only ever called with what the user typed: no run's folder names one.

    Args:
      text: `package.module:function` or `path/to/file.py:function`.

    Returns:
      The function.

    Raises:
      UsageError: its module cannot be imported, or has no such function.

    Example:
      >>> load_hook("operator:add")(1, 2)
      3
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
    """The hook for one of several runs: metrics are named `<name>/<metric>`.

    Args:
      hook: as `load_hook` returns it.
      name: of the run.

    Returns:
      A hook, or None for None.

    Example:
      >>> prefixed(lambda step, metrics: print(step, metrics), "vae")(3, {"elbo": -1.5})
      3 {'vae/elbo': -1.5}
    """
    if hook is None:
        return None
    return lambda step, metrics: hook(step, {f"{name}/{metric}": value for metric, value in metrics.items()})
