"""What surrounds a program: the hook that a flag names, exit codes and sentences, streams that nobody reads."""

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
