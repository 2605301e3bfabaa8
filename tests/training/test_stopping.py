"""What stops a run and what does not: the end of its terminal, and a number of steps that lies behind it."""

import os
import signal

import pytest

from spread_jax.errors import UsageError
from spread_jax.training import StopRequest, train


def test_the_end_of_the_terminal_is_a_request_to_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed(1)
            assert stop.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_it_is_none():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("start", "steps"), [(40, 30), (1, 0)])
def test_a_run_beyond_the_steps_asked_for_is_refused(start, steps):
    """Its results would say 30 and be those of 40."""
    options = {"on_record": print, "record_every": 1}
    with pytest.raises(UsageError, match=f"has taken {start} steps already, and {steps} are asked for"):
        train(0, None, [], start_step=start, num_steps=steps, **options)
    assert train("state", None, [], start_step=start, num_steps=start, **options) == "state"
