"""Newton's steps of the closed form: what they are at the truth and beside it, and when W is made orthogonal."""

import numpy as np
import pytest

from spread_jax.linear import _closed_form, _host, _scores


@pytest.mark.parametrize("moved", [np.zeros((2, 2)), np.array([[0.03, 0.05], [-0.04, -0.02]])], ids=["truth", "beside"])
def test_a_step_goes_back_to_the_truth_under_noise_of_another_share_in_each_source(moved):
    """Sources of unit variance with correlated observation noise, seen through I + D: the step is D, to first order.

    The laws and the shares of the noise differ, and so do the mean slopes of the scores.
    """
    rng, count = np.random.default_rng(0), 400_000
    sources = np.stack([rng.laplace(scale=np.sqrt(0.5), size=count), rng.uniform(-np.sqrt(3), np.sqrt(3), count)])
    noise = np.array([[0.3, 0.15], [0.15, 0.1]])
    seen = np.eye(2) + moved
    v = seen @ (sources + np.linalg.cholesky(noise) @ rng.normal(size=(2, count)))
    law = _scores.AnyLaw.of(2, count)
    blocks = _host.blocks(v)
    coefficients, slope, variance = _scores.project(law, np.eye(2), blocks, count)
    assert abs(slope[0] - slope[1]) > 0.5
    psi_u, noise_u = _closed_form.cross_moments(law, coefficients, np.eye(2), blocks), seen @ noise @ seen.T
    f = psi_u - slope[:, None] * noise_u
    p, q, deviation = _closed_form.equations(
        slope, variance, np.diagonal(psi_u), np.diagonal(noise_u), count, law.untold, np.asarray(False)
    )
    step = p * f + q * f.T
    off = ~np.eye(2, dtype=bool)
    error = np.abs(step - moved) * off
    # Var of a mean square of unit variance is about 4 / count; the second order of a step is of the size of D squared.
    allowed = 5 * np.where(deviation > 0, deviation, 2 / np.sqrt(count)) + 2 * np.abs(moved).max() ** 2
    assert (error < allowed).all()
    assert not moved.any() or (np.abs(moved) > 1.5 * allowed).any()


@pytest.mark.parametrize(("strength", "orthogonal"), [(0.0, False), (0.2, False), (0.4, True), (0.8, True)])
def test_estimates_that_are_more_correlated_than_by_chance_make_w_orthogonal(strength, orthogonal):
    """A source that holds an odd function of another, uncorrelated with it: psi of one is correlated with the other."""
    rng, count = np.random.default_rng(1), 20_000
    first = rng.laplace(scale=np.sqrt(0.5), size=count)
    held = np.tanh(2 * first)
    held -= first * (first @ held) / (first @ first)
    second = rng.laplace(scale=np.sqrt(0.5), size=count) + strength * held
    z = np.stack([first, second, rng.uniform(-1.7, 1.7, count)])
    z -= z.mean(axis=1, keepdims=True)
    v = np.linalg.solve(np.linalg.cholesky(z @ z.T / count), z)
    w, _, _, _, chosen = _closed_form.newton(
        v, _scores.AnyLaw.of(3, count), np.eye(3), None, np.asarray(False), 0, max_iterations=12, tolerance=0.0
    )
    assert bool(chosen) is orthogonal
    correlation = (w @ w.T)[np.triu_indices(3, 1)]
    if orthogonal:
        np.testing.assert_allclose(w @ w.T, np.eye(3), atol=1e-10)
    else:
        # (2 + 8 / sqrt(pairs)) / count is what chance leaves of a mean square.
        assert 0 < np.square(correlation).mean() * count < 2 + 8 / np.sqrt(3)
