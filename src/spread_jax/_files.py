"""Files that a crash leaves either as they were or complete, and that no untrusted link or pipe can divert."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What a crash can leave beside a file that was being replaced.
LEFTOVER = re.compile(r"\.spread_jax-[0-9a-f]{16}\.part")
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_MOST_BYTES = 2**30


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file that takes the place of another once the block has ended: no reader ever finds half of it.

    It is written beside the other under a name that nobody can foresee, so a link that lies there is never followed;
    one under the final name is replaced, and what it points to stays as it is.

    Args:
      path: the file; its folder exists.

    Yields:
      The file to write to, in binary.

    Raises:
      OSError: it could not be written, and the error has its name; what was there before is unchanged.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "note.txt")
      >>> with replacing(path) as file:
      ...     _ = file.write(b"whole")
      >>> path.read_text(), len(os.listdir(path.parent))
      ('whole', 1)
    """
    path = Path(path)
    part = path.with_name(f".spread_jax-{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        if error.filename in (None, os.fspath(part)):
            raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
        raise
    flush_folder(path.parent)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file in one piece, as `replacing` does.

    Args:
      path: the file; its folder exists.
      content: what it will hold; text is written as UTF-8.

    Raises:
      OSError: the file could not be written; what was there before is unchanged.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "note.txt")
      >>> write_atomically(path, "whole")
      >>> path.read_text()
      'whole'
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Removes from a folder what a crash in `replacing` left there; only under a lock of that folder.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / f".spread_jax-{'0' * 16}.part").touch()
      >>> remove_leftovers(folder)
      >>> os.listdir(folder)
      []
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if LEFTOVER.fullmatch(name):
                os.unlink(folder / name)


def read_regular(path: str | os.PathLike, most: int = _MOST_BYTES) -> bytes:
    """The bytes of a file that may come from anywhere: links are not followed, pipes and devices not waited for.

    Args:
      path: the file.
      most: bytes that it may hold.

    Raises:
      OSError: it cannot be read, is no regular file, or is larger.

    Example:
      >>> read_regular("/dev/zero")
      Traceback (most recent call last):
      OSError: [Errno 22] it is neither a file nor a folder: '/dev/zero'
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most:,} bytes", os.fspath(path))
    return content


def open_regular(path: str | os.PathLike, flags: int = os.O_RDONLY) -> BinaryIO:
    """Opens a file as `read_regular` does.

    Args:
      path: the file.
      flags: of `os.open`; with `os.O_CREAT` a missing file is made. One to write to has no other name.

    Returns:
      The unbuffered file where it is written to, a buffered one where it is read.

    Raises:
      OSError: as `read_regular`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "lines")
      >>> with open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
      ...     _ = file.write(b"one\\n")
      >>> read_regular(path)
      b'one\\n'
    """
    with contextlib.suppress(FileNotFoundError):
        _refuse_odd(path, os.lstat(path))
    descriptor = os.open(path, flags | _SAFE, 0o666)
    try:
        status = os.fstat(descriptor)
        _refuse_odd(path, status)
        if flags != os.O_RDONLY and status.st_nlink > 1:  # what has its other name would be changed with it
            raise OSError(errno.EMLINK, "it is a hard link to a file that lies elsewhere too", os.fspath(path))
        return open(descriptor, "rb") if flags == os.O_RDONLY else open(descriptor, "r+b", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


# These say what a file is; any other error says only that it cannot be read at this moment.
_LASTING = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG}


# What NumPy raises for an .npz file that is something else, or damaged.
UNREADABLE_ARRAYS = (
    ValueError, KeyError, TypeError, EOFError, NotImplementedError, MemoryError, OverflowError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def refuse_packed(file: BinaryIO) -> None:
    """Raises ValueError for an .npz file that is packed: a few bytes of such a one may unpack to gigabytes.

    Arrays of ours are random enough to shrink by little, and are not packed.

    Example:
      >>> import io, numpy as np
      >>> file = io.BytesIO()
      >>> np.savez_compressed(file, zeros=np.zeros(10**6))
      >>> refuse_packed(file)
      Traceback (most recent call last):
      ValueError: its arrays are packed
    """
    with zipfile.ZipFile(file) as archive:
        if any(member.file_size > member.compress_size for member in archive.infolist()):
            raise ValueError("its arrays are packed")
    file.seek(0)


def is_lasting(error: OSError) -> bool:
    """Whether an error says what a file is, and not that its disk or server is away for a moment.

    Example:
      >>> is_lasting(FileNotFoundError(errno.ENOENT, "")), is_lasting(OSError(errno.EIO, ""))
      (True, False)
    """
    return error.errno in _LASTING


def _refuse_odd(path: str | os.PathLike, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a symbolic link", os.fspath(path))
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is neither a file nor a folder", os.fspath(path))


_MOST_NESTED = 100


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file that may come from anywhere.

    Args:
      path: the file.

    Raises:
      OSError: as `read_regular`.
      ValueError: it holds something else, or what could not be worked with; the message says what.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "config.json")
      >>> write_atomically(path, '{"seed": 3}')
      >>> read_json(path)
      {'seed': 3}
    """
    try:
        found = json.loads(read_regular(path, 2**26).decode())
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
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


def odd_entry(folder: str | os.PathLike, skip: str = "") -> Path | None:
    """The first thing in a folder, or below it, that is neither a folder nor a file: a link leads out of it, a pipe
    is waited for.

    Args:
      folder: where to look; it may be nested to any depth.
      skip: folders of this name are not looked into.

    Returns:
      Its path, or None.

    Raises:
      OSError: a folder cannot be read.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> odd_entry(folder) is None
      True
      >>> (folder / "link").symlink_to("/etc")
      >>> odd_entry(folder).name
      'link'
    """
    waiting = [os.fspath(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != skip:
                        waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    return Path(entry.path)
    return None


def flush_folder(path: Path) -> None:
    """Makes the renames inside a folder survive a power cut, where the file system can.

    Args:
      path: the folder.

    Example:
      >>> flush_folder(Path("."))
    """
    with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: BaseException) -> str:
    """What went wrong, as one line that ends in a full stop.

    Args:
      error: the exception.

    Returns:
      Its first line, without an error number or a path.

    Example:
      >>> reason(ValueError("no such unit\\nmore"))
      'no such unit.'
    """
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    text = text.splitlines()[0][:300]
    return text if text.endswith(".") else text + "."
