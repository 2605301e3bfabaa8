"""One of several processes that share a checkpoint folder; run by test_checkpoint.py with the name of a role."""

from __future__ import annotations

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from spread_jax.training import _seal, checkpoint


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
            seal = os.path.join(directory, "3", _seal.SEAL)
            os.remove(seal)
        found = checkpointer.restore(make(0.0))
        assert found.step == 2, found
        for shard in found.state["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, 2.0 * values[shard.index])
        assert len(messages) == (process == "0")
        checkpointer.save(3, make(3.0))
    print("done", flush=True)


if __name__ == "__main__":
    {"pair": one_of_two}[sys.argv[1]](*sys.argv[2:])
