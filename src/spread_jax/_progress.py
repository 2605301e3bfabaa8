"""What a user is told while something runs: sentences on stderr, and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta

from spread_jax.runtime import first_process

_SECONDS_BETWEEN_LINES = 5.0


def tell(sentence: str) -> None:
    """Prints on stderr; a closed stderr or a full disk is not an error.

    Example:
      >>> tell("The state is saved.")
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(_harmless(sentence), file=sys.stderr, flush=True)


def _harmless(text: str) -> str:
    """Names in it may be untrusted: no sequence in them moves the cursor or changes the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class Progress:
    """How far something is: a bar with the time left on a terminal, a line every few seconds elsewhere.

    Something that takes no longer than these seconds says nothing elsewhere. Of several processes the first one tells.

    Args:
      label: what is counted, such as "step".
      quiet: whether to say nothing at all.

    Example:
      >>> with Progress("step", quiet=True) as progress:
      ...     progress.update(10, 100, "loss 0.5")
      ...     progress.note("A sentence between two lines.")
    """

    def __init__(self, label: str, *, quiet: bool = False):
        self._label, self._quiet = label, quiet or not first_process()
        self._bar = self._task = self._first = self._last_line = None
        self._told = False

    def __enter__(self) -> Progress:
        with contextlib.suppress(ImportError, OSError, ValueError):
            if not self._quiet and sys.stderr is not None and sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar

                self._bar = Bar(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=12),  # the whole line fits 80 columns
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[text]}", markup=False),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                )
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None and self._task is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()

    def __call__(self, message: str | None, done: int, total: int) -> None:
        """The same as a function, as `open_dataset` takes one: a message, or how far it is."""
        if message is not None:
            self.note(f"{self._label}: {message}")
        elif total:
            self.update(done, total)

    def update(self, done: int, total: int, text: str = "") -> None:
        """Shows how far it is.

        Args:
          done: how much of it.
          total: what it will be.
          text: what else to say of it; the rate, if nothing is given.
        """
        now = time.monotonic()
        if self._first is None:
            self._first, self._last_line = (done, now), now
        if self._quiet:
            return
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                if self._task is None:
                    self._bar.start()
                    self._task = self._bar.add_task(self._label, total=total, completed=done, text=text)
                self._bar.update(self._task, completed=done, total=total, text=text)
            return
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or (done == total and self._told)
        start, began = self._first
        if due and done > start:
            self._last_line, self._told = now, True
            rate = (done - start) / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            tell(f"{self._label} {done}/{total}: {text or f'{rate:,.0f} per second'}, {left} left")

    def note(self, sentence: str) -> None:
        """Shows a line of its own.

        Args:
          sentence: the line.
        """
        if self._quiet:
            return
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.console.print(_harmless(sentence), highlight=False, markup=False)
        else:
            tell(sentence)
