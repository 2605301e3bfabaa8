"""Asking a run to stop: SIGTERM, SIGHUP and Ctrl-C become a flag that the loop reads between steps.

Of a run in several processes all must stop after the same step, or the last ones wait for ever for the first. JAX's
preemption service, which `jax.distributed.initialize()` starts, sees to that: it catches SIGTERM in every process and
makes them agree on a step.
"""

from __future__ import annotations

import os
import signal
import threading

from spread_jax.training._processes import several

__all__ = ["StopRequest"]


class StopRequest:
    """Catches SIGTERM, SIGHUP and SIGINT while it is entered; a second Ctrl-C interrupts at once.

    SIGHUP, the end of the terminal, stays ignored where it was, as under nohup.

    Example:
      >>> with StopRequest() as stop:
      ...     stop.requested
      False
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def agreed(self, step: int) -> bool:
        """Whether the run stops after this step: all processes ask after every step, and get the same answer.

        Args:
          step: steps taken.

        Returns:
          True once a signal has come, to any of the processes.

        Example:
          >>> StopRequest().agreed(1)
          False
        """
        if not several():
            return self.requested
        from jax.experimental import multihost_utils

        stopping = multihost_utils.reached_preemption_sync_point(step)
        if stopping and self.signal is None:
            self.signal = signal.SIGTERM
        return stopping

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread set handlers; elsewhere the caller's own handling stays.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if not several():  # there SIGTERM is the preemption service's
                numbers.append(signal.SIGTERM)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if signal.SIGTERM not in self._previous:
            os.kill(os.getpid(), signal.SIGTERM)
