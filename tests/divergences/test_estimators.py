"""Estimates against closed forms and quadrature, within standard errors; gradients against closed ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import (
    GaussianNoise,
    LaplaceNoise,
    TransformedNoise,
    chi_squared,
    jensen_shannon,
    kl,
    reverse_kl,
    spread_chi_squared_deltas,
    spread_divergence,
    spread_hellinger_deltas,
    spread_kl,
    spread_kl_deltas,
    spread_total_variation_deltas,
    squared_hellinger,
    total_variation,
)

CLOSED = {
    kl: spread_kl_deltas,
    reverse_kl: lambda p, q, noise: spread_kl_deltas(q, p, noise),
    squared_hellinger: spread_hellinger_deltas,
    total_variation: spread_total_variation_deltas,
    chi_squared: spread_chi_squared_deltas,
}


CASES = [(d, "float32") for d in CLOSED] + [(kl, "float64")]


@pytest.mark.parametrize(("divergence", "dtype"), CASES, indirect=["dtype"], ids=lambda v: getattr(v, "name", v))
def test_deltas_match_the_closed_form_in_value_and_gradient(divergence, dtype, key):
    p, q, scale = (np.asarray(v, dtype) for v in ([[0.3]], [[1.2]], 0.8))
    noise = lambda s: GaussianNoise(s)

    @jax.jit
    def estimates(keys):
        def one(key):
            value = lambda p, q, s: spread_divergence(p, q, noise(s), divergence=divergence, num_samples=50, key=key)
            estimate = value(p, q, scale)
            slopes = jax.grad(lambda *a: value(*a).value, argnums=(0, 1, 2))(p, q, scale)
            return estimate, jnp.stack([jnp.ravel(s)[0] for s in slopes])

        return jax.vmap(one)(keys)

    (values, errors), slopes = estimates(jax.random.split(key, 400))
    closed = lambda p, q, s: CLOSED[divergence](p, q, noise(s))[0]
    exact, exact_slopes = jax.jit(jax.value_and_grad(closed, argnums=(0, 1, 2)))(p, q, scale)
    values, errors, slopes = (np.asarray(v, float) for v in (values, errors, slopes))
    assert abs(values.mean() - exact) < 6 * values.std() / 20
    # The reported standard error is the spread over keys.
    assert 0.85 < np.sqrt((errors**2).mean()) / values.std() < 1.15
    for mean, spread, want in zip(slopes.mean(axis=0), slopes.std(axis=0) / 20, exact_slopes, strict=True):
        assert abs(mean - float(np.ravel(want)[0])) < 6 * spread + 1e-6


@pytest.mark.parametrize("divergence", [kl, jensen_shannon, chi_squared], ids=lambda d: d.name)
def test_mixtures_match_quadrature(divergence, key):
    x, z = np.array([-1.0, 0.4, 2.0]), np.array([0.0, 1.0])
    p = lambda y: scipy.stats.laplace.pdf(y, x, 0.7).mean()
    q = lambda y: scipy.stats.laplace.pdf(y, z, 0.7).mean()
    textbook = {
        kl: lambda p, q: p * np.log(p / q),
        jensen_shannon: lambda p, q: 0.5 * (p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))),
        chi_squared: lambda p, q: (p - q) ** 2 / q,
    }[divergence]
    cuts = np.unique([-25, *x, *z, 25])
    exact = sum(scipy.integrate.quad(lambda y: textbook(p(y), q(y)), *ends)[0] for ends in itertools.pairwise(cuts))
    estimate = lambda x, z: spread_divergence(
        x, z, LaplaceNoise(0.7), divergence=divergence, num_samples=4000, key=key, chunk_size=1000
    )
    value, error = jax.jit(estimate)(x.astype(np.float32)[:, None], z.astype(np.float32)[:, None])
    assert abs(value - exact) < 6 * error
    assert error < 0.1 * exact


def test_properties_of_the_estimate(key):
    x, z = jax.random.normal(key, (2, 6, 2))
    run = jax.jit(lambda x, z, noise: spread_divergence(x, z, noise, num_samples=600, key=key))
    value, error = run(x, z, GaussianNoise(0.5))
    assert value > 6 * error
    same = run(x, x, GaussianNoise(0.5))
    assert abs(same.value) < 1e-6
    # A common shift changes nothing; more noise discriminates less.
    np.testing.assert_allclose(run(x + 3, z + 3, GaussianNoise(0.5)).value, value, rtol=1e-3)
    falling = [run(x, z, GaussianNoise(s)).value for s in (0.5, 1.0, 2.0)]
    assert falling[0] > falling[1] > falling[2] > 0


def test_far_apart_samples_give_finite_values_and_gradients(key):
    x, z = jnp.zeros((2, 1)), jnp.full((2, 1), 1e3)
    loss = lambda x, d: spread_divergence(x, z, GaussianNoise(0.1), divergence=d, num_samples=8, key=key).value
    for divergence, exact in ((kl, 5e7), (jensen_shannon, np.log(2))):
        value, slope = jax.jit(jax.value_and_grad(lambda x, d=divergence: loss(x, d)))(x)
        np.testing.assert_allclose(value, exact, rtol=1e-3)
        assert np.isfinite(slope).all()


def test_draws_use_every_sample_evenly(key):
    # With noise far below the spacing, y tells which atom it came from.
    from spread_jax.divergences.estimators import _draw

    x = jnp.arange(5.0)[:, None]
    y = np.rint(np.asarray(_draw(x, GaussianNoise(1e-3), 13, key))).astype(int).ravel()
    counts = np.bincount(y, minlength=5)
    assert counts.sum() == 13
    assert set(counts) == {2, 3}


def test_spread_kl_of_a_sampler_is_an_upper_bound_that_tightens(key):
    # p = N(0, 1) by 200 quantiles, model N(m, 1), noise 1: KL is near m^2 / 4 by the spread Gaussians.
    data = jnp.asarray(scipy.stats.norm.ppf((np.arange(200) + 0.5) / 200), jnp.float32)[:, None]
    noise = GaussianNoise(1.0)
    value = lambda m, key, num: spread_kl(
        data, lambda n, *, key: m + jax.random.normal(key, (n, 1)), noise,
        num_samples=200, num_model_samples=num, key=key,
    ).value  # fmt: skip
    keys = jax.random.split(key, 400)
    few = jax.jit(jax.vmap(lambda k: value(0.8, k, 5)))(keys)
    with_slope = jax.value_and_grad(lambda m, k: value(m, k, 500))
    many, slope = jax.jit(jax.vmap(with_slope, in_axes=(None, 0)))(0.8, keys)
    exact = 0.8**2 / 4
    assert few.mean() > exact + 6 * few.std() / 20
    assert abs(many.mean() - exact) < 6 * many.std() / 20 + 0.01
    assert abs(slope.mean() - 0.4) < 6 * slope.std() / 20 + 0.02


def test_transformed_noise_estimates_on_the_transformed_samples(key):
    x, z = jnp.array([[0.2]]), jnp.array([[0.9]])
    noise = TransformedNoise(GaussianNoise(0.5), lambda x: 2 * x)
    estimate = jax.jit(lambda x, z: spread_divergence(x, z, noise, num_samples=2000, key=key))(x, z)
    assert abs(estimate.value - 0.5 * (1.4 / 0.5) ** 2) < 6 * estimate.standard_error


def test_bad_arguments_are_refused(key):
    x, noise = jnp.zeros((3, 2)), GaussianNoise(1.0)
    with pytest.raises(ValueError, match="q_samples must hold at least one sample"):
        spread_divergence(x, jnp.zeros((0, 2)), noise, num_samples=3, key=key)
    with pytest.raises(ValueError, match="must share their event shape"):
        spread_divergence(x, jnp.zeros((3, 1)), noise, num_samples=3, key=key)
    with pytest.raises(TypeError, match="num_samples must be a Python integer"):
        spread_divergence(x, x, noise, num_samples=3.0, key=key)
    with pytest.raises(TypeError, match="divergence must be an FDivergence"):
        spread_divergence(x, x, noise, divergence="kl", num_samples=3, key=key)
    with pytest.raises(ValueError, match="sampler must return the 4 samples"):
        spread_kl(x, lambda n, *, key: x, noise, num_samples=3, num_model_samples=4, key=key)


def test_the_standard_error_of_spread_kl_is_its_deviation_over_keys_given_the_model_samples(key):
    """A sampler that always draws the same: what is left is the draws of y."""
    data, model = jnp.array([[0.0], [0.7]]), jnp.array([[0.4], [1.5], [0.1]])
    one = lambda key: spread_kl(
        data, lambda num, *, key: model, GaussianNoise(0.7), num_samples=40, num_model_samples=3, key=key
    )
    values, errors = jax.jit(jax.vmap(one))(jax.random.split(key, 300))
    np.testing.assert_allclose(np.sqrt(np.square(errors).mean()), values.std(ddof=1), rtol=0.25)
