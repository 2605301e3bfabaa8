"""Eight devices equal one: jit over meshes, shard_map, pmap; checkpoints from one mesh to another; micro-batches."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from spread_jax import GaussianNoise, example_keys, spread_elbo
from spread_jax.nn import Conv, DenseEncoder
from spread_jax.training import (
    Checkpointer,
    LossOutput,
    Player,
    abstract_state,
    create_train_state,
    local_copy,
    make_mesh,
    make_train_step,
    place_batch,
    place_state,
)

DEVICES, BATCH, RATE = 8, 16, 0.01
SGD = optax.sgd(RATE)
AXES = PartitionSpec(), PartitionSpec("data")


class Encoder(nn.Module):
    """A convolution and batch statistics, as in `spread_jax.nn`, small enough to compile often."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, y, *, train):
        h = Conv(8, kernel_size=(3, 3), stride=2, use_bias=False)(y.reshape(-1, 4, 4, 1))
        h = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(h))
        mean_and_log_std = nn.Dense(4)(h.reshape(len(y), -1))
        return mean_and_log_std[:, :2], mean_and_log_std[:, 2:]


def make_loss(axis_name=None):
    """Minus the mean spread ELBO; inside of shard_map and pmap the mean over devices too."""
    encoder = Encoder(axis_name)

    def loss(params, variables, batch, *, key, step):
        def encode(y):
            own = {"params": params["encoder"], **variables["encoder"]}
            return encoder.apply(own, y, train=True, mutable=["batch_stats"])

        decode = lambda z: (jnp.tanh(z @ params["decoder"]), None)
        terms, (stats, _) = spread_elbo(batch, encode, decode, GaussianNoise(0.5), key=key, has_aux=True)
        value = -terms.elbo.mean()
        value = value if axis_name is None else jax.lax.pmean(value, axis_name)
        return value, LossOutput({"encoder": stats}, {"step": step})

    return loss


@jax.jit
def start():
    variables = Encoder().init(jax.random.key(1), jnp.zeros((1, 16)), train=False)
    params = {"encoder": variables["params"], "decoder": 0.3 * jax.random.normal(jax.random.key(2), (2, 16))}
    stats = {"encoder": {"batch_stats": variables["batch_stats"]}}
    return create_train_state(params, stats, players(), key=jax.random.key(3))


def players():
    return [Player("model", ("encoder", "decoder"), make_loss(), SGD)]


def batches(num):
    return np.random.default_rng(0).normal(size=(num, BATCH, 16)).astype(np.float32)


