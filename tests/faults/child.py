"""Training runs that die: a parent that has imported everything and forks one process for each run.

It reads one JSON object for each run from stdin and answers with the lines `pid N` and `code N`. JAX makes its backend
in the forked process, so nothing of it crosses the fork. A run is a small model with the real data set, loader, loop,
run folder and checkpointer; what it is doing can be read from a shared file while it runs, and after it is dead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image  # noqa: F401  imported once, before the forks

from spread_jax.data import Loader, cache, open_dataset
from spread_jax.training import (
    Checkpointer,
    CheckpointError,
    LossOutput,
    NonFiniteLossError,
    Player,
    RunDirectory,
    RunDirectoryError,
    StopRequest,
    TrainingInterrupted,
    _seal,
    checkpoint,
    create_train_state,
    make_train_step,
    train,
)

STEPS = 8
SIZE = 8
STAGES = ("starting", "decoding the cache", "restoring", "training", "writing", "sealing", "deleting", "finished")


class Marks:
    """A shared file of four integers: what the run does, what its save does, newest sealed step, step restored."""

    SIZE = 16

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def read(self) -> tuple[int, int, int, int]:
        return struct.unpack("<iiii", self._map[:])

    def set(self, place: int, value: int) -> None:
        self._map[4 * place : 4 * place + 4] = struct.pack("<i", value)

    @staticmethod
    def create(path: Path) -> Marks:
        path.write_bytes(struct.pack("<iiii", 0, 0, -1, -1))
        return Marks(str(path))


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def instrument(marks: Marks, die_at: str | None, die_step: int) -> None:
    """Writes every stage into the marks, and dies at the worst moment of one of them."""
    build, finish = cache._Entry.build, Checkpointer._finish
    write_seal, drop_old = checkpoint.write_seal, Checkpointer._drop_old

    def building(self, progress):
        marks.set(0, STAGES.index("decoding the cache"))
        if die_at == "cache":
            progress = lambda message, done, total: done and die()
        build(self, progress)

    def finishing(self, step, *rest):
        marks.set(1, STAGES.index("writing"))
        if die_at == "commit" and step == die_step:
            self._orbax.wait_until_finished = die
        finish(self, step, *rest)
        marks.set(1, 0)

    def sealing(folder, step, *rest):
        marks.set(1, STAGES.index("sealing"))
        if step == die_step and die_at == "seal":
            die()
        if step == die_step and die_at == "rename":
            os.rename = die
        write_seal(folder, step, *rest)

    def dropping(self, newest):
        marks.set(2, newest)
        marks.set(1, STAGES.index("deleting"))
        if die_at == "deletion" and newest >= die_step:

            def half_delete(path, *_, **__):
                # Everything but the seal is gone, the worst half.
                for name in _seal.files_of(path):
                    os.remove(os.path.join(path, name))
                die()

            shutil.rmtree = half_delete
        drop_old(self, newest)

    cache._Entry.build, Checkpointer._finish = building, finishing
    checkpoint.write_seal, Checkpointer._drop_old = sealing, dropping


def digest_of(state) -> str:
    """SHA-256 of every bit of a state."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return sha.hexdigest()


def run(options: dict) -> int:
    """One training run, from the newest checkpoint or from the start; the exit code."""
    marks = Marks(options["marks"])
    instrument(marks, options.get("die_at"), options.get("die_step", 3))
    if seconds := {"backwards": -60.0, "forward": 86400.0}.get(options.get("clock")):
        ticks = itertools.count()
        time.time = lambda: 1e9 + seconds * next(ticks)
        time.time_ns = lambda: int(time.time() * 1e9)
    jax.config.update("jax_compilation_cache_dir", options["programs"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    dataset = open_dataset(options["images"], image_size=SIZE, cache_dir=options["cache"])
    loader = Loader(dataset, batch_size=4, seed=0)
    width, nan_at = options.get("width", 3), options.get("nan_at", -1)
    optimizer = optax.sgd(1e-4, momentum=0.9)

    def loss(params, variables, batch, *, key, step):
        x = batch.reshape(len(batch), -1).astype(jnp.float32) / 255
        y = x + 0.1 * jax.random.normal(key, x.shape)
        value = jnp.square(y @ params["encode"] @ params["decode"] - x).sum(axis=1).mean()
        return jnp.where(step + 1 == nan_at, jnp.nan, value), LossOutput({}, {"error": value})

    players = [Player("model", ("encode", "decode"), loss, optimizer)]

    @jax.jit
    def initial_state():
        shape = (int(np.prod(dataset.image_shape)), width)
        params = {"encode": jnp.full(shape, 0.01), "decode": 0.01 * jnp.ones(shape[::-1])}
        seed = options.get("seed", 0)
        return create_train_state(params, {"seen": jnp.zeros(())}, players, key=jax.random.key(seed))

    config = {"seed": options.get("seed", 0), "width": width, "data": dataset.fingerprint}
    with (
        RunDirectory.open(options["workdir"], config, tensorboard=False) as directory,
        directory.checkpointer(keep=2, best_metric="error", best_mode="min") as saver,
        StopRequest() as stop,
    ):
        marks.set(0, STAGES.index("restoring"))
        restored = saver.restore(jax.eval_shape(initial_state))
        state, start = (restored.state, restored.step) if restored else (initial_state(), 0)
        marks.set(3, start)
        directory.truncate_metrics(start)
        marks.set(0, STAGES.index("training"))

        def slowly(batches):
            for _, batch in batches:
                time.sleep(options.get("pause", 0.0))
                yield batch

        state = train(
            state,
            make_train_step(players),
            slowly(loader.iterate(start)),
            start_step=start,
            num_steps=STEPS,
            on_record=lambda record: directory.log_metrics(record.step, record.metrics),
            record_every=1,
            on_evaluate=lambda step, state: {"error": float(np.square(state.params["encode"]).sum())},
            evaluate_every=options.get("save_every", 1),
            save=lambda step, state, metrics: saver.save(step, state, metrics=metrics),
            save_every=options.get("save_every", 1),
            stop=stop,
        )  # fmt: skip
        saver.wait()
        marks.set(0, STAGES.index("finished"))
        directory.write_results({"digest": digest_of(state), "data": dataset.fingerprint, "steps": STEPS})
    return 0


def serve() -> None:
    """Forks a run for each line of stdin."""
    if "SPREAD_JAX_CHAOS" not in os.environ:  # a kill loses nothing that was written, and flushing is half of the time
        os.fsync = lambda descriptor: None
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 70
            log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                code = run(options)
            except TrainingInterrupted as interruption:
                code = 128 + interruption.signal
            except (CheckpointError, NonFiniteLossError, RunDirectoryError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"code {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
