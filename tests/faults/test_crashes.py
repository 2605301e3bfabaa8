"""Whatever ends a run, nothing committed is lost, nothing wrong is restored, and the end is that of an unbroken run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from spread_jax.training import Checkpointer, checkpoint

KILLS = int(os.environ.get("SPREAD_JAX_KILLS", "5"))
MOMENTS = ("at random", "decoding the cache", "writing", "sealing", "deleting")


def kill_at(runs, pid, moment, chance, seconds):
    """Sends SIGKILL a few milliseconds into a stage, or anywhere in the run."""
    if moment == "at random":
        time.sleep(chance.uniform(0, 1.1 * seconds))
    else:
        stage = runs.child.STAGES.index(moment)
        first = 0 if moment == "decoding the cache" else chance.randint(1, runs.child.STEPS - 1)
        runs.wait_for(lambda main, save, sealed, _: stage in (main, save) and sealed >= first - 1)
        time.sleep(chance.random() * 0.004)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def test_killed_at_random_moments_runs_end_as_if_unbroken(runs, unbroken, assert_unbroken, tally, chance, tmp_path):
    for number in range(KILLS):
        moment = MOMENTS[number % len(MOMENTS)]
        workdir = tmp_path / f"run-{number}"
        options = {"cache": str(tmp_path / f"cache-{number}")} if moment == "decoding the cache" else {}
        sealed, killed, wanted = -1, 0, chance.choice([1, 1, 2])
        while killed < wanted:
            kill_at(runs, runs.start(workdir, **options), moment, chance, unbroken[1])
            if runs.wait() == -signal.SIGKILL:
                killed += 1
                tally.kills[runs.stage()] += 1
                sealed = max(sealed, runs.marks.read()[2])
            elif killed:
                break  # the resumed run ended before its second kill
            else:
                shutil.rmtree(workdir)  # it ended before the kill: another
        tally.kill_runs.append(False)
        assert runs.run(workdir, **options) == 0, runs.said()
        assert "WARNING" not in runs.said()  # a crash is no damage
        assert runs.marks.read()[3] >= sealed  # what was sealed is not lost
        assert_unbroken(workdir)
        tally.kill_runs[-1] = True
        shutil.rmtree(workdir)


@pytest.mark.parametrize(
    ("stage", "newest"), [("cache", 0), ("commit", 2), ("seal", 2), ("rename", 2), ("deletion", 4)]
)
def test_killed_at_the_worst_moment_of_each_stage(stage, newest, runs, assert_unbroken, tally, tmp_path):
    """Between two system calls, where a kill from outside seldom hits."""
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    own = {"cache": str(cache)} if stage == "cache" else {}

    def check():
        assert runs.run(workdir, die_at=stage, die_step=3, **own) == -signal.SIGKILL, runs.said()
        if stage == "cache":
            assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".building"]
        elif stage != "commit":
            assert any("." in p.name for p in (workdir / "checkpoints").iterdir())
        assert runs.run(workdir, **own) == 0, runs.said()
        assert runs.marks.read()[3] == newest
        assert runs.said() == ""
        assert_unbroken(workdir)
        if stage == "cache":
            assert [p.suffix for p in cache.iterdir() if p.is_dir()] != [".building"]
        else:  # the next save clears away what the crash left
            assert all(p.name.isdecimal() for p in (workdir / "checkpoints").iterdir())

    tally(f"killed at the worst moment: {stage}", check)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_a_run_saves_within_its_grace(number, runs, assert_unbroken, tally, tmp_path):
    """Preemption: a signal, and ten seconds later the end."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    workdir = tmp_path / "run"

    def check():
        pid = runs.start(workdir, save_every=100, pause=0.5)
        assert runs.wait_for(lambda *_: (workdir / "metrics.jsonl").exists())
        os.kill(pid, number)
        began = time.monotonic()
        assert runs.wait() == 128 + number, runs.said()
        seconds = time.monotonic() - began
        assert seconds < 10
        tally.measured[f"seconds from {number.name} to the end, state saved"] = seconds
        assert runs.run(workdir) == 0, runs.said()
        assert 1 <= runs.marks.read()[3] < runs.child.STEPS
        assert_unbroken(workdir, same_steps=False)  # it saved others

    tally(f"{number.name} with a grace of 10 s", check)


