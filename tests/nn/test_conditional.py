"""The networks of (y, sigma): what they are at the start, at the ends of the scales, and for each example alone."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spread_jax import GaussianNoise, spread_gan_losses
from spread_jax.nn import Denoiser, ScaleCritic
from spread_jax.nn.conditional import _Conditional, haar_parts

RNG = np.random.default_rng(0)
NETWORKS = {"critic": ScaleCritic(width=4), "denoiser": Denoiser(width=4)}
Y = jnp.asarray(RNG.uniform(size=(3, 12, 16, 2)), jnp.float32)
SIGMA = jnp.asarray([0.02, 0.3, 2.0], jnp.float32)


@functools.cache
def variables_of(name):
    """Initial values, and ones of which none is 0."""
    initial = jax.jit(NETWORKS[name].init)(jax.random.key(0), Y, SIGMA)
    rng = np.random.default_rng(1)
    return initial, jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), initial
    )


@functools.cache
def compiled(network):
    return jax.jit(network.apply)


def apply(name, variables, y=Y, sigma=SIGMA):
    return np.asarray(compiled(NETWORKS[name])(variables, y, sigma))


def column(sigma):
    return np.asarray(sigma)[:, None, None, None]


@pytest.mark.parametrize(
    ("shape", "critic", "denoiser"),
    [
        ((16, 16, 3), [3, 2, 4], [2, 4]),
        ((28, 28, 1), [1, 2, 4, 8], [2, 4]),
        ((64, 64, 3), [3, 2, 4, 8, 16], [2, 4, 8, 16]),
        ((256, 256, 3), [3, 2, 4, 8, 16, 16, 16], [2, 4, 8, 16, 16, 16]),
        ((24, 40, 1), [1, 2, 4, 8, 16], [2, 4, 8]),
    ],
)
@jax.numpy_rank_promotion("raise")
@jax.numpy_dtype_promotion("strict")
def test_any_size(shape, critic, denoiser):
    """Channels alone: the critic halves to 4x4 or less, the denoiser down and up while halves are whole and above 4."""
    y, key = jnp.zeros((2, *shape)), jax.random.key(0)
    v, variables = jax.eval_shape(ScaleCritic(width=2).init_with_output, key, y, 0.5)
    assert v.shape == (2,)
    kernels = {name: layer["kernel"].shape for name, layer in variables["params"].items() if "Conv" in name}
    halving = {f"Conv_{i}": (5, 5, *pair) for i, pair in enumerate(itertools.pairwise(critic)) if i}
    assert kernels == {"Conv_0": (3, 3, 4 * critic[0], critic[1])} | halving
    x, variables = jax.eval_shape(Denoiser(width=2).init_with_output, key, y, 0.5)
    assert x.shape == y.shape
    assert set(variables) == {"params"}
    kernels = {name: layer["kernel"].shape for name, layer in variables["params"].items() if "Conv" in name}
    blocks, deepest = 4 * shape[-1], denoiser[-1]
    down = [(3, 3, blocks, 2), *((5, 5, *pair) for pair in itertools.pairwise(denoiser))]
    flat = [*down, (3, 3, deepest, deepest), (3, 3, 2 + blocks, blocks)]
    up = [(5, 5, *pair) for pair in itertools.pairwise(denoiser[::-1])]
    expected = {f"Conv_{i}": kernel for i, kernel in enumerate(flat)}
    assert kernels == expected | {f"ConvTranspose_{i}": kernel for i, kernel in enumerate(up)}


def test_the_start_is_the_linear_one():
    """v = 0, and D is the best linear estimate of independent pixels of that mean and scale."""
    assert np.all(apply("critic", variables_of("critic")[0]) == 0)
    variance = 0.25**2 / (column(SIGMA).astype(np.float64) ** 2 + 0.25**2)
    expected = 0.5 + variance * (np.asarray(Y, np.float64) - 0.5)
    np.testing.assert_allclose(apply("denoiser", variables_of("denoiser")[0]), expected, atol=1e-6)


def test_without_noise_the_denoiser_gives_y():
    _, moved = variables_of("denoiser")
    np.testing.assert_array_equal(apply("denoiser", moved, sigma=jnp.zeros(3)), Y)
    assert np.abs(apply("denoiser", moved, sigma=jnp.full(3, 1e-4)) - Y).max() < 5e-3
    assert np.abs(apply("denoiser", moved, sigma=jnp.full(3, 0.5)) - Y).max() > 0.1


def test_under_endless_noise_the_denoiser_forgets_y():
    _, moved = variables_of("denoiser")
    x, other = (apply("denoiser", moved, y, jnp.full(3, 1e5)) for y in (Y, 1 - Y))
    assert np.abs(x - 0.5).max() > 0.05  # m + s F(0), which is not m alone
    assert np.abs(x - other).max() < 1e-2 * np.abs(x - 0.5).max()


def without_sigma(variables):
    """Scales and shifts that are the same at every sigma."""
    return {
        "params": {
            name: {**layer, "kernel": 0 * layer["kernel"]} if name.startswith("Dense") else layer
            for name, layer in variables["params"].items()
        }
    }


def test_every_scale_looks_alike_to_the_layers():
    """With scales and shifts at rest, only y - m over its scale counts: v and F are the same at two scales."""
    larger = 2 * SIGMA
    blocks = np.asarray(Y, np.float64).reshape(3, 6, 2, 8, 2, 2).transpose(0, 1, 3, 5, 2, 4) - 0.5  # their 2x2 last
    coarse = np.broadcast_to(blocks.mean(axis=(4, 5), keepdims=True), blocks.shape)
    growth = lambda scale: column(
        np.sqrt((scale**2 + np.square(larger, dtype=float)) / (scale**2 + np.square(SIGMA, dtype=float)))
    )[..., None, None]
    grown = 0.5 + growth(0.5) * coarse + growth(0.05) * (blocks - coarse)  # twice the data's scale; that of details
    grown = jnp.asarray(grown.transpose(0, 1, 4, 2, 5, 3).reshape(Y.shape), jnp.float32)
    plain = without_sigma(variables_of("critic")[1])
    np.testing.assert_allclose(apply("critic", plain, grown, larger), apply("critic", plain), rtol=1e-3)

    ratio = growth(0.25)[..., 0, 0]
    plain = without_sigma(variables_of("denoiser")[1])

    def correction(y, sigma):
        sigma = column(sigma).astype(np.float64)
        total = sigma**2 + 0.25**2
        rest = apply("denoiser", plain, jnp.asarray(y, jnp.float32), jnp.asarray(sigma[:, 0, 0, 0], jnp.float32))
        return (rest - 0.5 - 0.25**2 / total * (np.asarray(y) - 0.5)) / (0.25 * sigma / np.sqrt(total))

    np.testing.assert_allclose(correction(0.5 + (Y - 0.5) * ratio, larger), correction(Y, SIGMA), rtol=1e-2, atol=1e-3)


def test_details_pass_by_the_deeper_layers():
    """With everything silent but the first and the last layer of the U-Net, it still sees what the first one sees."""
    params = variables_of("denoiser")[1]["params"]
    last = f"Conv_{max(int(name[5:]) for name in params if name.startswith('Conv_'))}"
    silent = {
        name: layer if name in ("Conv_0", last) else jax.tree.map(jnp.zeros_like, layer)
        for name, layer in params.items()
    }
    kernel = np.array(silent[last]["kernel"])
    kernel[:, :, 4:] = 0  # not from the blocks of y beside them
    silent[last] = {**silent[last], "kernel": jnp.asarray(kernel)}
    seen = apply("denoiser", {"params": silent})
    other = apply("denoiser", {"params": {**silent, "Conv_0": {"kernel": -silent["Conv_0"]["kernel"]}}})
    assert np.abs(seen - other).max() > 0.05


def test_parts_of_blocks():
    """An orthogonal transform, each part of which is one pattern; an odd side counts its last row or column twice."""
    patterns = np.array([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 2
    coarse, fine = haar_parts(jnp.tile(jnp.asarray(patterns, jnp.float32), (1, 3, 2))[..., None])
    assert (coarse.shape, fine.shape) == ((4, 3, 2, 1), (4, 3, 2, 3))
    np.testing.assert_array_equal(jnp.concatenate([coarse, fine], axis=-1)[:, 1, 1], np.eye(4))
    parts = haar_parts(Y)
    np.testing.assert_allclose(sum(jnp.square(part).sum() for part in parts), jnp.square(Y).sum(), rtol=1e-6)
    np.testing.assert_array_equal(fine[:, 0, 0], fine[:, 2, 1])
    doubled = jnp.concatenate([Y, Y[:, -1:]], axis=1)[:, :, :-1]  # 13 rows and 15 columns
    expected = haar_parts(jnp.concatenate([doubled, doubled[:, :, -1:]], axis=2)[:, 1:])
    for found, part in zip(haar_parts(doubled[:, 1:]), expected, strict=True):
        np.testing.assert_array_equal(found, part)
    np.testing.assert_array_equal(haar_parts(doubled[:, 10:])[0][:, 1], haar_parts(doubled[:, [12, 12]])[0][:, 0])


def test_the_blocks_of_y_reach_the_last_layer():
    """With weights for them alone, which copy each pixel: F = c_in (y - m), and D is linear in y."""
    silent = jax.tree.map(jnp.zeros_like, variables_of("denoiser")[0]["params"])
    last = f"Conv_{max(int(name[5:]) for name in silent if name.startswith('Conv_'))}"
    kernel = np.zeros(silent[last]["kernel"].shape, np.float32)
    kernel[1, 1, -8:] = np.eye(8)  # after those of the first layer's size, in the middle of 3x3
    silent[last] = {**silent[last], "kernel": jnp.asarray(kernel)}
    y, sigma = np.asarray(Y, np.float64), column(SIGMA).astype(np.float64)
    expected = 0.5 + (0.25**2 + 0.25 * sigma) / (sigma**2 + 0.25**2) * (y - 0.5)
    np.testing.assert_allclose(apply("denoiser", {"params": silent}), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_brightness_counts(name):
    """A normalisation of the first layer would take 2 y for y."""
    _, moved = variables_of(name)
    dark, bright = (apply(name, moved, 0.5 + t * (Y - 0.5) if name == "denoiser" else t * Y) for t in (1.0, 2.0))
    assert np.abs(bright - dark).max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_sigma_counts_in_any_of_its_shapes(name):
    _, moved = variables_of(name)
    first = apply(name, moved)
    np.testing.assert_array_equal(apply(name, moved, sigma=SIGMA[:, None, None, None]), first)
    one = apply(name, moved, sigma=jnp.float32(0.3))
    np.testing.assert_allclose(one[1], first[1], rtol=1e-5)
    assert np.abs(one[0] - first[0]).max() > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_each_example_by_itself(name):
    _, moved = variables_of(name)
    among_others = apply(name, moved, Y.at[1:].set(2 * Y[1:] - 0.3), SIGMA.at[1:].set(0.7))
    np.testing.assert_array_equal(among_others[0], apply(name, moved)[0])
    assert np.abs(among_others[1:] - apply(name, moved)[1:]).max() > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_native_forms(name, x64):
    network = NETWORKS[name]
    variables, y, sigma = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (variables_of(name)[1], Y[:2], SIGMA[:2]))
    weights = jnp.asarray(RNG.normal(size=(2, *Y.shape[1:]) if name == "denoiser" else 2))

    def gradients(native):
        clone = network.clone(dtype=jnp.float64, native_gradients=native)
        loss = lambda variables, y: jnp.sum(weights * clone.apply(variables, y, sigma))
        return jax.jit(jax.grad(loss, (0, 1)))(variables, y)

    for ours, native in zip(*(jax.tree.leaves(gradients(native)) for native in (False, True)), strict=True):
        assert ours.dtype == jnp.float64
        assert np.abs(native).max() > 0
        np.testing.assert_allclose(ours, native, atol=1e-11 * np.abs(native).max(), rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@jax.numpy_rank_promotion("raise")
@jax.numpy_dtype_promotion("strict")
def test_half_precision(name):
    """Parameters and results stay float32; the layers between round to 8 bits."""
    _, moved = variables_of(name)
    half = compiled(NETWORKS[name].clone(dtype=jnp.bfloat16))(moved, Y, SIGMA)
    whole = apply(name, moved)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


@pytest.mark.parametrize("kind", [ScaleCritic, Denoiser])
def test_what_has_no_network_is_refused(kind):
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        kind(width=0)
    with pytest.raises(ValueError, match=r"a scalar or one number for each of the 3 examples, got \(2,\)"):
        jax.eval_shape(kind(width=2).init, jax.random.key(0), Y, SIGMA[:2])


def test_a_denoiser_needs_blocks():
    with pytest.raises(ValueError, match=r"y must have an even height and width, got shape \(1, 6, 5, 1\)"):
        jax.eval_shape(Denoiser(width=2).init, jax.random.key(0), jnp.zeros((1, 6, 5, 1)), 0.5)


def test_a_critic_of_equal_distributions_ends_at_2_log_2():
    """The logistic loss 2 log 2 - 2 JS of two equal sets, never below 2 log 2 and there at v = 0; each image alone."""
    critic, noise, optimizer = ScaleCritic(width=2), GaussianNoise(1e-3), optax.adam(0.02)
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.uniform(size=(8, 8, 8, 1)), jnp.float32) for _ in range(2))
    shapes = jax.eval_shape(critic.init, jax.random.key(0), x, 1.0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)

    @jax.jit
    def step(params, opt_state, x):
        def loss(params):
            v = lambda y: critic.apply(params, y, 1.0)
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


class Layer(_Conditional):
    """One modulated normalisation by itself."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, h, sigma):
        return self._modulated(h, sigma)


