"""ICA: steps against quadrature and theory, fits against the Cramer-Rao bound and FastICA."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax.linear import _closed_form, _gibbs, _sampling, ica, match_columns
from spread_jax.linear.sources import CustomSource, LaplaceSource, LogisticSource, StudentTSource


def signs_matrix(rng, rows, columns):
    """Entries +-1, columns of full rank that do not repeat."""
    while True:
        mixing = rng.choice([-1.0, 1.0], (rows, columns))
        overlap = np.abs(mixing.T @ mixing - rows * np.eye(columns)).max()
        if np.linalg.matrix_rank(mixing) == min(rows, columns) and overlap < rows:
            return mixing


def laplace_data(seed, count, rows, columns, law=None):
    rng = np.random.default_rng(seed)
    mixing = signs_matrix(rng, rows, columns)
    draw = law or (lambda rng, shape: rng.laplace(scale=np.sqrt(0.5), size=shape))
    return jnp.asarray(draw(rng, (count, columns)) @ mixing.T, jnp.float32), mixing


def direction_error(estimate, truth):
    """Mean relative error of the entries, each column compared with the most parallel one of the estimate."""
    estimate = np.asarray(estimate, np.float64)
    estimate = estimate / np.linalg.norm(estimate, axis=0)
    length = np.linalg.norm(truth, axis=0)
    cosines = estimate.T @ (truth / length)
    best = np.abs(cosines).argmax(axis=0)
    assert len(set(best)) == truth.shape[1]
    matched = estimate[:, best] * np.sign(cosines[best, np.arange(truth.shape[1])]) * length
    return np.abs(matched - truth).mean() / np.abs(truth).mean()


def scale_error(result, truth):
    lengths = np.sort(np.linalg.norm(np.asarray(result.mixing), axis=0) / np.linalg.norm(truth, axis=0)[0])
    return np.abs(lengths - 1).max()


# The table of the smoothed score


@pytest.mark.parametrize(("model_scale", "data_scale"), [(0.1, 0.1), (0.5, 0.3), (1.0, 0.0)])
def test_score_table_is_the_expected_spread_score(model_scale, data_scale, x64):
    source = LaplaceSource()
    table = _closed_form.score_table(source, jnp.full(1, model_scale), jnp.full(1, data_scale), jnp.float64)
    u = jnp.array([[-3.0, -0.33, 0.0, 0.08, 0.41, 2.2]])

    def expected(u):
        psi = lambda e: (
            float(source.spread_score(jnp.asarray(u + data_scale * e), model_scale)) * scipy.stats.norm.pdf(e)
        )
        return scipy.integrate.quad(psi, -9, 9, limit=200)[0]

    psi, slope = _closed_form.look_up(table, u)
    np.testing.assert_allclose(psi[0], [expected(float(v)) for v in u[0]], atol=2e-3)
    difference = (expected(0.08 + 1e-3) - expected(0.08 - 1e-3)) / 2e-3
    np.testing.assert_allclose(slope[0, 3], difference, rtol=0.03)


def test_score_table_continues_linearly(x64):
    table = _closed_form.score_table(StudentTSource(5.0), jnp.full(1, 0.3), jnp.full(1, 0.3), jnp.float64)
    psi, slope = _closed_form.look_up(table, jnp.array([[9.999, 30.0, 31.0]]))
    np.testing.assert_allclose(psi[0, 2] - psi[0, 1], slope[0, 0], rtol=1e-9)


# The E-step


def exact_posterior(mixing, y, variance, source, points=2801):
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
    score = np.asarray(source.score(jnp.asarray(z)))
    mean = (weights[..., None] * z).sum(axis=(0, 1))
    second = np.einsum("ab,abi,abj->ij", weights, z, z)
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
    x, truth = laplace_data(0, 600, 4, 3)
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


def test_elimination_solves(x64):
    rng = np.random.default_rng(0)
    for size in (1, 4, 40):
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
    result = ica.fit(x, 4, method="gibbs", num_restarts=runs, max_iterations=150, key=jax.random.key(1))
    assert direction_error(result.mixing, truth) < 0.1
    assert int(result.num_iterations) == {1: 150, 3: 3 * 100 + 150 + 75}[runs]


# Fits


def cramer_rao(count):
    """Direction error of the best unbiased estimate of a +-1 matrix with ten sources."""
    return np.sqrt(2 / np.pi * 6 / count)


@pytest.fixture(scope="module")
def large():
    return laplace_data(5, 20_000, 20, 10)


@pytest.fixture(scope="module")
def fitted(large):
    return ica.fit(large[0], 10, source="laplace", key=jax.random.key(0))


def test_closed_form_reaches_the_cramer_rao_bound(large, fitted):
    # The error itself varies by a tenth between data sets of 20,000.
    assert bool(fitted.converged)
    assert int(fitted.num_iterations) < 40  # Newton's steps; others that vanish with F take many more
    assert direction_error(fitted.mixing, large[1]) < 1.25 * cramer_rao(20_000)
    assert scale_error(fitted, large[1]) < 4 / np.sqrt(20_000)


def test_closed_form_beats_fastica(large, fitted):
    sklearn = pytest.importorskip("sklearn.decomposition")
    peer = sklearn.FastICA(10, whiten="unit-variance", random_state=1).fit(np.asarray(large[0]))
    assert direction_error(fitted.mixing, large[1]) < direction_error(peer.mixing_, large[1])


def test_sources_and_inverse_are_recovered(large, fitted):
    x = large[0]
    z = (x - fitted.mean) @ fitted.unmixing.T
    np.testing.assert_allclose(z @ fitted.mixing.T + fitted.mean, x, atol=2e-3)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.05)


def test_an_unknown_law_gets_unit_variance_and_a_scale_of_its_own():
    uniform = lambda rng, shape: rng.uniform(-np.sqrt(3), np.sqrt(3), shape)
    x, truth = laplace_data(3, 8000, 6, 4, uniform)
    result = ica.fit(x, 4, key=jax.random.key(0))
    assert bool(result.converged)
    assert direction_error(result.mixing, truth) < 0.03
    assert scale_error(result, truth) < 0.03
    assert bool((result.noise_scale > 0.4).all())  # the clean Laplace score would serve it badly


def test_known_observation_noise_is_taken_off():
    x, truth = laplace_data(4, 20_000, 8, 4)
    x = x + 0.7 * jax.random.normal(jax.random.key(9), x.shape)
    aware = ica.fit(x, 4, source="laplace", observation_scale=0.7, key=jax.random.key(0))
    unaware = ica.fit(x, 4, source="laplace", key=jax.random.key(0))
    assert scale_error(aware, truth) < 0.025
    assert scale_error(unaware, truth) > 0.03


def test_natural_gradient_agrees_with_the_closed_form():
    x, truth = laplace_data(6, 4000, 6, 4)
    key = jax.random.key(0)
    exact = ica.fit(x, 4, source="laplace", key=key)
    sampled = ica.fit(x, 4, method="natural_gradient", key=key)
    assert bool(sampled.converged)
    assert direction_error(sampled.mixing, truth) < 1.15 * direction_error(exact.mixing, truth) + 0.002


def test_a_plateau_is_not_called_converged():
    x, truth = laplace_data(7, 2000, 6, 3)
    x = x + 0.8 * jax.random.normal(jax.random.key(9), x.shape)
    turn = np.eye(3)
    turn[:2, :2] = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)  # two columns mixed alike: here the gradient is zero too
    settled = functools.partial(
        ica._residual, jnp.zeros((3, 3)), x=x, noise_scale=0.0, observation_scale=0.8, source=LaplaceSource(),
        key=jax.random.key(0), tolerance=0.25,
    )  # fmt: skip
    assert float(settled(mixing=jnp.asarray(truth, jnp.float32))[0]) < 0.25
    assert float(settled(mixing=jnp.asarray(truth @ turn, jnp.float32))[0]) > 2


def test_em_goes_on_from_a_plateau():
    x, truth = laplace_data(1, 1000, 6, 3)
    x = x + 0.1 * jax.random.normal(jax.random.key(9), x.shape)
    for seed in range(4):  # by the gradient alone, three of these stop after 50 sweeps with errors of 0.4 to 0.7
        result = ica.fit(
            x, 3, method="spread_em", num_samples=64, observation_scale=0.1, tolerance=0.5, key=jax.random.key(seed)
        )
        assert bool(result.converged)
        assert direction_error(result.mixing, truth) < 0.2


def test_standard_em_freezes_says_so_and_spreading_frees_it():
    x, truth = laplace_data(7, 2000, 6, 4)
    key = jax.random.key(1)
    options = {"num_samples": 32, "max_iterations": 150, "key": key}
    frozen = ica.fit(x, 4, method="em", observation_scale=0.01, **options)
    spread = ica.fit(x, 4, method="spread_em", observation_scale=0.01, noise_scale=1.0, **options)
    assert direction_error(spread.mixing, truth) < 0.1
    assert direction_error(frozen.mixing, truth) > 3 * direction_error(spread.mixing, truth)
    assert not bool(frozen.converged)
    assert float(frozen.residual) > 2


def test_more_sources_than_dimensions():
    x, truth = laplace_data(8, 4000, 4, 6)
    result = ica.fit(x, 6, max_iterations=500, key=jax.random.key(0))
    assert direction_error(result.mixing, truth) < 0.15
    assert result.mixing.shape == (4, 6)


def test_restarts_keep_the_best():
    x, truth = laplace_data(9, 500, 6, 5)
    result = ica.fit(x, 5, num_restarts=4, key=jax.random.key(0))
    assert direction_error(result.mixing, truth) < 0.2
    sampled = ica.fit(x, 5, method="natural_gradient", num_restarts=2, key=jax.random.key(0))
    assert direction_error(sampled.mixing, truth) < 0.2


def test_fit_runs_under_jit_vmap_and_in_double_precision(x64):
    x = jnp.stack([jnp.asarray(laplace_data(seed, 800, 4, 3)[0], jnp.float64) for seed in (10, 11)])
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(lambda x, key: ica.fit(x, 3, key=key)))(x, keys)
    alone = ica.fit(x[1], 3, key=keys[1])
    assert alone.mixing.dtype == jnp.float64
    np.testing.assert_allclose(together.mixing[1], alone.mixing, rtol=1e-4, atol=1e-4)


def test_fewer_rows_than_columns(key):
    x, truth = laplace_data(12, 300, 400, 2)
    result = ica.fit(x, 2, key=key)
    assert direction_error(result.mixing, truth) < 0.2


def test_a_callers_law_serves_as_source():
    density = CustomSource(lambda z: -jnp.sqrt(2.0) * jnp.abs(z))
    x, _ = laplace_data(13, 3000, 4, 3)
    named = ica.fit(x, 3, source="laplace", noise_scale=0.3, key=jax.random.key(0))
    given = ica.fit(x, 3, source=density, noise_scale=0.3, key=jax.random.key(0))
    np.testing.assert_allclose(given.mixing, named.mixing, atol=0.01)


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_same_estimate():
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from spread_jax.linear import ica
assert jax.device_count() == 4
z = jax.random.laplace(jax.random.key(0), (4096, 3)) / 2**0.5
x = z @ jax.random.normal(jax.random.key(1), (5, 3)).T
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
for method in ("closed_form", "natural_gradient"):
    options = {"method": method, "max_iterations": 20, "key": jax.random.key(2)}
    alone, together = ica.fit(x, 3, **options), ica.fit(shared, 3, **options)
    np.testing.assert_allclose(together.mixing, alone.mixing, atol=2e-4)
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What cannot work


X = np.asarray(laplace_data(0, 50, 4, 3)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: ica.fit(X.astype(int), 3, key=k), TypeError, "x must have a floating-point dtype"),
        (lambda k: ica.fit(X[:, 0], 1, key=k), ValueError, r"x must have shape \[N, X\]"),
        (lambda k: ica.fit(np.where(X > 1, np.nan, X), 3, key=k), ValueError, "x must be finite"),
        (lambda k: ica.fit(X, 4, key=k), ValueError, "rank of x, which is 3, got 4"),
        (lambda k: ica.fit(X[:3], 3, key=k), ValueError, "x must have more than 3 rows to fit 3 sources, got 3"),
        (lambda k: ica.fit(X, 5, method="closed_form", key=k), ValueError, "num_sources must be at most 4"),
        (lambda k: ica.fit(X, 3, method="fast", key=k), ValueError, "method must be one of 'auto'"),
        (lambda k: ica.fit(X, 3, method="em", key=k), ValueError, "observation_scale must be positive"),
        (lambda k: ica.fit(X, 3, noise_scale=-1.0, key=k), ValueError, "noise_scale must be positive"),
        (lambda k: ica.fit(X, 3, noise_scale=0.0, key=k), ValueError, "noise_scale must be positive"),
        (lambda k: ica.fit(X, 3, method="gibbs", noise_scale=-1.0, key=k), ValueError, "must not be negative"),
        (lambda k: ica.fit(X, 3, method="natural_gradient", noise_scale=0.0, key=k), ValueError, "must not both be 0"),
        (
            lambda k: ica.fit(X, 3, observation_scale=np.nan, key=k),
            ValueError,
            "observation_scale must not be negative",
        ),
        (lambda k: ica.fit(X, 3, max_iterations=0, key=k), ValueError, "max_iterations must be at least 1, got 0"),
        (lambda k: ica.fit(X, 3, tolerance=-1.0, key=k), ValueError, "tolerance must be positive"),
        (lambda k: ica.em_step(jnp.ones((4, 2)), X, key=k), ValueError, "must not both be 0"),
        (
            lambda k: ica.gibbs_step(jnp.ones((4, 5)), jnp.ones((50, 5)), X, noise_scale=0.0, key=k),
            ValueError,
            "positive",
        ),
        (lambda k: ica.fit(X, 3, source="gauss", key=k), ValueError, "source must be one of"),
        (lambda k: ica.fit(X, 0, key=k), ValueError, "num_sources must be at least 1"),
        (lambda k: ica.fit(X, 6, source="logistic", key=k), ValueError, "scale mixture of Gaussians"),
        (lambda k: ica.fit(X, 6, num_restarts=0, key=k), ValueError, "num_restarts must be"),
        (lambda k: ica.em_step(jnp.ones((3, 2)), X, noise_scale=0.1, key=k), ValueError, r"mixing \[X, Z\]"),
        (lambda k: ica.em_step(jnp.ones((4, 5)), X, noise_scale=0.1, key=k), ValueError, "use gibbs_step"),
        (lambda k: ica.gibbs_step(jnp.ones((4, 5)), X, X, noise_scale=0.1, key=k), ValueError, "one chain for each y"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, message, key):
    with pytest.raises(error, match=message):
        call(key)
