"""How far a build of the cache is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[str | None, int, int], None]


@contextlib.contextmanager
def default_progress(label: str) -> Iterator[Progress]:
    """Report on stderr: with rich's bar on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError:
            pass
        else:
            columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bar = Progress(*columns, console=Console(stderr=True))
            task = None

            def show(message: str | None, done: int, total: int) -> None:
                nonlocal task
                if message is not None:
                    bar.console.print(message, highlight=False, markup=False)
                if total:
                    if task is None:
                        bar.start()
                        task = bar.add_task(label, total=total)
                    bar.update(task, completed=done, total=total)

            try:
                yield show
            finally:
                if task is not None:
                    bar.stop()
            return
    yield _Lines(label)


class _Lines:
    """Plain lines, silent for a build that is done within the first interval."""

    def __init__(self, label: str, interval: float = 5.0):
        self._label = label
        self._interval = interval
        self._start = self._last = time.monotonic()

    def __call__(self, message: str | None, done: int, total: int) -> None:
        now = time.monotonic()
        if message is not None:
            print(f"{self._label}: {message}", file=sys.stderr, flush=True)
        elif now - self._last >= self._interval and done:
            self._last = now
            rate = done / (now - self._start)
            left = (total - done) / rate
            print(
                f"{self._label}: {done:,} of {total:,} images, {rate:,.0f} per second, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