def assert_close(got, want, tolerance=1e-5):
    """By the size of each leaf: a gradient's small entries are differences of large numbers."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3), jax.tree_util.keystr(path)


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices; run in a process that has them")
def test_eight_devices_equal_one(tmp_path):
    # Noise from one key does not depend on where the rows lie: jax_threefry_partitionable, to the last bit.
    eight = make_mesh()
    split = jax.jit(
        lambda key: jax.random.normal(key, (BATCH, 5)), out_shardings=place_batch(batches(1)[0], eight).sharding
    )
    np.testing.assert_array_equal(split(jax.random.key(0)), jax.random.normal(jax.random.key(0), (BATCH, 5)))

    compiled = []
    is_compilation = lambda name: name == "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if is_compilation(name) else None
    )

    def step(state, batch, mesh):
        """The step, and how many programs it compiled."""
        batch = jax.block_until_ready(place_batch(batch, mesh))
        before = len(compiled)
        state, metrics = steps[mesh](state, batch)
        return state, float(metrics["model_loss"]), len(compiled) - before

    three = batches(3)
    unbroken = {}
    meshes = {
        "one": make_mesh(1),
        "eight": eight,
        "four pairs": make_mesh(model_parallel=2),
    }
    steps = {mesh: make_train_step(players(), mesh=mesh) for mesh in meshes.values()}
    assert meshes["four pairs"].devices.shape == (4, 2)
    with Checkpointer(tmp_path) as saver:
        for name, mesh in meshes.items():
            state = place_state(start(), mesh)
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            losses = []
            for number, batch in enumerate(three):
                state, loss, programs = step(state, batch, mesh)
                losses.append(loss)
                assert programs == (number == 0), "the state was placed: no later step compiles again"
                if name == "eight" and number == 1:
                    saver.save(2, state)
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
            unbroken[name] = losses, local_copy(state)
    for name in ("eight", "four pairs"):
        np.testing.assert_allclose(unbroken[name][0], unbroken["one"][0], rtol=1e-5)
        assert_close(unbroken[name][1].params, unbroken["one"][1].params)
        assert_close(unbroken[name][1].variables, unbroken["one"][1].variables)
    kernel = state.params["encoder"]["Conv_0"]["kernel"]  # of the four pairs
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 1, 4)}
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(unbroken["four pairs"][1].params)} == {jax.devices()[0]}

    # Saved on eight, resumed on one and on four pairs: the step after is the same.
    for name in ("one", "four pairs"):
        with Checkpointer(tmp_path) as saver:
            state = saver.restore(abstract_state(jax.eval_shape(start), meshes[name])).state
        state, loss, programs = step(state, three[2], meshes[name])
        np.testing.assert_allclose(loss, unbroken["one"][0][2], rtol=1e-5)
        assert programs == 0
        assert_close(local_copy(state).params, unbroken["one"][1].params)

    # The same step with one key for each example: on one device by make_train_step, then in other hands.
    state, batch = start(), jnp.asarray(three[0])
    keys = example_keys(jax.random.fold_in(state.key, 0), jnp.arange(BATCH))
    params, stats = state.params, state.variables
    before = jax.tree.map(np.asarray, params)
    state, metrics = make_train_step(players(), keys_per_example=True)(state, batch)
    want = jax.tree.map(lambda old, new: (old - np.asarray(new)) / RATE, before, state.params)
    want = float(metrics["model_loss"]), want, state.variables
    params, stats = before, jax.tree.map(np.asarray, start().variables)

    gradient_of = lambda loss: jax.value_and_grad(loss, has_aux=True)

    def under_shard_map(params, stats, batch, keys):
        """The mean over devices is inside of the loss: gradients come back summed, that is, right."""
        (value, output), gradient = gradient_of(make_loss("data"))(params, stats, batch, key=keys, step=0)
        return value, gradient, output.variables

    def under_pmap(params, stats, batch, keys):
        """Each device has parameters of its own: the mean over devices is that of the gradients."""
        (value, output), gradient = gradient_of(make_loss("data"))(params, stats, batch, key=keys, step=0)
        return value, jax.lax.pmean(gradient, "data"), output.variables

    inside_mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    inside = jax.shard_map(
        under_shard_map,
        mesh=inside_mesh,
        in_specs=(AXES[0], AXES[0], AXES[1], AXES[1]),
        out_specs=AXES[0],
    )
    assert_close(jax.jit(inside)(params, stats, batch, keys), want)
    rows = batch.reshape(DEVICES, -1, 16), keys.reshape(DEVICES, -1)
    got = jax.pmap(under_pmap, axis_name="data", in_axes=(None, None, 0, 0))(params, stats, *rows)
    assert_close(jax.tree.map(lambda leaf: leaf[0], got), want)

    # The trap: with the mean outside of the loss, gradients are too large by the number of devices, without an error.
    mean = lambda w, x: (w * x).mean()
    trap = lambda w, x: jax.lax.pmean(jax.grad(mean)(w, x), "data")
    inside = jax.shard_map(trap, mesh=inside_mesh, in_specs=AXES, out_specs=AXES[0])
    assert float(jax.jit(inside)(jnp.ones(()), jnp.ones(DEVICES))) == DEVICES

    # Micro-batches are cut so that no row changes its device.
    dense = make_train_step(DENSE, accumulate=2, keys_per_example=True)
    state = place_state(dense_start(), eight)
    text = dense.lower(state, place_batch(three[0], eight)).compile().as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="runs in this process already")
def test_what_needs_devices_in_a_process_that_has_them():
    """One process for all of it: JAX and its friends take longer to import than the tests."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    checkpoints = Path(__file__).with_name("test_checkpoint.py")
    targets = [f"{__file__}::test_eight_devices_equal_one", f"{checkpoints}::test_shardings"]
    done = subprocess.run([*command, *targets], capture_output=True, text=True, env=environment)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_mesh_of_what_is_not_there_is_refused():
    count = jax.device_count()
    with pytest.raises(ValueError, match=f"devices must be at most {count}.* got {count + 1}"):
        make_mesh(count + 1)
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        make_mesh(0)
    with pytest.raises(
        ValueError, match="model_parallel must divide the number of devices of each process, got 2 and 1"
    ):
        make_mesh(1, model_parallel=2)
    with pytest.raises(TypeError, match="model_parallel must be a Python integer"):
        make_mesh(1, model_parallel=2.0)


