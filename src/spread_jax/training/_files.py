"""Files that a crash leaves either as they were or complete."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by one rename, so that no reader ever finds half of it.

    Args:
      path: the file; its folder exists.
      text: what it will hold.

    Raises:
      OSError: the file could not be written; what was there before is unchanged.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
      >>> write_atomically(path, "whole")
      >>> path.read_text()
      'whole'
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Makes the renames inside a folder survive a power cut, where the file system can.

    Args:
      path: the folder.

    Example:
      >>> flush_folder(Path("."))
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
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