def test_a_layer_is_normalised_and_modulated_by_waves_of_log_sigma(x64):
    """By NumPy, at scales from below the least that is told apart to large ones, of images of little contrast."""
    rng = np.random.default_rng(2)
    h, sigma = 0.01 * rng.normal(size=(5, 4, 4, 3)), np.array([1e-8, 1e-6, 1e-5, 0.3, 20.0])
    kernel = rng.normal(size=(12, 6))
    found = Layer().apply({"params": {"Dense_0": {"kernel": kernel, "bias": np.zeros(6)}}}, h, jnp.asarray(sigma))

    angles = np.log(np.maximum(sigma, 1e-6))[:, None] * [0.25, 0.5, 1, 2, 4, 8]
    scale, shift = np.split(np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ kernel, 2, axis=1)
    mean, variance = (f(h, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    normal = (h - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(found, normal * (1 + scale[:, None, None]) + shift[:, None, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(shift[0], shift[1])
    assert np.abs(shift[1] - shift[2]).max() > 0.1


def test_the_layers_in_the_middle_are_passed_by():
    """With the one at the smallest size silent, the U-Net still sees what the halving before it has seen."""
    params = variables_of("denoiser")[1]["params"]
    middle = f"Conv_{max(int(name[5:]) for name in params if name.startswith('Conv_')) - 1}"
    convolutions = [name for name in params if name.startswith("Conv_")]
    assert (len(convolutions), params[middle]["kernel"].shape[:2]) == (4, (3, 3))  # first, halving, middle, last
    silent = {
        name: jax.tree.map(jnp.zeros_like, layer) if name == middle or name.startswith("Dense") else layer
        for name, layer in params.items()
    }
    seen, other = (
        apply("denoiser", {"params": {**silent, "Conv_1": {"kernel": sign * silent["Conv_1"]["kernel"]}}})
        for sign in (1, -1)
    )
    assert np.abs(seen - other).max() > 0.05
