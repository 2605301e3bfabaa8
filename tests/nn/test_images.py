"""The networks: the published ones to the number, every size, parameters' dtype, compute dtype, training mode."""

import functools
import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.nn import (
    DenseEncoder,
    DenseGenerator,
    Encoder,
    Generator,
    image_encoder,
    image_generator,
)


def kernel_shapes(module, shape):
    """Shapes of the kernels, convolutions first, without computing anything; and of all variables."""
    init = functools.partial(module.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *shape)))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"], variables


def chain(*channels, taps=5):
    return [(taps, taps, a, b) for a, b in itertools.pairwise(channels)]


PUBLISHED = {
    "encoder": (
        Encoder(latent_dim=64),
        (64, 64, 3),
        [*chain(3, 128, 256, 512, 1024), (4 * 4 * 1024, 64), (4 * 4 * 1024, 64)],
    ),
    "generator": (Generator(), (64,), [*chain(1024, 512, 256, 128, 64, 3), (64, 4 * 4 * 1024)]),
    "generator of the WAE": (Generator(start=8), (64,), [*chain(1024, 512, 256, 128, 3), (64, 8 * 8 * 1024)]),
    "encoder 28": (
        DenseEncoder(latent_dim=10),
        (28, 28, 1),
        [*chain(1, 64, 128, taps=4), (7 * 7 * 128, 1024), (1024, 10), (1024, 10)],
    ),
    "generator 28": (DenseGenerator(), (10,), [*chain(128, 64, 1, taps=4), (10, 1024), (1024, 7 * 7 * 128)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_as_published(name):
    module, shape, expected = PUBLISHED[name]
    shapes, variables = kernel_shapes(module, shape)
    assert shapes == expected
    assert set(variables) == {"params", "batch_stats"}


def wave(shape):
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


def projection(tree):
    """One number that changes with each of a tree's."""
    numbers = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
    return float(numbers @ wave(numbers.shape))


# Of each network at width 4 and key 3, as first released: a hash of the names and shapes of its variables, the
# projections of their initial values, and of the output. A checkpoint and a seed then mean the same network.
RELEASED = {
    "encoder": (Encoder(6, width=4), (64, 64, 3), "30393e85", -1.3597732, -1.404142),
    "generator": (Generator(width=4), (6,), "8b231a92", -28.498511, 0.624087),
    "generator of the WAE": (Generator(width=4, start=8), (6,), "8075b69d", -27.421582, 1.306824),
    "encoder 28": (DenseEncoder(6, width=4), (28, 28, 1), "39f47ecb", -0.9808667, -1.827770),
    "generator 28": (DenseGenerator(width=4), (6,), "f227bbd9", -32.797070, -0.003083),
}


@functools.cache
def computed(name):
    """Initial variables of a network, and its output where none of them is left at 0 or 1."""
    module, shape, *_ = RELEASED[name]
    x = jnp.asarray(wave((2, *shape)), jnp.float32)

    @jax.jit
    def compute(key):
        variables = module.init(key, x, train=False)
        moved = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(wave(leaf.shape), jnp.float32), variables)
        return variables, module.apply(moved, x, train=False)

    return compute(jax.random.key(3))


@pytest.mark.parametrize("name", RELEASED)
def test_networks_are_those_released(name):
    _, _, names, initial, output = RELEASED[name]
    variables, actual = computed(name)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    found = hashlib.sha256("".join(jax.tree_util.keystr(path) + str(leaf.shape) for path, leaf in leaves).encode())
    assert found.hexdigest()[:8] == names
    assert projection(variables) == pytest.approx(initial, abs=2e-5)
    assert projection(actual) == pytest.approx(output, abs=2e-5)


SIZES = [(16, 1), (28, 3), (32, 1), (56, 3), (64, 1), (112, 1), (128, 3), (224, 1), (256, 3)]


@pytest.mark.parametrize(("side", "channels"), SIZES)
@jax.numpy_rank_promotion("raise")
@jax.numpy_dtype_promotion("strict")
def test_networks_for_every_size(side, channels):
    """Shapes alone: each halves down to 4x4 or 7x7 or comes up from there, and none is wider than 8 times the width."""
    shape = (side, side, channels)
    least = 7 if side % 7 == 0 else 4
    halvings = (side // least).bit_length() - 1
    widths = [channels, *(min(2 * 2**i, 16) for i in range(halvings))]

    def made(network, x, **mode):
        output, variables = jax.eval_shape(functools.partial(network.init_with_output, **mode), jax.random.key(0), x)
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        return output, [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"]

    y, z = jnp.zeros((3, *shape)), jnp.zeros((3, 5))
    (mean, log_std), of_encoder = made(image_encoder(shape, latent_dim=5, width=2), y, train=False)
    assert mean.shape == log_std.shape == (3, 5)
    assert [kernel[2:] for kernel in of_encoder[:halvings]] == list(itertools.pairwise(widths))
    assert of_encoder[halvings][0] == least**2 * widths[-1]
    for start in (4,) if least == 7 else (4, 8):
        x, kernels = made(image_generator(shape, width=2, start=start), z, train=False)
        assert x.shape == y.shape
        assert max(kernel[2] for kernel in kernels if len(kernel) == 4) <= 16


REFUSED = {
    "side": (
        lambda: image_encoder((48, 48, 3), latent_dim=2, width=2),
        r"no network for images of shape \(48, 48, 3\)",
    ),
    "its sides": (
        lambda: image_generator((8, 8, 3), width=2),
        "a side of 16, 28, 32, 56, 64, 112, 128, 224 or 256 pixels",
    ),
    "not square": (lambda: image_generator((64, 32, 3), width=2), "square"),
    "no channels": (lambda: image_generator((64, 64), width=2), r"must be \[height, width, channels\]"),
    "no shape": (lambda: image_generator(64, width=2), r"must be \[height, width, channels\]"),
    "width": (lambda: image_encoder((64, 64, 3), latent_dim=2, width=0), "width must be at least 1, got 0"),
    "fraction": (lambda: image_generator((28, 28, 1), width=1.5), "width must be a Python integer, got float"),
    "odd width": (lambda: image_generator((64, 64, 3), width=3), "width must be an even number.*; got 3"),
    "latent": (lambda: image_encoder((28, 28, 1), latent_dim=0, width=2), "latent_dim must be at least 1"),
    "start": (lambda: image_generator((64, 64, 3), width=2, start=16), "start must be 4 or 8, got 16"),
    "start of 28": (lambda: image_generator((28, 28, 1), width=2, start=8), "images of 28 start from 7x7"),
    "generator": (lambda: Generator(image_size=28), "image_size must be one of 16, 32, 64, 128 or 256, got 28"),
    "dense generator": (lambda: DenseGenerator(image_size=64), "image_size must be one of 28, 56, 112 or 224, got 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_network_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(TypeError if name == "fraction" else ValueError, match=message):
        build()


def test_odd_widths_where_nothing_is_halved():
    assert image_generator((64, 64, 3), width=3, start=8).width == 3
    assert image_generator((28, 28, 1), width=3).width == 3


PAIRS = {"64 from 4": ("encoder", "generator"), "64 from 8": ("encoder", "generator of the WAE"),
         "28": ("encoder 28", "generator 28")}  # fmt: skip


@pytest.mark.parametrize(("pair", "compute"), [("64 from 4", "float32"), ("64 from 8", "bfloat16"), ("28", "float32")])
def test_forward_and_backward(pair, compute):
    encoder, generator = (RELEASED[name][0].copy(dtype=jnp.dtype(compute)) for name in PAIRS[pair])
    variables = [computed(name)[0] for name in PAIRS[pair]]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *RELEASED[PAIRS[pair][0]][1])), jnp.float32)

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

    for network, argument in ((encoder, x), (generator, jnp.zeros((3, 6)))):
        shapes = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), argument)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    (_, (mean, log_std, image, *statistics)), gradient = step(variables)
    assert mean.shape == log_std.shape == (3, 6)
    assert image.shape == x.shape
    assert {value.dtype.name for value in (mean, log_std, image)} == {"float32"}
    assert 0 < image.min() < image.max() < 1
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for before, after in zip((v["batch_stats"] for v in variables), statistics, strict=True):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after["batch_stats"])
        assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("name", RELEASED)