def test_a_loss_that_is_not_a_number_is_never_saved(runs, assert_unbroken, tally, chance, tmp_path):
    """Injected at some step, as a fault of the machine would be; the resumed run does not meet it."""
    workdir, bad = tmp_path / "run", chance.randint(2, 7)

    def check():
        assert runs.run(workdir, nan_at=bad) == 1
        assert f"Step {bad} gave a value that is not finite" in runs.said()
        assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == bad - 1
        assert runs.run(workdir) == 0, runs.said()
        assert runs.marks.read()[3] == bad - 1
        assert_unbroken(workdir)

    tally("NaN injected", check)


@pytest.mark.parametrize("clock", ["backwards", "forward"])
def test_a_clock_that_jumps_changes_nothing(clock, runs, assert_unbroken, tally, tmp_path):
    workdir = tmp_path / "run"

    def check():
        assert runs.run(workdir, clock=clock, die_at="seal", die_step=4) == -signal.SIGKILL
        assert runs.run(workdir, clock=clock) == 0, runs.said()
        assert_unbroken(workdir)

    tally(f"clock going {clock}", check)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(runs, assert_unbroken, tally, small_disk):
    workdir, ballast = small_disk / "run", small_disk / "ballast"

    def check():
        ballast.write_bytes(bytes(4 * 2**20 - 200_000))
        assert runs.run(workdir) == 1, runs.said()
        assert "disk is full" in runs.said() or "No space left" in runs.said()
        ballast.unlink()
        assert runs.run(workdir) == 0, runs.said()
        assert_unbroken(workdir)

    tally("full disk", check)


