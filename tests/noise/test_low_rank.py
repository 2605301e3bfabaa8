"""Low-rank Gaussian noise against the dense covariance it never forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spread_jax import GaussianNoise, LowRankGaussianNoise


def dense(scale, factor):
    flat = np.asarray(factor, float).reshape(-1, factor.shape[-1])
    return np.diag(np.broadcast_to(scale, factor.shape[:-1]).ravel() ** 2) + flat @ flat.T


@pytest.fixture
def problem():
    rng = np.random.default_rng(3)
    return rng.uniform(0.5, 1.5, size=(2, 3)), rng.normal(size=(2, 3, 2)), *rng.normal(size=(2, 5, 2, 3))


def test_log_prob_kl_and_kernels_match_the_dense_gaussian(problem, dtype):
    scale, factor, y, x = problem
    covariance = dense(scale, factor)
    flat = (y - x).reshape(5, -1)
    noise = LowRankGaussianNoise(jnp.asarray(scale, dtype), jnp.asarray(factor, dtype))
    y, x = jnp.asarray(y, dtype), jnp.asarray(x, dtype)
    tol = {"rtol": 1e-5 if dtype == "float32" else 1e-12}
    peer = scipy.stats.multivariate_normal(np.zeros(6), covariance)
    np.testing.assert_allclose(noise.log_prob(y, x), peer.logpdf(flat), **tol)
    np.testing.assert_allclose(jnp.diagonal(noise.pairwise_log_prob(y, x)), peer.logpdf(flat), **tol)
    np.testing.assert_allclose(noise.entropy(x), np.full(5, peer.entropy()), **tol)
    kl = 0.5 * np.einsum("ni,ij,nj->n", flat, np.linalg.inv(covariance), flat)
    np.testing.assert_allclose(noise.kl(y, x), kl, **tol)
    np.testing.assert_allclose(noise.expected_log_prob(y, x), -kl - peer.entropy(), **tol)
    wave = np.exp(-0.5 * np.einsum("ni,ij,nj->n", flat, covariance, flat))
    np.testing.assert_allclose(noise.characteristic_function(y - x), wave, rtol=1e-4, atol=1e-12)
    pair = scipy.stats.multivariate_normal(np.zeros(6), 2 * covariance)
    np.testing.assert_allclose(jnp.diagonal(noise.mmd_kernel(y, x)), pair.pdf(flat), rtol=1e-5)


def test_gradients_match_the_dense_form(problem, x64):
    scale, factor, y, x = (jnp.asarray(part) for part in problem)

    def dense_log_prob(scale, factor, y, x):
        flat = factor.reshape(-1, 2)
        covariance = jnp.diag(scale.ravel() ** 2) + flat @ flat.T
        return jax.scipy.stats.multivariate_normal.logpdf(
            (y - x).reshape(5, -1), jnp.zeros(6), covariance
        ).sum()

    low_rank = lambda s, f, y, x: LowRankGaussianNoise(s, f).log_prob(y, x).sum()
    argnums = (0, 1, 2, 3)
    expected = jax.jit(jax.grad(dense_log_prob, argnums))(scale, factor, y, x)
    for got, want in zip(jax.jit(jax.grad(low_rank, argnums))(scale, factor, y, x), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_sample_covariance_is_the_dense_one(problem, key):
    scale, factor, _, _ = problem
    covariance = dense(scale, factor)
    noise = LowRankGaussianNoise(jnp.asarray(scale, jnp.float32), jnp.asarray(factor, jnp.float32))
    count = 20000
    y = np.asarray(noise.sample(jnp.zeros((count, 2, 3)), key=key), float).reshape(count, 6)
    variances = np.diag(covariance)
    # Var of a sample covariance entry: (S_ii S_jj + S_ij^2) / n.
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert (np.abs(np.cov(y.T) - covariance) < 6 * error).all()


def test_huge_factor_keeps_its_digits_in_float32():
    # |L| / sigma = 1e5: the subtracting form of Woodbury would return noise of size 1e3 here.
    factor = 1e3 * jnp.ones((20, 1), jnp.float32)
    noise = LowRankGaussianNoise(0.01, factor)
    y = 3 * factor.T + 0.01 * jnp.asarray(np.random.default_rng(4).normal(size=(1, 20)), jnp.float32)
    u = np.asarray(y, np.longdouble)[0] / np.longdouble(np.float32(0.01))
    w = np.asarray(factor, np.longdouble)[:, 0] / np.longdouble(np.float32(0.01))
    exact = 0.5 * (u @ u - (u @ w) ** 2 / (1 + w @ w))
    np.testing.assert_allclose(noise.kl(y, jnp.zeros_like(y)), [float(exact)], rtol=0.05)


def test_with_volume_fixes_the_volume_and_lets_gradients_through(problem, x64):
    scale, factor, _, _ = (jnp.asarray(part) for part in problem)
    noise = LowRankGaussianNoise(scale, factor).with_volume(3.0)
    flat = np.asarray(noise.factor).reshape(-1, 2)
    np.testing.assert_allclose(np.sqrt(np.linalg.det(flat.T @ flat)), 3.0, rtol=1e-12)
    np.testing.assert_allclose(noise.factor / noise.factor[0, 0, 0], factor / factor[0, 0, 0], rtol=1e-10)
    # The volume does not move with the free factor, so its gradient is zero; that of a single entry is not.
    volume = lambda f: LowRankGaussianNoise(scale, f).with_volume(3.0).log_volume()
    np.testing.assert_allclose(jax.grad(volume)(factor), np.zeros_like(factor), atol=1e-12)
    entry = lambda f: LowRankGaussianNoise(scale, f).with_volume(3.0).factor[0, 0, 0]
    assert np.abs(jax.jit(jax.grad(entry))(factor)).max() > 0.1


def test_a_vanishing_factor_is_the_isotropic_gaussian(problem):
    _, factor, y, x = (jnp.asarray(part, jnp.float32) for part in problem)
    low_rank = LowRankGaussianNoise(0.7, 1e-8 * factor)
    np.testing.assert_allclose(low_rank.log_prob(y, x), GaussianNoise(0.7).log_prob(y, x), rtol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="factor must have shape"):
        LowRankGaussianNoise(1.0, jnp.ones(3))
    with pytest.raises(TypeError, match="factor must have a floating-point dtype"):
        LowRankGaussianNoise(1.0, jnp.ones((3, 1), int))
    with pytest.raises(ValueError, match="scale must be positive"):
        LowRankGaussianNoise(0.0, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"for events of shape \(4,\)"):
        LowRankGaussianNoise(1.0, jnp.ones((3, 1))).log_prob(jnp.ones((2, 4)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="at most as many columns"):
        LowRankGaussianNoise(1.0, jnp.ones((2, 3))).with_volume()
