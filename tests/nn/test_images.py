"""The published networks: shapes, channels, parameters' dtype, compute dtype, training mode."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spread_jax import GaussianNoise, spread_gan_losses
from spread_jax.nn import Discriminator28, Discriminator64, Encoder28, Encoder64, Generator28, Generator64


def kernel_shapes(module, *arguments):
    """Shapes of the kernels in the order of the layers, without computing anything."""
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), *arguments)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"], variables


def test_encoder_64_is_as_published():
    shapes, _ = kernel_shapes(Encoder64(latent_dim=64), jnp.zeros((1, 64, 64, 3)))
    assert shapes == [
        (5, 5, 3, 128),
        (5, 5, 128, 256),
        (5, 5, 256, 512),
        (5, 5, 512, 1024),
        (4 * 4 * 1024, 64),
        (4 * 4 * 1024, 64),
    ]


def test_generator_64_from_4x4_is_as_published():
    shapes, _ = kernel_shapes(Generator64(start=4), jnp.zeros((1, 64)))
    channels = [1024, 512, 256, 128, 64, 3]
    assert shapes == [*((5, 5, a, b) for a, b in itertools.pairwise(channels)), (64, 4 * 4 * 1024)]


def test_generator_64_from_8x8_is_the_wae_baselines():
    shapes, _ = kernel_shapes(Generator64(start=8), jnp.zeros((1, 64)))
    channels = [1024, 512, 256, 128, 3]
    assert shapes == [*((5, 5, a, b) for a, b in itertools.pairwise(channels)), (64, 8 * 8 * 1024)]


def test_28_pair_is_as_published():
    shapes, _ = kernel_shapes(Encoder28(latent_dim=10), jnp.zeros((1, 28, 28, 1)))
    assert shapes == [(4, 4, 1, 64), (4, 4, 64, 128), (7 * 7 * 128, 1024), (1024, 10), (1024, 10)]
    shapes, _ = kernel_shapes(Generator28(), jnp.zeros((1, 10)))
    assert shapes == [(4, 4, 128, 64), (4, 4, 64, 1), (10, 1024), (1024, 7 * 7 * 128)]


def test_generator_64_refuses_another_start():
    with pytest.raises(ValueError, match="start must be 4 or 8, got 16"):
        Generator64(start=16).init(jax.random.key(0), jnp.zeros((1, 2)), train=False)


PAIRS = {
    "64 from 4": (Encoder64(6, width=4), Generator64(width=4), (64, 64, 3)),
    "64 from 8": (Encoder64(6, width=4), Generator64(width=4, start=8), (64, 64, 3)),
    "28": (Encoder28(6, width=4), Generator28(width=4), (28, 28, 1)),
}


@pytest.mark.parametrize(("name", "compute"), [("64 from 4", "float32"), ("64 from 8", "bfloat16"), ("28", "float32")])
def test_forward_and_backward(name, compute):
    encoder, generator, shape = PAIRS[name]
    encoder, generator = encoder.copy(dtype=jnp.dtype(compute)), generator.copy(dtype=jnp.dtype(compute))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *shape)), jnp.float32)

    @jax.jit
    def create(key):
        return (
            encoder.init(key, x, train=False),
            generator.init(key, jnp.zeros((3, 6)), train=False),
        )

    @jax.jit
    def step(variables):
        def loss(params):
            (mean, log_std), seen = encoder.apply(
                {**variables[0], "params": params[0]}, x, train=True, mutable=["batch_stats"]
            )
            image, drawn = generator.apply(
                {**variables[1], "params": params[1]}, mean, train=True, mutable=["batch_stats"]
            )
            return jnp.square(image - x).mean() + log_std.mean(), (mean, log_std, image, seen, drawn)

        return jax.value_and_grad(loss, has_aux=True)([v["params"] for v in variables])

    variables = create(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    (_, (mean, log_std, image, *statistics)), gradient = step(variables)
    assert mean.shape == log_std.shape == (3, 6)
    assert image.shape == x.shape
    assert {value.dtype.name for value in (mean, log_std, image)} == {"float32"}
    assert 0 < image.min() < image.max() < 1
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for before, after in zip((v["batch_stats"] for v in variables), statistics, strict=True):
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after["batch_stats"])
        assert min(jax.tree.leaves(moved)) > 0


def test_evaluation_treats_examples_apart():
    """Without training, a row does not depend on the other rows of its batch."""
    encoder, _, shape = PAIRS["28"]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *shape)), jnp.float32)
    variables = encoder.init(jax.random.key(0), x, train=False)
    evaluate = lambda x: encoder.apply(variables, x, train=False)[0]
    np.testing.assert_allclose(evaluate(x)[:1], evaluate(x[:1]), rtol=1e-4, atol=1e-5)


def test_discriminators_mirror_the_generators():
    for module, shape, expected in (
        (Discriminator64(width=4), (64, 64, 3), [(5, 5, 3, 4), (5, 5, 4, 8), (5, 5, 8, 16), (5, 5, 16, 32), (512, 1)]),
        (Discriminator28(width=4), (28, 28, 1), [(4, 4, 1, 4), (4, 4, 4, 8), (392, 64), (64, 1)]),
    ):
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
        assert set(variables) == {"params"}  # no statistics of a batch
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        assert [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"] == expected


def test_a_discriminator_of_equal_distributions_ends_at_2_log_2():
    """The logistic loss 2 log 2 - 2 JS of two equal sets, never below 2 log 2 and there at v = 0; each image alone."""
    discriminator, noise, optimizer = Discriminator28(width=2), GaussianNoise(1e-3), optax.adam(0.02)
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.uniform(size=(8, 28, 28, 1)), jnp.float32) for _ in range(2))
    shapes = jax.eval_shape(discriminator.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)

    @jax.jit
    def step(params, opt_state, x):
        def loss(params):
            v = lambda y: discriminator.apply(params, y)
            losses = spread_gan_losses(x, x[::-1], v, noise, key=jax.random.key(1))
            return 2 * jnp.log(2.0) - 2 * losses.divergence, v(x)

        (value, v), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, v, gradient

    opt_state = optimizer.init(params)
    even = {"params": {**params["params"], "score": jax.tree.map(jnp.zeros_like, params["params"]["score"])}}
    assert float(step(even, opt_state, x)[2]) == pytest.approx(2 * np.log(2), abs=1e-6)
    alone, among_others = (step(params, opt_state, batch)[3] for batch in (x, other.at[0].set(x[0])))
    np.testing.assert_allclose(alone[0], among_others[0], rtol=1e-4, atol=1e-5)
    assert np.abs(alone[1:] - among_others[1:]).min() > 1e-4
    values = []
    params["params"]["score"] = jax.tree.map(lambda leaf: 5 * leaf, params["params"]["score"])
    for _ in range(60):
        params, opt_state, value, _, gradient = step(params, opt_state, x)
        values.append(float(value))
    assert values[0] > 2 * np.log(2) + 0.01
    assert min(values) > 2 * np.log(2) - 1e-3
    assert values[-1] == pytest.approx(2 * np.log(2), abs=5e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
