"""A checkpoint is restored bit for bit, or refused with a sentence; never in between. Crashes are in tests/faults."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spread_jax.training import _seal, checkpoint
from spread_jax.training.checkpoint import Checkpointer, CheckpointError

CHILD = Path(__file__).with_name("checkpoint_child.py")


def bits(leaf):
    """Everything that must be equal of a leaf, and nothing that may differ."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return "key", str(leaf.dtype), leaf.shape, data.tobytes()
    array = np.asarray(leaf)
    kind = "array" if isinstance(leaf, jax.Array) else type(leaf).__name__
    return kind, str(array.dtype), array.shape, array.tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def small_state(step=0):
    return {
        "w": jnp.arange(6.0).reshape(2, 3) + step,
        "n": jnp.int32(step),
        "k": jax.random.key(step),
    }


def all_kinds():
    params = flax.core.freeze({"dense": {"kernel": jnp.linspace(0, 1, 12).reshape(4, 3)}})
    return {
        "params": params,
        "opt": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params),
        "none": None,
        "empty": (),
        "bfloat16": jnp.linspace(-3, 3, 7, dtype=jnp.bfloat16),
        "uint8": jnp.arange(256, dtype=jnp.uint8),
        "int8": jnp.arange(-4, 4, dtype=jnp.int8),
        "bool": jnp.array([True, False, True]),
        "not_a_number": jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "no_elements": jnp.zeros((0, 3), jnp.float32),
        "scalar": jnp.float32(0.1),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "no_keys": jax.random.split(jax.random.key(1), 1)[:0],
        "raw_key": jax.random.PRNGKey(5),
        "numpy": np.arange(5, dtype=np.int64),
        "numpy_scalar": np.float64(0.1),
        "python": (3, 0.1, True, 2**40),
        "odd/name": jnp.ones(1),
        "odd": {"name": jnp.zeros(1)},
        "": jnp.ones(2),
        "..": jnp.ones(3),
        'ü "%\n': jnp.ones(4),
    }


def run_child(*arguments, devices=1, **kwargs):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs,
    )  # fmt: skip


# --- round trips ---


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = all_kinds()
    metrics = {"bound": -1.1, "nan": float("nan"), "inf": float("inf"), "jax": jnp.float32(0.1)}
    with Checkpointer(tmp_path / "a" / "b") as checkpointer:
        checkpointer.save(3, state, metrics=metrics)
        found = checkpointer.restore(all_kinds())
    assert found.step == 3
    assert found.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_equal(found.metrics[name], float(value))
    assert_same(found.state, state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found.state), strict=True):
        if isinstance(a, jax.Array):
            assert a.sharding == b.sharding
            assert a.committed == b.committed  # else the next step compiles again
    assert not [p for p in (tmp_path / "a" / "b" / "3").rglob("*") if "pickle" in p.name]


