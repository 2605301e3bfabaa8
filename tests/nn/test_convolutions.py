"""The convolutions against lax and Flax: value, both gradients, second order, parameters."""

import functools
import os

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from spread_jax.nn import (
    Conv,
    ConvTranspose,
    Denoiser,
    DenseEncoder,
    DenseGenerator,
    Encoder,
    Generator,
    ScaleCritic,
    conv,
    conv_transpose,
    convolutions,
    image_encoder,
    image_generator,
)

RNG = np.random.default_rng(0)

# (operation, input size, in channels, out channels, kernel size, stride): layers in use, of which every one has a test
# below too, an odd size, an even kernel, a stride larger than the kernel, few channels on either side at stride 1, many
# channels and few positions (products), and `up` to few and to many channels.
LAYERS = [
    (conv, 64, 3, 4, 5, 2),
    (conv, 8, 4, 6, 5, 2),
    (conv, 28, 1, 4, 4, 2),
    (conv, 7, 2, 3, 5, 2),
    (conv, 9, 2, 5, 3, 3),
    (conv, 6, 3, 2, 5, 1),
    (conv, 5, 3, 2, 5, 1),
    (conv_transpose, 4, 6, 4, 5, 2),
    (conv_transpose, 16, 4, 2, 5, 2),
    (conv_transpose, 7, 3, 4, 4, 2),
    (conv_transpose, 5, 2, 3, 2, 3),
    (conv_transpose, 32, 4, 3, 5, 1),
    (conv_transpose, 9, 4, 3, 5, 1),
    (conv_transpose, 6, 33, 3, 5, 1),
    (conv, 4, 5, 6, 4, 2),
    (conv, 4, 3, 64, 3, 2),
    (conv, 5, 3, 80, 4, 3),
    (conv_transpose, 2, 33, 5, 5, 2),
    (conv_transpose, 2, 34, 3, 4, 3),
    (conv_transpose, 5, 3, 17, 5, 2),
    (conv_transpose, 5, 2, 18, 2, 3),
    (conv, 2, 5, 40, 3, 1),
    (conv_transpose, 2, 40, 5, 3, 1),
    (conv, 12, 3, 6, 5, 2),
    (conv, 8, 4, 6, 3, 2),
    (conv, 6, 4, 7, 5, 1),
    (conv_transpose, 10, 6, 3, 5, 1),
]


# One of each form in float32 as well: phases; blocks of the output; of both images, in the value and in the kernel's
# gradient; all phases as channels; products.
IN_FLOAT32 = [
    (conv, 8, 4, 6, 5, 2),
    (conv, 12, 3, 6, 5, 2),
    (conv, 4, 3, 64, 3, 2),
    (conv_transpose, 5, 3, 17, 5, 2),
    (conv_transpose, 10, 6, 3, 5, 1),
    (conv_transpose, 2, 33, 5, 5, 2),
]


def both_forms(operation, size, in_channels, out_channels, taps, stride, dtype, batch=2):
    x = jnp.asarray(RNG.normal(size=(batch, size, size, in_channels)), dtype)
    kernel = jnp.asarray(RNG.normal(size=(taps, taps, in_channels, out_channels)), dtype)
    ours = lambda x, k: operation(x, k, stride)
    native = lambda x, k: operation(x, k, stride, native=True)
    return x, kernel, ours, native


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, kernel, cotangent):
    value, pull = jax.vjp(function, x, kernel)
    return value, pull(cotangent)


@functools.cache
def expected_of(layer, dtype):
    """Image, kernel, cotangent of a layer, and its value and gradients by lax."""
    x, kernel, _, native = both_forms(*layer, dtype, batch=1 if layer[1] > 64 else 2)
    cotangent = jnp.asarray(RNG.normal(size=jax.eval_shape(native, x, kernel).shape), dtype)
    arrays = x, kernel, cotangent
    return arrays, value_and_gradients(native, *arrays)


