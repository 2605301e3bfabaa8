"""A run's folder: one process at a time, one configuration, every line of metrics whole."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spread_jax.training import Checkpointer, CheckpointError, RunDirectory, RunDirectoryError, read_run

CONFIG = {"seed": 0, "model": {"width": 64, "scales": (0.5, 1.0)}, "steps": 100}


def open_run(path, config=CONFIG, **options):
    options = {"tensorboard": False, "resumable_keys": ["steps"], **options}
    return RunDirectory.open(path, config, **options)


def steps_of(run):
    return [record["step"] for record in run.read_metrics()]


# --- the configuration ---


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    path = tmp_path / "runs" / "ica" / "small-0"
    with open_run(path) as run:
        assert run.path == path
        assert run.checkpoints_path == path / "checkpoints"
        assert not run.finished
        assert run.results is None
    text = (path / "config.json").read_text()
    assert json.loads(text)["model"] == {"scales": [0.5, 1.0], "width": 64}
    assert text.index('"model"') < text.index('"seed"') < text.index('"steps"')
    assert text.count("\n") > 5
    with open_run(path) as run:  # a tuple is a list once it is JSON, and still the same
        assert run.config == json.loads(text)


def test_a_dataclass_is_a_configuration(tmp_path):
    class Kind(enum.Enum):
        LAPLACE = 1

    @dataclasses.dataclass(frozen=True)
    class Noise:
        kind: Kind = Kind.LAPLACE
        scale: float = float("inf")

    @dataclasses.dataclass(frozen=True)
    class Config:
        noise: Noise = dataclasses.field(default_factory=Noise)
        folder: Path = Path("/data")
        widths: tuple[int, ...] = (1, 2)
        count: object = np.int64(3)

    for _ in range(2):
        with open_run(tmp_path, Config()) as run:
            assert run.config == {
                "noise": {"kind": "LAPLACE", "scale": "inf"},
                "folder": "/data",
                "widths": [1, 2],
                "count": 3,
            }


def test_another_configuration_is_refused_by_key(tmp_path):
    with open_run(tmp_path):
        pass
    other = {"seed": 0, "model": {"width": 128, "scales": (0.5, 1.0)}, "steps": 200, "new": None}
    with pytest.raises(RunDirectoryError) as caught:
        open_run(tmp_path, other)
    message = str(caught.value)
    assert "\n  model.width: saved 64, now 128\n" in message
    assert "\n  new: not saved, now null\n" in message
    assert "steps" not in message
    assert "--workdir" in message
    with pytest.raises(RunDirectoryError, match=r"model\.scales: saved \[0\.5, 1\.0\], now absent"):
        open_run(tmp_path, {"seed": 0, "model": {"width": 64}, "steps": 100})
    with open_run(tmp_path):  # a refusal frees the lock and changes nothing
        assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 64


def test_resumable_keys_may_change_and_are_updated(tmp_path):
    with open_run(tmp_path, {"seed": 0, "log": {"every": 10, "bar": True}, "steps": 1}):
        pass
    changed = {"seed": 0, "log": {"every": 5, "bar": False}, "steps": 2}
    with open_run(tmp_path, changed, resumable_keys={"steps", "log"}) as run:
        assert run.config == changed
        assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_the_identity_is_that_of_what_cannot_change(tmp_path):
    same = [CONFIG, {**CONFIG, "steps": 7}, {**CONFIG, "seed": 0.0}]
    other = [{**CONFIG, "seed": 1}, {**CONFIG, "model": {"width": 64, "scales": (0.5, 2.0)}}, {**CONFIG, "more": None}]
    found = []
    for number, config in enumerate((*same, *other)):
        with open_run(tmp_path / str(number), config) as run:
            found.append(run.identity)
    assert len(set(found[:3])) == 1
    assert len(set(found)) == 1 + len(other)


def test_places_on_this_machine_are_neither_kept_nor_believed(tmp_path):
    """A stranger's `cache_dir` was written to, and cleaned."""
    keys = {"local_keys": ["cache_dir", "data.folder"]}
    config = {"seed": 0, "cache_dir": "/home/me", "data": {"folder": "/home/me/photos", "size": 8}}
    for moved in (config, {**config, "cache_dir": None}):
        with open_run(tmp_path, moved, **keys) as run:
            assert run.config == {"seed": 0, "data": {"size": 8}}
    assert json.loads((tmp_path / "config.json").read_text()) == run.config
    hostile = {**run.config, "cache_dir": "/etc", "data": {"folder": "/root", "size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(hostile))
    with RunDirectory.reopen(tmp_path, **keys) as reopened:
        assert reopened.config == run.config
        assert read_run(tmp_path, **keys)[1:] == (run.config, None, None)  # while it is in use
    with open_run(tmp_path, config, **keys) as run:
        run.write_results({"steps": 3})
    assert read_run(tmp_path, **keys).results == {"steps": 3}


def test_checkpoints_of_another_run_are_refused_after_training_too(tmp_path):
    """Of the same shapes: only the seed differs."""
    state = {"w": np.arange(3.0)}
    for seed in (0, 1):
        config = {"seed": seed, "steps": 3}
        with open_run(tmp_path / str(seed), config) as run, run.checkpointer() as checkpointer:
            checkpointer.save(1, state)
        assert read_run(tmp_path / str(seed)).identity == run.identity
        with read_run(tmp_path / str(seed)).checkpointer() as checkpointer:
            assert checkpointer.restore(state).step == 1
    shutil.rmtree(tmp_path / "0" / "checkpoints")
    shutil.copytree(tmp_path / "1" / "checkpoints", tmp_path / "0" / "checkpoints")
    with RunDirectory.reopen(tmp_path / "0") as run:
        for opened in (run.checkpointer(), read_run(tmp_path / "0").checkpointer()):
            with opened, pytest.raises(CheckpointError, match="saved by a run with other settings"):
                opened.restore(state)


def test_checkpoints_that_are_gone_do_not_cut_the_metrics(tmp_path):
    with open_run(tmp_path) as run, run.checkpointer() as checkpointer:
        run.log_metrics(400, {"a": 1.0})
        checkpointer.save(400, {"w": np.ones(2)})
    shutil.rmtree(tmp_path / "checkpoints")
    with (
        open_run(tmp_path) as run,
        run.checkpointer() as checkpointer,
        pytest.raises(CheckpointError, match="holds no checkpoint, and this run has saved some"),
    ):
        checkpointer.restore({"w": np.ones(2)})


@pytest.mark.parametrize("text", ["", '{"seed": 0,', "[1]", "\0\0\0"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"config\.json is damaged .*--workdir"):
        open_run(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_what_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"config\.a\.b\[1\] is a function"):
        open_run(tmp_path, {"a": {"b": [1, lambda: None]}})
    with pytest.raises(TypeError, match="config is a list"):
        open_run(tmp_path, [1])


# --- the folder ---


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match=r"no config\.json and holds thesis\.tex"):
        open_run(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_crash_while_the_folder_was_made_leaves_a_new_folder(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    (tmp_path / ".spread_jax-0123456789abcdef.part").write_text('{"se')
    with open_run(tmp_path) as run:
        assert run.read_metrics() == []
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunDirectoryError, match=r"a file\. Give another --workdir"):
            open_run(path)


def test_names_that_no_folder_of_a_run_can_have(tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"\xff\xfe")
    with pytest.raises(RunDirectoryError, match="is no UTF-8, which checkpoints need"):
        open_run(odd)
    with pytest.raises(CheckpointError, match="is no name in UTF-8"):
        Checkpointer(odd)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(RunDirectoryError, match="~/run cannot be a run's folder: Could not determine home directory"):
        open_run("~/run")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 64 kilobytes, and a way to make it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(disk):
    with open_run(disk / "run") as run:
        run.log_metrics(0, {"a": 1.0})
        wide = {f"metric_{i}": i / 7 for i in range(100)}

        def log_until_full():
            for step in range(1, 100):
                run.log_metrics(step, wide)

        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl .*No space left.*Make room"):
            log_until_full()
        steps = steps_of(run)
        assert 10 < len(steps) < 99
        assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")
        with pytest.raises(RunDirectoryError, match=r"results\.json .*No space left"):
            run.write_results({"a": list(range(10_000))})
        assert not run.finished
        run.truncate_metrics(5)
        run.log_metrics(6, {"a": 2.0})  # goes on once there is room
        assert steps_of(run) == [0, 1, 2, 3, 4, 5, 6]


def test_a_read_only_disk_is_one_sentence(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RunDirectoryError, match="Read-only file system"):
        open_run(disk / "run")


@pytest.mark.parametrize("name", ["config.json", "results.json", "samples", "nested/run/link", ".lock"])
def test_links_and_pipes_in_a_run_folder_are_refused(tmp_path, name):
    """By name; tests/faults/test_hostile_run.py has every place and kind."""
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    for target in (tmp_path, None):
        path.unlink(missing_ok=True)
        path.symlink_to(target) if target else os.mkfifo(path)
        for use in (open_run, RunDirectory.reopen, read_run):
            with pytest.raises(RunDirectoryError, match=rf"{path.name} (is neither|cannot be read|is damaged)"):
                use(tmp_path / "run")


def test_what_a_run_writes_goes_through_no_link_that_is_planted_meanwhile(tmp_path):
    outside = tmp_path / "start-up file"
    outside.write_text("mine")
    with open_run(tmp_path / "run", tensorboard=True) as run:
        for name in ("results.json", "figures.json", "table.md", "metrics.jsonl", ".checkpointed", "tensorboard"):
            (run.path / name).symlink_to(outside)
        run.write_results({"a": 1})
        run.write_file("table.md", "| a |")
        run.save_figure_path("a", caption="what the stranger chose")
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl could not be written: it is a symbolic link"):
            run.log_metrics(1, {"a": 1.0})
        with run.checkpointer() as checkpointer:
            checkpointer.save(1, {"w": np.ones(2)})
    assert outside.read_text() == "mine"


# --- the lock ---

HOLDER = """
import sys, time
from spread_jax.training.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1], {"seed": 0})
run.log_metrics(1, {"a": 1.0})
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder_and_a_crash_frees_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "open\n"
        host = os.uname().nodename
        message = rf"in use by process {holder.pid} on {host} since .*--workdir"
        for _ in range(2):  # asking does not overwrite who holds it
            with pytest.raises(RunDirectoryError, match=message):
                open_run(tmp_path, {"seed": 0})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with open_run(tmp_path, {"seed": 0}) as run:
        assert steps_of(run) == [1]


def test_close_frees_the_lock_and_ends_writing(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} "):
        open_run(tmp_path)
    run.close()
    run.close()
    for write in (
        lambda: run.log_metrics(1, {"a": 1.0}),
        lambda: run.write_results({}),
        lambda: run.truncate_metrics(0),
    ):
        with pytest.raises(RunDirectoryError, match="is closed"):
            write()
    with open_run(tmp_path):
        pass


# --- metrics ---


def test_every_line_is_valid_json_and_every_number_comes_back(tmp_path):
    metrics = {"a": 0.1, "nan": float("nan"), "up": np.inf, "down": -np.inf, "np": np.float32(0.1)}
    with open_run(tmp_path) as run:
        run.log_metrics(np.int64(7), metrics)
        line = (tmp_path / "metrics.jsonl").read_text()  # in the file before anything is closed

        def refuse(constant):
            raise ValueError(constant)

        record = json.loads(line, parse_constant=refuse)
        assert list(record) == ["step", "time", *metrics]
        assert (record["nan"], record["up"], record["down"]) == ("nan", "inf", "-inf")
        (found,) = run.read_metrics()
    assert found["step"] == 7
    assert found["time"] > 1e9
    for name, value in metrics.items():
        np.testing.assert_equal(found[name], float(value))


@pytest.mark.parametrize("name", ["step", "time"])
def test_reserved_names(tmp_path, name):
    with open_run(tmp_path) as run, pytest.raises(ValueError, match=f"named '{name}'"):
        run.log_metrics(1, {name: 1.0})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), junk=st.binary(max_size=4).filter(lambda b: b"\n" not in b))
def test_a_torn_last_line_is_dropped_and_repaired(tmp_path, cut, junk):
    """Cut the file anywhere: what was whole stays, and the next record starts on its own line."""
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with open_run(tmp_path) as run:
        for step in range(6):
            run.log_metrics(step, {"loss": step / 3})
    data = path.read_bytes()[:cut] + junk
    path.write_bytes(data)
    whole = data.count(b"\n")
    with open_run(tmp_path) as run:
        assert steps_of(run) == list(range(whole))
        run.log_metrics(99, {"loss": 0.0})
        assert steps_of(run) == [*range(whole), 99]
    assert path.read_bytes().count(b"\n") == whole + 1


def test_a_torn_line_longer_than_a_block_is_repaired(tmp_path):
    with open_run(tmp_path) as run:
        run.log_metrics(1, {"a": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"x" * 200_000)
    with open_run(tmp_path) as run:
        run.log_metrics(2, {"a": 1.0})
        assert steps_of(run) == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    with open_run(tmp_path) as run:
        for step in range(3):
            run.log_metrics(step, {"a": 1.0})
        path = tmp_path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        for damage in (b"\xff\xfe\n", b"[1]\n", b'{"time": 1}\n', b"3\n"):
            path.write_bytes(lines[0] + damage + lines[2])
            with pytest.raises(RunDirectoryError, match=r"line 2 of .*metrics\.jsonl"):
                run.read_metrics()


def test_an_interrupted_run_leaves_the_file_of_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)

    def log(run, steps):
        for step in steps:
            run.log_metrics(step, {"loss": 1.0 / (1 + step), "bad": float("nan")})

    with open_run(tmp_path / "unbroken") as run:
        log(run, range(20))
    with open_run(tmp_path / "broken") as run:
        log(run, range(13))
    with open(tmp_path / "broken" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 13, "los')
    with open_run(tmp_path / "broken") as run:
        run.truncate_metrics(9)  # the checkpoint of step 9 was the newest
        log(run, range(10, 15))
        run.truncate_metrics(11)  # also with the file open
        log(run, range(12, 20))
    unbroken, broken = (tmp_path / name / "metrics.jsonl" for name in ("unbroken", "broken"))
    assert unbroken.read_bytes() == broken.read_bytes()
    with open_run(tmp_path / "broken") as run:
        run.truncate_metrics(-1)
        assert run.read_metrics() == []


@pytest.mark.parametrize(
    ("steps", "restored", "told"),
    [
        ([10, 20, 30], 100, "ends at step 30: the records from there to step 100 are lost"),
        ([10, 20, 30], 35, None),  # between two records
        ([10, 20, 30], 20, None),
        ([10], 15, None),  # how far apart they are is not known
        ([], 50, "holds no records up to step 50"),
        ([], 0, None),
    ],
)
def test_a_gap_in_the_metrics_is_told_of(tmp_path, steps, restored, told):
    said = []
    with open_run(tmp_path, log=said.append) as run:
        for step in steps:
            run.log_metrics(step, {"a": 1.0})
        run.truncate_metrics(restored)
    assert len(said) == (told is not None)
    assert told is None or told in said[0]


def test_the_last_step_is_read_without_the_rest(tmp_path):
    with open_run(tmp_path) as run:
        assert read_run(tmp_path).last_step is None
        for step in (1, 2):
            run.log_metrics(step, {f"metric_{n}": 1 / 3 for n in range(2000)})  # a line, not the file, fits the tail
    assert read_run(tmp_path).last_step == 2
    path = tmp_path / "metrics.jsonl"
    for text, step in (
        ('{"step": 7}\n{"st', 7),
        ('{"st', None),
        ('{"step": [1]}\n', None),
        ("[" * 50_000 + "\n", None),
    ):
        path.write_text(text)
        assert read_run(tmp_path).last_step == step


def test_truncating_records_out_of_order_keeps_the_earlier_steps(tmp_path):
    with open_run(tmp_path) as run:
        for step in (1, 5, 2, 6):
            run.log_metrics(step, {"a": 1.0})
        run.truncate_metrics(4)
        assert steps_of(run) == [1, 2]


# --- TensorBoard ---


def read_events(folder):
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_events_hold_the_metrics_and_a_resumed_run_purges(tmp_path):
    with open_run(tmp_path, tensorboard=True) as run:
        assert not (tmp_path / "tensorboard").exists()  # nothing is imported before it is needed
        for step in range(4):
            run.log_metrics(step, {"loss": step / 2, "nan": float("nan")})
    with open_run(tmp_path, tensorboard=True) as run:
        run.truncate_metrics(1)
        run.log_metrics(2, {"loss": 7.0})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # in the same second
    events = read_events(tmp_path / "tensorboard")
    losses = [
        (event.step, value.simple_value) for event in events for value in event.summary.value if value.tag == "loss"
    ]
    assert losses == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (2, 7.0)]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [2]


def test_without_tensorboardx_the_metrics_are_logged_and_it_is_said_once(tmp_path, monkeypatch):
    for name in ("tensorboardX", "tensorboardX.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    said = []
    with open_run(tmp_path, tensorboard=True, log=said.append) as run:
        run.log_metrics(1, {"a": 1.0})
        run.log_metrics(2, {"a": 1.0})
        assert steps_of(run) == [1, 2]
    assert said == ["tensorboardX is not installed: metrics go to metrics.jsonl alone."]


def test_events_that_cannot_be_written_end_events_alone(tmp_path):
    said = []
    with open_run(tmp_path, tensorboard=True, log=said.append) as run:
        (tmp_path / "tensorboard").write_text("a file in the way")
        run.log_metrics(1, {"a": 1.0})
        run.log_metrics(2, {"a": 1.0})
        assert steps_of(run) == [1, 2]
    assert len(said) == 1
    assert "metrics.jsonl continues" in said[0]


# --- a hook ---


def test_a_hook_gets_every_record_once_it_is_in_the_file(tmp_path):
    got = []

    def hook(step, metrics):
        got.append((step, dict(metrics), steps_of(run)))
        metrics.clear()  # its own copy

    with open_run(tmp_path, tensorboard=True, on_log=hook) as run:
        run.log_metrics(np.int64(1), {"loss": np.float32(0.5)})
        run.log_metrics(2, {"elbo": np.inf})
        records = run.read_metrics()
    assert got == [(1, {"loss": 0.5}, [1]), (2, {"elbo": np.inf}, [1, 2])]
    assert type(got[0][0]) is int
    assert type(got[0][1]["loss"]) is float
    assert [set(record) - {"step", "time"} for record in records] == [{"loss"}, {"elbo"}]
    tags = [value.tag for event in read_events(tmp_path / "tensorboard") for value in event.summary.value]
    assert tags == ["loss", "elbo"]
    with open_run(tmp_path) as run:  # and is nothing that a folder keeps
        run.log_metrics(3, {"elbo": 1.0})
    assert len(got) == 2


def test_a_hook_that_raises_is_told_of_once_and_the_run_goes_on(tmp_path):
    said, calls = [], []

    def hook(step, metrics):
        calls.append(step)
        if step == 2:
            raise ConnectionError("refused\nby the server " + "x" * 1000)

    with open_run(tmp_path, log=said.append, on_log=hook) as run:
        for step in (1, 2, 3, 4):
            run.log_metrics(step, {"loss": 1.0 / step})
        assert steps_of(run) == [1, 2, 3, 4]
    assert calls == [1, 2]
    assert len(said) == 1
    assert said[0].startswith(
        "on_log failed at step 2 and is not called again, metrics.jsonl continues: ConnectionError:"
    )
    assert "refused by the server" in said[0]
    assert len(said[0]) < 500

    def interrupted(step, metrics):  # not an error of the hook
        raise KeyboardInterrupt

    with open_run(tmp_path, log=said.append, on_log=interrupted) as run, pytest.raises(KeyboardInterrupt):
        run.log_metrics(5, {"loss": 0.2})
    assert len(said) == 1


# --- results and figures ---


def test_results_finish_a_run(tmp_path):
    results = {"bound": np.float32(-1.5), "nan": float("nan"), "steps": 3, "per_class": (1.0, 2.0)}
    with open_run(tmp_path) as run:
        run.write_results(results)
        assert run.finished
    with open_run(tmp_path) as run:
        assert run.finished
        assert run.results == {"bound": -1.5, "nan": "nan", "steps": 3, "per_class": [1.0, 2.0]}
        text = (tmp_path / "results.json").read_text()
        (tmp_path / "results.json").write_text(text[:-4])
        assert not run.finished  # torn by something other than this library


def test_results_that_cannot_be_read_at_the_moment_are_not_computed_again(tmp_path, monkeypatch):
    with open_run(tmp_path) as run:
        run.write_results({"steps": 3})

        def away(path):
            raise OSError(5, "Input/output error", str(path))

        with monkeypatch.context() as patch:
            patch.setattr("spread_jax.training._folder.read_json", away)
            with pytest.raises(RunDirectoryError, match=r"results\.json cannot be read: Input/output error"):
                assert run.finished
        assert run.finished


def test_a_finished_run_is_reopened_and_its_results_added_to(tmp_path):
    with open_run(tmp_path, {"seed": 5}) as run:
        with pytest.raises(RunDirectoryError, match="is not finished: it has no results yet"):
            run.update_results({"a": 1})
        assert not run.finished
        run.write_results({"steps": 3, "a": 0})
    with RunDirectory.reopen(tmp_path) as run:
        assert run.config == {"seed": 5}
        with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} "):  # it holds the lock
            RunDirectory.reopen(tmp_path)
        run.update_results({"a": 1, "evaluation": {"distance": np.float64(2.5)}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"steps": 3, "a": 1, "evaluation": {"distance": 2.5}}


def test_only_a_run_is_reopened(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunDirectoryError, match=r"has no config\.json\. Name the folder"):
            RunDirectory.reopen(path)
    assert list(tmp_path.iterdir()) == []
    for text, message in (("{", "cannot be read"), ("[1]", "holds no mapping")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunDirectoryError, match=message):
            RunDirectory.reopen(tmp_path)


def test_figures(tmp_path):
    with open_run(tmp_path) as run:
        assert run.save_figure_path("samples") == tmp_path / "samples.png"
        assert run.save_figure_path("samples.pdf") == tmp_path / "samples.pdf"
        for name in ("", "../samples", "a/b", "/tmp/x"):
            with pytest.raises(ValueError, match="a figure is named"):
                run.save_figure_path(name)
            with pytest.raises(ValueError, match="is named by a file name"):
                run.write_file(name, "")
        assert not (tmp_path / "figures.json").exists()
        run.save_figure_path("samples", caption="Samples.", grid=True)
    with open_run(tmp_path) as run:  # what an earlier process has told is kept
        run.save_figure_path("faces", caption="Faces.", section="Faces", real_images=True)
        run.save_figure_path("samples", caption="More samples.", grid=True)
    told = json.loads((tmp_path / "figures.json").read_text())
    assert {name: (figure["caption"], figure["real_images"]) for name, figure in told.items()} == {
        "samples.png": ("More samples.", False),
        "faces.png": ("Faces.", True),
    }


def test_the_steps_of_a_finished_run(tmp_path):
    with open_run(tmp_path) as run:
        assert run.finished_steps == 0
        run.write_results({"steps": 40})
        assert run.finished_steps == 40
        run.write_results({"steps": "forty"})
        with pytest.raises(RunDirectoryError, match=r'is damaged: its steps are "forty"\. Delete it'):
            assert run.finished_steps
