"""Annealed importance sampling against exact likelihoods; bounds over a data set against one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import GaussianNoise, spread_importance_bound
from spread_jax.evaluation import annealed_importance_sampling, held_out_bound

SIGMA = 0.3


def linear_model(dtype):
    """x = F z in five dimensions, z of two; data from it, and the exact log p~."""
    chance = np.random.default_rng(3)
    factor = chance.standard_normal((5, 2))
    y = chance.standard_normal((6, 2)) @ factor.T + SIGMA * chance.standard_normal((6, 5))
    exact = scipy.stats.multivariate_normal(np.zeros(5), factor @ factor.T + SIGMA**2 * np.eye(5)).logpdf(y)
    return jnp.asarray(factor, dtype), jnp.asarray(y, dtype), exact


@functools.partial(jax.jit, static_argnames=("num_steps", "num_chains"))
def estimate(factor, y, key, *, num_steps, num_chains):
    decode = lambda z: z @ factor.T
    return annealed_importance_sampling(
        y, decode, GaussianNoise(SIGMA), 2, num_steps=num_steps, num_chains=num_chains, key=key, num_leapfrog_steps=5
    )


def test_a_linear_models_likelihood_is_exact_within_its_error(dtype, key):
    factor, y, exact = linear_model(dtype)
    found = estimate(factor, y, key, num_steps=100, num_chains=2000)
    assert found.log_likelihood.dtype == dtype
    assert (np.abs(found.log_likelihood - exact) < 4.5 * found.standard_error).all()
    assert (found.standard_error < 0.06).all()
    assert (found.effective_sample_size > 400).all()
    assert ((found.acceptance_rate > 0.6) & (found.acceptance_rate < 0.95)).all()


def test_weights_are_unbiased_and_logs_lie_below(key):
    """Few steps and one chain: a rough estimate is still unbiased, and its log a bound on average."""
    factor, y, exact = linear_model("float32")
    found = estimate(factor, jnp.tile(y, (1000, 1)), key, num_steps=6, num_chains=1)
    logs = np.asarray(found.log_likelihood, np.float64).reshape(1000, 6) - exact
    weights = np.exp(logs)
    assert (np.abs(weights.mean(axis=0) - 1) < 4.5 * weights.std(axis=0) / np.sqrt(1000)).all()
    assert (logs.mean(axis=0) < -0.2).all()
    assert ((logs > 3).mean(axis=0) < np.exp(-3)).all()
    assert np.isnan(found.standard_error).all()


def test_a_curved_model_against_quadrature(x64, key):
    y = jnp.asarray([[0.5, 1.0], [-1.5, 1.5]])
    decode = lambda z: jnp.concatenate([z, jnp.sin(2 * z)], axis=1)

    def density(z, point):
        x = np.array([z, np.sin(2 * z)])
        return scipy.stats.norm.pdf(z) * scipy.stats.norm.pdf(point, x, SIGMA).prod()

    exact = [np.log(scipy.integrate.quad(density, -8, 8, args=(np.asarray(p),), limit=400)[0]) for p in y]
    found = jax.jit(
        lambda y: annealed_importance_sampling(
            y, decode, GaussianNoise(SIGMA), 1, num_steps=60, num_chains=300, key=key, num_leapfrog_steps=5
        )
    )(y)
    assert (np.abs(found.log_likelihood - np.array(exact)) < 4.5 * found.standard_error).all()
    assert (found.standard_error < 0.2).all()


def test_where_a_decoder_is_no_number_there_is_no_mass(key):
    """x = z, and no number above a point that chains come to from below: p~ of what is left, in closed form."""
    end, y = 4.9, jnp.asarray([[6.0], [5.0], [-1.0]])
    scale = 0.5
    found = jax.jit(
        lambda y: annealed_importance_sampling(
            y, lambda z: jnp.where(z > end, jnp.nan, z), GaussianNoise(scale), 1, num_steps=100, num_chains=400,
            key=key, num_leapfrog_steps=5,
        )
    )(y)  # fmt: skip
    variance = scale**2 / (1 + scale**2)
    posterior = scipy.stats.norm(np.asarray(y)[:, 0] / (1 + scale**2), np.sqrt(variance))
    exact = scipy.stats.norm(0, np.sqrt(1 + scale**2)).logpdf(np.asarray(y)[:, 0]) + posterior.logcdf(end)
    assert posterior.sf(end)[0] > 0.3  # chains do meet it
    assert (np.abs(found.log_likelihood - exact) < 4.5 * found.standard_error).all()
    assert (found.standard_error < 0.2).all()
    assert ((found.acceptance_rate > 0.5) & (found.acceptance_rate < 0.95)).all()


class FixedNoise:
    """A noise whose draw is known, so that a bound and an exact value are about the same y."""

    def __init__(self, y):
        self.y, self.noise = y, GaussianNoise(SIGMA)

    def sample(self, x, *, key):
        return self.y

    def log_prob(self, y, x):
        return self.noise.log_prob(y, x)

    def location(self, x):
        return x


def test_it_lies_above_a_bound_with_a_poor_encoder(key):
    factor, y, exact = linear_model("float32")
    encode = lambda y: (jnp.zeros((len(y), 2)), jnp.full((len(y), 2), -0.5))
    bound = spread_importance_bound(y, encode, lambda z: z @ factor.T, FixedNoise(y), key=key, num_samples=10).bound
    found = estimate(factor, y, key, num_steps=100, num_chains=2000)
    assert bound.mean() + 1 < found.log_likelihood.mean()
    assert found.log_likelihood.mean() == pytest.approx(exact.mean(), abs=0.2)


def test_what_is_refused(key):
    call = functools.partial(
        annealed_importance_sampling, decode=lambda z: z, noise=GaussianNoise(1.0), latent_dim=2, key=key
    )
    with pytest.raises(ValueError, match=r"decode must .* = \(8, 3\) for z of shape \(8, 2\), got \(8, 2\)"):
        call(jnp.zeros((1, 3)), num_steps=2, num_chains=2)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        call(jnp.zeros((1, 2)), num_steps=0, num_chains=2)
    with pytest.raises(TypeError, match="y must have a floating-point dtype"):
        call(jnp.zeros((1, 2), int), num_steps=2, num_chains=2)


# --- bounds over a data set


def test_a_data_set_in_batches_is_its_examples(key):
    seen = []

    def bound(batch, *, key):
        seen.append((batch.shape, batch.dtype, jax.random.key_data(key).tolist()))
        return batch.astype(np.float32).sum(axis=1)

    data = np.arange(14, dtype=np.uint8).reshape(7, 2)
    found = held_out_bound(bound, data, batch_size=3, key=key)
    np.testing.assert_array_equal(found.per_example, data.sum(axis=1))
    assert found.value == data.sum(axis=1).mean()
    assert found.standard_error == pytest.approx(scipy.stats.sem(data.sum(axis=1)))
    assert np.isnan(found.effective_sample_size)
    assert [s[:2] for s in seen] == [((3, 2), np.uint8)] * 3
    assert len({tuple(s[2]) for s in seen}) == 3
    assert held_out_bound(bound, data[:1], batch_size=3, key=key).per_example.shape == (1,)


def test_the_importance_bound_of_an_exact_encoder_is_the_likelihood(key):
    """x = z spread by sigma: p~ is N(0, 1 + sigma^2), and with the exact posterior every weight is p~(y)."""
    variance = SIGMA**2 / (1 + SIGMA**2)
    encode = lambda y: (y / (1 + SIGMA**2), jnp.full_like(y, 0.5 * np.log(variance)))

    @jax.jit
    def bound(x, *, key):
        return spread_importance_bound(x, encode, lambda z: z, GaussianNoise(SIGMA), key=key, num_samples=4)

    x = np.asarray(jax.random.normal(key, (500, 1)))
    found = held_out_bound(bound, x, batch_size=200, key=key)
    expected = -0.5 - 0.5 * np.log(2 * np.pi * (1 + SIGMA**2))  # minus the entropy of p~
    assert abs(found.value - expected) < 4.5 * found.standard_error
    assert found.effective_sample_size == pytest.approx(4, rel=1e-4)
    assert bound._cache_size() == 1


def test_a_bound_of_another_shape_and_no_data_are_refused(key):
    with pytest.raises(ValueError, match=r"one number for each example, shape \(2,\), got \(\)"):
        held_out_bound(lambda x, key: x.sum(), np.zeros((4, 2)), batch_size=2, key=key)
    with pytest.raises(ValueError, match="at least one example"):
        held_out_bound(lambda x, key: x.sum(), np.zeros((0, 2)), batch_size=2, key=key)
