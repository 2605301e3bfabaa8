"""Divergences over scales against SciPy's quadrature of closed forms, and estimates against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import (
    GaussianNoise,
    GridScales,
    LaplaceNoise,
    LogUniformScales,
    divergence_over_scales,
    jensen_shannon,
    kl,
    reverse_kl,
    spread_divergence,
    spread_divergence_over_scales,
    spread_kl_gaussians,
)

LOW, HIGH = 0.05, 1.0
LAW = LogUniformScales(LOW, HIGH)


def over_scales(at, weight=lambda s: 1.0):
    """The mean of at(sigma) over the log-uniform law, by SciPy."""
    integrand = lambda t: at(np.exp(t)) * weight(np.exp(t))
    return scipy.integrate.quad(integrand, np.log(LOW), np.log(HIGH), epsabs=1e-12)[0] / np.log(HIGH / LOW)


def test_gaussians_match_scipy_in_value_and_in_the_gradient_to_means_and_ends(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 1))
    mean_p, mean_q, cov_p, cov_q = rng.normal(size=2), rng.normal(size=2), a @ a.T, b @ b.T  # lines: singular

    def exact(sigma, mean_q=mean_q):
        s, t, d = cov_p + sigma**2 * np.eye(2), cov_q + sigma**2 * np.eye(2), mean_p - mean_q
        solved = np.linalg.solve(t, s)
        return 0.5 * (np.trace(solved) - 2 + d @ np.linalg.solve(t, d) - np.linalg.slogdet(solved)[1])

    def value(mean_q, high):
        at = lambda sigma: spread_kl_gaussians(mean_p, cov_p, mean_q, cov_q, GaussianNoise(sigma))
        return divergence_over_scales(at, LogUniformScales(LOW, high), weight=jnp.square, num_scales=24)

    got, (slope, of_end) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(mean_q, HIGH)
    expected = over_scales(exact, np.square)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    step = 1e-5
    for index in range(2):
        ends = (mean_q + sign * step * np.eye(2)[index] for sign in (1, -1))
        moved = [over_scales(lambda s, m=m: exact(s, m), np.square) for m in ends]
        np.testing.assert_allclose(slope[index], (moved[0] - moved[1]) / (2 * step), rtol=1e-6)
    # d/dhigh of 1 / log(high / low) * the integral: (h(high) - mean) / (high log(high / low)).
    np.testing.assert_allclose(of_end, (exact(HIGH) - expected) / (HIGH * np.log(HIGH / LOW)), rtol=1e-8)


@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise])
@pytest.mark.parametrize("divergence", [kl, jensen_shannon])
def test_estimates_of_samples_match_quadrature_within_their_standard_errors(make, divergence, key):
    p, q = jnp.array([[0.0], [0.6]]), jnp.array([[0.2], [1.0], [1.1]])
    estimate = lambda key: spread_divergence_over_scales(
        p, q, LAW, make, divergence=divergence, weight=jnp.square, num_samples=40, num_scales=8, key=key
    )
    values, errors = jax.jit(jax.vmap(estimate))(jax.random.split(key, 50))
    # One density on a fine grid at each scale: no draws.
    y = np.linspace(-25, 25, 200_001)
    kernel = {GaussianNoise: scipy.stats.norm, LaplaceNoise: scipy.stats.laplace}[make]
    density = lambda atoms, s: np.mean([kernel.pdf(y, a, s) for a in np.asarray(atoms)[:, 0]], axis=0)

    def at(s):
        a, b = (np.maximum(density(atoms, s), 1e-300) for atoms in (p, q))
        m = (a + b) / 2
        terms = a * np.log(a / b) if divergence is kl else (a * np.log(a / m) + b * np.log(b / m)) / 2
        return terms.sum() * (y[1] - y[0])

    nodes, weights = np.polynomial.legendre.leggauss(16)
    scales = np.exp(np.log(LOW) + (1 + nodes) / 2 * np.log(HIGH / LOW))
    expected = sum(0.5 * w * s**2 * at(s) for w, s in zip(weights, scales, strict=True))
    assert abs(values.mean() - expected) < 6 * values.std() / np.sqrt(50)
    # The standard error tells the spread over keys.
    np.testing.assert_allclose(np.sqrt(np.square(errors).mean()), values.std(ddof=1), rtol=0.4)


def test_one_scale_is_the_divergence_of_that_scale(key):
    p, q = jnp.array([[0.0], [0.6]]), jnp.array([[0.2], [1.0]])
    options = {"divergence": reverse_kl, "num_samples": 16}
    got, want = jax.jit(
        lambda key: (
            spread_divergence_over_scales(p, q, GridScales(0.5), key=key, **options),
            spread_divergence(p, q, GaussianNoise(0.5), key=jax.random.split(key, 1)[0], **options),
        )
    )(key)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: divergence_over_scales(1.0, LAW), TypeError, "divergence must be callable, got float"),
        (lambda: divergence_over_scales(jnp.square, 0.5), TypeError, "law must be a law of noise scales, .* got float"),
        (lambda: divergence_over_scales(jnp.square, LAW, weight=2.0), TypeError, "weight must be callable"),
        (
            lambda: spread_divergence_over_scales(
                jnp.ones((2, 1)), jnp.ones((2, 1)), LAW, GaussianNoise(1.0), num_samples=2, key=jax.random.key(0)
            ),
            TypeError,
            "noise must be callable, got GaussianNoise",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
