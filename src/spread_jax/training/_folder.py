"""A run's folder as it lies on the disk: read without writing, made, locked."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from spread_jax._files import (
    LEFTOVER,
    is_lasting,
    odd_entry,
    open_regular,
    read_json,
    read_regular,
    reason,
    write_atomically,
)
from spread_jax.training._config import RunDirectoryError, differences, without
from spread_jax.training._metrics import cannot_write
from spread_jax.training.checkpoint import Checkpointer

CHECKPOINTS = "checkpoints"
MARK = ".checkpointed"


class SavedRun(NamedTuple):
    """A run as its folder describes it; all that has been checked is that the folder is that of a run.

    Attributes:
      path: the folder.
      config: what the run was started with, less the keys that name places on a machine.
      results: what it ended with, or None.
      identity: as `RunDirectory.identity`, once a checkpoint was sealed; None before that.
    """

    path: Path
    config: dict[str, Any]
    results: dict[str, Any] | None
    identity: str | None

    @property
    def last_step(self) -> int | None:
        """The step of the last whole record of its metrics, or None where there is none that can be read."""
        try:
            with open_regular(self.path / "metrics.jsonl") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**20))
                return int(json.loads(file.read().split(b"\n")[-2])["step"])
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def checkpointer(self, **options: Any) -> Checkpointer:
        """Reads the checkpoints of this run and of no other, and changes nothing in its folder.

        Args:
          options: of ``Checkpointer``.

        Returns:
          The checkpointer.
        """
        return Checkpointer(self.path / CHECKPOINTS, run=self.identity, read_only=True, **options)


def read_run(path: str | os.PathLike[str], *, local_keys: Collection[str] = ()) -> SavedRun:
    """Reads the folder of a run, which may be in use or untrusted; nothing is written or locked.

    Args:
      path: the folder.
      local_keys: those that the run was opened with: where a folder has them all the same, they are not read.

    Returns:
      What the folder says.

    Raises:
      RunDirectoryError: it is no run's folder, its configuration is damaged, or there is a link or a pipe in it.

    Example:
      >>> import tempfile
      >>> from spread_jax.training import RunDirectory
      >>> workdir = tempfile.mkdtemp()
      >>> RunDirectory.open(workdir, {"seed": 3, "data": "/home/me"}, local_keys=["data"]).close()
      >>> read_run(workdir, local_keys=["data"]).config
      {'seed': 3}
    """
    folder = absolute(path)
    try:
        saved = without(read_json(folder / "config.json"), local_keys)
    except (FileNotFoundError, NotADirectoryError):
        raise RunDirectoryError(
            f"{folder} is not a run's folder: it has no config.json. Name the folder a run printed."
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{folder / 'config.json'} cannot be read: {reason(error)}") from error
    _refuse_odd_entries(folder)
    return SavedRun(folder, saved, results_of(folder), _sealed_identity(folder))


def _sealed_identity(folder: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return read_regular(folder / MARK, most=100).decode() or None
    return None


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path of a run's folder; refuses one that cannot be."""
    try:
        folder = Path(path).expanduser().absolute()
        os.fspath(folder).encode()
    except RuntimeError as error:  # ~ of a user without a home folder
        raise RunDirectoryError(f"{path} cannot be a run's folder: {reason(error)} Give another --workdir.") from None
    except UnicodeEncodeError:
        raise RunDirectoryError(
            f"{os.fspath(path)!a} cannot be a run's folder: its name is no UTF-8, which checkpoints need. Give "
            "another --workdir."
        ) from None
    return folder


def results_of(folder: Path) -> dict[str, Any] | None:
    """What results.json says, or None where it is missing or damaged."""
    path = folder / "results.json"
    try:
        return read_json(path)
    except ValueError:
        return None
    except OSError as error:
        if is_lasting(error):
            return None
        raise RunDirectoryError(
            f"{path} cannot be read: {reason(error)} Repeat the command once it can be, or delete the file."
        ) from error


def _refuse_odd_entries(folder: Path) -> None:
    """A checkpointer looks after its own folder."""
    try:
        odd = odd_entry(folder, skip=CHECKPOINTS)
    except OSError as error:
        raise RunDirectoryError(f"{error.filename or folder} cannot be read: {reason(error)}") from error
    if odd is not None:
        raise RunDirectoryError(
            f"{odd} is neither a file nor a folder, but a link, say, which leads out of a run's folder. Remove it, or "
            "give another --workdir."
        )


def make_and_lock(folder: Path) -> BinaryIO:
    """Locks a folder that is new, or that of a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = set(os.listdir(folder))
    except (FileExistsError, NotADirectoryError):
        raise RunDirectoryError(
            f"{folder} cannot be a run's folder: it, or a folder above it, is a file. Give another --workdir."
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    # What a crash while the folder was being made leaves behind is still a new folder.
    foreign = sorted(name for name in entries if name != ".lock" and not LEFTOVER.fullmatch(name))
    if "config.json" not in entries and foreign:
        raise RunDirectoryError(
            f"{folder} is not a run's folder: it has no config.json and holds {_some(foreign)}. "
            "Give an empty or a new --workdir."
        )
    _refuse_odd_entries(folder)
    return lock(folder)


def write_config(
    folder: Path, config: dict[str, Any], resumable_keys: Collection[str], local_keys: Collection[str]
) -> None:
    path = folder / "config.json"
    try:
        saved = without(read_json(path), local_keys)
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
    if saved is not None and (lines := differences(saved, config, resumable_keys)):
        listed = "\n  ".join(lines)
        raise RunDirectoryError(
            f"{folder} holds a run with another configuration:\n  {listed}\n"
            "Repeat the saved values to resume it, or give another --workdir."
        )
    try:
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def lock(folder: Path) -> BinaryIO:
    path = folder / ".lock"
    try:
        file = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise cannot_write(path if error.errno == errno.EMLINK else folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = "".join(c for c in file.read(200).decode(errors="replace") if c.isprintable()) or "another process"
        file.close()
        raise RunDirectoryError(
            f"{folder} is in use by {holder}. Wait for it to end, stop it, or give another --workdir."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            file.close()
            raise cannot_write(folder, error) from error
        # A file system without locks: the run goes on unprotected rather than not at all.
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        file.flush()
    except OSError as error:
        file.close()
        raise cannot_write(folder, error) from error
    return file


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
