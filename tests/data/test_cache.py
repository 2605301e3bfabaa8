"""The cache is built once, whole or not at all, and notices when its source changes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spread_jax.data import DatasetError, cache, open_dataset


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


@pytest.mark.parametrize(
    "what", ["one bit", "labels", "cut", "longer", "meta", "fingerprint", "shape", "missing", "link"]
)
def test_a_damaged_entry_is_noticed(own_cache, what, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_verified", set())  # as in a new process
    open_digits = lambda recorder: open_dataset("digits", "test", max_examples=8, progress=recorder)
    expected = open_digits(Recorder())
    images, labels = np.array(expected.images), np.array(expected.labels)
    entry = own_cache / entries(own_cache)[0]
    path = entry / "images.npy"
    data = path.read_bytes()
    if what == "one bit":
        path.write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    elif what == "labels":
        found = (entry / "labels.npy").read_bytes()
        (entry / "labels.npy").write_bytes(found[:-8] + bytes([found[-8] ^ 1]) + found[-7:])
    elif what == "cut":
        path.write_bytes(data[:500])
    elif what == "longer":
        path.write_bytes(data + b"more")
    elif what == "fingerprint":
        text = (entry / "meta.json").read_text()
        (entry / "meta.json").write_text(text.replace('"fingerprint": "', '"fingerprint": "0'))
    elif what == "meta":
        (entry / "meta.json").write_text("{")
    elif what == "shape":
        path.write_bytes(data.replace(b"28, 28, 1", b"28, 14, 2"))
    elif what == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
    monkeypatch.setattr(cache, "_verified", set())
    recorder = Recorder()
    second = open_digits(recorder)
    assert "damaged" in recorder.messages[0]
    assert np.array_equal(second.images, images)
    assert np.array_equal(second.labels, labels)
    if what == "link":
        assert (tmp_path / "elsewhere").read_bytes() == data


def test_a_cache_that_cannot_be_read_at_the_moment_is_left_alone(own_cache, monkeypatch):
    expected = open_dataset("digits", "test", max_examples=8)
    before = entries(own_cache)

    def away(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", away)
        with pytest.raises(DatasetError, match=r"The cache .* cannot be read \(Stale file handle\): repeat"):
            open_dataset("digits", "test", max_examples=8)
    recorder = Recorder()
    assert np.array_equal(open_dataset("digits", "test", max_examples=8, progress=recorder).images, expected.images)
    assert not recorder.calls
    assert entries(own_cache) == before


def test_pixels_are_hashed_once_in_a_process(own_cache, monkeypatch):
    monkeypatch.setattr(cache, "_verified", set())
    hashed, digest_of = [], cache._digest_of
    monkeypatch.setattr(cache, "_digest_of", lambda array: hashed.append(array.shape) or digest_of(array))
    for _ in range(3):
        open_dataset("digits", "test", max_examples=8)
    assert hashed.count((8, 28, 28, 1)) == 1


def test_other_pixels_of_the_same_size_and_time_are_noticed(photos, picture):
    """As `cp -p` and archives restore them: nothing but the time of the change of the file itself tells."""
    file = photos / "all.bmp"
    file.write_bytes(picture(50, kind="BMP"))
    status = file.stat()
    (first, _), other = open_train(photos), picture(51, kind="BMP")
    file.write_bytes(other)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    second, recorder = open_train(photos)
    assert "has changed" in recorder.messages[0]
    assert first.fingerprint != second.fingerprint


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


def test_only_what_the_cache_itself_has_left_is_removed(photos, own_cache, tmp_path):
    """Left overs of dead builds go; those of live ones stay, and so does whatever of the user's is named like them."""
    import fcntl

    stem = "x-train-0123456789"
    kept = {
        "mine.building": "thesis.tex",  # a folder of the user's
        f"{stem}.{'1' * 16}.building": "thesis.tex",  # named exactly so, and with other things in it
        f"alive-test-0123456789-first3.{'2' * 16}.building": "images.npy",
        f"y-train-0123456789.{'3' * 16}.building": "images.npy",  # nobody holds, or held, its lock
    }
    gone = {f"{stem}.{'4' * 16}.building": "images.npy", f"{stem}.{'5' * 16}.building": "meta.json"}
    for name, file in {**kept, **gone}.items():
        (own_cache / name).mkdir(parents=True)
        (own_cache / name / file).write_bytes(b"half")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "images.npy").write_bytes(b"of the user")
    link = own_cache / f"{stem}.{'6' * 16}.building"
    link.symlink_to(tmp_path / "outside")
    (own_cache / f"{stem}.lock").touch()
    with open(own_cache / "alive-test-0123456789-first3.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_train(photos)
    assert [name for name in entries(own_cache) if name.endswith(".building")] == sorted([*kept, link.name])
    assert (tmp_path / "outside" / "images.npy").read_bytes() == b"of the user"


def test_a_folder_of_the_users_in_the_place_of_an_entry_is_left_alone(photos, own_cache):
    open_train(photos)
    entry = own_cache / entries(own_cache)[0]
    (entry / "meta.json").unlink()
    (entry / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match="holds other things than decoded images"):
        open_train(photos)
    assert (entry / "thesis.tex").read_text() == "years of work"
    assert len(entries(own_cache)) == 1


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


def test_the_first_so_many_examples_keep_their_labels(tmp_path):
    few, every = (
        open_dataset("digits", "test", max_examples=most, cache_dir=str(tmp_path), progress=lambda *_: None)
        for most in (7, None)
    )
    np.testing.assert_array_equal(few.labels, every.labels[:7])
    np.testing.assert_array_equal(few.images, every.images[:7])
    assert len(set(few.labels.tolist())) > 1
