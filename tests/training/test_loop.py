"""The loop's bookkeeping; schedules."""

import itertools
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

from spread_jax.training import (
    NonFiniteLossError,
    StopRequest,
    TrainingInterrupted,
    learning_rate_schedule,
    noise_scale_schedule,
    train,
)


def counting_step(bad_at=None):
    """A step over integers, whose metric is NaN at one step."""

    def step(state, batch):
        assert batch == state
        return state + 1, {"value": math.nan if state + 1 == bad_at else float(state)}

    return step


def run(step, *, num_steps=10, start=0, **options):
    log = {"records": [], "saves": [], "evaluations": []}

    def evaluate(step, state):
        log["evaluations"].append((step, state))
        return {"score": float(step)}

    result = None
    try:
        result = train(
            start,
            step,
            itertools.count(start),
            start_step=start,
            num_steps=num_steps,
            on_record=log["records"].append,
            save=lambda step, state, metrics: log["saves"].append((step, state, dict(metrics))),
            on_evaluate=evaluate,
            **{"record_every": 4, "evaluate_every": 6, "save_every": 3, **options},
        )
    except (NonFiniteLossError, TrainingInterrupted) as error:
        log["error"] = error
    return result, log


def test_loop_calls_at_its_intervals_and_at_the_end():
    result, log = run(counting_step())
    assert result == 10
    assert [(r.step, r.metrics["value"]) for r in log["records"]] == [(4, 3.0), (8, 7.0), (10, 9.0)]
    assert log["evaluations"] == [(6, 6), (10, 10)]
    assert log["saves"] == [
        (3, 3, {}),
        (6, 6, {"score": 6.0}),
        (9, 9, {}),
        (10, 10, {"score": 10.0}),
    ]


def test_a_record_has_the_newest_number_of_every_name():
    """Players on turn in different steps have metrics of different names."""

    def step(state, batch):
        return state + 1, {"model" if state % 4 < 3 else "critic": float(state)}

    _, log = run(step, num_steps=9, save_every=5, evaluate_every=0)
    assert [record.metrics for record in log["records"]] == [
        {"model": 2.0, "critic": 3.0}, {"model": 6.0, "critic": 7.0}, {"model": 8.0},
    ]  # fmt: skip


def test_loop_starts_where_it_is_told():
    result, log = run(counting_step(), start=7)
    assert result == 10
    assert [r.step for r in log["records"]] == [8, 10]


@pytest.mark.parametrize("bad_at", [1, 5, 7, 10])
def test_a_bad_value_is_reported_with_its_step_and_never_saved(bad_at):
    _, log = run(counting_step(bad_at), record_every=100)
    assert log["error"].step == bad_at
    assert "not finite (value = nan)" in str(log["error"])
    assert all(step < bad_at for step, *_ in log["saves"])


def test_a_request_to_stop_saves_and_raises():
    with StopRequest() as stop:

        def step(state, batch):
            if state == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return state + 1, {"value": 0.0}

        _, log = run(step, stop=stop, save_every=100)
    assert log["error"].signal == signal.SIGTERM
    assert log["error"].step == 5
    assert log["saves"] == [(5, 5, {})]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_is_not_held_back():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_noise_scale_schedule_is_the_published_staircase():
    schedule = noise_scale_schedule(0.5, 0.1, decay=0.9, every=10, begin=5)
    for step in (0, 5, 14, 15, 100, 1000):
        expected = max(0.1, 0.5 * 0.9 ** max(0, (step - 5) // 10))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(schedule)(step), expected, rtol=1e-5)
    assert float(noise_scale_schedule(0.3, 0.3)(77)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.1), "initial must be positive"),
        ((0.1, 0.5), "final must not exceed initial"),
        ((0.5, 0.1, 1.5), r"decay must be in \(0, 1\)"),
    ],
)
def test_noise_scale_schedule_refuses(arguments, message):
    initial, final, *decay = arguments
    with pytest.raises(ValueError, match=message):
        noise_scale_schedule(initial, final, **({"decay": decay[0]} if decay else {}))


def test_learning_rate_schedule():
    schedule = learning_rate_schedule(1.0, num_steps=110, warmup=10, final_fraction=0.2)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(0.5)
    for step in (10, 60, 110):
        expected = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
    assert float(learning_rate_schedule(0.3, num_steps=5)(4)) == pytest.approx(0.3)
    late = learning_rate_schedule(1.0, num_steps=100, warmup=10, final_fraction=0.2, decay_start=0.6)
    assert [float(late(step)) for step in (5, 10, 59, 60)] == [0.5, 1.0, 1.0, 1.0]
    assert float(late(80)) == pytest.approx(0.6, rel=1e-5)
    assert float(late(100)) == pytest.approx(0.2, rel=1e-5)
    with pytest.raises(ValueError, match=r"decay_start must be in \[0, 1\), got 1.0"):
        learning_rate_schedule(1.0, num_steps=10, decay_start=1.0)
    with pytest.raises(ValueError, match=r"warmup must be in \[0, num_steps\)"):
        learning_rate_schedule(1.0, num_steps=10, warmup=10)
    with pytest.raises(ValueError, match="final_fraction must be in"):
        learning_rate_schedule(1.0, num_steps=10, final_fraction=2.0)


def test_a_request_during_the_last_step_ends_a_run_that_is_done_anyway():
    with StopRequest() as stop:

        def step(state, batch):
            if state == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return state + 1, {"value": 0.0}

        result, log = run(step, stop=stop)
    assert (result, log.get("error")) == (10, None)
    assert log["saves"][-1][0] == 10


def test_the_rate_leaves_the_first_step_out():
    """It is the one that compiles."""

    def step(state, batch):
        time.sleep(0.3 if batch == 0 else 0)
        return state, {"loss": 1.0}

    records = []
    train(0, step, range(4), start_step=0, num_steps=4, on_record=records.append, record_every=4)
    assert records[0].seconds_per_step < 0.05


def test_the_share_of_waiting_is_that_of_the_time():
    def slow_batches():
        for batch in range(9):
            time.sleep(0.02)
            yield batch

    def step(state, batch):
        time.sleep(0.02)
        return state, {"loss": 1.0}

    records = []
    train(0, step, slow_batches(), start_step=0, num_steps=9, on_record=records.append, record_every=9)
    assert 0.3 < records[0].waiting < 0.7


def test_the_rate_leaves_evaluations_and_saves_out(monkeypatch):
    """By a clock of the test's own, on which a step takes 1 s, an evaluation 100 and a save 1000."""
    clock = [0.0]
    monkeypatch.setattr("spread_jax.training.loop.time.perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds

    records = []
    train(
        0, lambda state, batch: (wait(1) or state + 1, {"value": 0.0}), itertools.count(), start_step=0, num_steps=9,
        on_record=records.append, record_every=4, on_evaluate=lambda step, state: wait(100), evaluate_every=2,
        save=lambda step, state, metrics: wait(1000), save_every=3,
    )  # fmt: skip
    assert [record.seconds_per_step for record in records] == [1.0, 1.0, 1.0]
