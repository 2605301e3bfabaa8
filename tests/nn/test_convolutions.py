"""The convolutions against lax and Flax: value, both gradients, second order, parameters."""

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from spread_jax.nn import Conv, ConvTranspose, conv, conv_transpose

RNG = np.random.default_rng(0)

# (operation, input size, in channels, out channels, kernel size, stride): the layers in use, an odd size, an even
# kernel, a stride larger than the kernel and the few-channels form of the last layer.
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
]


def both_forms(operation, size, in_channels, out_channels, taps, stride, dtype, batch=2):
    x = jnp.asarray(RNG.normal(size=(batch, size, size, in_channels)), dtype)
    kernel = jnp.asarray(RNG.normal(size=(taps, taps, in_channels, out_channels)), dtype)
    ours = lambda x, k: operation(x, k, stride)
    native = lambda x, k: operation(x, k, stride, native=True)
    return x, kernel, ours, native


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: "-".join(map(str, (v[0].__name__, *v[1:]))))
def test_value_and_gradients_are_laxs(layer, dtype):
    x, kernel, ours, native = both_forms(*layer, dtype)

    def value_and_gradients(function, x, kernel, cotangent):
        value, pull = jax.vjp(function, x, kernel)
        return value, pull(cotangent)

    shape = jax.eval_shape(native, x, kernel)
    cotangent = jnp.asarray(RNG.normal(size=shape.shape), dtype)
    actual, expected = (
        jax.jit(value_and_gradients, static_argnums=0)(function, x, kernel, cotangent) for function in (ours, native)
    )
    limit = {"float32": 1e-5, "float64": 1e-13}[dtype]
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.dtype == dtype
        assert np.abs(a - e).max() <= limit * np.abs(e).max()


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
