"""The random numbers of a CPU: those of `jax.random`, of the generator's published test vectors and of SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spread_jax import _threefry

# Key, counter and words of the authors' test vectors for Threefry-2x32 with 20 rounds.
VECTORS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]
DRAWS = {"normal": jax.random.normal, "uniform": jax.random.uniform, "laplace": jax.random.laplace}


@pytest.mark.parametrize(("key", "counter", "words"), VECTORS)
def test_the_generator_gives_the_published_words(key, counter, words):
    found = _threefry._threefry(jnp.array(key, jnp.uint32), *(jnp.uint32(word) for word in counter))
    assert tuple(int(word) for word in found) == words


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2**17 + 5, 3), (0, 4)])
def test_they_are_the_numbers_of_jax(name, shape, key):
    found = jax.jit(lambda key: getattr(_threefry, name)(key, shape, jnp.float32))(key)
    expected = jax.jit(lambda key: DRAWS[name](key, shape, jnp.float32))(key)
    assert found.dtype == expected.dtype
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)  # the same bits, rounded as XLA fuses


def test_bits_are_exactly_those_of_jax(key):
    found = _threefry._bits(jax.random.key_data(key), (5, 30_001))
    np.testing.assert_array_equal(found, jax.random.bits(key, (5, 30_001)))


def test_numbers_are_quantiles_of_the_bits(key, x64):
    fraction = np.asarray(jax.random.bits(key, (2000,), jnp.uint32) >> 9) / 2.0**23
    normal = _threefry.normal(key, (2000,), jnp.float32)
    np.testing.assert_allclose(scipy.stats.norm.cdf(np.asarray(normal, np.float64)), fraction, atol=3e-7)
    np.testing.assert_allclose(_threefry.uniform(key, (2000,), jnp.float32, -1.0, 3.0), 4 * fraction - 1, atol=1e-6)
    laplace = np.asarray(_threefry.laplace(key, (2000,), jnp.float32), np.float64)
    # Its sign is that of u and so, as in JAX, mirrored: numbers below the median have log1p(-|u|) > 0.
    np.testing.assert_allclose(1 - scipy.stats.laplace.cdf(laplace), fraction, atol=3e-7)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("case", ["float64", "bfloat16", "legacy", "rbg", "not_partitionable"])
def test_other_types_and_generators_are_left_to_jax(name, case, key, x64):
    dtype = jnp.dtype(case) if case in ("float64", "bfloat16") else jnp.dtype("float32")
    if case == "legacy":
        key = jax.random.PRNGKey(0)
    if case == "rbg":
        key = jax.random.key(0, impl="rbg")
    with jax.threefry_partitionable(case != "not_partitionable"):
        found, expected = getattr(_threefry, name)(key, (6, 5), dtype), DRAWS[name](key, (6, 5), dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=1e-6)


def test_under_vmap_scan_and_in_gradients(key):
    keys = jax.random.split(key, 4)
    draw = lambda key: _threefry.normal(key, (6,), jnp.float32)
    each = np.stack([draw(key) for key in keys])
    np.testing.assert_allclose(jax.vmap(draw)(keys), each, rtol=1e-6)
    np.testing.assert_allclose(jax.lax.map(draw, keys), each, rtol=1e-6)
    moved = lambda scale: (scale * draw(key)).sum()
    np.testing.assert_allclose(jax.grad(moved)(2.0), draw(key).sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(moved)(2.0), draw(key).sum(), rtol=1e-5)
