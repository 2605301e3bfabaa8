"""Closed forms against quadrature, NumPy and Monte Carlo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import (
    CauchyNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    LowRankGaussianNoise,
    StudentTNoise,
    TransformedNoise,
    spread_chi_squared_deltas,
    spread_hellinger_deltas,
    spread_hellinger_gaussians,
    spread_kl_deltas,
    spread_kl_gaussians,
    spread_total_variation_deltas,
)

PEERS = {
    GaussianNoise: scipy.stats.norm,
    LaplaceNoise: scipy.stats.laplace,
    LogisticNoise: scipy.stats.logistic,
    CauchyNoise: scipy.stats.cauchy,
}
INTEGRANDS = {
    spread_kl_deltas: lambda p, q: p * (np.log(p) - np.log(q)),
    spread_hellinger_deltas: lambda p, q: 0.5 * (np.sqrt(p) - np.sqrt(q)) ** 2,
    spread_chi_squared_deltas: lambda p, q: (p - q) ** 2 / q,
    spread_total_variation_deltas: lambda p, q: 0.5 * np.abs(p - q),
}
MISSING = {(spread_hellinger_deltas, CauchyNoise), (spread_chi_squared_deltas, LogisticNoise)}
CASES = [(f, n) for f in INTEGRANDS for n in PEERS if (f, n) not in MISSING]


@pytest.mark.parametrize(("function", "make"), CASES, ids=lambda v: v.__name__)
def test_deltas_match_quadrature(function, make, dtype):
    scale, mu_p = 0.8, np.array([[0.3], [0.3], [0.3], [0.3]])
    mu_q = np.array([[0.3], [0.25], [1.0], [-1.9]])
    peer, integrand = PEERS[make], INTEGRANDS[function]
    expected = []
    for a, b in zip(mu_p[:, 0], mu_q[:, 0], strict=True):
        h = lambda y, a=a, b=b: integrand(peer.pdf(y, a, scale), peer.pdf(y, b, scale))
        width = 2000.0 if make is CauchyNoise else 20.0
        cuts = sorted({-width, -9.0, a, b, (a + b) / 2, 9.0, width})
        parts = itertools.pairwise(cuts)
        expected.append(sum(scipy.integrate.quad(h, *ends, epsabs=1e-13, limit=200)[0] for ends in parts))
    result = jax.jit(function)(mu_p.astype(dtype), mu_q.astype(dtype), make(scale))
    # Cut at +-2000 scales, the Cauchy tails miss less than 1e-6.
    atol = 1e-6 if make is CauchyNoise else 1e-11
    rtol = 5e-6 if dtype == "float32" else 1e-8
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=max(atol, 2e-7 if dtype == "float32" else 0))


@pytest.mark.parametrize("function", [spread_kl_deltas, spread_hellinger_deltas, spread_chi_squared_deltas])
@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise])
def test_deltas_in_two_dimensions_match_quadrature(function, make):
    peer, scale = PEERS[make], np.array([0.8, 1.5])
    mu_p, mu_q = np.array([[0.3, -0.4]]), np.array([[0.7, 0.5]])
    grid = [np.linspace(-25, 25, 2001)] * 2
    density = lambda mu: np.multiply.outer(*(peer.pdf(g, m, s) for g, m, s in zip(grid, mu, scale, strict=True)))
    with np.errstate(all="ignore"):
        values = np.nan_to_num(INTEGRANDS[function](density(mu_p[0]), density(mu_q[0])), posinf=0)
    expected = values.sum() * (grid[0][1] - grid[0][0]) ** 2
    result = jax.jit(function)(mu_p.astype(np.float32), mu_q.astype(np.float32), make(scale))
    np.testing.assert_allclose(result, [expected], rtol=1e-3)


@pytest.mark.parametrize(("function", "make"), CASES, ids=lambda v: v.__name__)
def test_deltas_have_finite_gradients_even_where_they_meet(function, make):
    both = jax.jit(jax.vmap(jax.value_and_grad(lambda d: function(d[None, None], jnp.zeros((1, 1)), make(1.0))[0])))
    d = jnp.array([0.0, 1e-6, 1e-3, 0.5, 8.0])
    value, slope = both(d)
    assert value[0] == 0
    assert np.isfinite(slope).all()
    assert (np.diff(value) >= 0).all()
    centre = both(d + 1e-2)[0] - both(d - 1e-2)[0]
    np.testing.assert_allclose(slope[3], centre[3] / 2e-2, rtol=1e-2)


def test_low_rank_and_transformed_deltas():
    rng = np.random.default_rng(4)
    mu_p, mu_q = rng.normal(size=(2, 3, 4)).astype(np.float32)
    factor = rng.normal(size=(4, 2)).astype(np.float32)
    covariance = 0.25 * np.eye(4) + factor @ factor.T
    difference = mu_p - mu_q
    square = np.einsum("ni,ij,nj->n", difference, np.linalg.inv(covariance), difference)
    noise = LowRankGaussianNoise(0.5, factor)
    at = jax.jit(lambda noise: [function(mu_p, mu_q, noise) for function in INTEGRANDS])
    total = 2 * scipy.stats.norm.cdf(np.sqrt(square) / 2) - 1
    expected = [square / 2, 1 - np.exp(-square / 8), np.expm1(square), total]
    for got, want in zip(at(noise), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3)
    twice = TransformedNoise(GaussianNoise(1.0), lambda x: 2 * x)
    for got, want in zip(at(twice), at(GaussianNoise(0.5)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.fixture
def gaussians():
    """A line and another line in three dimensions: singular covariances, infinite KL without noise."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 3, 1))
    return rng.normal(size=3), a @ a.T, rng.normal(size=3), b @ b.T


