"""The records of a run: metrics.jsonl, whole lines only, and the same numbers as TensorBoard events."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from spread_jax._files import open_regular, read_regular, reason, write_atomically
from spread_jax.training._config import RunDirectoryError, plain

_NOT_FINITE = ("nan", "inf", "-inf")
_EVENTS_FLUSH_SECONDS = 2.0


class Metrics:
    """The two files of one run folder, opened when they are needed.

    Args:
      folder: of the run.
      events: whether TensorBoard events are written.
      log: told once why there are none.
    """

    def __init__(self, folder: Path, *, events: bool, log: Callable[[str], None]) -> None:
        self.path = folder / "metrics.jsonl"
        self._log = log
        self._file: BinaryIO | None = None
        self._wants_events = events
        self._events: _Events | None = None
        self._purge_step: int | None = None

    def close(self) -> None:
        """Closes both files; they are opened again when they are needed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record to both."""
        now = time.time()
        record = {"step": step, "time": round(now, 3), **metrics}
        line = (json.dumps(plain(record, "metrics")) + "\n").encode()
        try:
            if self._file is None:
                self._file = _open_for_append(self.path)
            _append(self._file, line)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._write_events(step, now, metrics)

    def read(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Every whole line, and what it says."""
        try:
            data = read_regular(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be read: {reason(error)}") from error
        found = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # what follows the last newline is torn
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                shown = line[:60].decode(errors="replace")
                raise RunDirectoryError(
                    f"line {number} of {self.path} is not a record of metrics: {shown!r}. "
                    "Delete that line, or start the run again in another --workdir."
                ) from error
            found.append((line + b"\n", {k: float(v) if v in _NOT_FINITE else v for k, v in record.items()}))
        return found

    def truncate(self, step: int) -> None:
        """Drops the records after a step, and says so where there are none up to it."""
        records = self.read()
        kept = b"".join(line for line, record in records if record["step"] <= step)
        self._purge_step = step + 1
        self.close()
        steps = sorted({record["step"] for _, record in records})
        longest = max((after - before for before, after in itertools.pairwise(steps)), default=0)
        if steps and step - steps[-1] > longest > 0:
            self._log(f"{self.path} ends at step {steps[-1]}: the records from there to step {step} are lost.")
        elif not steps and step > 0:
            self._log(f"{self.path} holds no records up to step {step}, from which the run continues.")
        if not records:
            return
        try:
            if b"".join(line for line, _ in records).startswith(kept):  # needs no room on the disk
                with open_regular(self.path, os.O_RDWR) as file:
                    file.truncate(len(kept))
            else:
                write_atomically(self.path, kept)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _write_events(self, step: int, now: float, metrics: Mapping[str, float]) -> None:
        if not self._wants_events:
            return
        folder = self.path.parent / "tensorboard"
        try:
            if self._events is None:
                self._events = _Events(folder, self._purge_step)
            self._events.write(step, now, metrics)
        except ImportError:
            self._wants_events = False
            self._log("tensorboardX is not installed: metrics go to metrics.jsonl alone.")
        except OSError as error:
            self._wants_events = False
            self._log(
                f"TensorBoard events stop here, metrics.jsonl continues: {folder} could not be written: {reason(error)}"
            )


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


def _open_for_append(path: Path) -> BinaryIO:
    """Opens a file of lines at its end, after cutting off a line that a crash left torn."""
    file = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
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


def cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    advices = {errno.ENOSPC: "Make room", errno.EMLINK: "Put a copy in its place"}
    advice = advices.get(error.errno or 0, "Make it writable")
    return RunDirectoryError(f"{path} could not be written: {reason(error)} {advice}, or give another --workdir.")
