"""Reads that never end: a dead file server becomes an error with the file's name, not a process that waits for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from spread_jax.data.errors import DatasetError

T = TypeVar("T")

VARIABLE = "SPREAD_JAX_READ_TIMEOUT"
_SECONDS = 300.0
_own = threading.local()


def read_timeout() -> float:
    """Seconds after which a read counts as stalled: $SPREAD_JAX_READ_TIMEOUT, else 300.

    Raises:
        DatasetError: the variable is not a positive number.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return _SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise DatasetError(f"{VARIABLE} is {text!r}: it must be a positive number of seconds.")
    return seconds


def stalled(name: object, seconds: float) -> DatasetError:
    """The error of a read that does not end."""
    return DatasetError(
        f"{name} could not be read for {seconds:g} seconds: its disk or file server does not answer. Copy the data to "
        f"a local disk, or give it more time with {VARIABLE}=seconds."
    )


class _Watch:
    """What a watched call does, written by its thread."""

    def __init__(self, name: object) -> None:
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.reads(name)

    def reads(self, name: object) -> None:
        self.now = (name, time.monotonic())


def reading(name: object) -> None:
    """Says what this thread reads next; outside of a watched call it says nothing."""
    watch = getattr(_own, "watch", None)
    if watch is not None:
        watch.reads(name)


def watched(name: object, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a thread of its own, which is left behind when it stalls.

    Args:
        name: what is read, until `reading` says something else.
        function: calls `reading` before every read.
        arguments: of the function.

    Returns:
        What the function returns.

    Raises:
        DatasetError: one read took longer than `read_timeout()`; the message has its name.
    """
    seconds = read_timeout()
    watch = _Watch(name)

    def work() -> None:
        _own.watch = watch
        try:
            watch.result = function(*arguments)
        except BaseException as error:
            watch.error = error
        finally:
            watch.done.set()

    threading.Thread(target=work, name="spread_jax-read", daemon=True).start()
    while not watch.done.wait(min(1.0, seconds / 4)):
        what, since = watch.now
        if time.monotonic() - since > seconds:
            raise stalled(what, seconds)
    if watch.error is not None:
        raise watch.error
    return watch.result
