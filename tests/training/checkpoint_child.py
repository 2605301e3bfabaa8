"""Processes that save checkpoints and die; run by test_checkpoint.py with the name of a role."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from spread_jax.training import checkpoint


def state_at(step: int) -> dict:
    """A state that only its step determines."""
    random = np.random.default_rng(step)
    return {
        "params": {
            "w": jnp.asarray(random.normal(size=(64, 32)).astype(np.float32)),
            "b": jnp.asarray(random.integers(0, 255, 257).astype(np.uint8)),
        },
        "key": jax.random.wrap_key_data(np.array([0, step], np.uint32), impl="threefry2x32"),
        "step": step,
    }


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_for_ever(directory: str) -> None:
    """Announces every step that is sealed, on a line of its own, until it is killed."""
    with checkpoint.Checkpointer(directory, keep=2) as checkpointer:
        found = checkpointer.restore(state_at(0))
        for step in itertools.count(0 if found is None else found.step + 1):
            checkpointer.save(step, state_at(step))  # returns once the step before is sealed
            print(step - 1, flush=True)


def die_at(stage: str, directory: str) -> None:
    """Saves steps 1 and 2, and is killed at a stage of saving step 3."""
    with checkpoint.Checkpointer(directory, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(1, state_at(1))
        checkpointer.save(2, state_at(2))
        if stage == "deletion":

            def half_delete(path, *_, **__):
                # Everything but the seal is gone, the worst half.
                for name in checkpoint._files(path):
                    os.remove(os.path.join(path, name))
                die()

            shutil.rmtree = half_delete
        elif stage == "seal":
            checkpoint._write_seal = die
        elif stage == "rename":
            os.rename = die
        elif stage == "commit":
            checkpointer._orbax.wait_until_finished = die
        checkpointer.save(3, state_at(3))
        raise SystemExit("survived")


def one_of_two(process: str, port: str, directory: str) -> None:
    """One process of a two-process run: saves sharded arrays and restores them."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    values = np.arange(8.0, dtype=np.float32)

    def make(scale):
        return {"x": jax.make_array_from_callback((8,), sharding, lambda index: scale * values[index])}

    messages = []
    with checkpoint.Checkpointer(directory, keep=2, log=messages.append) as checkpointer:
        assert checkpointer.restore(make(0.0)) is None
        for step in (1, 2, 3):
            checkpointer.save(step, make(float(step)), metrics={"m": step})
        checkpointer.wait()
        assert checkpointer.latest_step == 3
        multihost_utils.sync_global_devices("both have seen step 3")
        if process == "0":
            seal = os.path.join(directory, "3", checkpoint._SEAL)
            os.remove(seal)
        found = checkpointer.restore(make(0.0))
        assert found.step == 2, found
        for shard in found.state["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, 2.0 * values[shard.index])
        assert len(messages) == (process == "0")
        checkpointer.save(3, make(3.0))
    print("done", flush=True)


if __name__ == "__main__":
    {"save": save_for_ever, "die": die_at, "pair": one_of_two}[sys.argv[1]](*sys.argv[2:])