# --- damage ---


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "one bit flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
}


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_checkpoints_or_metrics_that_are_gone_are_told_of(runs, unbroken, assert_unbroken, tally, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    (workdir / "results.json").unlink()
    metrics = (workdir / "metrics.jsonl").read_bytes()
    shutil.move(workdir / "checkpoints", tmp_path / "checkpoints")

    def check_checkpoints():
        assert runs.run(workdir) == 1
        assert "holds no checkpoint, and this run has saved some" in runs.said()
        assert (workdir / "metrics.jsonl").read_bytes() == metrics
        shutil.move(tmp_path / "checkpoints", workdir / "checkpoints")
        assert runs.run(workdir) == 0, runs.said()
        assert_unbroken(workdir)

    def check_metrics():
        (workdir / "metrics.jsonl").write_bytes(b"".join(metrics.splitlines(keepends=True)[:3]))
        assert runs.run(workdir) == 0, runs.said()
        assert f"ends at step 3: the records from there to step {runs.child.STEPS} are lost" in runs.said()

    tally("checkpoints gone", check_checkpoints)
    tally("metrics cut short", check_metrics)


def test_one_bit_of_the_cached_pixels_is_found(runs, assert_unbroken, tally, tmp_path):
    """Under the same fingerprint it would train on wrong pixels."""
    workdir, own = tmp_path / "run", {"cache": str(tmp_path / "cache")}

    def check():
        assert runs.run(workdir, die_at="seal", die_step=4, **own) == -signal.SIGKILL
        (images,) = (tmp_path / "cache").glob("*/images.npy")
        flip(images)
        assert runs.run(workdir, **own) == 0, runs.said()
        assert "is damaged: decoding it again" in runs.said()
        assert_unbroken(workdir)

    tally("one bit of the cached pixels flipped", check)


def check_damaged(runs, unbroken, assert_unbroken, workdir, damage, newest):
    """A copy of the unbroken run is damaged; resumed, it says so and ends the same."""
    shutil.copytree(unbroken[0], workdir)
    (workdir / "results.json").unlink()
    damage(workdir / "checkpoints" / newest)
    assert runs.run(workdir) == 0, runs.said()
    assert f"It is set aside as {newest}.unsound" in runs.said()
    assert runs.marks.read()[3] < int(newest)
    assert_unbroken(workdir)
    shutil.rmtree(workdir)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_costs_one_step(how, runs, unbroken, assert_unbroken, tally, chaos, chance, tmp_path):
    """One file in the short form, each in the long one; tests/training damages each at the level of `restore`."""
    newest = str(runs.child.STEPS)
    files = files_of(unbroken[0] / "checkpoints" / newest)
    assert len(files) > 5
    for file in files if chaos else [chance.choice(files)]:
        hurt = lambda step, file=file: DAMAGE[how](step / file)
        tally(
            f"a checkpoint's file {how}", check_damaged, runs, unbroken, assert_unbroken, tmp_path / "run", hurt, newest
        )


def test_files_of_another_configuration_are_refused(runs, unbroken, assert_unbroken, tally, chaos, chance, tmp_path):
    """Its files, its whole step, its folder's settings."""
    newest, other = str(runs.child.STEPS), tmp_path / "other"
    assert runs.run(other, width=4) == 0, runs.said()
    theirs = other / "checkpoints" / newest
    same_names = [f for f in files_of(unbroken[0] / "checkpoints" / newest) if (theirs / f).is_file()
                  and (theirs / f).read_bytes() != (unbroken[0] / "checkpoints" / newest / f).read_bytes()]  # fmt: skip
    assert len(same_names) >= 2
    for file in same_names if chaos else [chance.choice(same_names)]:
        swap = lambda step, file=file: shutil.copy(theirs / file, step / file)
        tally("a file of another configuration's checkpoint", check_damaged, runs, unbroken, assert_unbroken,
              tmp_path / "run", swap, newest)  # fmt: skip

    workdir = tmp_path / "mixed"

    def check():
        shutil.copytree(unbroken[0], workdir)
        (workdir / "results.json").unlink()
        mine = workdir / "checkpoints" / newest
        shutil.move(mine, tmp_path / "mine")
        shutil.copytree(theirs, mine)
        assert runs.run(workdir) == 1
        assert "was saved by a run with other settings" in runs.said()
        assert files_of(mine) == files_of(theirs)  # nothing is done to it
        shutil.rmtree(mine)
        shutil.move(tmp_path / "mine", mine)
        assert runs.run(workdir) == 0, runs.said()
        assert_unbroken(workdir)

    tally("a whole checkpoint of another run", check)

    def check_settings():
        shutil.copy(other / "config.json", workdir / "config.json")
        assert runs.run(workdir) == 1
        assert "width: saved 4, now 3" in runs.said()

    tally("settings of another run", check_settings)


def test_seconds_of_sealing_per_gigabyte(chaos, tally, monkeypatch, tmp_path):
    """A state of a gigabyte, in the long form."""
    if not chaos:
        pytest.skip("part of `make chaos`")
    random = np.random.default_rng(0)
    state = {str(i): random.integers(0, 256, 2**27, np.uint8).view(np.float32) for i in range(8)}
    spent, write_seal = [], checkpoint.write_seal

    def timed(*arguments):
        began, busy = time.monotonic(), time.thread_time()
        write_seal(*arguments)
        spent.extend([time.monotonic() - began, time.thread_time() - busy])

    monkeypatch.setattr(checkpoint, "write_seal", timed)
    with Checkpointer(tmp_path) as checkpointer:
        began = time.monotonic()
        checkpointer.save(1, state)
        checkpointer.wait()
        tally.measured["seconds to save 1 GiB, sealing included"] = time.monotonic() - began
        tally.measured["of these, seconds of sealing per GiB"] = spent[0]
        tally.measured["of these, seconds of processor"] = spent[1]
        began = time.monotonic()
        assert checkpointer.sound_steps() == [1]
        tally.measured["seconds to verify 1 GiB"] = time.monotonic() - began
        found = checkpointer.restore(state).state
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)
