"""What is told while something runs: lines few seconds apart, nothing from another process, streams that are gone."""

import sys

import pytest

from spread_jax import _progress
from spread_jax._progress import Progress, tell


def test_what_is_quick_or_quiet_prints_no_lines(capsys):
    for quiet in (False, True):
        with Progress("photos", quiet=quiet) as report:
            for done in range(1001):
                report(None, done, 1000)
            report("source has changed", 0, 1000)
        assert capsys.readouterr().err == ("" if quiet else "photos: source has changed\n")


def test_lines_are_seconds_apart_and_the_last_one_is_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    with Progress("step") as progress:
        progress.update(40, 100, "compiling")
        for done in range(41, 101):
            now[0] += 0.5
            progress.update(done, 100, f"loss {done}" if done < 60 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["step 51/100: loss 51, 0:00:24 left", "step 62/100: 2 per second, 0:00:19 left"]
    assert lines[-1] == "step 100/100: 2 per second, 0:00:00 left"
    assert len(lines) == 6


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_and_lines_survive_the_end_of_the_terminal(monkeypatch, terminal):
    class Gone:
        encoding = "utf-8"

        def isatty(self):
            return terminal

        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = lambda self: self.write("")

    monkeypatch.setattr(sys, "stderr", Gone())
    with Progress("step") as progress:
        progress.update(0, 2, "[compiling]")
        progress.note("evaluated [/bold]")
        progress.update(2, 2)
    monkeypatch.setattr(sys, "stderr", None)
    tell("nobody hears this")
    with Progress("step") as progress:
        progress.update(2, 2)


def test_a_name_of_a_strangers_does_not_change_the_terminal(capsys):
    tell("leaf 'w\x1b[2J\x1b]0;owned\x07\r' differs:\n\tüber \udcff")
    assert capsys.readouterr().err == "leaf 'w?[2J?]0;owned??' differs:\n\tüber ?\n"