@pytest.mark.parametrize("low_rank", [False, True])
def test_gaussians_match_numpy_and_monte_carlo(gaussians, low_rank, dtype):
    mean_p, cov_p, mean_q, cov_q = gaussians
    factor = np.array([[0.5], [0.0], [1.0]])
    noise = LowRankGaussianNoise(0.4, jnp.asarray(factor, dtype)) if low_rank else GaussianNoise(0.4)
    extra = 0.16 * np.eye(3) + (factor @ factor.T if low_rank else 0)
    a, b, d = cov_p + extra, cov_q + extra, mean_p - mean_q
    inverse = np.linalg.inv(b)
    log_det = lambda m: np.linalg.slogdet(m)[1]
    kl = 0.5 * (np.trace(inverse @ a) - 3 + d @ inverse @ d + log_det(b) - log_det(a))
    middle = (a + b) / 2
    affinity = 0.25 * (log_det(a) + log_det(b)) - 0.5 * log_det(middle) - d @ np.linalg.solve(middle, d) / 8
    args = [jnp.asarray(v, dtype) for v in gaussians]
    rtol = 2e-5 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(jax.jit(spread_kl_gaussians)(*args, noise), kl, rtol=rtol)
    np.testing.assert_allclose(jax.jit(spread_hellinger_gaussians)(*args, noise), 1 - np.exp(affinity), rtol=rtol)
    y = np.random.default_rng(6).multivariate_normal(mean_p, a, size=20000)
    peer = scipy.stats.multivariate_normal
    terms = peer.logpdf(y, mean_p, a) - peer.logpdf(y, mean_q, b)
    assert abs(terms.mean() - kl) < 6 * terms.std() / np.sqrt(len(y))


def test_gaussians_are_zero_iff_equal_smooth_there_and_fall_with_noise(gaussians):
    mean_p, cov_p, mean_q, cov_q = (jnp.asarray(v, jnp.float32) for v in gaussians)
    same = jax.jit(jax.value_and_grad(lambda m: spread_kl_gaussians(m, cov_p, mean_p, cov_p, GaussianNoise(0.5))))
    value, slope = same(mean_p)
    assert abs(value) < 1e-6
    np.testing.assert_allclose(slope, jnp.zeros(3), atol=1e-6)
    kl = jax.jit(jax.vmap(lambda s: spread_kl_gaussians(mean_p, cov_p, mean_q, cov_q, GaussianNoise(s))))
    assert (np.diff(kl(jnp.array([0.1, 0.3, 1.0, 3.0]))) < 0).all()


def test_what_has_no_closed_form_says_so():
    one = jnp.ones((1, 1))
    for function in INTEGRANDS:
        with pytest.raises(TypeError, match="StudentTNoise has no closed form"):
            function(one, one, StudentTNoise(1.0, 3.0))
    with pytest.raises(ValueError, match="events of one number"):
        spread_total_variation_deltas(jnp.ones((1, 2)), jnp.ones((1, 2)), LaplaceNoise(1.0))
    with pytest.raises(ValueError, match="same shape"):
        spread_kl_deltas(one, jnp.ones((2, 1)), GaussianNoise(1.0))
    with pytest.raises(TypeError, match="noise must be GaussianNoise or LowRankGaussianNoise"):
        spread_kl_gaussians(jnp.ones(1), one, jnp.ones(1), one, LaplaceNoise(1.0))
    with pytest.raises(ValueError, match=r"cov_q must have shape \(1, 1\)"):
        spread_kl_gaussians(jnp.ones(1), one, jnp.ones(1), jnp.ones((2, 2)), GaussianNoise(1.0))
