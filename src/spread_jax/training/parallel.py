"""Many devices and many processes: a mesh, where a batch and a state lie on it, and the way back to one device.

Under `jax.jit` arrays on a mesh look like arrays on one device: the compiled step of `make_train_step` is that of
the whole batch, batch statistics are over the whole batch, noise does not depend on the layout, and XLA inserts the
sums over devices. So all there is to do is to place the state and the batches. The same code runs in one process
or, after `jax.distributed.initialize()`, in many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spread_jax._checks import check_count
from spread_jax.training._leaves import is_key

__all__ = [
    "DATA_AXIS",
    "MODEL_AXIS",
    "abstract_state",
    "batch_sharding",
    "local_copy",
    "make_mesh",
    "place_batch",
    "place_state",
    "state_shardings",
]

PyTree = Any

DATA_AXIS = "data"
MODEL_AXIS = "model"


def make_mesh(devices: int | Sequence[jax.Device] | None = None, *, model_parallel: int = 1) -> Mesh:
    """A mesh of what is there: axis `data` over batches, axis `model` over output channels.

    The devices of a process are neighbours along `data`, in the order of the processes, so that the rows of the
    batch that a process reads are those its devices compute with.

    Args:
      devices: how many over all processes, the same number of each; or the devices themselves; None for all.
      model_parallel: devices that share one copy of the parameters; it divides the devices of each process.

    Returns:
      A `jax.sharding.Mesh` of shape (devices / model_parallel, model_parallel).

    Raises:
      TypeError: a number is no integer.
      ValueError: a number is below 1, there are fewer devices, or one number does not divide the other.

    Example:
      >>> mesh = make_mesh(1)
      >>> mesh.axis_names, mesh.devices.shape
      (('data', 'model'), (1, 1))
    """
    check_count("model_parallel", model_parallel)
    if devices is None or not isinstance(devices, Sequence):
        found = jax.devices()
        processes = jax.process_count()
        count = len(found) if devices is None else check_count("devices", devices)
        if count > len(found):
            raise ValueError(f"devices must be at most {len(found)}, which is how many JAX finds, got {count}.")
        if count % processes:
            raise ValueError(f"devices must be a multiple of the {processes} processes, got {count}.")
        by_process = [[d for d in found if d.process_index == p][: count // processes] for p in range(processes)]
        devices = [device for own in by_process for device in sorted(own, key=lambda device: device.id)]
        if len(devices) != count:
            raise ValueError(f"devices must be as many in every process, got {count} and {[*map(len, by_process)]}.")
    own = [sum(1 for d in devices if d.process_index == process) for process in {d.process_index for d in devices}]
    if any(n % model_parallel for n in own):
        raise ValueError(
            f"model_parallel must divide the number of devices of each process, got {model_parallel} and {own[0]}."
        )
    # jax.make_mesh would make the axes Explicit, which is a type system for shardings that Flax does not speak.
    return Mesh(np.array(devices).reshape(-1, model_parallel), (DATA_AXIS, MODEL_AXIS))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its first axis over `data`.

    Args:
      mesh: as `make_mesh` makes it.

    Returns:
      The sharding of an array [batch, ...] of any rank.

    Example:
      >>> tuple(batch_sharding(make_mesh(1)).spec)
      ('data',)
    """
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Where each leaf of a state lies: output channels over `model` where they can be divided, copies elsewhere.

    Output channels are the last axis, as in Flax's kernels, biases and batch statistics; moments of an optimiser and
    moving averages have the shapes of their parameters and lie beside them.

    Args:
      state: arrays, or `jax.ShapeDtypeStruct`.
      mesh: as `make_mesh` makes it.

    Returns:
      A tree of `jax.sharding.NamedSharding`.

    Example:
      >>> state_shardings({"kernel": np.zeros((3, 8))}, make_mesh(1))["kernel"].is_fully_replicated
      True
    """
    parts = mesh.shape[MODEL_AXIS]

    def sharding(leaf):
        shape = np.shape(leaf)
        divided = parts > 1 and shape and shape[-1] % parts == 0 and not is_key(leaf)
        spec = PartitionSpec(*[None] * (len(shape) - 1), MODEL_AXIS) if divided else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, state)


def kept_in_place(state: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside of a compiled step: the state where `place_state` puts it, whatever XLA would choose.

    Otherwise a step might return a leaf elsewhere than it was, and the next one would compile again.
    """
    if mesh is None or mesh.size == 1:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def abstract_state(state: PyTree, mesh: Mesh) -> PyTree:
    """A state's shapes, dtypes and places on a mesh, for `Checkpointer.restore`.

    The mesh may be another than the one the checkpoint was saved on.

    Args:
      state: arrays, or `jax.ShapeDtypeStruct` as `jax.eval_shape` returns it.
      mesh: as `make_mesh` makes it.

    Returns:
      A tree of `jax.ShapeDtypeStruct` with shardings.

    Example:
      >>> abstract_state({"w": np.zeros(3, np.float32)}, make_mesh(1))["w"].shape
      (3,)
    """
    describe = lambda leaf, sharding: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
    return jax.tree.map(describe, state, state_shardings(state, mesh))


def place_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Puts a state on a mesh, before its first step: a step compiles for the places of what it is given.

    Args:
      state: arrays with the same values in every process; of no further use, as they may share memory with what
        is returned, which a step frees.
      mesh: as `make_mesh` makes it.

    Returns:
      The state, as global arrays.

    Example:
      >>> place_state({"w": np.ones(3)}, make_mesh(1))["w"].sharding.is_fully_replicated
      True
    """
    shardings = state_shardings(state, mesh)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)
    return jax.tree.map(_place, state, shardings)


def _place(leaf, sharding):
    if is_key(leaf):
        words = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), words), impl=jax.random.key_impl(leaf))
    # device_put would first compare the values of all processes, one collective for each leaf.
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch on a mesh; in many processes, each one's own rows.

    Args:
      batch: arrays [n, ...] of this process's rows, such as `Loader.batch` returns.
      mesh: as `make_mesh` makes it.

    Returns:
      Global arrays [n * processes, ...].

    Raises:
      ValueError: the rows cannot be divided among the devices of this process.

    Example:
      >>> place_batch(np.ones((4, 2)), make_mesh(1)).shape
      (4, 2)
    """
    sharding = batch_sharding(mesh)
    parts = mesh.local_mesh.shape[DATA_AXIS]
    for leaf in jax.tree.leaves(batch):
        if len(leaf) % parts:
            raise ValueError(f"batch must be a multiple of this process's {parts} devices, got {len(leaf)} rows.")
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def local_copy(tree: PyTree) -> PyTree:
    """The whole of global arrays on one device of this process, for what each process does for itself.

    All processes must call it, where parameters are divided over devices.

    Args:
      tree: arrays on a mesh.

    Returns:
      Arrays on this process's first device of the mesh; those that lay on one device only are returned as they
      are.

    Example:
      >>> state = place_state({"w": np.ones(3)}, make_mesh(1))
      >>> local_copy(state)["w"].tolist()
      [1.0, 1.0, 1.0]
    """
    return jax.tree.map(_local_copy, tree)


def _local_copy(leaf):
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return leaf
    if is_key(leaf):
        return jax.random.wrap_key_data(_local_copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    if not leaf.is_fully_replicated:
        leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return leaf.addressable_data(0)
