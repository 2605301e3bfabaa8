"""What a saved run may not bring with it."""

import dataclasses

from experiments import _generator
from spread_jax.data import Dataset


def test_a_saved_run_names_no_hook(monkeypatch):
    config = _generator.GeneratorConfig(on_log="tracking:log")
    images = Dataset.__new__(Dataset)
    monkeypatch.setattr(Dataset, "fingerprint", "f", raising=False)
    monkeypatch.setattr(Dataset, "image_shape", (28, 28, 1), raising=False)
    saved = _generator.saved_config(config, images)
    assert "on_log" not in saved
    for given in (saved, {**saved, "on_log": "os:abort"}):  # of a stranger
        assert _generator.load_config(given)[0] == dataclasses.replace(config, on_log=None)
