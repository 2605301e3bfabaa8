"""What surrounds a program: the hook that a flag names, exit codes and sentences, streams that nobody reads."""

import errno
import json
import os
import subprocess
import sys

import pytest

from spread_jax.cli.launch import load_hook, prefixed, run_program
from spread_jax.errors import UsageError

HOOK = """from __future__ import annotations
import dataclasses


@dataclasses.dataclass
class Sent:
    step: int
    metrics: dict

sent: list[Sent] = []

def log(step, metrics):
    sent.append(Sent(step, metrics))

number = 3
"""


def test_a_hook_is_found_in_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "tracking_for_test.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)
    for text in (f"{tmp_path}/tracking_for_test.py:log", "tracking_for_test:log"):
        hook = load_hook(text)
        prefixed(hook, "fixed-0")(3, {"elbo": 0.5})
        hook(4, {})
        sent = [(record.step, record.metrics) for record in hook.__globals__["sent"]]
        assert sent == [(3, {"fixed-0/elbo": 0.5}), (4, {})]
    assert load_hook(None) is None
    assert prefixed(None, "fixed-0") is None


def test_what_is_no_hook_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('no\\nserver')")
    (tmp_path / "sound.py").write_text(HOOK)
    refused = {
        "no_such_module:log": "ModuleNotFoundError: No module named 'no_such_module'",
        f"{tmp_path}/none.py:log": "No such file",
        f"{tmp_path}/broken.py:log": "OSError: no server",
        f"{tmp_path}/sound.py:lgo": "no attribute 'lgo'",
        f"{tmp_path}/sound.py:number": "that is a int",
        f"{tmp_path}/sound.py": "cannot be used",
        "json": "that is a module",
        ":": "cannot be used",
        "": "cannot be used",
    }
    for text, why in refused.items():
        with pytest.raises(UsageError, match=r"package\.module:function or path/to/file\.py:function") as caught:
            load_hook(text)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_experiment_for_one_process_runs_in_the_first_only(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for index in (0, 1):
        monkeypatch.setenv("JAX_PROCESS_ID", str(index))
        called = []
        with pytest.raises(SystemExit) as ended:
            run_program(lambda called=called: called.append(True))
        assert ended.value.code == 0
        assert called == [True] * (index == 0)


def test_a_file_that_cannot_be_written_is_named(capfd):
    def main():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "runs/a/report.html")

    with pytest.raises(SystemExit, match="1"):
        run_program(main)
    assert capfd.readouterr().err == (
        "\nerror: runs/a/report.html cannot be used: Is a directory. Make room or make it writable, then repeat the "
        "command.\n"
    )


STREAMS = """
import json, os, sys
from spread_jax.cli.launch import print_result, run_program, talker
from spread_jax.errors import UsageError

def finish():
    talker(quiet=False)("said")
    print_result({"a": 1})

def refuse():
    raise UsageError("sentence")

def leave(code, out, err):
    for number, name, way in ((1, "stdout", out), (2, "stderr", err)):
        if way == "closed":  # as Python finds it at its start
            os.close(number)
            setattr(sys, name, None)
        elif way == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        elif way == "nobody reads":
            ends = os.pipe()
            os.dup2(ends[1], number)
            os.close(ends[0]), os.close(ends[1])
    run_program(code)

for code, ways in (
    (finish, (("closed", ""), ("", "closed"), ("full", ""), ("", "full"), ("nobody reads", ""), ("", "nobody reads"))),
    (refuse, (("closed", "closed"), ("nobody reads", ""), ("full", "nobody reads"), ("", "full"))),
):
    for out, err in ways:
        sys.stdout.flush()
        sys.stderr.flush()
        log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if (pid := os.fork()) == 0:
            os.dup2(log, 1), os.dup2(log, 2)
            leave(code, out, err)
        _, status = os.waitpid(pid, 0)
        print(json.dumps([code.__name__, out, err, os.waitstatus_to_exitcode(status), open(sys.argv[1]).read()]))
"""


def test_streams_that_are_closed_full_or_unread_change_no_exit_code(tmp_path):
    """A finished program ends with 0, a refused one with 1, and nothing but its own words is printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", STREAMS, str(tmp_path / "log")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 10
    for name, out, err, code, printed in cases:
        expected = "" if err else "said\n" if name == "finish" else "\nerror: sentence\n"
        if name == "finish" and not out:
            expected += 'RESULT {"a": 1}\n'
        if name == "finish" and out == "full" and not err:
            expected += "the results could not be printed: [Errno 28] No space left on device.\n"
        assert (code, printed) == (0 if name == "finish" else 1, expected), (name, out, err)