def test_abstract_state_of_eval_shape(tmp_path):
    def init(key):
        params = {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
        return {"params": params, "opt": optax.adam(1e-3).init(params), "key": key, "step": 0}

    state = init(jax.random.key(1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        found = checkpointer.restore(jax.eval_shape(init, jax.random.key(0))).state
    # The step is a Python number in one and a traced one in the other.
    assert found["step"].dtype == jnp.int32
    assert int(found["step"]) == 0
    assert_same({**found, "step": 0}, state)


def test_restored_leaves_can_be_trained_on(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros(3), "n": jnp.int32(0)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        state = step(checkpointer.restore(state).state)
        checkpointer.save(1, state)
        state = step(checkpointer.restore(state).state)
    assert int(state["n"]) == 2
    assert step._cache_size() == 1


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices; test_parallel.py runs it")
def test_shardings(tmp_path):
    devices = np.array(jax.devices()[:4])
    four, two = (jax.sharding.Mesh(devices[:n], ("d",)) for n in (4, 2))
    rows, whole = PartitionSpec("d"), PartitionSpec()
    values = {
        "x": jnp.arange(32.0).reshape(8, 4),
        "m": jnp.arange(3),
        "k": jax.random.split(jax.random.key(0), 8),
    }

    def place(mesh):
        where = {"x": rows, "m": whole, "k": rows}
        return {k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in values.items()}

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, place(four))
        for target in (place(four), place(two), values):
            found = checkpointer.restore(target).state
            assert_same(found, values)
            for name in values:
                assert found[name].sharding == target[name].sharding
                assert found[name].committed == target[name].committed
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), place(two))
        found = checkpointer.restore(abstract).state
        assert_same(found, values)
        assert found["k"].sharding == abstract["k"].sharding


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [run_child("pair", i, port, tmp_path, devices=2) for i in (0, 1)]
    try:
        for child in pair:
            out, err = child.communicate(timeout=60)
            assert child.returncode == 0, err
            assert out.endswith("done\n")  # after what the transport prints
    finally:
        for child in pair:
            child.kill()
            child.communicate()
    with Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.restore({"x": jnp.zeros(8)})  # one process reads what two wrote
    assert found.step == 3
    np.testing.assert_array_equal(found.state["x"], 3 * np.arange(8.0))


@pytest.mark.parametrize("kind", ["jax", "numpy"])
def test_a_saved_state_may_be_donated_or_overwritten_at_once(tmp_path, kind):
    """The training steps run while Orbax writes, so a view of the state would show."""
    size = 300_000
    if kind == "jax":
        advance = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
        state = {str(i): jnp.full(size, float(i)) for i in range(6)}
        jax.block_until_ready(state)
    else:

        def advance(s):
            for a in s.values():
                a += 1
            return s

        state = {str(i): np.full(size, float(i)) for i in range(6)}
    abstract = {name: jnp.zeros_like(a) if kind == "jax" else a.copy() for name, a in state.items()}
    for trial in range(3):
        with Checkpointer(tmp_path / str(trial)) as checkpointer:
            expected = {name: np.array(a, copy=True) for name, a in state.items()}
            checkpointer.save(1, state)
            for _ in range(5):
                state = advance(state)
            jax.block_until_ready(state)
            found = checkpointer.restore(abstract)
        for name, a in expected.items():
            np.testing.assert_array_equal(found.state[name], a)


# --- which steps are kept ---


def test_keeps_the_newest_and_the_best_across_restarts(tmp_path):
    scores = [0.0, 9.0, float("nan"), 3.0, float("inf"), 2.0, 9.0, 1.0]
    for step, score in enumerate(scores):  # a new process each time
        with Checkpointer(tmp_path, keep=2, best_metric="score") as checkpointer:
            checkpointer.save(step, small_state(step), metrics={"score": score})
    with Checkpointer(tmp_path, keep=2, best_metric="score") as checkpointer:
        assert checkpointer.sound_steps() == [1, 6, 7]
        assert (checkpointer.best_step, checkpointer.latest_step) == (1, 7)
        found = checkpointer.restore(small_state(), step=1)
        assert_same(found.state, small_state(1))
        checkpointer.save(8, small_state(8))  # without metrics it is never the best
        checkpointer.wait()
        assert checkpointer.best_step == 1
    with Checkpointer(tmp_path, keep=2, best_metric="score", best_mode="min") as checkpointer:
        assert checkpointer.best_step == 7
    assert sorted(os.listdir(tmp_path)) == ["1", "7", "8"]


def test_a_step_saved_behind_newer_ones_is_kept(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(9, small_state(9))
        checkpointer.save(4, small_state(4))
        checkpointer.wait()
        assert checkpointer.sound_steps() == [4, 9]


def test_saving_a_sealed_step_again_changes_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), metrics={"m": 1.0})
        checkpointer.save(1, small_state(2), metrics={"m": 2.0})
        found = checkpointer.restore(small_state())
    assert found.metrics == {"m": 1.0}
    assert_same(found.state, small_state(1))


