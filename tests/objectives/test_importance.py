"""The importance bound on linear-Gaussian models, where everything is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spread_jax import GaussianNoise, LaplaceNoise, spread_elbo, spread_importance_bound

A = np.array([[1.0, 0.5], [-0.3, 0.8], [0.7, -0.2]])
SIGMA = 0.6
NOISE = GaussianNoise(SIGMA)
COVARIANCE = A @ A.T + SIGMA**2 * np.eye(3)
POSTERIOR = np.linalg.inv(np.eye(2) + A.T @ A / SIGMA**2)


def decode(z):
    return z @ jnp.asarray(A.T, z.dtype)


def exact_encode(y):
    """The exact posterior needs a diagonal covariance: rotate z onto its axes."""
    mean = y @ jnp.asarray(A @ POSTERIOR / SIGMA**2, y.dtype)
    return mean @ jnp.asarray(AXES, y.dtype), jnp.broadcast_to(jnp.asarray(LOG_STD, y.dtype), mean.shape)


VARIANCES, AXES = np.linalg.eigh(POSTERIOR)
LOG_STD = 0.5 * np.log(VARIANCES)


def rotated_decode(z):
    return decode(z @ jnp.asarray(AXES.T, z.dtype))


def prior_encode(y):
    return jnp.zeros((y.shape[0], 2), y.dtype), jnp.zeros((y.shape[0], 2), y.dtype)


def expected_log_density(x):
    """E log N(y; 0, A A^T + sigma^2 I) over y ~ N(x, sigma^2 I)."""
    inverse = np.linalg.inv(COVARIANCE)
    quadratic = np.einsum("ni,ij,nj->n", x, inverse, x) + SIGMA**2 * np.trace(inverse)
    return scipy.stats.multivariate_normal.logpdf(np.zeros(3), cov=COVARIANCE) - 0.5 * quadratic


def test_equals_the_log_density_at_the_exact_posterior(dtype, key):
    x = jnp.asarray(np.random.default_rng(8).normal(size=(5, 3)), dtype)
    terms = jax.jit(lambda x: spread_importance_bound(x, exact_encode, rotated_decode, NOISE, key=key, num_samples=4))(
        x
    )
    # y is drawn inside: draw it again, from the key the objective uses.
    y = NOISE.sample(x, key=jax.random.split(key)[0])
    exact = scipy.stats.multivariate_normal.logpdf(np.asarray(y, float), np.zeros(3), COVARIANCE)
    np.testing.assert_allclose(terms.bound, exact, rtol=2e-5 if dtype == "float32" else 1e-10)
    np.testing.assert_allclose(terms.effective_sample_size, np.full(5, 4.0), rtol=1e-3)


def test_grows_with_k_from_the_elbo_to_the_log_density(key):
    x = jnp.asarray(np.random.default_rng(9).normal(size=(2, 3)), jnp.float32)
    keys = jax.random.split(key, 4000)
    at = lambda k: jax.jit(
        jax.vmap(lambda key: spread_importance_bound(x, prior_encode, decode, NOISE, key=key, num_samples=k))
    )(keys)
    elbo = jax.jit(jax.vmap(lambda key: spread_elbo(x, prior_encode, decode, NOISE, key=key).elbo))(keys)
    terms = [at(k) for k in (1, 4, 32)]
    runs = [np.asarray(t.bound, float) for t in terms]
    error = lambda *values: 6 * sum(np.std(v, axis=0) for v in values) / np.sqrt(len(keys))
    assert (np.abs(runs[0].mean(axis=0) - np.mean(elbo, axis=0)) < error(runs[0], elbo)).all()
    assert (runs[1].mean(axis=0) > runs[0].mean(axis=0) + error(runs[0], runs[1])).all()
    assert (runs[2].mean(axis=0) > runs[1].mean(axis=0) + error(runs[1], runs[2])).all()
    exact = expected_log_density(np.asarray(x, float))
    assert (runs[2].mean(axis=0) < exact + error(runs[2])).all()
    assert (runs[2].mean(axis=0) > exact - 0.5).all()
    size = np.asarray(terms[1].effective_sample_size)
    assert ((size >= 1) & (size <= 4 + 1e-5)).all()


def test_gradients_match_finite_differences_and_calls_happen_once(x64, key):
    x = jnp.asarray(np.random.default_rng(10).normal(size=(2, 3)))
    calls = []

    def bound(w):
        def counted(z):
            calls.append(z.shape)
            return decode(w * z), {"seen": z.shape[0]}

        encode = lambda y: (prior_encode(y), None)
        terms, aux = spread_importance_bound(
            x, encode, counted, LaplaceNoise(0.7), key=key, num_samples=3, num_spread_samples=2, has_aux=True
        )
        assert aux == (None, {"seen": 12})
        return terms.bound.sum()

    slope = jax.jit(jax.grad(bound))(1.1)
    assert calls == [(12, 2)]
    bound = jax.jit(bound)
    np.testing.assert_allclose(slope, (bound(1.100001) - bound(1.099999)) / 2e-6, rtol=1e-6)


def test_bad_returns_are_named(key):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"decode must return shape \[n, \*event\] = \(10, 3\)"):
        spread_importance_bound(x, prior_encode, lambda z: z, NOISE, key=key, num_samples=5)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        spread_importance_bound(x, prior_encode, decode, NOISE, key=key, num_samples=0)


def test_two_draws_of_y_and_three_of_z_against_numpy(x64, key):
    """S_y = 2, K = 3: the mean of logarithms of means, and the effective size of each y's weights."""
    x = np.random.default_rng(11).normal(size=(2, 3))
    seen = []

    def encode(y):
        seen.append(y)
        return 0.1 * y[:, :2], jnp.full((len(y), 2), -0.2)

    def counted(z):
        seen.append(z)
        return decode(z)

    terms = spread_importance_bound(x, encode, counted, NOISE, key=key, num_samples=3, num_spread_samples=2)
    y, z = (np.asarray(part) for part in seen)
    assert y.shape == (4, 3)
    assert z.shape == (12, 2)
    bound, size = np.zeros((2, 2)), np.zeros((2, 2))
    for n in range(2):
        for s in range(2):
            row = y[2 * n + s]
            draws = z[6 * n + 3 * s : 6 * n + 3 * s + 3]
            log_w = (
                scipy.stats.norm.logpdf(row, draws @ A.T, SIGMA).sum(axis=1)
                + scipy.stats.norm.logpdf(draws).sum(axis=1)
                - scipy.stats.norm.logpdf(draws, 0.1 * row[:2], np.exp(-0.2)).sum(axis=1)
            )
            w = np.exp(log_w)
            bound[n, s], size[n, s] = np.log(w.mean()), w.sum() ** 2 / np.square(w).sum()
    np.testing.assert_allclose(terms.bound, bound.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(terms.effective_sample_size, size.mean(axis=1), rtol=1e-9)


def test_the_gradient_is_the_weighted_mean_of_the_draws_gradients(x64, key):
    """d/dw log mean_k w_k = sum_k (w_k / sum w) d log w_k, by NumPy: z is fixed, x = w z."""
    x, z = np.random.default_rng(12).normal(size=(1, 3)), []
    encode = lambda y: (jnp.zeros((1, 3)), jnp.zeros((1, 3)))

    def bound(w):
        record = lambda draws: z.append(draws) or w * draws
        options = {"key": key, "num_samples": 5, "spread_samples": x}
        return spread_importance_bound(x, encode, record, NOISE, **options).bound[0]

    slope = jax.grad(bound)(1.2)
    draws = np.asarray(z[0])
    log_w = scipy.stats.norm.logpdf(x, 1.2 * draws, SIGMA).sum(axis=1)
    share = np.exp(log_w - np.logaddexp.reduce(log_w))
    of_each = ((x - 1.2 * draws) * draws / SIGMA**2).sum(axis=1)
    np.testing.assert_allclose(slope, share @ of_each, rtol=1e-9)
