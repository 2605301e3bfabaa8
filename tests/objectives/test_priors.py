"""Bounds under another prior, of y that is drawn already, and with a weight on the KL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import spread_jax as sj
from spread_jax import GaussianNoise, elbo, spread, spread_elbo, spread_importance_bound, wae_mmd_loss

SIGMA, SLOPE, MEAN, STD = 0.5, np.array([1.5, -0.5]), 0.7, 0.4  # x = a z, z ~ N(m, s^2)
NOISE = GaussianNoise(SIGMA)
X = np.random.default_rng(0).normal(size=(6, 2))
decode = lambda z: z * SLOPE
log_prior = lambda z: jax.scipy.stats.norm.logpdf(z[:, 0], MEAN, STD)


def exact_posterior(y):
    precision = 1 / STD**2 + SLOPE @ SLOPE / SIGMA**2
    mean = (MEAN / STD**2 + y @ SLOPE / SIGMA**2) / precision
    return mean[:, None], jnp.full((len(y), 1), -0.5 * np.log(precision))


def wide_posterior(y):
    mean, log_std = exact_posterior(y)
    return mean + 0.1, log_std + 0.3


@pytest.fixture
def log_density():
    cov = STD**2 * np.outer(SLOPE, SLOPE) + SIGMA**2 * np.eye(2)
    return lambda y: scipy.stats.multivariate_normal.logpdf(y, MEAN * SLOPE, cov)


def test_the_importance_bound_of_the_exact_posterior_is_the_log_density(log_density, key, x64):
    y = spread(X, NOISE, key=key, num_samples=2)
    terms = jax.jit(
        lambda y: spread_importance_bound(
            X, exact_posterior, decode, NOISE, key=key, num_samples=3, num_spread_samples=2,
            prior_log_prob=log_prior, spread_samples=y,
        )
    )(y)  # fmt: skip
    np.testing.assert_allclose(terms.bound, log_density(y).reshape(6, 2).mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(terms.effective_sample_size, np.full(6, 3.0), rtol=1e-9)


def test_the_elbo_and_its_kl_are_unbiased(log_density, key, x64):
    y = jnp.asarray(X)
    bound = lambda key, encode: elbo(y, encode, decode, NOISE, key=key, num_latent_samples=4, prior_log_prob=log_prior)
    keys = jax.random.split(key, 400)
    at = jax.jit(jax.vmap(bound, in_axes=(0, None)), static_argnums=1)
    exact = at(keys, exact_posterior)
    assert (np.abs(exact.elbo.mean(axis=0) - log_density(X)) < 6 * exact.elbo.std(axis=0) / np.sqrt(400)).all()
    wide = at(keys, wide_posterior)
    mean, log_std = (np.asarray(part)[:, 0] for part in wide_posterior(X))
    kl = np.log(STD) - log_std + (np.exp(2 * log_std) + (mean - MEAN) ** 2) / (2 * STD**2) - 0.5
    assert (np.abs(wide.kl.mean(axis=0) - kl) < 6 * wide.kl.std(axis=0) / np.sqrt(400)).all()
    assert (wide.elbo.mean(axis=0) < log_density(X)).all()
    np.testing.assert_allclose(wide.elbo, wide.log_likelihood - wide.kl, rtol=1e-12)


def test_the_standard_normal_as_a_callable_is_the_default(key, x64):
    standard = lambda z: jax.scipy.stats.norm.logpdf(z).sum(axis=1)
    options = {"key": key, "num_samples": 3, "num_spread_samples": 2}
    bound = functools.partial(spread_importance_bound, X, wide_posterior, decode, NOISE, **options)
    for got, want in zip(bound(prior_log_prob=standard), bound(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("low_variance", [False, True])
def test_samples_that_are_given_are_the_ones_it_would_draw(low_variance, key, x64):
    seen = []
    encode = lambda y: seen.append(y) or wide_posterior(y)
    bound = functools.partial(
        spread_elbo, X, encode, decode, NOISE, num_spread_samples=3, num_latent_samples=2, low_variance=low_variance
    )
    spread_key, latent_key = jax.random.split(key)
    y = spread(X, NOISE, key=spread_key, num_samples=3)
    for got, want in zip(bound(key=latent_key, spread_samples=y), bound(key=key), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(seen[0], y)
    with pytest.raises(ValueError, match=r"spread_samples must have num_spread_samples = 3 rows for each of the 6"):
        bound(key=key, spread_samples=y[:6])


def test_a_weight_on_the_kl(key, x64):
    terms = elbo(jnp.asarray(X), wide_posterior, decode, NOISE, key=key)
    np.testing.assert_allclose(terms.weighted(1.0), terms.elbo, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(terms.weighted)(0.25), terms.log_likelihood - 0.25 * terms.kl, rtol=1e-12)


def test_a_wasserstein_autoencoder_with_another_prior(key, x64):
    z = jnp.asarray(X)
    same = wae_mmd_loss(z, lambda x: x, lambda z: z, key=key, weight=2.0, prior_samples=z)
    far = wae_mmd_loss(z, lambda x: x, lambda z: z, key=key, weight=2.0, prior_samples=z + 3)
    assert same.mmd <= 0 < far.mmd  # unbiased: negative for a set and itself
    assert far.loss == 2 * far.mmd


def test_a_prior_of_another_shape_is_refused(key):
    bound = functools.partial(elbo, jnp.ones((3, 2)), lambda y: (y, y), lambda z: z, NOISE, key=key)
    with pytest.raises(ValueError, match=r"prior_log_prob must return shape \(3,\) or \(3, 1\), got \(3, 2\)"):
        bound(prior_log_prob=lambda z: z)
    with pytest.raises(TypeError, match="prior_log_prob must be callable, got float"):
        bound(prior_log_prob=0.5)
    with pytest.raises(TypeError, match="key must be a JAX random key"):
        sj.spread_gan_losses(jnp.ones((2, 1)), jnp.ones((2, 1)), lambda y: y, NOISE, key=0)