def test_no_checkpoint_is_none_and_leftovers_are_swept(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(small_state()) is None
        assert checkpointer.latest_step is None
        assert checkpointer.best_step is None
    assert not (tmp_path / "new").exists()
    leftovers = ["3.unsealed", "3.unsealed.orbax-checkpoint-tmp", "2.deleting", "2.deleting-2"]
    for name in leftovers:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("torn")
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(small_state()) is None
        checkpointer.save(3, small_state(3))
        checkpointer.wait()
    assert sorted(os.listdir(tmp_path)) == ["3", "notes"]


# --- damage ---


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "steps"
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, small_state(1))
        checkpointer.save(2, small_state(2))
    return folder


def _flip(path):
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + 8] = bytes(b ^ 0xFF for b in data[start : start + 8])
    path.write_bytes(data)


DAMAGE = {
    "flip": _flip,
    "truncate": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "append": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "delete": lambda path: path.unlink(),
    "to_folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_and_the_older_step_restored(two_steps, tmp_path, damage):
    files = sorted(p.relative_to(two_steps) for p in (two_steps / "2").rglob("*") if p.is_file())
    assert len(files) > 5
    assert Path("2", _seal.SEAL) in files
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        DAMAGE[damage](folder / file)
        said = []
        with Checkpointer(folder, log=said.append) as checkpointer:
            assert checkpointer.sound_steps() == [1], file
            found = checkpointer.restore(small_state())
            assert found.step == 1, file
            assert_same(found.state, small_state(1))
            assert len(said) == 1
            assert "2.unsound" in said[0]
            assert file.relative_to("2").as_posix() in said[0]
            assert sorted(os.listdir(folder)) == ["1", "2.unsound"]
            if number == 0:  # the damaged copy is never in the way
                checkpointer.save(2, small_state(2))
                assert_same(checkpointer.restore(small_state()).state, small_state(2))


def test_an_extra_file_and_another_steps_seal_are_found(two_steps, tmp_path):
    def extra(folder):
        (folder / "2" / "d" / "more").write_text("")

    def swap(folder):
        shutil.copy(folder / "1" / _seal.SEAL, folder / "2" / _seal.SEAL)

    def rename(folder):
        os.rename(folder / "2", folder / "3")

    def edit(folder):  # the seal protects its own metrics
        seal = folder / "2" / _seal.SEAL
        content = json.loads(seal.read_text())
        content["content"]["metrics"]["score"] = 99.0
        seal.write_text(json.dumps(content))

    def not_a_mapping(folder):
        (folder / "2" / _seal.SEAL).write_text("[1]")

    for number, damage in enumerate([extra, swap, rename, edit, not_a_mapping]):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        damage(folder)
        said = []
        with Checkpointer(folder, log=said.append) as checkpointer:
            assert checkpointer.restore(small_state()).step == 1, damage
            assert len(said) == 1


def test_nothing_sound_left_is_an_error_and_stays_one(two_steps, tmp_path, capsys):
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    for step in (1, 2):
        _flip(folder / str(step) / "manifest.ocdbt")
    with Checkpointer(folder) as checkpointer:
        both = r"step 2: manifest\.ocdbt.*step 1: manifest\.ocdbt"
        with pytest.raises(CheckpointError, match=both):
            checkpointer.restore(small_state())
        assert capsys.readouterr().err.count("WARNING") == 2
        with pytest.raises(CheckpointError, match=r"1\.unsound, 2\.unsound"):
            checkpointer.restore(small_state())


def test_an_unsound_step_that_was_asked_for_is_an_error(two_steps, tmp_path):
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    _flip(folder / "2" / "_METADATA")
    with Checkpointer(folder) as checkpointer:
        with pytest.raises(CheckpointError, match="_METADATA: its contents changed"):
            checkpointer.restore(small_state(), step=2)
        with pytest.raises(CheckpointError, match=r"no step 7; its steps are \[1, 2\]"):
            checkpointer.restore(small_state(), step=7)
        assert checkpointer.restore(small_state(), step=1).step == 1
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_seal_of_a_later_format_is_refused_and_left_alone(two_steps, tmp_path):
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    path = folder / "2" / _seal.SEAL
    content = json.loads(path.read_text())["content"] | {"format": _seal.FORMAT + 1}
    outer = {"content": content, "digest": _seal.digest_of(content)}
    path.write_text(_seal.seal_text(outer))
    with Checkpointer(folder) as checkpointer, pytest.raises(CheckpointError, match="upgrade"):
        checkpointer.restore(small_state())
    assert sorted(os.listdir(folder)) == ["1", "2"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_at_the_moment_is_not_called_damaged(two_steps, monkeypatch, number):
    """A file server that is away for a moment: nothing is renamed, and the newest step is there when it is back."""
    before, opened = sorted(two_steps.rglob("*")), _seal.open_regular

    def away(path):
        if path.name == "manifest.ocdbt":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path)

    with Checkpointer(two_steps) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(_seal, "open_regular", away)
            for step in (None, 2):
                with pytest.raises(
                    CheckpointError, match=r"2/\S*manifest\.ocdbt cannot be read: .* Nothing was changed"
                ):
                    checkpointer.restore(small_state(), step=step)
        assert sorted(two_steps.rglob("*")) == before
        assert checkpointer.restore(small_state()).step == 2


def test_for_reading_only_nothing_is_changed(two_steps, tmp_path):
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    _flip(folder / "2" / "_METADATA")
    (folder / "3.unsealed").mkdir()
    before, said = sorted(folder.rglob("*")), []
    with Checkpointer(folder, read_only=True, log=said.append) as checkpointer:
        assert checkpointer.restore(small_state()).step == 1
        with pytest.raises(CheckpointError, match="for reading only"):
            checkpointer.save(4, small_state())
    assert sorted(folder.rglob("*")) == before
    assert len(said) == 1
    assert "It is not used" in said[0]


def test_only_what_the_checkpointer_itself_has_left_is_removed(tmp_path):
    """Whatever of the user's is named like it stays, and a link is removed, never followed."""
    folder, outside = tmp_path / "steps", tmp_path / "outside"
    kept = ["3.deleting.txt", "3.unsealed-notes", "4.unsealed.mine", "notes.deleting"]
    for name in (*kept, "5.unsealed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.tex").write_text("years of work")
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    (folder / "1.unsealed").symlink_to(outside)
    (folder / "6.deleting").symlink_to(outside)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, small_state(1))
    assert sorted(os.listdir(folder)) == [
        "1",
        "3.deleting.txt",
        "3.unsealed-notes",
        "4.unsealed.mine",
        "notes.deleting",
    ]
    assert [path.name for path in outside.rglob("*")] == ["thesis.tex"]


