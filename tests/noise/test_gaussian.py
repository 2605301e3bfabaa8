"""GaussianNoise against SciPy, quadrature and its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from spread_jax import GaussianNoise, SpreadNoise

RNG = np.random.default_rng(0)
Y, X = RNG.normal(size=(2, 5, 3, 2))


def tolerance(dtype):
    return {"float32": 2e-5, "float64": 1e-12}[dtype]


def test_is_a_spread_noise():
    assert isinstance(GaussianNoise(1.0), SpreadNoise)


@pytest.mark.parametrize("scale", [0.3, np.linspace(0.2, 0.7, 6).reshape(3, 2)], ids=["scalar", "each dimension"])
def test_log_prob_is_scipys(dtype, scale):
    noise = GaussianNoise(scale)
    y, x = jnp.asarray(Y, dtype), jnp.asarray(X, dtype)
    expected = stats.norm(X, scale).logpdf(Y).sum(axis=(1, 2))
    for log_prob in (noise.log_prob, jax.jit(noise.log_prob)):
        actual = log_prob(y, x)
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=tolerance(dtype))


def test_log_prob_of_scalar_events():
    actual = GaussianNoise(2.0).log_prob(jnp.array([1.0, 2.0]), jnp.zeros(2))
    np.testing.assert_allclose(actual, stats.norm(0, 2).logpdf([1, 2]), rtol=1e-6)


def test_gradients(x64):
    difference = Y - X
    value_of = lambda scale, y: GaussianNoise(scale).log_prob(y, jnp.asarray(X)).sum()
    by_scale, by_y = jax.grad(value_of, argnums=(0, 1))(0.4, jnp.asarray(Y))
    np.testing.assert_allclose(by_y, -difference / 0.4**2, rtol=1e-12)
    np.testing.assert_allclose(by_scale, (difference**2).sum() / 0.4**3 - difference.size / 0.4, rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(value_of)(0.4, jnp.asarray(Y)), by_scale, rtol=1e-12)


def test_vmap_over_scales():
    scales = jnp.array([0.1, 0.5, 2.0])
    y, x = jnp.asarray(Y, jnp.float32), jnp.asarray(X, jnp.float32)
    together = jax.vmap(lambda noise: noise.log_prob(y, x))(GaussianNoise(scales))
    apart = [GaussianNoise(float(s)).log_prob(y, x) for s in scales]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5)


def test_samples_have_the_density(key, dtype):
    x = jnp.zeros((20_000, 2), dtype) + jnp.asarray([1.0, -2.0], dtype)
    scale = np.array([0.5, 3.0])
    y = GaussianNoise(scale).sample(x, key=key)
    assert y.dtype == dtype
    for column, (mean, std) in enumerate(zip([1.0, -2.0], scale, strict=True)):
        assert stats.kstest(np.asarray(y[:, column]), stats.norm(mean, std).cdf).pvalue > 1e-3


def test_expected_log_prob_is_the_integral(x64):
    """Quadrature of N(y; a, s^2) log N(y; b, s^2), and the mean over samples."""
    a, b, s = 0.3, 1.1, 0.6
    exact, _ = integrate.quad(lambda y: stats.norm(a, s).pdf(y) * stats.norm(b, s).logpdf(y), -12, 12)
    noise = GaussianNoise(s)
    np.testing.assert_allclose(noise.expected_log_prob(jnp.array([[a]]), jnp.array([[b]])), [exact], rtol=1e-8)
    entropy = noise.expected_log_prob(jnp.zeros((1, 7)), jnp.zeros((1, 7)))
    np.testing.assert_allclose(-entropy, [7 * stats.norm(0, s).entropy()], rtol=1e-12)


def test_characteristic_function_is_the_transform_of_the_density(x64):
    noise = GaussianNoise(0.7)
    for omega in (0.0, 0.5, 3.0):
        exact, _ = integrate.quad(lambda y, w: np.cos(w * y) * stats.norm(0, 0.7).pdf(y), -9, 9, args=(omega,))
        actual = noise.characteristic_function(jnp.array([[omega]]))
        np.testing.assert_allclose(actual, [exact], rtol=1e-7)


def test_mmd_kernel_is_the_integral_of_two_densities(x64):
    s = 0.8
    a, b = np.array([0.0, 1.0, 2.5]), np.array([0.3, -1.0])
    product = lambda y, m, n: stats.norm(m, s).pdf(y) * stats.norm(n, s).pdf(y)
    exact = [[integrate.quad(product, -15, 15, args=(m, n))[0] for n in b] for m in a]
    actual = GaussianNoise(s).mmd_kernel(jnp.asarray(a)[:, None], jnp.asarray(b)[:, None])
    np.testing.assert_allclose(actual, exact, rtol=1e-7)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, np.array([1.0, -0.5])])
def test_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        GaussianNoise(scale)


def test_a_traced_bad_scale_gives_nan_at_once():
    value = jax.jit(lambda s: GaussianNoise(s).log_prob(jnp.ones((2, 1)), jnp.ones((2, 1))))
    assert np.isnan(value(0.0)).all()
    assert np.isnan(value(-1.0)).all()
    assert np.isfinite(value(1.0)).all()


def test_refuses_shapes_and_dtypes():
    noise = GaussianNoise(1.0)
    with pytest.raises(ValueError, match=r"y and x must have the same shape"):
        noise.log_prob(jnp.ones((4, 2)), jnp.ones((1, 2)))
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got int32"):
        noise.sample(jnp.ones((4, 2), jnp.int32), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"scale must be a number or broadcast against one event of shape \(2,\)"):
        GaussianNoise(np.ones(3)).log_prob(jnp.ones((4, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="x and x2 must share their event shape"):
        noise.mmd_kernel(jnp.ones((4, 2)), jnp.ones((4, 3)))