def test_modules_take_batch_statistics_over_a_named_axis():
    """Two halves of a batch, mapped with a name, see what the whole batch sees."""
    y = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)
    whole, halves = DenseEncoder(2, width=1), DenseEncoder(2, width=1, axis_name="data")
    variables = jax.jit(functools.partial(whole.init, train=False))(jax.random.key(0), y)
    apply = lambda module, y: module.apply(variables, y, train=True, mutable=["batch_stats"])
    (mean, _), stats = jax.jit(functools.partial(apply, whole))(y)
    mapped = jax.vmap(functools.partial(apply, halves), axis_name="data")
    (mean_of_halves, _), stats_of_halves = jax.jit(mapped)(y.reshape(2, 2, 28, 28, 1))
    np.testing.assert_allclose(mean_of_halves.reshape(4, 2), mean, rtol=1e-4, atol=1e-5)
    assert_close(jax.tree.map(lambda leaf: leaf[1], stats_of_halves), stats)


# --- micro-batches


def dense_loss(params, variables, batch, *, key, step):
    """A spread ELBO without batch statistics; counts its calls in the variables."""
    encode = lambda y: (y @ params["encode"], jnp.zeros((len(y), 2)))
    terms = spread_elbo(batch, encode, lambda z: jnp.tanh(z @ params["decode"]), GaussianNoise(0.5), key=key)
    metrics = {"kl": terms.kl.mean(), "noise_scale": 0.5}
    return -terms.elbo.mean(), LossOutput({"calls": variables["calls"] + 1}, metrics)


@jax.jit
def dense_start():
    first, second = (0.3 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(16, 2), (2, 16)]))
    params, variables = {"encode": first, "decode": second}, {"calls": jnp.zeros(())}
    return create_train_state(params, variables, DENSE, key=jax.random.key(5))


DENSE = [Player("model", ("encode", "decode"), dense_loss, SGD)]


def test_micro_batches_equal_the_whole_batch():
    """In value, gradient, metrics and average, with a key for each example; with one key the draws are others."""
    batch, found = jnp.asarray(batches(1)[0]), {}
    for accumulate in (1, 4):
        step = make_train_step(DENSE, accumulate=accumulate, keys_per_example=True)
        state, metrics = step(dense_start(), batch)
        state, metrics = step(state, batch)
        assert (int(state.step), int(state.variables["calls"])) == (2, 2 * accumulate)
        assert step._cache_size() == 1
        found[accumulate] = state.params, state.ema, metrics
    assert_close(found[4], found[1], 1e-6)
    other = make_train_step(DENSE, accumulate=4)(dense_start(), batch)[1]
    assert 1e-4 < abs(float(other["model_loss"] / found[1][2]["model_loss"]) - 1) < 0.5


def test_micro_batches_of_both_players():
    """Against losses whose gradients are known: the mean over the batch of (p - q x)^2, q ascending on that of q x."""
    batch = jnp.arange(8.0)

    def loss(params, variables, batch, *, key, step):
        return jnp.square(params["p"] - params["q"] * batch).mean(), LossOutput({}, {})

    def ascent(params, variables, batch, *, key, step):
        return -(params["q"] * batch).mean(), LossOutput({"calls": variables["calls"] + 1}, {})

    both = [Player("model", ("p",), loss, SGD), Player("noise", ("q",), ascent, SGD, look_again=True)]
    params = {"p": 2 * jnp.ones(()), "q": jnp.ones(())}
    state = create_train_state(params, {"calls": jnp.zeros(())}, both, key=jax.random.key(0))
    step = make_train_step(both, accumulate=4)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["model_loss"], np.square(2 - np.arange(8.0)).mean(), rtol=1e-6)
    np.testing.assert_allclose(state.params["p"], 2 - RATE * 2 * (2 - 3.5), rtol=1e-6)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(state.params["q"], 1 + RATE * 3.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["noise_gain"], RATE * 3.5**2, rtol=1e-5)
    assert int(state.variables["calls"]) == 4


def test_each_micro_batch_has_a_key_of_its_own():
    drawn = lambda params, variables, batch, *, key, step: (jax.random.normal(key) * params["w"], LossOutput({}, {}))
    player = Player("model", ("w",), drawn, SGD)
    state = create_train_state({"w": jnp.ones(())}, {}, [player], key=jax.random.key(7))
    _, metrics = make_train_step([player], accumulate=4)(state, jnp.ones(8))
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), index) for index in range(4)]
    np.testing.assert_allclose(metrics["model_loss"], np.mean([jax.random.normal(key) for key in keys]), rtol=1e-6)


def test_micro_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="accumulate must divide the batch size, got 3 and 16 examples"):
        make_train_step(DENSE, accumulate=3)(dense_start(), jnp.ones((BATCH, 16)))
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_train_step(DENSE, accumulate=0)
    with pytest.raises(TypeError, match="accumulate must be a Python integer"):
        make_train_step(DENSE, accumulate=2.0)
