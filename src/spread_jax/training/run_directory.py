"""The folder of one run: its configuration, its metrics, its figures, its results, its lock.

    config.json       what the run was started with; a resumed run must repeat it
    metrics.jsonl     one JSON object per line: step, time (seconds since 1970), the named numbers
    tensorboard/      the same numbers as TensorBoard events, where tensorboardX is installed
    checkpoints/      see ``Checkpointer``
    *.png             figures
    results.json      written when the run is finished
    .lock             held by the process that writes to the folder; a crash frees it

JSON has no numbers for NaN and the infinities: they are written as the strings "nan", "inf" and
"-inf", which ``float`` understands and ``read_metrics`` turns back into numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from spread_jax._files import LEFTOVER, reason, remove_leftovers, write_atomically
from spread_jax._progress import tell
from spread_jax.training._processes import agree, several

_NOT_FINITE = ("nan", "inf", "-inf")
_EVENTS_FLUSH_SECONDS = 2.0


class RunDirectoryError(RuntimeError):
    """A run's folder cannot be used; the message says why and what to do."""


class RunDirectory:
    """A run's folder, open for writing; made by ``RunDirectory.open``.

    In a run of several processes all open it, and process 0 alone holds and writes it. To the others it is a folder
    of their own that looks the same and is removed when it is closed; only ``checkpoints_path`` is that of all.

    Attributes:
      path: the folder.
      config: the configuration as it was written to ``config.json``.
      identity: a digest of the configuration without its resumable keys, the same for every process of a run;
        for ``Checkpointer``. None after ``reopen``.

    Example:
      >>> import tempfile, os
      >>> workdir = os.path.join(tempfile.mkdtemp(), "small-0")
      >>> with RunDirectory.open(workdir, {"seed": 0}, tensorboard=False) as run:
      ...     run.log_metrics(1, {"bound": -2.5})
      ...     run.write_results({"bound": -2.5})
      ...     [(record["step"], record["bound"]) for record in run.read_metrics()], run.finished
      ([(1, -2.5)], True)
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        lock: BinaryIO,
        *,
        identity: str | None = None,
        log: Callable[[str], None],
        tensorboard: bool,
        on_log: Callable[[int, dict[str, float]], object] | None = None,
    ) -> None:
        """For ``open`` only."""
        self.path = path
        self.config = config
        self.identity = identity
        self._lock: BinaryIO | None = lock
        self._log = log
        self._metrics: BinaryIO | None = None
        self._shared = path
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._wants_events = tensorboard
        self._events: _Events | None = None
        self._purge_step: int | None = None
        self._on_log = on_log

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | Any,
        *,
        resumable_keys: Collection[str] = (),
        log: Callable[[str], None] | None = None,
        tensorboard: bool = True,
        on_log: Callable[[int, dict[str, float]], object] | None = None,
    ) -> RunDirectory:
        """Opens the folder of a new run or of one to resume, and locks it.

        Args:
          path: the folder; it is made, with its parents, where it does not exist.
          config: a mapping or a dataclass of numbers, strings, lists and further mappings.
          resumable_keys: keys that may differ from the saved ones, such as the number of steps;
            nested keys are dotted, ``optimizer.learning_rate``, and a key stands for all below it.
          log: called with a sentence about something worth knowing; prints to stderr by default.
          tensorboard: whether to write TensorBoard events beside ``metrics.jsonl``.
          on_log: called with the step and the numbers of each record once it is in the file, to send them
            elsewhere. Training waits for it. An exception of it does not end the run: ``log`` gets one sentence,
            and it is not called again.

        Returns:
          The open folder; close it, or use it in a ``with`` statement.

        Raises:
          RunDirectoryError: the folder cannot be made or written, belongs to something else, is in
            use by another process, or holds a run with another configuration.
          TypeError: ``config`` is neither a mapping nor a dataclass.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {"steps": 10}) as run:
          ...     run.finished
          False
        """
        folder, log = Path(path).expanduser().absolute(), log or tell
        opened = functools.partial(cls._open, folder, config, resumable_keys, log, tensorboard, on_log)
        return cls._open_in_each_process(opened, path, config, resumable_keys) if several() else opened()

    @classmethod
    def _open(cls, folder, config, resumable_keys, log, tensorboard, on_log=None) -> RunDirectory:
        plain = _plain(config, "config")
        if not isinstance(plain, dict):
            raise TypeError(f"config is a {type(config).__name__}; give a mapping or a dataclass.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = set(os.listdir(folder))
        except (FileExistsError, NotADirectoryError):
            raise RunDirectoryError(
                f"{folder} cannot be a run's folder: it, or a folder above it, is a file. Give another --workdir."
            ) from None
        except OSError as error:
            raise _cannot_write(folder, error) from error
        # What a crash while the folder was being made leaves behind is still a new folder.
        foreign = sorted(name for name in entries if name != ".lock" and not LEFTOVER.fullmatch(name))
        if "config.json" not in entries and foreign:
            raise RunDirectoryError(
                f"{folder} is not a run's folder: it has no config.json and holds {_some(foreign)}. "
                "Give an empty or a new --workdir."
            )
        lock = _lock(folder)
        try:
            remove_leftovers(folder)
            _write_config(folder, plain, resumable_keys)
            identity = _identity(plain, resumable_keys)
            return cls(
                folder,
                plain,
                lock,
                identity=identity,
                log=log,
                tensorboard=tensorboard,
                on_log=on_log,
            )
        except BaseException:
            lock.close()
            raise

    @classmethod
    def _open_in_each_process(cls, opened, path, config, resumable_keys) -> RunDirectory:
        run, problem = None, None
        if jax.process_index() == 0:
            try:
                run = opened()
            except Exception as error:
                problem = error
        if agree(problem is not None):
            raise problem or RunDirectoryError(f"process 0 could not open {path}; it says why.")
        if run is None:
            temporary = tempfile.TemporaryDirectory(prefix="spread_jax-")
            run = cls._open(Path(temporary.name), config, resumable_keys, tell, False)
            run._temporary, run._shared = temporary, Path(path).expanduser().absolute()
            for name in ("metrics.jsonl", "results.json"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(run._shared / name, run.path / name)
        agree(0)  # process 0 goes on only when they have been read
        return run

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], *, log: Callable[[str], None] | None = None) -> RunDirectory:
        """Opens and locks the folder of a run as it is, with the configuration it was started with.

        For what comes after training and has settings of its own, such as an evaluation.

        Args:
          path: the folder.
          log: as in ``open``.

        Returns:
          The open folder.

        Raises:
          RunDirectoryError: the folder is not that of a run, its configuration is damaged, or another
            process uses it.

        Example:
          >>> import tempfile
          >>> workdir = tempfile.mkdtemp()
          >>> RunDirectory.open(workdir, {"seed": 3}).close()
          >>> with RunDirectory.reopen(workdir) as run:
          ...     run.config
          {'seed': 3}
        """
        folder = Path(path).expanduser().absolute()
        try:
            saved = _read_mapping(folder / "config.json")
        except (FileNotFoundError, NotADirectoryError):
            raise RunDirectoryError(
                f"{folder} is not a run's folder: it has no config.json. Name the folder a run printed."
            ) from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{folder / 'config.json'} cannot be read: {reason(error)}") from error
        return cls(folder, saved, _lock(folder), log=log or tell, tensorboard=False)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and frees the lock; closing twice is allowed."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    # --- metrics

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``; it is in the file when this returns.

        Args:
          step: the step the numbers belong to.
          metrics: named numbers; NaN and the infinities are written as strings.

        Raises:
          RunDirectoryError: the line could not be written; the file keeps the lines before it.
          ValueError: a metric is named ``step`` or ``time``.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}, tensorboard=False) as run:
          ...     run.log_metrics(3, {"loss": float("nan")})
          ...     run.read_metrics()[0]["loss"]
          nan
        """
        self._require_open()
        for name in ("step", "time"):
            if name in metrics:
                raise ValueError(f"a metric cannot be named {name!r}: every record has one already.")
        numbers = {str(name): float(value) for name, value in metrics.items()}
        now = time.time()
        record = {"step": int(step), "time": round(now, 3), **numbers}
        line = (json.dumps(_plain(record, "metrics")) + "\n").encode()
        try:
            if self._metrics is None:
                self._metrics = _open_for_append(self._metrics_path)
            _append(self._metrics, line)
        except OSError as error:
            raise _cannot_write(self._metrics_path, error) from error
        self._write_events(int(step), now, numbers)
        self._call_hook(int(step), numbers)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Reads every record; a last line that a crash left torn is not one.

        Returns:
          One dictionary per record, in the order they were written.

        Raises:
          RunDirectoryError: a line other than the last is damaged; the message has its number.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.read_metrics()
          []
        """
        return [record for _, record in self._records()]

    def truncate_metrics(self, step: int) -> None:
        """Drops the records after ``step``, so a resumed run leaves the file of an unbroken one.

        Call it once with the step that was restored (-1 for none) before logging. TensorBoard is
        told to forget the same steps.

        Args:
          step: the last step to keep.

        Raises:
          RunDirectoryError: the file is damaged or could not be rewritten.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}, tensorboard=False) as run:
          ...     for step in (1, 2, 3):
          ...         run.log_metrics(step, {"loss": 0.5})
          ...     run.truncate_metrics(2)
          ...     [record["step"] for record in run.read_metrics()]
          [1, 2]
        """
        self._require_open()
        records = list(self._records())
        kept = b"".join(line for line, record in records if record["step"] <= step)
        self._purge_step = int(step) + 1
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if not records:
            return
        try:
            if b"".join(line for line, _ in records).startswith(kept):  # needs no room on the disk
                os.truncate(self._metrics_path, len(kept))
            else:
                write_atomically(self._metrics_path, kept.decode())
        except OSError as error:
            raise _cannot_write(self._metrics_path, error) from error

    def _records(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        try:
            data = self._metrics_path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunDirectoryError(f"{self._metrics_path} cannot be read: {reason(error)}") from error
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                shown = line[:60].decode(errors="replace")
                raise RunDirectoryError(
                    f"line {number} of {self._metrics_path} is not a record of metrics: {shown!r}. "
                    "Delete that line, or start the run again in another --workdir."
                ) from error
            yield (
                line + b"\n",
                {k: float(v) if v in _NOT_FINITE else v for k, v in record.items()},
            )

    def _write_events(self, step: int, now: float, metrics: Mapping[str, float]) -> None:
        if not self._wants_events:
            return
        try:
            if self._events is None:
                self._events = _Events(self.path / "tensorboard", self._purge_step)
            self._events.write(step, now, metrics)
        except ImportError:
            self._wants_events = False
            self._log("tensorboardX is not installed: metrics go to metrics.jsonl alone.")
        except OSError as error:
            self._wants_events = False
            self._log(
                f"TensorBoard events stop here, metrics.jsonl goes on: {self.path / 'tensorboard'} "
                f"could not be written: {reason(error)}"
            )

    def _call_hook(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._on_log is None:
            return
        try:
            self._on_log(step, dict(metrics))
        except Exception as error:  # whatever a tracking server that is down makes of it
            self._on_log = None  # each further call may wait for a timeout
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._log(f"on_log failed at step {step} and is not called again, metrics.jsonl goes on: {said[:300]}")

    # --- results and figures

    @property
    def checkpoints_path(self) -> Path:
        """Where this run's ``Checkpointer`` keeps its steps."""
        return self._shared / "checkpoints"

    @property
    def results(self) -> dict[str, Any] | None:
        """What ``write_results`` wrote, or None while the run is not finished."""
        try:
            return _read_mapping(self.path / "results.json")
        except (OSError, ValueError):
            return None

    @property
    def finished(self) -> bool:
        """Whether ``results.json`` is there and complete."""
        return self.results is not None

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json`` in one piece; from then on the run is finished.

        Args:
          results: numbers, strings, lists and mappings of them.

        Raises:
          RunDirectoryError: the file could not be written, or holds something JSON cannot.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({"error": 0.01})
          ...     run.results
          {'error': 0.01}
        """
        self._require_open()
        text = json.dumps(_plain(results, "results"), indent=2) + "\n"
        try:
            write_atomically(self.path / "results.json", text)
        except OSError as error:
            raise _cannot_write(self.path / "results.json", error) from error

    def update_results(self, results: Mapping[str, Any]) -> None:
        """Adds to the results of a finished run, or replaces those of the same names.

        Args:
          results: as in ``write_results``.

        Raises:
          RunDirectoryError: the run is not finished, or as ``write_results``.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({"error": 0.01})
          ...     run.update_results({"distance": 3.5})
          ...     run.results
          {'error': 0.01, 'distance': 3.5}
        """
        self.require_finished()
        self.write_results({**self.results, **results})

    def require_finished(self) -> None:
        """Refuses a run without results.

        Raises:
          RunDirectoryError: the run is not finished; the message says how to finish it.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({})
          ...     run.require_finished()
        """
        if not self.finished:
            raise RunDirectoryError(
                f"the run in {self.path} is not finished: it has no results yet. Repeat its command to finish it."
            )

    def save_figure_path(self, name: str) -> Path:
        """The path of a figure in this folder.

        Args:
          name: a file name; ``.png`` is added where it has no suffix.

        Returns:
          The path to save to.

        Raises:
          ValueError: ``name`` is a path, or empty.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.save_figure_path("samples").name
          'samples.png'
        """
        if not name or Path(name).name != name:
            raise ValueError(f"a figure is named by a file name, not {name!r}.")
        return self.path / (name if Path(name).suffix else f"{name}.png")

    def _require_open(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(f"the run's folder {self.path} is closed.")


class _Events:
    """TensorBoard events, written at once.

    The writer that tensorboardX offers first has a thread, and waits for ever once a full disk has
    ended it; the record writer below it raises.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # takes over a second
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # The file name has whole seconds only; the rest keeps a quick restart from overwriting it.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self._flushed = 0.0

    def write(self, step: int, now: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
            self._writer.write_event(self._event(wall_time=now, step=step, summary=summary))
        if time.monotonic() - self._flushed > _EVENTS_FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # metrics.jsonl has every number
            self._writer.close()


# --- the configuration --------------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
    """The value as JSON can hold it; tuples become lists, paths and enums become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # an array or a number of NumPy or JAX
        return _plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RunDirectoryError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: use numbers, strings, lists and mappings."
    )


_MOST_NESTED = 100


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object; a ValueError if the file holds something else, or what could not be worked with."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no mapping")
    level: list[Any] = [found]
    for _ in range(_MOST_NESTED):
        level = [v for value in level if isinstance(value, dict | list)
                 for v in (value.values() if isinstance(value, dict) else value)]  # fmt: skip
        if not level:
            return found
    raise ValueError("it is nested too deeply")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_resumable(key: str, resumable_keys: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in resumable_keys)


def _canonical(value: Any) -> Any:
    """1 and 1.0 are the same setting."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and abs(value) <= 2**53 else value


def _identity(config: Mapping[str, Any], resumable_keys: Collection[str]) -> str:
    fixed = {key: _canonical(v) for key, v in _flatten(config).items() if not _is_resumable(key, resumable_keys)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _differences(saved: Mapping, now: Mapping, resumable_keys: Collection[str]) -> list[str]:
    """One line per key whose change makes this another run."""
    old, new = _flatten(saved), _flatten(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was = f"saved {json.dumps(old[key])}" if key in old else "not saved"
        is_now = f"now {json.dumps(new[key])}" if key in new else "now absent"
        if not _is_resumable(key, resumable_keys) and (key in old, old.get(key)) != (key in new, new.get(key)):
            lines.append(f"{key}: {was}, {is_now}")
    return lines


def _write_config(folder: Path, config: dict[str, Any], resumable_keys: Collection[str]) -> None:
    path = folder / "config.json"
    try:
        saved = _read_mapping(path)
    except FileNotFoundError:
        saved = None
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise RunDirectoryError(
            f"{path} is damaged ({error}): whether this is the same run cannot be known. Put back "
            "a copy of the file, or give another --workdir."
        ) from error
    if saved == config:
        return
    if saved is not None and (lines := _differences(saved, config, resumable_keys)):
        listed = "\n  ".join(lines)
        raise RunDirectoryError(
            f"{folder} holds a run with another configuration:\n  {listed}\n"
            "Repeat the saved values to resume it, or give another --workdir."
        )
    try:
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


# --- files --------------------------------------------------------------------------------------


def _lock(folder: Path) -> BinaryIO:
    path = folder / ".lock"
    try:
        file = open(path, "a+b")  # noqa: SIM115  held open as long as the run
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise RunDirectoryError(
            f"{folder} is in use by {holder}. Wait for it to end, stop it, or give another --workdir."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            file.close()
            raise _cannot_write(folder, error) from error
        # A file system without locks: the run goes on unprotected rather than not at all.
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        file.flush()
    except OSError as error:
        file.close()
        raise _cannot_write(folder, error) from error
    return file


def _open_for_append(path: Path) -> BinaryIO:
    """Opens a file of lines at its end, after cutting off a line that a crash left torn."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  held open as long as the run
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if end < size:
        file.truncate(end)
    return file


def _append(file: BinaryIO, line: bytes) -> None:
    """Writes the whole line or none of it."""
    start = file.seek(0, os.SEEK_END)
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(start)
        raise


def _cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    advice = "Make room" if error.errno == errno.ENOSPC else "Make it writable"
    return RunDirectoryError(f"{path} could not be written: {reason(error)} {advice}, or give another --workdir.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
