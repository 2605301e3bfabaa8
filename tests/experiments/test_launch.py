"""The hook that `--on-log` names: found in a module or a file, or refused in a sentence."""

import dataclasses

import pytest

from experiments import _generator, _launch
from spread_jax.data import Dataset

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
        hook = _launch.load_hook(text)
        _launch.prefixed(hook, "fixed-0")(3, {"elbo": 0.5})
        hook(4, {})
        sent = [(record.step, record.metrics) for record in hook.__globals__["sent"]]
        assert sent == [(3, {"fixed-0/elbo": 0.5}), (4, {})]
    assert _launch.load_hook(None) is None
    assert _launch.prefixed(None, "fixed-0") is None


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
        with pytest.raises(
            _launch.UsageError, match=r"package\.module:function or path/to/file\.py:function"
        ) as caught:
            _launch.load_hook(text)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_saved_run_names_no_hook(monkeypatch):
    config = _generator.GeneratorConfig(on_log="tracking:log")
    images = Dataset.__new__(Dataset)
    monkeypatch.setattr(Dataset, "fingerprint", "f", raising=False)
    monkeypatch.setattr(Dataset, "image_shape", (28, 28, 1), raising=False)
    saved = _generator.saved_config(config, images)
    assert "on_log" not in saved
    for given in (saved, {**saved, "on_log": "os:abort"}):  # of a stranger
        assert _generator.load_config(given)[0] == dataclasses.replace(config, on_log=None)
