"""The data of a run: a path in its folder is opened only where this user has trained on it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from spread_jax.cli._runs import data_of, open_split_of
from spread_jax.data import open_dataset
from spread_jax.data.places import remember
from spread_jax.errors import UsageError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on photographs, as its folder tells of it."""
    image_module = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        image_module.fromarray(pixels).save(tmp_path / "photos" / f"{n}.png")
    splits = {
        split: open_dataset(tmp_path / "photos", split, image_size=16) for split in ("train", "validation", "test")
    }
    config = {
        "data": {"data": str(tmp_path / "photos"), "crop": None, "max_examples": None},
        "data_fingerprint": splits["train"].fingerprint,
        "held_out_fingerprints": {split: splits[split].fingerprint for split in ("validation", "test")},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(path=tmp_path, method=SimpleNamespace(image_shape=(16, 16, 3)), splits=splits)


def test_a_strangers_path_is_not_opened(run, tmp_path):
    with pytest.raises(UsageError, match=r"trained on .*photos.*not on this machine by you: pass --data"):
        data_of(run, None, None)
    assert data_of(run, "elsewhere", None).data == "elsewhere"
    remember(run.splits["train"], str(tmp_path / "photos"))
    assert data_of(run, None, None).data == str(tmp_path / "photos")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "data": "/etc"}}))
    assert data_of(run, None, None).data == str(tmp_path / "photos")  # whatever the folder says
    (tmp_path / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "data": "faces"}}))
    assert data_of(run, None, None).data == "faces"


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_every_split_must_be_those_of_the_run(run, tmp_path, split):
    data = data_of(run, str(tmp_path / "photos"), None)
    assert open_split_of(data, run, split, quiet=True).fingerprint == run.splits[split].fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    config["data_fingerprint"] = config["held_out_fingerprints"]["test"] = "0" * 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"\({split}\) is not what the run was trained on"):
        open_split_of(data, run, split, quiet=True)