def test_another_compiler_or_device_is_told_of(two_steps, monkeypatch):
    def said_by(**changes):
        said = []
        now = {**checkpoint.numerics(), **changes}
        with monkeypatch.context() as patch, Checkpointer(two_steps, log=said.append) as checkpointer:
            patch.setattr(checkpoint, "numerics", lambda: now)
            assert checkpointer.restore(small_state()).step == 2
        return said

    assert said_by() == []
    device = checkpoint.numerics()["device"]
    (sentence,) = said_by(jaxlib="99.1", device="TPU v9", XLA_FLAGS="--new")
    assert "jaxlib " in sentence
    assert f"device {device} (now TPU v9), XLA_FLAGS" in sentence
    assert "(now --new): the last digits may differ" in sentence


def test_checkpoints_that_are_gone_are_no_new_run(tmp_path):
    folder, mark = tmp_path / "steps", tmp_path / ".checkpointed"
    for _ in range(2):
        with Checkpointer(folder, mark=mark) as checkpointer:
            assert checkpointer.restore(small_state()) is None  # killed before its first save
    with Checkpointer(folder, mark=mark) as checkpointer:
        checkpointer.save(1, small_state(1))
    for remove in (folder / "1", folder):
        shutil.rmtree(remove)
        with (
            Checkpointer(folder, mark=mark) as checkpointer,
            pytest.raises(CheckpointError, match=r"holds no checkpoint, and this run has saved some: .*\.checkpointed"),
        ):
            checkpointer.restore(small_state())
    mark.unlink()
    with Checkpointer(folder, mark=mark) as checkpointer:
        assert checkpointer.restore(small_state()) is None


