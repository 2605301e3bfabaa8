"""Every objective on eight devices equals one device, in value and gradient: jit over a mesh, shard_map, pmap.

Under jit with sharded data the program is the one of a single device, so the key is the same and so is all noise.
shard_map and pmap call the objective once on each device with a key of its own, fold_in(key, device); the mean
over devices is then the mean over the same shards and keys on one device. For the means over examples (the bounds,
a GAN's losses with linear terms) that is the objective of the whole batch with other draws. The penalty of
`wae_mmd_loss` compares sets: a shard's is another, noisier, unbiased estimate, and only jit over a mesh or gathered
latents give that of the whole batch. The same holds for `mmd_squared`.
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
    elbo,
    jensen_shannon,
    mmd_squared,
    spread_divergence,
    spread_elbo,
    spread_gan_losses,
    spread_importance_bound,
    wae_mmd_loss,
)

DEVICES = 8
KERNEL = GaussianKernel(1.0)
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")


def problem():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4 * DEVICES, 3)), jnp.float32)
    shapes = {"encode": (3, 2), "log_std": (2,), "decode": (2, 3), "critic": (3,), "log_scale": ()}
    params = {name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return params, x


def encode(params, y):
    return jnp.tanh(y @ params["encode"]), jnp.broadcast_to(params["log_std"], (len(y), 2))


def objectives(params, x, key):
    """Each objective as one number to minimise, a function of every parameter it has."""
    networks = functools.partial(encode, params), lambda z: z @ params["decode"]
    noise = LaplaceNoise(jnp.exp(params["log_scale"]))
    generated = x @ params["encode"] @ params["decode"]
    critic = lambda y: jnp.tanh(y) @ params["critic"]
    autoencoder = wae_mmd_loss(x, lambda x: networks[0](x)[0], networks[1], key=key, weight=2.0, kernel=KERNEL)
    gan = spread_gan_losses(x, generated, critic, noise, key=key, divergence=jensen_shannon)
    estimate = spread_divergence(x, generated, noise, num_samples=2 * len(x), key=key)
    return {
        "elbo": -elbo(x, *networks, noise, key=key).elbo.mean(),
        "spread_elbo": -spread_elbo(x, *networks, noise, key=key, num_spread_samples=2).elbo.mean(),
        "importance": -spread_importance_bound(x, *networks, noise, key=key, num_samples=3).bound.mean(),
        "wae": autoencoder.loss,
        "gan_critic": gan.critic,
        "gan_generator": gan.generator,
        "spread_divergence": estimate.value,
        "mmd_squared": mmd_squared(x, generated, KERNEL, unbiased=False),
    }


def with_gradients(losses, params, *args):
    """({name: value}, {name: gradient}) in one program."""
    gradients, values = jax.jacrev(lambda params: (losses(params, *args),) * 2, has_aux=True)(params)
    return values, gradients


def assert_equal(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.isfinite(a).all(), name
    values, gradients = got
    for name in values:  # each one has a gradient to compare
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients[name])) > 1e-3, name


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices; run in a process that has them")
def test_eight_devices_equal_one(key):
    params, x = problem()
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    everything = jax.jit(functools.partial(with_gradients, objectives))

    # jit over a mesh: the same program, the same key, the whole batch.
    placed = jax.device_put(params, NamedSharding(mesh, REPLICATED)), jax.device_put(x, NamedSharding(mesh, SPLIT))
    sharded = everything(*placed, jax.device_put(key, NamedSharding(mesh, REPLICATED)))
    assert_equal(sharded, everything(params, x, key))

    # What one device makes of the same shards with the same keys.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(DEVICES))
    shards = x.reshape(DEVICES, -1, 3)
    mean = lambda tree: jax.tree.map(lambda leaf: leaf.mean(axis=0), tree)
    mean_of_shards = lambda params: mean(jax.vmap(objectives, in_axes=(None, 0, 0))(params, shards, keys))
    want = jax.jit(functools.partial(with_gradients, mean_of_shards))(params)

    # shard_map: the mean over devices belongs inside of the loss. A pmean of gradients taken to replicated
    # parameters would come back eight times too large, because these are summed over devices already.
    def on_each_device(params, x, key):
        local_key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return jax.lax.pmean(objectives(params, x, local_key), "data")

    in_specs = (REPLICATED, SPLIT, REPLICATED)
    inside = jax.shard_map(
        functools.partial(with_gradients, on_each_device), mesh=mesh, in_specs=in_specs, out_specs=REPLICATED
    )
    assert_equal(jax.jit(inside)(params, x, key), want)

    # pmap: each device has parameters of its own, so here the gradients are averaged.
    averaged = lambda *args: jax.lax.pmean(with_gradients(objectives, *args), "data")
    replicas = jax.pmap(averaged, axis_name="data", in_axes=(None, 0, 0))(params, shards, keys)
    assert_equal(jax.tree.map(lambda leaf: leaf[0], replicas), want)

    # Gathered latents give shard_map the penalty of the whole batch.
    prior = jax.random.normal(key, (len(x), 2))

    def penalty(params, x, prior):
        z = encode(params, x)[0]
        return mmd_squared(z, prior, KERNEL)

    def gathered(params, x, prior):
        z = encode(params, x)[0]
        z, prior = (jax.lax.all_gather(part, "data", tiled=True) for part in (z, prior))
        return jax.lax.pmean(mmd_squared(z, prior, KERNEL), "data")

    mapped = jax.shard_map(gathered, mesh=mesh, in_specs=(REPLICATED, SPLIT, SPLIT), out_specs=REPLICATED)
    both = [jax.jit(jax.value_and_grad(f))(params, x, prior) for f in (mapped, penalty)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="runs in this process already")
def test_eight_devices_equal_one_in_a_process_that_has_them():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Compiling is all that this costs, so without optimisation.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    target = f"{__file__}::test_eight_devices_equal_one"
    done = subprocess.run([*command, target], capture_output=True, text=True, env=environment)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
