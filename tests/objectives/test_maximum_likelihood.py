"""Fisher information against closed forms and NumPy; covariances of estimates against repeated estimation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from spread_jax import (
    GaussianNoise,
    LaplaceNoise,
    LowRankGaussianNoise,
    fisher_information,
    gaussian_fisher_information,
    gaussian_mle_variance,
    mle_covariance,
    sandwich_covariance,
    spread_fisher_information,
)

PARAMS = {"b": np.array([0.3, -0.2]), "log_s": np.array(0.4)}  # x ~ N(b, diag(s^2, 1))


def mean(params):
    return params["b"] * jnp.array([1.0, 2.0], params["b"].dtype)


def cov(params):
    s = jnp.exp(params["log_s"])
    return jnp.array([[1.0, 0.3], [0.3, 0.5]], s.dtype) * s + jnp.outer(params["b"], params["b"])


def numpy_information(noise_covariance):
    """J by NumPy, from finite differences of mean and covariance."""
    theta = np.array([*PARAMS["b"], PARAMS["log_s"]])

    def moments(theta):
        b, s = theta[:2], np.exp(theta[2])
        return b * [1, 2], np.array([[1.0, 0.3], [0.3, 0.5]]) * s + np.outer(b, b) + noise_covariance

    precision = np.linalg.inv(moments(theta)[1])
    h = 1e-6 * np.eye(3)
    dm, ds = zip(*((np.subtract(u, v) / 2e-6 for u, v in zip(moments(theta + e), moments(theta - e), strict=True))
                   for e in h), strict=True)  # fmt: skip
    information = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            information[i, j] = dm[i] @ precision @ dm[j] + 0.5 * np.trace(precision @ ds[i] @ precision @ ds[j])
    return information


FACTOR = np.array([[0.5], [-1.0]])
NOISES = {
    "clean": (None, np.zeros((2, 2))),
    "gaussian": (GaussianNoise(0.7), 0.49 * np.eye(2)),
    "scales": (GaussianNoise(np.array([0.7, 0.2])), np.diag([0.49, 0.04])),
    "low_rank": (LowRankGaussianNoise(0.7, FACTOR), 0.49 * np.eye(2) + FACTOR @ FACTOR.T),
}


@pytest.mark.parametrize("name", NOISES)
def test_gaussian_information_is_numpys(name, dtype):
    noise, covariance = NOISES[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    compiled = jax.jit(lambda params: gaussian_fisher_information(mean, cov, params, noise=noise))
    information = compiled(params)
    assert information.dtype == dtype
    tol = {"float32": {"rtol": 2e-4, "atol": 2e-5}, "float64": {"rtol": 1e-7, "atol": 1e-8}}[dtype]
    np.testing.assert_allclose(information, numpy_information(covariance), **tol)


def log_density_of(noise):
    covariance = NOISES[noise][1]

    def log_density(params, x):
        s = cov(params) + jnp.asarray(covariance, x.dtype)
        u = x - mean(params)
        return -0.5 * (u * jnp.linalg.solve(s, u.T).T).sum(axis=1) - 0.5 * jnp.linalg.slogdet(s)[1]

    return log_density


@pytest.mark.parametrize("name", ["clean", "gaussian"])
def test_sampled_information_meets_the_closed_form_in_chunks_too(name, dtype):
    covariance = NOISES[name][1]
    moments = [np.asarray(f(jax.tree.map(jnp.asarray, PARAMS)), float) for f in (mean, cov)]
    x = np.random.default_rng(0).multivariate_normal(moments[0], moments[1] + covariance, size=20_000).astype(dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    run = jax.jit(lambda p, x: [fisher_information(log_density_of(name), p, x, chunk_size=c) for c in (None, 3000)])
    (value, error), chunked = run(params, x)
    assert value.dtype == dtype
    assert (np.abs(value - numpy_information(covariance)) < 6 * np.asarray(error)).all()
    for got, want in zip(chunked, (value, error), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == "float32" else 1e-9, atol=1e-4)


def test_the_standard_error_is_the_deviation_over_samples():
    log_density = lambda m, x: -0.5 * jnp.square(x[:, 0] - m)  # score x - m, information 1, Var score^2 = 2
    x = jax.random.normal(jax.random.key(1), (500, 200, 1))
    values, errors = jax.jit(jax.vmap(lambda x: fisher_information(log_density, jnp.float32(0), x)))(x)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors))), np.std(values), rtol=6 / np.sqrt(2 * 500))
    np.testing.assert_allclose(np.std(values), np.sqrt(2 / 200), rtol=6 / np.sqrt(2 * 500))


def test_spreading_only_loses_information_and_more_noise_loses_more(x64):
    params = jax.tree.map(jnp.asarray, PARAMS)
    information = jax.jit(lambda s: gaussian_fisher_information(mean, cov, params, noise=GaussianNoise(s)))
    clean = gaussian_fisher_information(mean, cov, params)
    ladder = [clean, *(information(s) for s in (0.01, 0.3, 1.0, 4.0))]
    for more, less in itertools.pairwise(ladder):
        assert (np.linalg.eigvalsh(more - less) > 0).all()  # Loewner order
    np.testing.assert_allclose(ladder[1], clean, rtol=1e-2)


@pytest.mark.parametrize("a", [[1.0, 1.0], [0.3, 0.1], [1e-3, 2.0]])
def test_a_singular_model_has_spread_information_only(a, dtype):
    """x = a z on a line: NaN without noise. Along a the variance v = |a|^2 has 1 / (2 (v + sigma^2)^2)."""
    a, zero = jnp.asarray(a, dtype), lambda a: jnp.zeros_like(a)
    both = lambda a: [
        gaussian_fisher_information(zero, lambda a: jnp.outer(a, a), a, noise=noise)
        for noise in (None, GaussianNoise(0.5))
    ]
    clean, spread = jax.jit(both)(a)
    assert np.isnan(clean).all()
    assert np.isnan(both(a)[0]).all()
    v = float(jnp.square(a).sum())
    along = float(a @ spread @ a) / v  # per unit of |a|; dv = 2 |a| d|a|
    np.testing.assert_allclose(along, 4 * v / (2 * (v + 0.25) ** 2), rtol=1e-4)


def test_information_of_a_sampler_meets_the_closed_form(key):
    """x = m + a z of one dimension: y ~ N(m, a^2 + sigma^2)."""
    sampler = lambda p, num, *, key: p["m"] + p["a"] * jax.random.normal(key, (num, 1))
    params = {"a": jnp.float32(0.8), "m": jnp.float32(0.1)}
    run = lambda noise: spread_fisher_information(
        sampler, params, noise, num_samples=2000, num_model_samples=2000, key=key, chunk_size=500
    )
    value, error = jax.jit(run)(GaussianNoise(0.6))
    variance = 0.64 + 0.36
    expected = np.diag([(2 * 0.8) ** 2 / 2 / variance**2, 1 / variance])
    # 2000 model samples leave an error of their own of a few per cent.
    assert (np.abs(value - expected) < 6 * np.asarray(error) + 0.03).all()


def test_few_model_samples_bias_the_information_up_or_down(key):
    """Up for a location, whose score an atom too few makes larger; down where outliers, which few draws have, count."""
    sigma = 0.3
    total, ratio, left = 1 + sigma**2, 1 / (1 + sigma**2), sigma**2 / (1 + sigma**2)  # z|y ~ N(ratio y, left)
    location = lambda theta, z: theta + z
    curve = lambda theta, z: jnp.concatenate([z, theta * (1 + z**2)], axis=1)  # at 0: J = E[E[1 + z^2|y]^2] / sigma^2
    exact_curve = ((1 + left) ** 2 + 2 * (1 + left) * ratio**2 * total + 3 * (ratio**2 * total) ** 2) / sigma**2
    for move, exact, sign in ((location, 1 / total, 1), (curve, exact_curve, -1)):

        def information(key, move=move):
            sampler = lambda theta, num, *, key: move(theta, jax.random.normal(key, (num, 1)))
            options = {"num_samples": 32, "num_model_samples": 4, "key": key}
            return spread_fisher_information(sampler, jnp.float32(0), GaussianNoise(sigma), **options).value[0, 0]

        values = jax.jit(jax.vmap(information))(jax.random.split(key, 400))
        assert sign * (values.mean() - exact) > 6 * values.std() / np.sqrt(400)


def test_information_of_a_laplace_spread_delta(key):
    """The score of a location is a sign over b: 1 / b^2, with no error at all."""
    sampler = lambda mean, num, *, key: jnp.full((num, 1), mean)
    run = lambda p, noise: spread_fisher_information(sampler, p, noise, num_samples=50, num_model_samples=1, key=key)
    value, error = jax.jit(run)(jnp.float32(0.0), LaplaceNoise(0.5))
    np.testing.assert_allclose(value, [[4.0]], rtol=1e-5)
    np.testing.assert_allclose(error, [[0.0]], atol=1e-3)


def test_mle_covariance_is_that_of_repeated_estimates():
    """Deterministic model x = a z in two dimensions: the spread estimate over 400 data sets."""
    a, sigma, count = np.array([1.0, 0.5]), 0.5, 400
    rng = np.random.default_rng(2)
    y = rng.normal(size=(400, count, 1)) * a + sigma * rng.normal(size=(400, count, 2))
    # The maximiser in closed form: the leading eigenvector of the spread data's covariance, less sigma^2.
    values, vectors = np.linalg.eigh(np.einsum("nki,nkj->nij", y, y) / count)
    estimates = vectors[:, :, 1] * np.sqrt(values[:, 1:] - sigma**2)
    estimates *= np.sign(estimates @ a)[:, None]
    information = gaussian_fisher_information(
        lambda a: jnp.zeros(2), lambda a: jnp.outer(a, a), jnp.asarray(a, jnp.float32), noise=GaussianNoise(sigma)
    )
    covariance = np.asarray(mle_covariance(information, count), float)
    np.testing.assert_allclose(covariance, np.linalg.inv(information) / count, rtol=1e-4)
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / 400)
    # Estimates of finite data differ from their limit by a relative 1 / count.
    assert (np.abs(np.cov(estimates.T) - covariance) < 6 * error + 0.02 * variances.max()).all()
    assert np.isnan(mle_covariance(jnp.zeros((2, 2)), count)).all()


def test_sandwich_is_white_s(dtype):
    """Normal model of Laplace data: H and G by hand. Where the model is right it is J^-1 / N."""
    x = np.random.default_rng(3).laplace(0.2, 1.5, size=5000)
    m, v = x.mean(), x.var()

    def log_density(p, x):
        return -0.5 * jnp.square(x - p["m"]) / p["v"] - 0.5 * jnp.log(p["v"])

    params = {"m": jnp.asarray(m, dtype), "v": jnp.asarray(v, dtype)}
    got = jax.jit(lambda x: [sandwich_covariance(log_density, params, x, chunk_size=c) for c in (None, 999)])(
        x.astype(dtype)
    )
    scores = np.stack([(x - m) / v, 0.5 * (x - m) ** 2 / v**2 - 0.5 / v])
    curvature = np.diag([1 / v, 0.5 / v**2])
    expected = np.linalg.inv(curvature) @ (scores @ scores.T / len(x)) @ np.linalg.inv(curvature) / len(x)
    for value in got:
        tol = {"rtol": 5e-3, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-8, "atol": 1e-12}
        np.testing.assert_allclose(value, expected, **tol)
    naive = mle_covariance(jnp.asarray(curvature, dtype), len(x))
    assert got[0][1, 1] > 1.5 * naive[1, 1]  # Laplace tails: (kurtosis - 1) / 2 = 2.5 times


@pytest.mark.parametrize("spread", ["both", "model", "data"])
@pytest.mark.parametrize("v", [0.1, 0.5, 3.0])
def test_one_sided_variance_maximises_the_expected_log_likelihood(spread, v, dtype):
    sigma = 0.6
    noisy_data = v + (sigma**2 if spread in ("both", "data") else 0)
    added = sigma**2 if spread in ("both", "model") else 0
    negative = lambda a: 0.5 * noisy_data / (a + added) + 0.5 * np.log(a + added)
    best = scipy.optimize.minimize_scalar(negative, bounds=(1e-9, 10), method="bounded", options={"xatol": 1e-10}).x
    got = jax.jit(lambda v: gaussian_mle_variance(v, GaussianNoise(sigma), spread=spread))(jnp.asarray([v], dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, [best], atol=1e-5)


def test_derivatives_and_vmap(x64):
    of_scale = lambda s: mle_covariance(
        gaussian_fisher_information(mean, cov, jax.tree.map(jnp.asarray, PARAMS), noise=GaussianNoise(s)), 10
    )[0, 0]
    both = jax.jit(jax.vmap(jax.value_and_grad(of_scale)))
    value, slope = both(jnp.array([0.3, 0.6]))
    moved = [both(jnp.array([0.3, 0.6]) + h)[0] for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(value[1], of_scale(0.6), rtol=1e-12)
    biased = jax.grad(lambda s: gaussian_mle_variance(jnp.array([2.0]), GaussianNoise(s), spread="data").sum())
    np.testing.assert_allclose(biased(0.5), 1.0)


KEY = jax.random.key(0)
X = jnp.ones((3, 1))
FLAT = lambda p, x: p * x[:, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fisher_information("f", 1.0, X), TypeError, "log_density must be callable"),
        (lambda: fisher_information(FLAT, 1.0, X.astype(int)), TypeError, "samples must have a floating-point dtype"),
        (lambda: fisher_information(FLAT, 1.0, X[:0]), ValueError, "samples must hold at least one sample"),
        (lambda: fisher_information(FLAT, 1.0, X.at[0].set(jnp.nan)), ValueError, "samples must be finite"),
        (lambda: fisher_information(FLAT, 1, X), TypeError, "params must hold floating-point numbers"),
        (lambda: fisher_information(FLAT, {}, X), ValueError, "params must hold at least one number"),
        (lambda: fisher_information(lambda p, x: p * x, 1.0, X), ValueError, r"log_density must return shape \[n\]"),
        (lambda: fisher_information(FLAT, 1.0, X, chunk_size=0), ValueError, "chunk_size must be at least 1"),
        (lambda: sandwich_covariance(None, 1.0, X), TypeError, "log_density must be callable"),
        (
            lambda: spread_fisher_information(
                lambda p, n, *, key: X, 1.0, GaussianNoise(1.0), num_samples=2, num_model_samples=3, key=KEY
            ),
            ValueError,
            "sampler must return the 2 samples",
        ),
        (lambda: gaussian_fisher_information(0, cov, PARAMS), TypeError, "mean must be callable"),
        (
            lambda: gaussian_fisher_information(lambda p: p, lambda p: p, jnp.ones(2)),
            ValueError,
            r"mean and cov must return shapes \[X\] and \[X, X\], got \(2,\) and \(2,\)",
        ),
        (
            lambda: gaussian_fisher_information(lambda p: p, jnp.diag, jnp.ones(2), noise=LaplaceNoise(1.0)),
            TypeError,
            "noise must be GaussianNoise or LowRankGaussianNoise",
        ),
        (lambda: mle_covariance(jnp.ones((2, 3)), 5), ValueError, r"information must have shape \[P, P\]"),
        (lambda: mle_covariance(jnp.eye(2), 0), ValueError, "num_examples must be positive"),
        (lambda: gaussian_mle_variance(X, GaussianNoise(1.0), spread="x"), ValueError, "spread must be 'both'"),
        (lambda: gaussian_mle_variance(X, LaplaceNoise(1.0)), TypeError, "noise must be GaussianNoise"),
        (lambda: gaussian_mle_variance(X, GaussianNoise(np.ones(2))), ValueError, "noise must have one scale"),
        (lambda: gaussian_mle_variance(1, GaussianNoise(1.0)), TypeError, "variance must have a floating-point"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_model_draws_and_draws_of_y_have_keys_of_their_own(key):
    """With the same draws for both, y sits on the model samples and the information is too small."""
    drawn = []

    def sampler(mean, num, *, key):
        drawn.append(key)
        return mean + jax.random.normal(key, (num, 1))

    options = {"num_samples": 3, "num_model_samples": 3, "key": key}
    spread_fisher_information(sampler, jnp.float32(0.0), GaussianNoise(0.5), **options)
    data = {tuple(np.asarray(jax.random.key_data(each))) for each in drawn if not isinstance(each, jax.core.Tracer)}
    assert len(data) == 2
