"""All pairs by matrix products, and the accuracy that makes them usable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import GaussianNoise
from spread_jax._pairwise import squared_distances


@pytest.mark.parametrize(("size", "offset"), [(8, 100.0), (9, 0.0), (64, 100.0), (700, 0.0)])
def test_squared_distances_keep_the_digits_of_near_pairs(size, offset, dtype):
    # Half of the pairs are 1e-2 apart, the rest about sqrt(2 size): the product form keeps only the latter.
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=(6, size)) + offset, dtype)
    y = jnp.asarray(np.asarray(x, float) + 1e-2 * rng.normal(size=(6, size)), dtype)
    exact = np.square(np.asarray(y, float)[:, None] - np.asarray(x, float)).sum(axis=-1)
    if dtype == "float64":
        exact = np.square(np.asarray(y, np.longdouble)[:, None] - np.asarray(x, np.longdouble)).sum(axis=-1)
    result = np.asarray(jax.jit(squared_distances)(y, x), np.longdouble)
    eps = np.finfo(dtype).eps
    # Relative to |x|^2 ~ size the error is below eps sqrt(size) / 2^10 in float32 (2^24 in float64), after
    # the rounding of each centred number, eps (1 + offset), enters to first order.
    split = 4 * eps * size**1.5 * 2.0 ** (-10 if dtype == "float32" else -24)
    rounding = 4 * eps * (1 + offset) * np.sqrt(exact) + 4 * eps * exact
    np.testing.assert_array_less(np.abs(result - exact), split + rounding)


def test_one_product_is_used_only_where_its_error_is_negligible():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 64)).astype(np.float32)
    y = (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
    exact = np.square(y.astype(float) - x).sum(axis=1)
    longest = max(np.square(v.astype(float) - x.mean(axis=0)).sum(axis=1).max() for v in (x, y))
    error = lambda n: np.abs(np.diagonal(squared_distances(y, x, negligible=n)) - exact).max()
    assert error(1.01 * longest) < 8 * np.finfo(np.float32).eps * longest
    assert error(0.99 * longest) < error(1.01 * longest) / 20


@pytest.mark.parametrize("negligible", [0.0, 1e6])
def test_rematerialised_gradients_where_both_arguments_move(negligible, x64):
    rng = np.random.default_rng(4)
    x, weights = jnp.asarray(rng.normal(size=(5, 9))), jnp.asarray(rng.normal(size=(5, 5)))
    distances = jax.checkpoint(lambda a, b: squared_distances(a, b, negligible=negligible))
    got = jax.grad(lambda x: (weights * distances(jnp.sin(x), x)).sum())(x)
    direct = lambda x: (weights * jnp.square(jnp.sin(x)[:, None] - x).sum(axis=2)).sum()
    np.testing.assert_allclose(got, jax.grad(direct)(x), rtol=1e-11)


def test_pairwise_log_prob_beats_the_textbook_form_by_two_digits():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 64)).astype(np.float32)
    y = (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
    exact = -0.5 * np.square((y.astype(float)[:, None] - x) / 0.01).sum(axis=-1)
    result = jax.jit(GaussianNoise(0.01).pairwise_log_prob)(y, x)
    constant = -64 * (np.log(0.01) + 0.5 * np.log(2 * np.pi))
    diagonal = np.arange(20)
    error = np.abs(np.asarray(result, float) - constant - exact)[diagonal, diagonal].max()
    textbook = np.square(y).sum(1)[:, None] + np.square(x).sum(1) - 2 * y @ x.T
    textbook_error = np.abs(-0.5 * textbook.astype(float) / 1e-4 - exact)[diagonal, diagonal].max()
    assert error < 5e-4
    assert textbook_error > 100 * error


@pytest.mark.parametrize("scale", [0.7, np.linspace(0.5, 2.0, 12).reshape(4, 3)])
def test_pairwise_log_prob_equals_log_prob_in_value_and_every_gradient(scale, dtype):
    rng = np.random.default_rng(2)
    y, x, weights = (jnp.asarray(rng.normal(size=s), dtype) for s in ((5, 4, 3), (6, 4, 3), (5, 6)))
    scale = jnp.asarray(scale, dtype)
    one_by_one = lambda s, y, x: jax.vmap(lambda row: GaussianNoise(s).log_prob(jnp.broadcast_to(row, x.shape), x))(y)
    pairs = lambda s, y, x: GaussianNoise(s).pairwise_log_prob(y, x)
    tol = 2e-4 if dtype == "float32" else 1e-11

    @jax.jit
    def both(*args):
        total = lambda f: lambda *a: (weights * f(*a)).sum()
        gradients = [jax.grad(total(f), argnums=(0, 1, 2))(*args) for f in (one_by_one, pairs)]
        forward = jax.jvp(total(pairs), args, args)[1]
        return one_by_one(*args), pairs(*args), *gradients, forward

    args = (scale, y, x)
    want_value, value, want, got, forward = both(*args)
    np.testing.assert_allclose(value, want_value, rtol=tol)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=tol, atol=tol)
    inner = sum((np.asarray(w, float) * np.asarray(a, float)).sum() for w, a in zip(want, args, strict=True))
    np.testing.assert_allclose(forward, inner, rtol=20 * tol)
