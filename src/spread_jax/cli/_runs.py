"""The data of a run, for what comes after training."""

from __future__ import annotations

import json

from spread_jax.data import Dataset, open_dataset
from spread_jax.data.dataset import NAMES
from spread_jax.data.places import recall
from spread_jax.errors import UsageError
from spread_jax.models import DataSettings, Trained
from spread_jax.models.run import saved_config


def data_of(run: Trained, data: str | None, cache_dir: str | None) -> DataSettings:
    """What a run was trained on; where that is now, and where decoded images are kept, only the caller may say.

    Args:
      run: from its folder.
      data: where the data is now. If None, one of the data sets with a name, or where this user has trained on it:
        a path in the folder of a run may be untrusted.
      cache_dir: of decoded images; the usual place if None.
    """
    saved = saved_config(run.path).get("data")
    saved = saved if isinstance(saved, dict) else {}
    known = {name: saved.get(name) for name in ("crop", "max_examples")}
    if not all(value is None or type(value) is int for value in known.values()) or type(saved.get("data")) is not str:
        raise UsageError(f"{run.path / 'config.json'} does not say what the run was trained on: pass --data.")
    if data is None and saved["data"] not in NAMES:
        data = recall(saved_config(run.path).get("data_fingerprint"), cache_dir=cache_dir)
        if data is None:
            raise UsageError(
                f"{run.path} was trained on {json.dumps(saved['data'])[:200]}, and not on this machine by you: pass "
                "--data with the path of that data."
            )
    return DataSettings(data or saved["data"], image_size=run.method.image_shape[0], cache_dir=cache_dir, **known)


def open_split_of(data: DataSettings, run: Trained, split: str, *, quiet: bool = False) -> Dataset:
    """A split of a run's data; refuses images that the run was not trained on."""
    dataset = open_dataset(
        data.data, split, image_size=data.image_size, crop=data.crop, channels=run.method.image_shape[2],
        max_examples=data.max_examples, cache_dir=data.cache_dir, **({"progress": lambda *_: None} if quiet else {}),
    )  # fmt: skip
    saved = saved_config(run.path)
    held_out = saved.get("held_out_fingerprints")
    known = {**(held_out if isinstance(held_out, dict) else {}), "train": saved.get("data_fingerprint")}
    wanted = known.get(split, dataset.fingerprint)
    if dataset.fingerprint != wanted:
        raise UsageError(
            f"{dataset.source} ({split}) is not what the run was trained on: its pixels have the fingerprint "
            f"{dataset.fingerprint}, the run's {json.dumps(wanted)[:40]}. Pass the run's data with --data."
        )
    return dataset
