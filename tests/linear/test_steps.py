"""Newton's steps of the closed form: what they are at the truth and beside it, and when W is made orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear import _closed_form, _host, _scores, ica
from tests.linear._data import LAWS

KEY = jax.random.key(0)


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


def test_a_fit_that_arrives_early_is_asked_too_whether_its_estimates_are_correlated():
    """Two sources of which one holds an odd function of the other, seen at once: three steps, not five, are enough."""
    rng, count = np.random.default_rng(1), 20_000
    first = rng.laplace(scale=np.sqrt(0.5), size=count)
    held = np.tanh(2 * first)
    held -= first * (first @ held) / (first @ first)
    z = np.stack([first, rng.laplace(scale=np.sqrt(0.5), size=count) + 0.8 * held])
    z -= z.mean(axis=1, keepdims=True)
    v = np.linalg.solve(np.linalg.cholesky(z @ z.T / count), z)
    w, steps, _, _, orthogonal = _closed_form.newton(
        v, _scores.AnyLaw.of(2, count), np.eye(2), None, np.asarray(False), 0, max_iterations=50, tolerance=1.0
    )
    assert bool(orthogonal)
    assert steps <= 5
    np.testing.assert_allclose(w @ w.T, np.eye(2), atol=1e-10)


@pytest.mark.parametrize(
    "laws", [("laplace", "laplace"), ("uniform", "uniform"), ("gauss", "gamma"), ("signs", "gauss")]
)
def test_two_sources_are_parted_by_one_angle(laws):
    rng, count = np.random.default_rng(0), 20_000
    z = np.stack([LAWS[law](rng, count) for law in laws])
    z = (z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, keepdims=True)
    for angle in np.linspace(0, np.pi, 9):
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        w = _closed_form.turn_of_two(turn @ z)
        np.testing.assert_allclose(w @ w.T, np.eye(2), atol=1e-12)
        # Each estimate is one of the sources, of either sign: a third of a step of pi/32 is left at most.
        np.testing.assert_allclose(np.abs(w @ turn).max(axis=1), 1, atol=6e-4)
    if laws == ("uniform", "uniform"):
        on_device = jax.jit(_closed_form.turn_of_two)(jnp.asarray(turn @ z, jnp.float32))
        np.testing.assert_allclose(on_device, w, atol=1e-3)


def test_steps_of_many_sources_with_few_examples_are_few():
    """Each alone takes one ninth off what is left; along the secant of two of them it takes most of it."""
    rng = np.random.default_rng(0)
    z = LAWS["laplace"](rng, (1000, 16))
    z[:, ::2] = LAWS["uniform"](rng, (1000, 8))
    x = z @ rng.normal(size=(16, 16))
    near = ica.fit(x, 16, key=KEY)
    far = ica.fit(x, 16, tolerance=1e-4, key=KEY)
    assert bool(near.converged)
    assert bool(far.converged)
    assert int(near.num_iterations) < 15  # 17 without
    assert int(far.num_iterations) < 28  # 33 without
    # What was left of the way, in standard errors of the share of each source in each estimate.
    shares = near.unmixing @ far.mixing
    order = np.abs(shares).argmax(axis=1)
    assert len(set(order)) == 16
    shares = (shares / shares[np.arange(16), order][:, None])[:, order]
    off = ~np.eye(16, dtype=bool)
    assert np.abs(shares[off] / near.leakage[off]).max() < 0.3


def test_pairs_that_rest_where_they_look_alike_are_turned_and_found():
    """A Gaussian source and others, few examples: eight of nine starts end where two of them cannot be told apart."""
    found = []
    for seed in (32, 46, 78, 85):
        rng = np.random.default_rng(seed)
        mixing = rng.normal(size=(5, 5))
        z = np.stack([LAWS[law](rng, 1000) for law in ("gauss", "student_5", "uniform", "laplace", "gamma")], axis=1)
        result = ica.fit(z @ mixing.T, 5, key=KEY)
        sources = np.abs(result.unmixing @ mixing)
        found.append((sources / np.linalg.norm(sources, axis=1, keepdims=True)).max(axis=0).min())
    assert min(found) > 0.95, found


def test_scores_on_a_device_have_derivatives(x64):
    """Of an estimate through the histogram, against differences."""
    v = jnp.asarray(np.random.default_rng(0).laplace(size=(2, 500)))
    law = _scores.AnyLaw.of(2, 500)

    def slopes(angle):
        w = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
        return _scores.project(law, w, _host.blocks(v), 500)[1]

    slopes = jax.jit(slopes)
    _, found = jax.jvp(slopes, (0.3,), (1.0,))
    step = 1e-7  # so small that hardly an example comes to another point of the grid
    np.testing.assert_allclose(found, (slopes(0.3 + step) - slopes(0.3 - step)) / (2 * step), rtol=1e-3)
    assert np.abs(found).max() > 0.01


def test_a_jax_array_has_its_scores_from_all_of_its_examples():
    rng = np.random.default_rng(0)
    z = np.stack([LAWS["gamma"](rng, 60_000), LAWS["laplace"](rng, 60_000)], axis=1)
    x = (z @ np.array([[1.0, 0.5], [0.5, 1.0]])).astype(np.float32)
    host, device = (ica.fit(data, 2, tolerance=1e-2, key=KEY) for data in (x, jnp.asarray(x)))
    shares = host.unmixing @ np.asarray(device.mixing)
    off = ~np.eye(2, dtype=bool)
    assert np.abs((shares / np.diagonal(shares))[off] / host.leakage[off]).max() < 0.05  # 0.11 from a quarter of them
