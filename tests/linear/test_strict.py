"""Everything traces where the program has forbidden JAX to promote ranks and dtypes, and gives what it gives else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear import amari_distance, ica, pca
from tests.linear._data import laplace_data

X = jnp.asarray(laplace_data(0, 60, 3, 2)[0], jnp.float32)
A = jnp.asarray(laplace_data(0, 60, 3, 2)[1], jnp.float32)
Z = X[:, :2]
KEY = jax.random.key(0)
SHORT = {"num_samples": 4, "max_iterations": 20, "key": KEY}

CALLS = {
    "natural gradient": lambda x: ica.fit(x, 2, method="natural_gradient", num_restarts=2, **SHORT),
    "spread EM": lambda x: ica.fit(x, 2, method="spread_em", source="student_t", **SHORT),
    "EM": lambda x: ica.fit(x, 2, method="em", observation_scale=jnp.float32(0.1), **SHORT),
    "gibbs": lambda x: ica.fit(x, 5, num_restarts=3, **SHORT),
    "closed form": lambda x: ica.fit(x, 2, observation_scale=0.1, key=KEY),
    "a law": lambda x: ica.fit(x, 2, source="bernoulli_gauss", num_restarts=2, key=KEY),
    "a density": lambda x: ica.fit(x, 2, source=lambda z: -jnp.log(jnp.cosh(z)), key=KEY),
    "moments": lambda x: ica.posterior_moments(A, x, noise_scale=0.1, num_samples=64, rows_per_draw=8, key=KEY),
    "steps": lambda x: (
        ica.em_step(A, x, noise_scale=0.1, key=KEY),
        ica.natural_gradient_step(A, x, noise_scale=0.1, num_spread_samples=2, key=KEY),
        ica.gibbs_step(A, Z, x, noise_scale=0.1, key=KEY),
    ),
    "scores": lambda x: (ica.paper_noise_scale(A), amari_distance(A[:2].T, A[:2])),
    "PCA": lambda x: [
        (pca.latents(x, result), result.log_likelihood)
        for rows in (x, x[:2])
        for spread in (True, False)
        for result in (
            pca.fit(rows, 2, 0.1, spread=spread),
            pca.fit(rows, 2, 0.1, spread=spread, method="em", key=KEY),
        )
    ],
    "PCA's steps": lambda x: (
        pca.em_step(A, pca.second_moments(x).covariance, 0.1),
        pca.closed_form(pca.second_moments(x).covariance, 2, 0.1),
        pca.spread_kl(A, pca.second_moments(x).covariance, 0.1),
        pca.spread_log_likelihood(A, pca.second_moments(x).covariance, 0.1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_promoted_that_the_caller_would_see(name):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(CALLS[name], X)


def test_the_setting_changes_no_number_and_is_left_as_it_was():
    fit = functools.partial(ica.fit, X, 2, method="natural_gradient", num_samples=2, max_iterations=5, key=KEY)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(fit().mixing, fit().mixing)
        with pytest.raises(ValueError, match="rank"):
            jnp.ones((2, 3)) + jnp.ones(3)
        with pytest.raises(ValueError, match="must not both be 0"):
            fit(noise_scale=0.0)
        with pytest.raises(ValueError, match="rank"):
            jnp.ones((2, 3)) + jnp.ones(3)
