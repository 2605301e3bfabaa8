"""The cache is built once, whole or not at all, and notices when its source changes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spread_jax.data import DatasetError, open_dataset


class Recorder:
    """A progress callback that keeps what it was told."""

    def __init__(self):
        self.calls: list[tuple] = []

    def __call__(self, *call):
        self.calls.append(call)

    @property
    def messages(self) -> list[str]:
        return [message for message, _, _ in self.calls if message is not None]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def open_train(folder: Path, **arguments):
    recorder = Recorder()
    return open_dataset(folder, progress=recorder, **{"image_size": 8, **arguments}), recorder


def test_decoded_once_and_mapped_read_only(photos, own_cache):
    first, built = open_train(photos)
    assert built.calls[-1] == (None, len(first), len(first))
    second, reused = open_train(photos)
    assert not reused.calls
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    assert np.array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint
    assert len(entries(own_cache)) == 1
    other, rebuilt = open_train(photos, image_size=4)
    assert rebuilt.calls
    assert other.image_shape == (4, 4, 3)
    assert other.fingerprint != first.fingerprint


def test_fewer_examples_are_taken_from_a_full_cache_or_decoded_alone(photos, own_cache):
    few, _ = open_train(photos, max_examples=3)
    full, _ = open_train(photos)
    again, recorder = open_train(photos, max_examples=2)
    assert len(few) == 3
    assert len(again) == 2
    assert not recorder.calls
    assert np.array_equal(full.images[:3], few.images)
    assert np.array_equal(full.images[:2], again.images)
    assert open_train(photos, max_examples=10**6)[0].fingerprint == full.fingerprint


def test_a_changed_source_is_decoded_again_with_one_line(photos, own_cache, picture):
    first, _ = open_train(photos)
    before = entries(own_cache)
    name = next(path for path in sorted(photos.iterdir()))
    name.write_bytes(picture(99))
    second, recorder = open_train(photos)
    assert len(recorder.messages) == 1
    assert "has changed" in recorder.messages[0]
    assert first.fingerprint != second.fingerprint
    assert not np.array_equal(first.images[0], second.images[0])
    assert len(entries(own_cache)) == 1
    assert entries(own_cache) != before


@pytest.mark.parametrize("damage", ["cut", "longer", "meta", "fingerprint", "shape", "missing"])
def test_a_damaged_entry_is_noticed(photos, own_cache, damage):
    first, _ = open_train(photos)
    expected = np.array(first.images)
    entry = own_cache / entries(own_cache)[0]
    if damage == "cut":
        with open(entry / "images.npy", "r+b") as file:
            file.truncate(500)
    elif damage == "longer":
        with open(entry / "images.npy", "ab") as file:
            file.write(b"more")
    elif damage == "fingerprint":
        text = (entry / "meta.json").read_text()
        (entry / "meta.json").write_text(text.replace('"fingerprint": "', '"fingerprint": "0'))
    elif damage == "meta":
        (entry / "meta.json").write_text("{")
    elif damage == "shape":
        data = (entry / "images.npy").read_bytes()
        (entry / "images.npy").write_bytes(data.replace(b"8, 8, 3", b"8, 4, 6"))
    else:
        (entry / "images.npy").unlink()
    second, recorder = open_train(photos)
    assert "damaged" in recorder.messages[0]
    assert np.array_equal(second.images, expected)


OPEN = """
import os, sys, time
from spread_jax.data import open_dataset
def progress(message, done, total):
    {body}
    print(message or done, flush=True)
d = open_dataset(sys.argv[1], image_size=8, progress=progress)
print("sum", int(d.images.sum()))
"""


def start(folder: Path, body: str) -> subprocess.Popen:
    script = OPEN.format(body=body)
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_matters(photos, own_cache):
    process = start(photos, "time.sleep(0) if not done else os.kill(os.getpid(), 9)")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert [name.endswith(".building") for name in entries(own_cache)] == [True]
    dataset, _ = open_train(photos)
    assert [name.endswith(".building") for name in entries(own_cache)] == [False]
    assert dataset.images.any()


def test_left_overs_of_other_dead_builds_are_removed_and_live_ones_kept(photos, own_cache):
    import fcntl

    own_cache.mkdir()
    for name in ("dead.x", "alive"):
        (own_cache / f"{name}.building").mkdir()
        (own_cache / f"{name}.building" / "images.npy").write_bytes(b"half")
    with open(own_cache / "alive.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_train(photos)
    left = [name for name in entries(own_cache) if name.endswith(".building")]
    assert left == ["alive.building"]


def test_two_processes_build_it_once(photos, own_cache, tmp_path):
    go = tmp_path / "go"
    first = start(photos, f"while done and not os.path.exists({str(go)!r}): time.sleep(0.01)")
    assert first.stdout.readline() == "0\n"  # It holds the lock from here on.
    second = start(photos, "pass")
    assert "waiting for another process" in second.stdout.readline()
    go.touch()
    outputs = [process.communicate(timeout=30)[0].split() for process in (first, second)]
    assert outputs[0][-2:] == outputs[1]
    assert outputs[1][0] == "sum"
    assert len(entries(own_cache)) == 1


def test_a_failed_build_leaves_nothing(photos, own_cache):
    (photos / "0.png").write_bytes(b"not a picture")
    (photos / "1.png").write_bytes(b"not a picture")
    (photos / "2.png").write_bytes(b"not a picture")
    with pytest.raises(DatasetError, match=r"\d\.png cannot be decoded"):
        open_train(photos)
    assert entries(own_cache) == []


def test_a_full_disk_names_the_folder_the_bytes_and_the_way_out(photos, own_cache):
    """A limit on the size of files makes write() fail halfway, as a full disk does."""
    script = (
        "import resource, sys; from spread_jax.data import open_dataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "open_dataset(sys.argv[1], image_size=64)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(photos)], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    size = 64 * 64 * 3
    assert "DatasetError" in last
    assert str(own_cache) in last
    assert any(f"{n * size:,} bytes" in last for n in range(5, 10))
    assert "cache_dir" in last
    assert "SPREAD_JAX_CACHE" in last
    assert entries(own_cache) == []


def test_too_little_space_is_seen_before_decoding(photos, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(DatasetError, match="1 bytes are free"):
        open_train(photos)


def test_a_cache_folder_that_cannot_be_made(photos, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(DatasetError, match="SPREAD_JAX_CACHE"):
            open_train(photos, cache_dir=tmp_path / folder)


def test_a_valid_cache_needs_no_write_permission(photos, own_cache):
    open_train(photos)
    for lock in own_cache.glob("*.lock"):
        lock.unlink()
    stamp = own_cache.stat().st_mtime_ns
    time.sleep(0.01)
    open_train(photos)
    assert own_cache.stat().st_mtime_ns == stamp
    assert not list(own_cache.glob("*.lock"))
