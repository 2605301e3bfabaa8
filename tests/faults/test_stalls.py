"""A source that does not answer ends in a sentence with the file's name, and the process ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from spread_jax.data import DatasetError, Loader, files, open_dataset

SCRIPT = """
import os, sys
from spread_jax.data import dataset, open_dataset
split = dataset.assign_splits
def swap(names, path):
    splits = split(names, path)
    file = path / splits["train"][2]
    os.remove(file)
    os.mkfifo(file)  # nobody writes to it: reading it waits for ever, as on a dead file server
    print(file.name)
    return splits
dataset.assign_splits = swap
open_dataset(sys.argv[1], cache_dir=sys.argv[2])
"""


@pytest.fixture
def pictures(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        image_module.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_file_that_never_comes(pictures, tmp_path, tally):
    def check():
        environment = {**os.environ, "SPREAD_JAX_READ_TIMEOUT": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, str(pictures), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert f"{pictures}/{done.stdout.strip()} could not be read for 3 seconds" in last
        assert "SPREAD_JAX_READ_TIMEOUT" in last
        assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]

    tally("stalled data source", check)


def test_a_folder_that_is_never_listed(pictures, monkeypatch):
    monkeypatch.setenv("SPREAD_JAX_READ_TIMEOUT", "0.2")
    gate, scandir = threading.Event(), os.scandir
    (pictures / "deep").mkdir()

    def hang(path):
        assert not str(path).endswith("deep") or gate.wait(30)
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", hang)
    try:
        with pytest.raises(DatasetError, match=r"pictures(/deep)? could not be read for 0\.2 seconds"):
            open_dataset(pictures)
    finally:
        gate.set()


def test_a_batch_that_never_comes(pictures, monkeypatch, tmp_path):
    dataset = open_dataset(pictures, image_size=8, cache_dir=tmp_path / "cache")
    monkeypatch.setenv("SPREAD_JAX_READ_TIMEOUT", "1")
    loader, gate = Loader(dataset, batch_size=2, seed=0), threading.Event()
    loader.batch = lambda step: gate.wait(30) if step == 1 else np.zeros(2)
    batches = loader.iterate()
    next(batches)
    try:
        with pytest.raises(DatasetError, match=r"images\.npy could not be read for 1 seconds"):
            next(batches)
    finally:
        gate.set()


def test_a_slow_source_is_not_a_dead_one(pictures, monkeypatch, tmp_path):
    """Longer than the limit in all, each file within it."""
    monkeypatch.setenv("SPREAD_JAX_READ_TIMEOUT", "1")
    monkeypatch.setattr(files.os, "cpu_count", lambda: 1)
    decode = files.decode_image

    def slowly(*arguments):
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr(files, "decode_image", slowly)
    began = time.monotonic()
    assert len(open_dataset(pictures, image_size=8, cache_dir=tmp_path / "cache")) > 4
    assert time.monotonic() - began > 1


def test_a_pipe_is_no_data_set(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="pipe is neither a file nor a folder"):
        open_dataset(tmp_path / "pipe")
    monkeypatch.setenv("SPREAD_JAX_READ_TIMEOUT", "soon")
    with pytest.raises(DatasetError, match="SPREAD_JAX_READ_TIMEOUT is 'soon'"):
        open_dataset("faces")