def test_a_clock_that_is_set_forward_does_not_end_a_save(tmp_path, monkeypatch):
    days = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 + 86400.0 * next(days))
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small_state(step))
        assert_same(checkpointer.restore(small_state()).state, small_state(2))


# --- another model ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "w": jnp.zeros((2, 4))}, r"w: float32\[2, 3\] .*, float32\[2, 4\]"),
        (lambda s: {**s, "w": jnp.zeros((2, 3), jnp.bfloat16)}, r"w: .* bfloat16\[2, 3\]"),
        (lambda s: {**s, "more": {"b": jnp.zeros(1)}}, r"more/b: not in the checkpoint"),
        (lambda s: {"w": s["w"], "k": s["k"]}, r"n: int32\[\] in the checkpoint, not in the model"),
        (lambda s: {**s, "k": jax.random.key(0, impl="rbg")}, r"k: key<fry>.* key<rbg>"),
        (lambda s: {**s, "k": jax.random.PRNGKey(0)}, r"k: key<fry>.* uint32\[2\]"),
        (lambda s: {**s, "n": None}, r"n: int32\[\] in the checkpoint, not in the model"),
        (lambda s: {**s, "n": 0.5}, r"n: int32.* number float64"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_name(two_steps, change, message):
    with (
        Checkpointer(two_steps) as checkpointer,
        pytest.raises(CheckpointError, match=f"another model; 1 leaves differ:\n  {message}"),
    ):
        checkpointer.restore(change(small_state()))
    assert sorted(os.listdir(two_steps)) == ["1", "2"]  # nothing is set aside for it


def test_a_step_of_another_run_is_refused_though_it_fits(tmp_path):
    with Checkpointer(tmp_path, run="mine") as checkpointer:
        checkpointer.save(1, small_state(1))
    for run in ("mine", None):
        with Checkpointer(tmp_path, run=run) as checkpointer:
            assert_same(checkpointer.restore(small_state()).state, small_state(1))
    for step in (None, 1):
        with Checkpointer(tmp_path, run="another") as checkpointer, pytest.raises(CheckpointError) as caught:
            checkpointer.restore(small_state(), step=step)
        assert "saved by a run with other settings (it is sealed for mine, this run is another)" in str(caught.value)
    assert os.listdir(tmp_path) == ["1"]  # and left alone


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="best_mode is 'best'"):
        Checkpointer(tmp_path, best_mode="best")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpointer(tmp_path / "file")
    with Checkpointer(tmp_path, best_metric="score") as checkpointer:
        with pytest.raises(CheckpointError, match=r"'score'.*'bound'"):
            checkpointer.save(1, small_state(), metrics={"bound": 1.0})
        with pytest.raises(ValueError, match="step is -1"):
            checkpointer.save(-1, small_state())
        with pytest.raises(CheckpointError, match="leaf 'w' of the state is a str"):
            checkpointer.save(1, {"w": "text"})
        with pytest.raises(CheckpointError, match="leaf 'w' of the state has dtype"):
            checkpointer.save(1, {"w": np.array(["text"])})
        with pytest.raises(CheckpointError, match="abstract"):
            checkpointer.save(1, jax.eval_shape(small_state))
        with pytest.raises(CheckpointError, match="no numbers"):
            checkpointer.save(1, {"a": None})
        checkpointer.save(1, {"n": 2**40})
        with pytest.raises(CheckpointError, match="'n' was saved as the number 1099511627776"):
            checkpointer.restore({"n": jnp.int32(0)})
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(2, small_state())
    checkpointer.close()


