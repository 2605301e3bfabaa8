"""A training loop for any model: it advances a state, records, saves, and stops cleanly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from spread_jax.errors import UsageError
from spread_jax.training.signals import StopRequest

__all__ = ["NonFiniteLossError", "StepRecord", "TrainingInterrupted", "every", "train"]

PyTree = Any


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient stopped being a number.

    Attributes:
      step: the first step at which it happened, counted from 1.
      metrics: the metrics of that step.
    """

    def __init__(self, step: int, metrics: Mapping[str, float]):
        self.step, self.metrics = step, dict(metrics)
        bad = ", ".join(f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value))
        super().__init__(f"Step {step} gave a value that is not finite ({bad}).")


class TrainingInterrupted(Exception):
    """The run was asked to stop; the state was saved first.

    Attributes:
      step: steps taken.
      signal: the signal that asked for it.
    """

    def __init__(self, step: int, signal):
        self.step, self.signal = step, signal
        super().__init__(f"Stopped by {signal.name} after step {step}.")


class StepRecord(NamedTuple):
    """What the loop tells its callback.

    Attributes:
      step: steps taken so far.
      metrics: as floats, the newest of each name since the last record: players on turn in different steps have
        metrics of different names.
      seconds_per_step: mean over the steps since the last record (the first, compiling step apart).
      waiting: share of that time spent waiting for data, in [0, 1].
    """

    step: int
    metrics: dict[str, float]
    seconds_per_step: float
    waiting: float


def every(step: int, interval: int, num_steps: int) -> bool:
    """Whether something due each `interval` steps is due after `step`; it always is at the end.

    Args:
      step: steps taken.
      interval: steps between two times; 0 for the end only.
      num_steps: steps in all.

    Returns:
      True or False.

    Example:
      >>> [step for step in range(1, 8) if every(step, 3, 7)]
      [3, 6, 7]
    """
    return step == num_steps or (interval > 0 and step % interval == 0)


def train(
    state: PyTree,
    train_step: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, jax.Array]]],
    batches: Iterable[PyTree],
    *,
    start_step: int,
    num_steps: int,
    on_record: Callable[[StepRecord], None],
    record_every: int,
    on_evaluate: Callable[[int, PyTree], Mapping[str, float] | None] | None = None,
    evaluate_every: int = 0,
    save: Callable[[int, PyTree, Mapping[str, float]], None] | None = None,
    save_every: int = 0,
    stop: StopRequest | None = None,
) -> PyTree:
    """Advances `state` from `start_step` to `num_steps`.

    Steps are dispatched without waiting for their results; results are fetched when a record, an evaluation
    or a save is due, and every step's metrics are then looked at, so the step at which a loss stopped being
    finite is known exactly and a state after it is never saved.

    Args:
      state: what `train_step` advances; it is donated, so only the returned one may be used.
      train_step: (state, batch) -> (state, metrics), metrics being named scalars.
      batches: yields the batch of step start_step, start_step + 1, ...
      start_step: steps already taken.
      num_steps: steps in all.
      on_record: called every `record_every` steps with a `StepRecord`.
      record_every: steps between records.
      on_evaluate: (step, state) -> metrics to be saved with that step; must not keep the state.
      evaluate_every: steps between evaluations; 0 for one at the end.
      save: (step, state, metrics) -> None, such as `Checkpointer.save`.
      save_every: steps between saves; 0 for one at the end.
      stop: a request to stop, looked at between steps; several processes stop after the same one.

    Returns:
      The state after `num_steps`.

    Raises:
      NonFiniteLossError: a metric of some step is not finite.
      TrainingInterrupted: `stop` was requested; the state was saved.
      UsageError: `start_step` is beyond `num_steps`: what such a run ends with would not be that of `num_steps`.

    Example:
      >>> count = lambda state, batch: (state + batch, {"loss": 1.0 / batch})
      >>> show = lambda record: print(record.step, record.metrics)
      >>> train(0, count, [1, 2, 4, 8], start_step=0, num_steps=4, on_record=show, record_every=2)
      2 {'loss': 0.5}
      4 {'loss': 0.125}
      15
    """
    if start_step > num_steps:
        raise UsageError(
            f"The run has taken {start_step} steps already, and {num_steps} are asked for: ask for more, or start "
            "another run."
        )
    pending: list[Mapping[str, jax.Array]] = []
    latest: dict[str, float] = {}  # since the last record
    evaluation: Mapping[str, float] = {}
    stream = iter(batches)
    clock, timed_steps, waited = time.perf_counter(), 0, 0.0

    def fetch(step: int) -> None:
        for offset, metrics in enumerate(jax.device_get(pending)):
            found = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, found.values())):
                raise NonFiniteLossError(step - len(pending) + offset + 1, found)
            latest.update(found)
        pending.clear()

    for step in range(start_step + 1, num_steps + 1):
        before = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - before
        state, metrics = train_step(state, batch)
        pending.append(metrics)
        timed_steps += 1
        if step == start_step + 1:
            fetch(step)  # compiles; not part of the rate
            clock, timed_steps, waited = time.perf_counter(), 0, 0.0

        if every(step, record_every, num_steps):
            fetch(step)
            elapsed = time.perf_counter() - clock
            rate = elapsed / timed_steps if timed_steps else math.nan
            on_record(StepRecord(step, dict(latest), rate, waited / elapsed if timed_steps else 0.0))
            latest.clear()
            clock, timed_steps, waited = time.perf_counter(), 0, 0.0

        stopping = stop is not None and step < num_steps and stop.agreed(step)
        evaluating = on_evaluate is not None and every(step, evaluate_every, num_steps)
        saving = save is not None and (every(step, save_every, num_steps) or stopping)
        if evaluating or saving:
            pause = time.perf_counter()
            fetch(step)
            if evaluating:
                evaluation = on_evaluate(step, state) or {}
            if saving:
                save(step, state, evaluation if evaluating else {})
            clock += time.perf_counter() - pause
        if stopping:
            raise TrainingInterrupted(step, stop.signal)
    return state