def assert_laxs(layer, dtype):
    """The value and both gradients are lax's, to rounding."""
    arrays, expected = expected_of(layer, dtype)
    ours = lambda x, kernel: layer[0](x, kernel, layer[-1])
    limit = {"float32": 1e-5, "float64": 1e-13}[dtype]
    for a, e in zip(*map(jax.tree.leaves, (value_and_gradients(ours, *arrays), expected)), strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype == dtype
        assert np.abs(a - e).max() <= limit * np.abs(e).max(), layer


def layer_name(layer):
    return "-".join(map(str, (layer[0].__name__, *layer[1:])))


@pytest.mark.parametrize("layer", LAYERS, ids=layer_name)
def test_value_and_gradients_are_laxs(layer, x64):
    assert_laxs(layer, "float64")


@pytest.mark.parametrize("layer", IN_FLOAT32, ids=layer_name)
def test_value_and_gradients_in_single_precision(layer):
    assert layer in LAYERS
    assert_laxs(layer, "float32")


# A TPU has one form of its own, of `up` with at least as many pixels as taps: an odd size, a stride larger than the
# kernel, and as the gradient of `down`.
OTHERS = [("cuda", layer) for layer in LAYERS if layer[-1] > 1]
OTHERS += [
    ("tpu", (conv_transpose, 7, 3, 4, 4, 2)),
    ("tpu", (conv_transpose, 5, 2, 3, 2, 3)),
    ("tpu", (conv, 12, 3, 6, 5, 2)),
]


@pytest.mark.parametrize(("platform", "layer"), OTHERS, ids=[f"{name}-{layer_name(layer)}" for name, layer in OTHERS])
def test_forms_of_other_platforms(platform, layer, monkeypatch, x64):
    """The branches that no CPU takes, run on one."""

    def branch(*arrays, default, **branches):
        return branches.get(platform, default)(*arrays)

    monkeypatch.setattr(convolutions.lax, "platform_dependent", branch)
    assert_laxs(layer, "float64")


def lowered_for(platform, layer):
    """The convolutions and barriers in the program of a value and its gradients, uncompiled."""
    x, kernel, ours, _ = both_forms(*layer, "float32")
    gradients = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(ours(x, kernel) ** 2), (0, 1)))
    text = gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    return [line for line in text.splitlines() if "stablehlo.convolution" in line or "optimization_barrier" in line]


def test_a_gpu_gets_gradient_routines():
    lines = lowered_for("cuda", (conv_transpose, 8, 6, 40, 5, 2))
    for operation in ("lhs_dilate = [2, 2]", "stride = [2, 2]", "rhs_dilate = [2, 2]"):
        assert sum(operation in line for line in lines) == 1
    # One for the reversed kernel, and one for the padded cotangent in each gradient, which XLA makes one again.
    assert sum("optimization_barrier" in line for line in lines) == 3
    assert len(lines) == 6
    # With more taps than pixels: phases of the value, each padded, the gradient to x, and a product for the kernel's.
    lines = lowered_for("cuda", (conv_transpose, 4, 6, 40, 5, 2))
    assert not any("dilate = [2, 2]" in line for line in lines)
    assert sum("convolution" in line for line in lines) == 5


def test_a_tpu_dilates_and_pads_by_itself():
    lines = lowered_for("tpu", (conv_transpose, 8, 6, 40, 5, 2))
    assert len(lines) == 3
    assert sum("lhs_dilate = [2, 2]" in line for line in lines) == 1
    assert not any("optimization_barrier" in line for line in lines)
    lines = lowered_for("tpu", (conv_transpose, 4, 6, 40, 5, 2))
    assert not any("lhs_dilate = [2, 2]" in line for line in lines)
    assert len(lines) == 6


# Channels change the rounding only: narrow networks here, SPREAD_JAX_WIDTHS=16,32,64,128 for the published ones.
WIDTHS = [int(width) for width in os.environ.get("SPREAD_JAX_WIDTHS", "2").split(",")]


def layers_of(networks, monkeypatch):
    """(operation, size, in channels, out channels, kernel size, stride) of every convolution of networks."""
    seen = []

    def note(operation):
        def noted(x, kernel, stride, *, native):
            seen.append((operation, x.shape[1], *kernel.shape[2:], kernel.shape[0], stride))
            return operation(x, kernel, stride, native=native)

        return noted

    monkeypatch.setattr(convolutions, "conv", note(conv))
    monkeypatch.setattr(convolutions, "conv_transpose", note(conv_transpose))
    for network, shape, arguments in networks:
        jax.eval_shape(lambda x, n=network, a=arguments: n.init(jax.random.key(0), x, **a), jnp.zeros(shape))
    return list(dict.fromkeys(seen))