# --- failures of the disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# When one array fails, Orbax ends the event loop that the other arrays still report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_one_sentence_and_harms_nothing(small_disk, monkeypatch, noticed):
    if noticed == "while writing":
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda _: None)
    folder = small_disk / "c"
    large = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000)), "n": jnp.ones(2)}
    full = r"step 2 .* \(it needs 4,000,008 bytes, .* are free\): the disk is full"

    def save_and(finish):
        checkpointer.save(2, large)
        finish()

    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, small_state(1))
        checkpointer.wait()
        for finish in (checkpointer.wait, lambda: checkpointer.save(3, small_state(3))):
            with pytest.raises(CheckpointError, match=full):
                save_and(finish)
            assert os.listdir(folder) == ["1"]
        assert_same(checkpointer.restore(small_state()).state, small_state(1))
        checkpointer.save(3, small_state(3))  # the same checkpointer goes on
        checkpointer.wait()
        assert checkpointer.sound_steps() == [1, 3]
    with pytest.raises(CheckpointError, match=full), Checkpointer(folder) as checkpointer:
        checkpointer.save(2, large)  # raised here or by close
    if noticed == "while writing":
        said = []

        def interrupted():
            with Checkpointer(folder, log=said.append) as checkpointer:
                checkpointer.save(2, large)
                raise KeyError("what ended the run is not hidden by the failure of close")

        with pytest.raises(KeyError):
            interrupted()
        assert len(said) == 1
        assert "the disk is full" in said[0]
    assert not [t for t in threading.enumerate() if t.name.startswith(("seal", "async_save"))]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"step 1 could not be written .* Not a directory"
    with Checkpointer(tmp_path / "file" / "below") as checkpointer:
        assert checkpointer.restore(small_state()) is None
        with pytest.raises(CheckpointError, match=message):
            checkpointer.save(1, small_state())


def test_a_failure_while_sealing_is_raised_at_the_next_call(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1))
        checkpointer.wait()
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(5, "Input/output error")

            patch.setattr(checkpoint, "write_seal", fail)
            checkpointer.save(2, small_state(2))
            with pytest.raises(CheckpointError, match=r"step 2 .* Input/output error"):
                checkpointer.save(3, small_state(3))
        assert os.listdir(tmp_path) == ["1"]
        checkpointer.save(3, small_state(3))
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


def test_orbax_is_quiet_only_while_a_checkpointer_is_open(tmp_path, capfd):
    absl = logging.getLogger("absl")
    before = list(absl.filters)
    orbax_record = logging.LogRecord(
        "absl", logging.ERROR, f"{os.sep}x{os.sep}orbax{os.sep}y.py", 1, "chatter", (), None
    )
    other_record = logging.LogRecord("absl", logging.ERROR, "mine.py", 1, "mine", (), None)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state())
        assert checkpointer.restore(small_state()).step == 1
        assert not absl.filter(orbax_record)
        assert absl.filter(other_record)
    assert absl.filters == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_saving_does_not_wait_for_the_seal(tmp_path, monkeypatch):
    gate = threading.Event()
    write_seal = checkpoint.write_seal

    def wait_then_write(*arguments):
        assert gate.wait(30)
        write_seal(*arguments)

    monkeypatch.setattr(checkpoint, "write_seal", wait_then_write)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1))
        assert checkpointer.latest_step is None  # announced only once it is sealed
        gate.set()
        checkpointer.wait()
        assert checkpointer.latest_step == 1
