"""The run folder of a stranger, with something odd in the place of each file: nothing outside of it is touched."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat

import numpy as np
import pytest

from spread_jax.cli import runs
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_image, write_report
from spread_jax.models import open_run
from spread_jax.training import Checkpointer, CheckpointError, RunDirectory, RunDirectoryError, read_run

STATE = {"w": np.arange(6.0)}
PLACES = (
    ".lock",
    ".checkpointed",
    "config.json",
    "metrics.jsonl",
    "results.json",
    "figures.json",
    "table.md",
    "report.html",
    "samples.png",
    "samples",
    "samples/step_1.png",
    "tensorboard",
    "checkpoints",
    "checkpoints/2",
    "checkpoints/2/SEAL.json",
    "checkpoints/2/_METADATA",
    "checkpoints/3.unsealed",
    "checkpoints/1.deleting",
    "nested/run/config.json",
)
KINDS = ("link to a file", "link to a folder", "link to nothing", "hard link to a file", "pipe", "socket", "device")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all that a folder may hold."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with RunDirectory.open(folder, {"seed": 0}, tensorboard=False) as run, run.checkpointer() as checkpointer:
        run.log_metrics(1, {"loss": 0.5})
        for step in (1, 2):
            checkpointer.save(step, STATE)
        (folder / "samples").mkdir()
        for path in (
            run.save_figure_path("samples", caption="Samples."),
            *(folder / "samples" / f"step_{n}.png" for n in (1, 2)),
        ):
            save_image(np.zeros((4, 4, 3), np.uint8), path)
        run.write_file("table.md", "| a | b |\n|---|---|\n| 1 | 2 |\n")
        run.write_results({"steps": 2})
    return folder


def plant(path, kind, outside):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    elif kind == "hard link to a file":
        os.link(outside / "profile", path)
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero, which never ends
        except PermissionError:
            pytest.skip("making a device is not permitted here")
    else:
        names = {"link to a file": "profile", "link to a folder": "steps", "link to nothing": "new"}
        path.symlink_to(outside / names[kind])


def everything_in(folder):
    """Name, kind, time and content of all there is."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else ""
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns, digest(path)) for path in folder.rglob("*")}


def resume(folder):
    with RunDirectory.open(folder, {"seed": 0}) as run, run.checkpointer(log=lambda _: None) as checkpointer:
        checkpointer.restore(STATE)
        run.truncate_metrics(0)
        run.log_metrics(3, {"loss": 0.1})
        checkpointer.save(3, STATE)
        save_image(np.zeros((4, 4, 3), np.uint8), run.save_figure_path("samples", caption="Again."))
        run.write_results({"steps": 3})


def evaluate(folder):
    with RunDirectory.reopen(folder) as run, run.checkpointer(log=lambda _: None) as checkpointer:
        checkpointer.restore(STATE)
        run.update_results({"evaluation": {"distance": 1.0}})
        write_report(run.path)


def sample(folder):
    with read_run(folder).checkpointer(log=lambda _: None) as checkpointer:
        checkpointer.restore(STATE)


def list_and_open(folder):
    assert [row[0] for row in runs.find(folder.parent) if row[0] == "run"] in ([], ["run"])
    with contextlib.suppress(UsageError):  # it trains no generator
        open_run(folder)


def restore_alone(folder):
    with Checkpointer(folder / "checkpoints", log=lambda _: None) as checkpointer:
        checkpointer.restore(STATE)
        checkpointer.save(3, STATE)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_of_a_hostile_run_folder_is_touched(kind, finished, tally, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # most of the time, and nothing to do with it
    outside = tmp_path / "outside"
    shutil.copytree(finished / "checkpoints", outside / "steps")
    (outside / "profile").write_text('{"step": 3}\nof the user')  # whole records would be cut off
    before = everything_in(outside)

    def check(place, use):
        shutil.copytree(finished, tmp_path / "run", symlinks=True)
        plant(tmp_path / "run" / place, kind, outside)
        try:
            signal.alarm(30)  # a pipe would be waited for, and a device read, for ever
            with contextlib.suppress(RunDirectoryError, CheckpointError):
                use(tmp_path / "run")
            assert everything_in(outside) == before, (place, use)
        finally:
            signal.alarm(0)
            shutil.rmtree(tmp_path / "run")

    for place in PLACES:
        # The folder that a checkpointer is given is its caller's own choice.
        own = (restore_alone,) if place.startswith("checkpoints/") else (write_report,)
        for use in (resume, evaluate, sample, list_and_open, *own):
            with contextlib.suppress(FileNotFoundError) if place == "config.json" else contextlib.nullcontext():
                tally(f"hostile run folder: {kind}", check, place, use)