def published(width):
    mode = {"train": False}
    return [
        (Encoder(4, width=width), (1, 64, 64, 3), mode),
        (Generator(width=width), (1, 4), mode),
        (Generator(width=width, start=8), (1, 4), mode),
        (DenseEncoder(4, width=width), (1, 28, 28, 1), mode),
        (DenseGenerator(width=width), (1, 4), mode),
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_layer_of_the_published_networks(width, monkeypatch):
    layers = layers_of(published(width), monkeypatch)
    assert {(layer[0].__name__, layer[1]) for layer in layers} == {
        *(("conv", size) for size in (64, 32, 16, 8, 28, 14)),
        *(("conv_transpose", size) for size in (4, 8, 16, 32, 64, 7, 14)),
    }

    for layer in layers:
        assert_laxs(layer, "float32")
        if WIDTHS == [2] and layer[1] != 8:
            continue
        half = [array.astype(jnp.bfloat16) for array in expected_of(layer, "float32")[0]]
        ours, native = (lambda x, kernel, n=n: layer[0](x, kernel, layer[-1], native=n) for n in (False, True))  # noqa: B023
        expected = value_and_gradients(native, *(array.astype(jnp.float32) for array in half))
        actual = value_and_gradients(ours, *half)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.bfloat16
            assert np.abs(a.astype(jnp.float32) - e).max() <= 2**-8 * np.abs(e).max(), layer


def test_every_layer_of_the_other_sizes(monkeypatch, x64):
    """Those that differ from the published ones in more than their channels."""
    mode, others = {"train": False}, []
    for side in (16, 32, 56, 256, 128):
        shape = (side, side, 3)
        if side > 32:
            others.append((image_encoder(shape, latent_dim=4, width=2), (1, *shape), mode))
        others.append((image_generator(shape, width=2), (1, 4), mode))
    for side in (28, 64):
        others.append((Denoiser(width=2), (1, side, side, 1), {"sigma": 0.5}))
        others.append((ScaleCritic(width=2), (1, side, side, 1), {"sigma": 0.5}))
    known = {(layer[0], layer[1], *layer[4:]) for layer in layers_of(published(2), monkeypatch)}
    new = {(layer[0], layer[1], *layer[4:]): layer for layer in layers_of(others, monkeypatch)}
    sizes = {(kind[0].__name__, *kind[1:]) for kind in set(new) - known}
    assert sizes == {
        *(("conv", size, 5, 2) for size in (256, 128, 14, 7)),
        *(("conv_transpose", size, 5, 2) for size in (64, 128, 7)),
        *(("conv_transpose", size, 5, 1) for size in (16, 32, 128, 256)),
        *(("conv", size, 3, 1) for size in (32, 14, 7, 4)),
        ("conv", 56, 4, 2),
        ("conv_transpose", 28, 4, 2),
    }
    for kind in set(new) - known:
        assert_laxs(new[kind], "float64")


def test_gradients_are_numerical_ones_to_second_order(x64):
    for operation in (conv, conv_transpose):
        x, kernel, ours, _ = both_forms(operation, 4, 2, 3, 3, 2, "float64", batch=1)
        check_grads(ours, (x, kernel), order=2, modes=["rev"])


def test_native_form_supports_forward_mode():
    x, kernel, _, native = both_forms(conv_transpose, 4, 2, 3, 5, 2, "float32")
    assert jax.jvp(native, (x, kernel), (x, kernel))[1].shape == (2, 8, 8, 3)


def test_vmap():
    x, kernel, ours, _ = both_forms(conv_transpose, 4, 2, 3, 5, 2, "float32")
    together = jax.vmap(ours, in_axes=(0, None))(jnp.stack([x, 2 * x]), kernel)
    np.testing.assert_allclose(together[1], ours(2 * x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "flaxs"), [(Conv, flax_nn.Conv), (ConvTranspose, flax_nn.ConvTranspose)])
def test_parameters_are_flaxs(ours, flaxs):
    """The same names, shapes and initial values, so a checkpoint of one is a checkpoint of the other."""
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
    mine, theirs = ours(4, stride=2), flaxs(4, (5, 5), strides=2)
    variables, reference = (layer.init(jax.random.key(1), x) for layer in (mine, theirs))
    jax.tree.map(np.testing.assert_array_equal, variables, reference)
    np.testing.assert_allclose(mine.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_kernel_gradients_between_blocks_are_summed_in_float32():
    x, kernel, ours, native = both_forms(conv_transpose, 64, 8, 3, 5, 1, "float32")
    x, kernel, cotangent = (array.astype(jnp.bfloat16) for array in (x, kernel, jnp.ones((*x.shape[:3], 3))))
    gradient = lambda function, dtype: jax.vjp(lambda w: function(x.astype(dtype), w), kernel.astype(dtype))[1](
        cotangent.astype(dtype)
    )[0]
    actual, expected = jax.jit(lambda: (gradient(ours, jnp.bfloat16), gradient(native, jnp.float32)))()
    # Each number is rounded once.
    assert np.all(np.abs(actual.astype(jnp.float32) - expected) <= 2**-8 * np.abs(expected) + 1e-3)
