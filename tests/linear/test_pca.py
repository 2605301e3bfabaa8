"""Deterministic PCA against NumPy, SciPy and scikit-learn; the rates of EM against theory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.decomposition

from spread_jax import GaussianNoise, spread_kl_gaussians
from spread_jax.linear import pca

SIGMA = 0.7


def make_data(num_examples=60, width=5, rank=None, seed=0):
    """Correlated data of well separated variances, off the origin, in float64."""
    rng = np.random.default_rng(seed)
    rank = rank or min(width, num_examples)
    axes = np.linalg.qr(rng.normal(size=(width, rank)))[0]
    return rng.normal(size=(num_examples, rank)) * np.linspace(3, 0.5, rank) @ axes.T + rng.normal(size=width)


def numpy_loadings(x, num_components, removed=0.0):
    """U (Lambda - removed)_+^(1/2) by NumPy's SVD, with the sign convention of the fit."""
    _, lengths, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    variance = np.maximum(lengths[:num_components] ** 2 / len(x) - removed, 0)
    axes = axes[:num_components].T
    return axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(num_components)]) * np.sqrt(variance)


@pytest.mark.parametrize("shape", [(60, 5), (6, 9)], ids=["X<N", "N<X"])
def test_closed_form_is_clean_pca_and_one_side_shrinks(shape, dtype):
    x = make_data(*shape).astype(dtype)
    rtol = 2e-4 if dtype == "float32" else 1e-10
    for spread in (True, False):
        for value in (x, jnp.asarray(x)):
            result = pca.fit(value, 3, SIGMA, spread=spread)
            expected = numpy_loadings(x.astype(np.float64), 3, 0 if spread else SIGMA**2)
            np.testing.assert_allclose(result.loadings, expected, rtol=rtol, atol=rtol)
            assert result.loadings.dtype == result.mean.dtype == dtype
        np.testing.assert_allclose(result.mean, x.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(result.explained_variance, np.square(expected).sum(axis=0), rtol=rtol)
    peer = sklearn.decomposition.PCA(3).fit(x)
    result = pca.fit(x, 3, SIGMA)
    np.testing.assert_allclose(result.explained_variance, peer.explained_variance_ * (1 - 1 / len(x)), rtol=rtol)


@pytest.mark.parametrize("spread", [True, False])
def test_log_likelihood_matches_scipy(spread, dtype):
    x = make_data()
    result = pca.fit(x.astype(dtype), 2, SIGMA, spread=spread)
    f = np.asarray(result.loadings, np.float64)
    covariance = f @ f.T + SIGMA**2 * np.eye(5)
    expected = scipy.stats.multivariate_normal.logpdf(x, x.mean(axis=0), covariance).mean()
    if spread:  # E (x + e)^T C^-1 (x + e) = x^T C^-1 x + sigma^2 tr C^-1
        expected -= 0.5 * SIGMA**2 * np.trace(np.linalg.inv(covariance))
        draws = np.random.default_rng(1).normal(size=(400, *x.shape)) * SIGMA + x
        terms = scipy.stats.multivariate_normal.logpdf(draws, x.mean(axis=0), covariance).mean(axis=1)
        assert abs(terms.mean() - expected) < 6 * terms.std() / np.sqrt(len(terms))
    np.testing.assert_allclose(result.log_likelihood, expected, rtol=2e-6 if dtype == "float32" else 1e-12)


def test_log_likelihood_matches_ppca_of_scikit_learn(x64):
    """At the noise that PPCA estimates, its score on the training data is the one-sided likelihood."""
    x = make_data()
    peer = sklearn.decomposition.PCA(2).fit(x)
    scale = len(x) / (len(x) - 1)  # scikit-learn divides by N - 1
    result = pca.fit(x * np.sqrt(scale), 2, np.sqrt(peer.noise_variance_), spread=False)
    np.testing.assert_allclose(
        result.loadings @ result.loadings.T + peer.noise_variance_ * np.eye(5), peer.get_covariance()
    )
    likelihood = pca.spread_log_likelihood(
        result.loadings, jnp.cov(x.T, bias=True), np.sqrt(peer.noise_variance_), spread=False
    )
    np.testing.assert_allclose(likelihood, peer.score(x))


def test_data_of_more_dimensions_than_examples_have_the_same_likelihood_in_their_span(x64):
    x = make_data(6, 9)
    result = pca.fit(x, 3, SIGMA)
    dense = pca.spread_log_likelihood(result.loadings, np.cov(x.T, bias=True), SIGMA)
    np.testing.assert_allclose(result.log_likelihood, dense)
    one_sided = pca.fit(x, 3, SIGMA, spread=False)
    dense = pca.spread_log_likelihood(one_sided.loadings, np.cov(x.T, bias=True), SIGMA, spread=False)
    np.testing.assert_allclose(one_sided.log_likelihood, dense)


def test_rank_deficient_data_give_zero_columns_and_no_nan(dtype):
    x = make_data(60, 5, rank=2).astype(dtype)
    result = pca.fit(x, 4, SIGMA)
    np.testing.assert_array_equal(result.loadings[:, 2:], 0)
    z = pca.latents(jnp.asarray(x), result, noise_scale=0.0)
    np.testing.assert_allclose(
        jnp.cov(z.T, bias=True), np.diag([1, 1, 0, 0]), atol=1e-4 if dtype == "float32" else 1e-12
    )
    assert pca.spread_kl(result.loadings, np.cov(x.T, bias=True).astype(dtype), SIGMA) < 1e-5  # rank Z: exact
    constant = pca.fit(np.ones((4, 3), dtype), 1, SIGMA)
    for value in jax.tree.leaves(constant):
        assert np.isfinite(value).all()
    em = pca.fit(np.ones((4, 3), dtype), 1, SIGMA, method="em", key=jax.random.key(0))
    assert np.isfinite(em.loadings).all()
    assert em.converged


def test_moments_in_chunks_from_host_and_device(tmp_path, dtype):
    x = (make_data(1000, 4) + 1000).astype(dtype)  # far from the origin: sums of squares would lose the variance
    x[500:] += 3  # a mean that drifts
    mapped = np.memmap(tmp_path / "x", dtype, "w+", shape=x.shape)
    mapped[:] = x
    exact = np.cov(x.astype(np.float64).T, bias=True)
    for value in (x, mapped, jnp.asarray(x)):
        for chunk_size in (64, 5000):
            mean, covariance = pca.second_moments(value, chunk_size=chunk_size)
            np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=2e-7)
            np.testing.assert_allclose(covariance, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
            assert covariance.dtype == dtype


def test_em_step_matches_expectations_under_the_posterior(x64):
    """M = E[y z^T] E[z z^T]^-1, the expectations by NumPy from the joint Gaussian of (z, y)."""
    x, f = make_data(), make_data(5, 2, seed=3)
    covariance = np.cov(x.T, bias=True)
    for spread in (True, False):
        data = covariance + spread * SIGMA**2 * np.eye(5)
        gain = f.T @ np.linalg.inv(f @ f.T + SIGMA**2 * np.eye(5))
        second = np.eye(2) - gain @ f + gain @ data @ gain.T
        expected = data @ gain.T @ np.linalg.inv(second)
        step = pca.em_step(jnp.asarray(f), jnp.asarray(covariance), SIGMA, spread=spread)
        np.testing.assert_allclose(step, expected, rtol=1e-10)
        before, after = (pca.spread_log_likelihood(v, covariance, SIGMA, spread=spread) for v in (jnp.asarray(f), step))
        assert after > before


@pytest.mark.parametrize("shape", [(60, 5), (6, 9)], ids=["X<N", "N<X"])
@pytest.mark.parametrize("spread", [True, False])
def test_em_ends_at_the_closed_form(shape, spread, dtype, key):
    x = make_data(*shape).astype(dtype)
    exact = pca.fit(x, 2, SIGMA, spread=spread)
    result = pca.fit(x, 2, SIGMA, spread=spread, method="em", tolerance=1e-5, max_iterations=3000, key=key)
    assert result.converged
    assert 1 < result.num_iterations < 3000
    np.testing.assert_allclose(result.loadings, exact.loadings, atol=2e-4)
    np.testing.assert_allclose(result.log_likelihood, exact.log_likelihood, rtol=1e-6)


def test_a_frozen_em_is_not_called_converged(key):
    x = make_data(60, 5, rank=2).astype(np.float32)
    frozen = pca.fit(x, 2, 1e-3, method="em", key=key)
    assert not frozen.converged
    assert frozen.num_iterations == 1000
    moved = pca.em_step(frozen.loadings, pca.second_moments(x).covariance, 1e-3) - frozen.loadings
    assert jnp.abs(moved).max() < 1e-5  # the steps are small all the same
    assert pca.fit(x, 2, 2.0, method="em", key=key).converged  # only sigma differs


def test_em_contracts_as_the_theory_says(x64):
    """The Jacobian of a step at the optimum: its eigenvalues are those of the module's docstring."""
    variances, width = np.array([4.0, 1.5, 0.3, 0.1]), 4
    for spread in (True, False):
        t = variances + (SIGMA**2 if spread else 0)
        lengths = t[:2] - SIGMA**2
        optimum = jnp.asarray(np.eye(width)[:, :2] * np.sqrt(lengths))
        step = lambda f, spread=spread: pca.em_step(
            f.reshape(width, 2), jnp.diag(variances), SIGMA, spread=spread
        ).ravel()
        found = np.linalg.eigvals(jax.jit(jax.jacfwd(step))(optimum.ravel()))
        outside = [t[j] / t[i] for i in range(2) for j in (2, 3)]
        inside = [1 - SIGMA**2 * (lengths[i] + lengths[k]) / (t[i] * t[k]) for i, k in ((0, 0), (0, 1), (1, 1))]
        np.testing.assert_allclose(np.sort(found.real), np.sort([*outside, *inside, 1.0]), rtol=1e-9)
        np.testing.assert_allclose(found.imag, 0, atol=1e-9)


def test_spread_kl_is_that_of_gaussians_and_zero_at_the_optimum(x64):
    x, f = make_data(60, 5, rank=2), make_data(5, 2, seed=3)
    covariance = np.cov(x.T, bias=True)
    zero = jnp.zeros(5)
    expected = spread_kl_gaussians(zero, jnp.asarray(covariance), zero, jnp.asarray(f @ f.T), GaussianNoise(0.2))
    np.testing.assert_allclose(pca.spread_kl(jnp.asarray(f), covariance, 0.2), expected)
    # Minus the likelihood and the entropy of the spread data.
    entropy = scipy.stats.multivariate_normal(cov=covariance + 0.04 * np.eye(5)).entropy()
    np.testing.assert_allclose(expected, -pca.spread_log_likelihood(jnp.asarray(f), covariance, 0.2) - entropy)
    best = pca.closed_form(jnp.asarray(covariance), 2, 0.2)[0]
    assert abs(pca.spread_kl(best, covariance, 0.2)) < 1e-12
    slope = jax.jit(jax.grad(pca.spread_kl))(best, jnp.asarray(covariance), 0.2)
    np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_latents_are_the_posterior_mean_and_in_the_limit_the_pseudo_inverse(dtype):
    x = make_data().astype(dtype)
    result = pca.fit(x, 3, SIGMA)
    f, centred = np.asarray(result.loadings, np.float64), x - x.mean(axis=0)
    rtol = 1e-4 if dtype == "float32" else 1e-10
    expected = centred @ np.linalg.solve(f.T @ f + SIGMA**2 * np.eye(3), f.T).T
    np.testing.assert_allclose(pca.latents(x, result), expected, rtol=rtol, atol=rtol)
    exact = centred @ np.linalg.pinv(f).T
    np.testing.assert_allclose(pca.latents(x, result, noise_scale=0.0), exact, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(pca.latents(x, result, noise_scale=1e-6), exact, rtol=rtol, atol=rtol)


def test_jit_vmap_and_grad_agree_with_eager():
    x = jnp.asarray(np.stack([make_data(30, 4, seed=s) for s in (0, 1)]), jnp.float32)
    fit = functools.partial(pca.fit, num_components=2)
    batched = jax.jit(jax.vmap(lambda x, s: fit(x, noise_scale=s)))(x, jnp.array([0.5, 1.0]))
    for i, sigma in enumerate((0.5, 1.0)):
        for got, want in zip(jax.tree.leaves(batched), jax.tree.leaves(fit(x[i], noise_scale=sigma)), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-3, atol=1e-5)
    # d log-likelihood / d sigma at fixed loadings is the total derivative at the optimum (envelope theorem).
    total = jax.jit(jax.grad(lambda s: fit(x[0], noise_scale=s).log_likelihood))(0.5)
    result = fit(x[0], noise_scale=0.5)
    covariance = pca.second_moments(x[0]).covariance
    partial = jax.jit(jax.grad(pca.spread_log_likelihood, argnums=2))(result.loadings, covariance, 0.5)
    np.testing.assert_allclose(total, partial, rtol=1e-3)
    ends = [pca.spread_log_likelihood(result.loadings, covariance, s) for s in (0.49, 0.51)]
    np.testing.assert_allclose(partial, (ends[1] - ends[0]) / 0.02, rtol=1e-2)
    # d explained variance / dx = 2 z_n u / N^(1/2) in total: scaling x by c scales the variance by c^2.
    scaled = jax.jit(jax.grad(lambda c: fit(c * x[0], noise_scale=0.5).explained_variance[0]))(1.0)
    np.testing.assert_allclose(scaled, 2 * result.explained_variance[0], rtol=1e-3)


X = np.ones((4, 3), np.float32)
BAD = [
    (lambda: pca.fit(X, 4, 1.0), ValueError, r"num_components must be at most 3, min\(N, X\) of x, .* \(4, 3\), got 4"),
    (lambda: pca.fit(X, 0, 1.0), ValueError, "num_components must be at least 1"),
    (lambda: pca.fit(X, 1, 0.0), ValueError, "noise_scale must be positive and finite, got 0.0"),
    (lambda: pca.fit(X, 1, 1.0, method="svd"), ValueError, "method must be 'closed_form' or 'em', got 'svd'"),
    (lambda: pca.fit(X, 1, 1.0, method="em"), TypeError, "key must be a JAX random key for method='em'"),
    (lambda: pca.fit(X, 1, 1.0, tolerance=-1.0), ValueError, "tolerance must be positive"),
    (lambda: pca.fit(X[0], 1, 1.0), ValueError, r"x must have shape \[N, X\].*got \(3,\)"),
    (lambda: pca.fit(X.astype(int), 1, 1.0), TypeError, "x must have a floating-point dtype, got int64"),
    (lambda: pca.fit(X * np.nan, 1, 1.0), ValueError, "x must be finite"),
    (lambda: pca.fit(X[:2] * np.nan, 1, 1.0), ValueError, "x must be finite"),
    (lambda: pca.closed_form(X, 1, 1.0), ValueError, r"covariance must have shape \[X, X\], got \(4, 3\)"),
    (lambda: pca.em_step(X, jnp.eye(3), 1.0), ValueError, r"loadings must have shape \[3, Z\].*got \(4, 3\)"),
    (lambda: pca.spread_kl(X[:3], jnp.eye(3), -1.0), ValueError, "must be positive"),
    (lambda: pca.latents(X[:, :2], pca.fit(X, 1, 1.0)), ValueError, r"y must have shape \[batch, 3\]"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), BAD)
def test_bad_input_gets_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
