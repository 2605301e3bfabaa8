"""Sampling methods of ICA: E-steps against quadrature and theory, steps, Gibbs chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear import _gibbs, _sampling, ica, match_columns
from spread_jax.linear.sources import LaplaceSource, LogisticSource
from tests.linear._data import direction_error, laplace_data, on_device, signs_matrix

# The E-step


def exact_posterior(mixing, y, variance, source, points=701):
    """E[z], E[z z^T], E[psi z^T] and log p~(y) for one y and two sources, on a fine grid in NumPy."""
    grid = np.linspace(-14, 14, points)
    z = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
    residual = ((y - z @ mixing.T) ** 2).sum(axis=-1)
    prior = np.asarray(source.log_prob(jnp.asarray(grid)))
    log_joint = prior[:, None] + prior[None, :] - 0.5 * residual / variance
    log_joint = log_joint - 0.5 * len(y) * np.log(2 * np.pi * variance)
    weights = np.exp(log_joint - log_joint.max())
    log_evidence = np.log(weights.sum()) + log_joint.max() + 2 * np.log(grid[1] - grid[0])
    weights = weights / weights.sum()
    score = np.asarray(source.score(jnp.asarray(grid)))
    mean = (weights[..., None] * z).sum(axis=(0, 1))
    second = np.einsum("ab,abi,abj->ij", weights, z, z)
    score = np.stack(np.meshgrid(score, score, indexing="ij"), axis=-1)
    scored = np.einsum("ab,abi,abj->ij", weights, score, z)
    return mean, second, scored, log_evidence


@pytest.mark.parametrize("source", [LaplaceSource(), LogisticSource()], ids=["laplace", "logistic"])
def test_importance_sampling_agrees_with_quadrature(source, x64):
    mixing = np.array([[1.0, 0.4], [-0.5, 1.0], [0.3, 0.8]])
    y = np.array([0.7, -1.1, 0.2])
    mean, second, scored, log_evidence = exact_posterior(mixing, y, 0.5**2, source)
    moments = functools.partial(
        ica.posterior_moments, observation_scale=0.5, source=source, num_samples=4000, key=jax.random.key(3)
    )
    # 50 copies of one example, each with samples of its own, give the mean and its standard error.
    each = jax.jit(jax.vmap(lambda key: moments(jnp.asarray(mixing), jnp.asarray(y)[None], key=key)))
    found = each(jax.random.split(jax.random.key(0), 50))
    exact = {
        "y_z": y[:, None] * mean,
        "z_z": second,
        "deviation_z": second - np.outer(np.linalg.pinv(mixing) @ y, mean),
        "score_z": scored,
        "log_likelihood": log_evidence,
    }
    for name, value in exact.items():
        draws = np.asarray(getattr(found, name))
        error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
        # Self-normalised weights have a bias of order 1 / samples.
        assert np.all(np.abs(draws.mean(axis=0) - value) <= 5 * error + 2e-3), name


def test_the_gain_of_a_turn_agrees_with_quadrature_and_with_the_evidence_of_the_turned_matrix(x64):
    mixing = np.array([[1.0, 0.4], [-0.5, 1.0], [0.3, 0.8]])
    y = np.random.default_rng(1).normal(size=(8, 3)) @ np.diag([1.0, 2.0, 0.5])
    sampling = {"source": LaplaceSource(), "noise_scale": 0.0, "observation_scale": jnp.asarray(0.5)}
    found = _sampling.turn_gain(
        jnp.asarray(mixing), jnp.asarray(y), num_samples=10_000, key=jax.random.key(0), **sampling
    )
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in (np.pi / 8, -np.pi / 8, np.pi / 4)]

    def gain(evidence):
        before = evidence(mixing)
        gains = [evidence(mixing @ turn) - before for turn in turns]
        return max(np.sqrt(len(y)) * each.mean() / each.std() for each in gains)

    exact = gain(lambda a: np.array([exact_posterior(a, row, 0.25, LaplaceSource(), 301)[3] for row in y]))
    np.testing.assert_allclose(found, exact, atol=0.03)

    @jax.jit
    def sampled(a):
        each = lambda row: ica.posterior_moments(a, row[None], num_samples=10_000, key=jax.random.key(1), **sampling)
        return jax.lax.map(each, jnp.asarray(y)).log_likelihood

    np.testing.assert_allclose(gain(sampled), exact, atol=0.03)


def test_few_samples_many_samples_blocks_and_groups_estimate_the_same(key, monkeypatch):
    x, truth = on_device(laplace_data(0, 600, 4, 3))
    mixing = truth @ np.array([[0.4, 0.2, 0.0], [0.0, 0.7, 0.1], [0.0, 0.0, 2.0]])  # the true A hides terms that cancel
    mixing = jnp.asarray(mixing, jnp.float32)
    moments = functools.partial(ica.posterior_moments, mixing, x, noise_scale=0.5, source="logistic")
    ways = [
        {"rows_per_draw": 1},  # examples last
        {"rows_per_draw": 7, "chunk_size": 50, "num_spread_samples": 2},  # samples last
    ]
    fields = ("y_z", "z_z", "deviation_z", "score_z", "score_square", "log_likelihood")
    found = []
    for way, few in zip(ways, (16, 0), strict=True):
        monkeypatch.setattr(_sampling, "_FEW_PAIRS", few)
        each = jax.jit(jax.vmap(lambda key, way=way: moments(key=key, num_samples=32, **way)))
        runs = each(jax.random.split(key, 24))
        found.append({name: np.asarray(getattr(runs, name)) for name in fields})
    for name in fields:
        one, two = (draws[name] for draws in found)
        error = np.hypot(one.std(axis=0, ddof=1), two.std(axis=0, ddof=1)) / np.sqrt(24)
        assert np.all(np.abs(one.mean(axis=0) - two.mean(axis=0)) <= 5 * error), name


def test_relative_gradient_is_the_derivative_of_the_likelihood(x64):
    # One source in two dimensions: log p~ by quadrature, differentiated.
    mixing, sigma = jnp.array([[0.8], [0.6]]), 0.4
    x = jnp.array([[0.5, 0.1], [-1.0, -0.9], [0.2, 0.5]])
    z = jnp.linspace(-12, 12, 4001)
    step = z[1] - z[0]

    def log_likelihood(log_scale):
        square = jnp.square(x[:, None, :] - z[None, :, None] * (jnp.exp(log_scale) * mixing[:, 0])).sum(axis=-1)
        terms = LaplaceSource().log_prob(z) - 0.5 * square / sigma**2
        return jax.scipy.special.logsumexp(terms + jnp.log(step), axis=1).mean()

    moments = ica.posterior_moments(mixing, x, observation_scale=sigma, num_samples=40_000, key=jax.random.key(0))
    expected = jax.grad(log_likelihood)(0.0)
    np.testing.assert_allclose(moments.score_z[0, 0] - 1, expected, atol=0.01)
    np.testing.assert_allclose(-moments.deviation_z[0, 0] / sigma**2, expected, atol=0.01)  # A^T A = 1


# Steps


def test_em_moves_by_the_square_of_the_noise(x64):
    # A+ = A + s^2 A G^-1 (E[psi(u) u^T] - I) C^-1 to first order, whichever side the noise s comes from.
    x, truth = laplace_data(1, 4000, 3, 2)
    x = jnp.asarray(x, jnp.float64)
    turn = jnp.array([[jnp.cos(0.4), -jnp.sin(0.4)], [jnp.sin(0.4), jnp.cos(0.4)]])
    mixing = jnp.asarray(truth) @ turn
    u = x @ jnp.linalg.pinv(mixing).T
    covariance = u.T @ u / len(u)
    f = LaplaceSource().score(u).T @ u / len(u) - jnp.eye(2)
    step = mixing @ jnp.linalg.solve(mixing.T @ mixing, f) @ jnp.linalg.inv(covariance)
    moves = {}
    for scale in (0.02, 0.08):
        new = ica.em_step(mixing, x, observation_scale=scale, num_samples=400, key=jax.random.key(0))
        moves[scale] = float(jnp.linalg.norm(new - mixing))
        np.testing.assert_allclose((new - mixing) / scale**2, step, atol=0.15 * float(jnp.abs(step).max()))
    np.testing.assert_allclose(moves[0.08] / moves[0.02], 16, rtol=0.2)


def test_em_raises_the_likelihood(x64):
    x, truth = laplace_data(2, 400, 2, 1)
    x = jnp.asarray(x, jnp.float64)
    z = jnp.linspace(-12, 12, 2001)
    gamma = 0.7

    @jax.jit
    def log_likelihood(mixing):
        square = jnp.square(x[:, None, :] - z[None, :, None] * mixing[:, 0]).sum(axis=-1)
        return jax.scipy.special.logsumexp(LaplaceSource().log_prob(z) - 0.5 * square / gamma**2, axis=1).mean()

    mixing = 0.4 * jnp.asarray(truth) + jnp.array([[0.3], [-0.2]])
    values = [float(log_likelihood(mixing))]
    for t in range(6):
        mixing = ica.em_step(mixing, x, observation_scale=gamma, num_samples=2000, key=jax.random.key(t))
        values.append(float(log_likelihood(mixing)))
    assert np.all(np.diff(values) > 0)


def test_the_papers_scale_is_its_formula(x64):
    mixing = jax.random.normal(jax.random.key(0), (5, 3))
    np.testing.assert_allclose(ica.paper_noise_scale(mixing), 2.5 * np.sqrt(np.mean(np.asarray(mixing @ mixing.T))))
    assert ica.paper_noise_scale(jnp.zeros((2, 1))) == 0.001


def test_the_papers_scale_has_a_slope_where_columns_sum_to_zero(dtype):
    """Against the double sum over A A^T, and its derivative 2.5 s_j / (X |s|) with s the sums of columns."""
    of = jax.jit(jax.vmap(jax.value_and_grad(ica.paper_noise_scale)))
    rng = np.random.default_rng(0)
    balanced = np.array([[1.0, -2.0], [-3.0, 0.5], [2.0, 1.5]])
    cases = np.stack([balanced, np.zeros((3, 2)), balanced + 1e-4, rng.normal(size=(3, 2)), rng.normal(size=(3, 2))])
    value, slope = of(jnp.asarray(cases, dtype))
    sums = cases.sum(axis=1, keepdims=True)
    length = np.sqrt(np.einsum("nik,njk->nij", cases, cases).mean(axis=(1, 2)).clip(0))
    np.testing.assert_allclose(value, np.maximum(0.001, 2.5 * length), rtol=1e-5)
    assert (value[:3] == jnp.asarray(0.001, dtype)).all()
    expected = 2.5 / 3 * sums[3:] / np.linalg.norm(sums[3:], axis=2, keepdims=True)
    np.testing.assert_array_equal(slope[:3], np.zeros((3, 3, 2)))
    np.testing.assert_allclose(slope[3:], np.broadcast_to(expected, (2, 3, 2)), rtol=1e-5)


def test_elimination_solves(x64):
    rng = np.random.default_rng(0)
    for size in (1, 3, 33):
        roots = rng.normal(size=(7, size, size))
        matrices = roots @ roots.transpose(0, 2, 1) + np.eye(size)
        right = rng.normal(size=(7, size))
        found = _sampling.solve_positive(jnp.asarray(matrices.transpose(1, 2, 0)), jnp.asarray(right.T))
        np.testing.assert_allclose(found.T, np.linalg.solve(matrices, right[..., None])[..., 0], rtol=1e-8)


def test_gibbs_chains_have_the_posterior(x64):
    mixing = np.array([[1.0, 0.6]])
    y = np.array([0.9])
    mean, second, _, _ = exact_posterior(mixing, y, 0.5**2, LaplaceSource())
    chains = 400
    sweep = functools.partial(_sampling.gibbs_sweep, jnp.asarray(mixing), variance=0.25, source=LaplaceSource())

    @jax.jit
    def run(z, key):
        def step(z, key):
            z = sweep(z, jnp.full((1, chains), y[0]), key=key)
            return z, z

        return jax.lax.scan(step, z, jax.random.split(key, 300))[1][50:]

    z = np.asarray(run(jnp.zeros((2, chains)), jax.random.key(0)))  # [sweeps, Z, chains]
    each = z.mean(axis=0)
    error = each.std(axis=1, ddof=1) / np.sqrt(chains)
    assert np.all(np.abs(each.mean(axis=1) - mean) <= 5 * error)
    products = np.einsum("sic,sjc->cij", z, z) / len(z)
    error = products.std(axis=0, ddof=1) / np.sqrt(chains)
    assert np.all(np.abs(products.mean(axis=0) - second) <= 5 * error)


def test_runs_vote_on_columns():
    rng = np.random.default_rng(0)
    truth = signs_matrix(rng, 4, 5)  # cosines of 0.5 at most
    signs = rng.choice([-1.0, 1.0], (6, 5))
    pool = np.stack([(truth + 0.01 * rng.normal(size=truth.shape)) * sign for sign in signs])
    pool[0, :, 3] = pool[1, :, 3] = truth[:, 3] + truth[:, 0]  # two runs mixed two columns
    pool[5, :, 2] = rng.normal(size=4)
    shuffled = np.stack([run[:, rng.permutation(5)] for run in pool])
    agreed, votes = jax.jit(_gibbs.vote)(jnp.asarray(shuffled, jnp.float32))
    matched = match_columns(np.asarray(agreed), truth, kind="direction")
    np.testing.assert_allclose(matched, truth, atol=0.03)
    assert sorted(votes.tolist()) == [4, 5, 6, 6, 6]


@pytest.mark.parametrize("runs", [1, 3])
def test_overcomplete_columns_are_found(runs):
    x, truth = laplace_data(3, 2000, 3, 4)
    result = ica.fit(x, 4, num_restarts=runs, max_iterations=150, key=jax.random.key(1))  # gibbs by itself
    assert result.mixing.shape == (3, 4)
    assert direction_error(result.mixing, truth) < 0.1
    assert int(result.num_iterations) == {1: 150, 3: 3 * 100 + 150 + 75}[runs]
