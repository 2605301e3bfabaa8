"""Every objective on eight devices equals one device, in value and gradient: jit over a mesh, shard_map, pmap.

Under jit with sharded data the program is the one of a single device, so the key is the same and so is all noise.
shard_map and pmap call the objective once on each device with its examples' keys. For means over examples (the bounds,
a GAN's losses with linear terms) the mean over devices is then the objective of the whole batch. The penalty of
`wae_mmd_loss` compares sets: a shard's is another, noisier, unbiased estimate, and only jit over a mesh or gathered
latents give that of the whole batch. The same holds for `mmd_squared`, and `spread_divergence` draws from a set.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spread_jax import (
    GaussianKernel,
    LaplaceNoise,
    LogUniformScales,
    density_ratio_losses,
    elbo,
    example_keys,
    jensen_shannon,
    mmd_squared,
    score_difference_loss,
    spread_divergence,
    spread_elbo,
    spread_gan_losses,
    spread_importance_bound,
    wae_mmd_loss,
)

DEVICES = 8
KERNEL = GaussianKernel(1.0)
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")


NAMES = ("elbo", "spread_elbo", "importance", "wae", "gan", "ratio", "score", "spread_divergence", "mmd_squared")
OF_SETS = ("wae", "spread_divergence", "mmd_squared")


def problem():
    """Parameters for each objective, so that one backward pass has the gradient of each; and data."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2 * DEVICES, 3)), jnp.float32)
    shapes = {"encode": (3, 2), "log_std": (2,), "decode": (2, 3), "critic": (3,), "log_scale": ()}
    params = {name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return dict.fromkeys(NAMES, params), x


def encode(params, y):
    return jnp.tanh(y @ params["encode"]), jnp.broadcast_to(params["log_std"], (len(y), 2))


def objectives(params, x, key, set_key):
    """Each objective as one number to minimise; `key` is one for each example, `set_key` one for all."""
    networks = lambda p: (functools.partial(encode, p), lambda z: z @ p["decode"])
    noise = lambda p: LaplaceNoise(jnp.exp(p["log_scale"]))
    generated = lambda p: x @ p["encode"] @ p["decode"]

    def gan(p):
        critic = lambda y: jnp.tanh(y) @ p["critic"]
        losses = spread_gan_losses(x, generated(p), critic, noise(p), key=key, divergence=jensen_shannon)
        return losses.critic + 0.5 * losses.generator

    def ratio(p):
        critic = lambda y, sigma: jnp.tanh(y) @ p["critic"] / sigma
        law = LogUniformScales(0.1, jnp.exp(p["log_scale"]))
        losses = density_ratio_losses(x, generated(p), critic, law, LaplaceNoise, key=key)
        return losses.critic + 0.5 * losses.generator

    def score(p):
        law = LogUniformScales(0.1, jnp.exp(p["log_scale"]))
        denoisers = [lambda y, sigma, w=w: w * y / (1 + sigma[:, None]) for w in (0.5, 1.0)]
        return score_difference_loss(generated(p), *denoisers, law, key=key).loss.mean()

    def wae(p):
        encoder, decoder = networks(p)
        return wae_mmd_loss(x, lambda x: encoder(x)[0], decoder, key=key, weight=2.0, kernel=KERNEL).loss

    bound = lambda p, f, **options: f(x, *networks(p), noise(p), key=key, **options)
    found = {
        "elbo": lambda p: -bound(p, elbo).elbo.mean(),
        "spread_elbo": lambda p: -bound(p, spread_elbo, num_spread_samples=2).elbo.mean(),
        "importance": lambda p: -bound(p, spread_importance_bound, num_samples=3).bound.mean(),
        "wae": wae,
        "gan": gan,
        "ratio": ratio,
        "score": score,
        "spread_divergence": lambda p: (
            spread_divergence(x, generated(p), noise(p), num_samples=2 * len(x), key=set_key).value
        ),
        "mmd_squared": lambda p: mmd_squared(x, generated(p), KERNEL, unbiased=False),
    }
    return {name: found[name](params[name]) for name in params}


def gathered(params, x, key, set_key):
    """`objectives` on one of the devices, and the penalty of the latents of all."""
    p = params["elbo"]
    z, prior = encode(p, x)[0], jax.vmap(lambda key: jax.random.normal(key, (2,)))(key)
    z, prior = (jax.lax.all_gather(part, "data", tiled=True) for part in (z, prior))
    return {**objectives(params, x, key, set_key), "penalty": mmd_squared(z, prior, KERNEL)}


def with_gradients(losses, params, *args):
    """({name: value}, {name: gradient}) in one program."""

    def total(params):
        values = losses(params, *args)
        return sum(values.values()), values

    gradients, values = jax.grad(total, has_aux=True)(params)
    return values, gradients


def assert_equal(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.isfinite(a).all(), name
    _, gradients = got
    for name, gradient in gradients.items():  # each one has a gradient to compare
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3, name


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices; run in a process that has them")
def test_eight_devices_equal_one(key):
    params, x = problem()
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    keys, set_keys = example_keys(key, jnp.arange(len(x))), example_keys(key, jnp.arange(DEVICES))

    def whole(params, x, keys, set_keys):
        """The objectives of the whole batch; where sets are compared, the mean over the devices' shards."""
        of_sets = {name: params[name] for name in OF_SETS}
        shards = x.reshape(DEVICES, -1, 3), keys.reshape(DEVICES, -1), set_keys
        values = objectives({name: params[name] for name in NAMES if name not in OF_SETS}, x, keys, None)
        values |= jax.tree.map(jnp.mean, jax.vmap(objectives, in_axes=(None, 0, 0, 0))(of_sets, *shards))
        prior = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
        return {**values, "penalty": mmd_squared(encode(params["elbo"], x)[0], prior, KERNEL)}

    everything = jax.jit(functools.partial(with_gradients, whole))
    want = everything(params, x, keys, set_keys)

    # jit over a mesh: the same program, the whole batch.
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    assert_equal(everything(place(params, REPLICATED), *place((x, keys, set_keys), SPLIT)), want)

    # shard_map: the mean over devices belongs inside of the loss. A pmean of gradients taken to replicated
    # parameters would come back eight times too large, because these are summed over devices already.
    on_each_device = lambda params, x, keys, set_keys: jax.lax.pmean(gathered(params, x, keys, set_keys[0]), "data")
    inside = jax.shard_map(
        functools.partial(with_gradients, on_each_device),
        mesh=mesh,
        in_specs=(REPLICATED, SPLIT, SPLIT, SPLIT),
        out_specs=REPLICATED,
    )
    assert_equal(jax.jit(inside)(params, x, keys, set_keys), want)

    # pmap: each device has parameters of its own, so here the gradients are averaged. (In `want` those of "elbo" are
    # also those of the penalty.)
    each = {name: params[name] for name in NAMES if name != "elbo"}
    averaged = lambda *args: jax.lax.pmean(with_gradients(objectives, *args), "data")
    shards = x.reshape(DEVICES, -1, 3), keys.reshape(DEVICES, -1), set_keys
    replicas = jax.pmap(averaged, axis_name="data", in_axes=(None, 0, 0, 0))(each, *shards)
    assert_equal(
        jax.tree.map(lambda leaf: leaf[0], replicas), tuple({name: part[name] for name in each} for part in want)
    )


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices; run in a process that has them")
def test_one_key_is_enough_under_jit(key):
    params, x = problem()
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    # One key for the batch: the draws are those of one device, whatever the layout.
    everything = jax.jit(functools.partial(with_gradients, lambda params, x, key: objectives(params, x, key, key)))
    placed = place(params, REPLICATED), place(x, SPLIT), place(key, REPLICATED)
    assert_equal(everything(*placed), everything(params, x, key))


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="runs in this process already")
def test_eight_devices_equal_one_in_a_process_that_has_them():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Compiling is all that this costs, so without optimisation.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    targets = [f"{__file__}::{name}" for name in ("test_eight_devices_equal_one", "test_one_key_is_enough_under_jit")]
    done = subprocess.run([*command, *targets], capture_output=True, text=True, env=environment)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