@jax.numpy_rank_promotion("raise")
@jax.numpy_dtype_promotion("strict")
def test_half_precision_is_promoted_where_nothing_may_be(name):
    """Traced alone: statistics of half precision are taken in float32."""
    module, shape, *_ = RELEASED[name]
    run = functools.partial(module.copy(dtype=jnp.bfloat16).init_with_output, train=True)
    output, variables = jax.eval_shape(run, jax.random.key(0), jnp.zeros((2, *shape)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((output, variables))} == {"float32"}


def test_statistics_keep_nine_tenths_of_what_they_were():
    """One step on dense layers' outputs, against NumPy: decay 0.9, the variance of the batch without its correction."""
    module, z = DenseGenerator(width=2), wave((5, 3))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros(z.shape))
    variables = jax.tree.map(lambda leaf: np.asarray(rng.uniform(0.5, 2.0, leaf.shape), np.float32), shapes)
    step = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
    after = step(variables, jnp.asarray(z, jnp.float32))[1]["batch_stats"]
    first = z @ np.float64(variables["params"]["Dense_0"]["kernel"])
    norm = variables["params"]["BatchNorm_0"]
    normalised = (first - first.mean(axis=0)) / np.sqrt(first.var(axis=0) + 1e-5) * norm["scale"] + norm["bias"]
    second = np.maximum(normalised, 0) @ np.float64(variables["params"]["Dense_1"]["kernel"])
    for name, h in (("BatchNorm_0", first), ("BatchNorm_1", second)):
        before = variables["batch_stats"][name]
        np.testing.assert_allclose(after[name]["mean"], 0.9 * before["mean"] + 0.1 * h.mean(axis=0), rtol=2e-5)
        np.testing.assert_allclose(after[name]["var"], 0.9 * before["var"] + 0.1 * h.var(axis=0), rtol=2e-5)


def test_evaluation_treats_examples_apart():
    """Without training, a row does not depend on the other rows of its batch."""
    module, shape, *_ = RELEASED["encoder 28"]
    variables, _ = computed("encoder 28")
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *shape)), jnp.float32)
    evaluate = jax.jit(lambda x: module.apply(variables, x, train=False)[0])
    np.testing.assert_array_equal(evaluate(x)[0], evaluate(x.at[1:].set(0.5))[0])
    assert np.abs(evaluate(x)[1:] - evaluate(x.at[1:].set(0.5))[1:]).max() > 1e-3
