"""The closed form: estimated scores against quadrature, fits against the Cramer-Rao bound, theory and FastICA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from spread_jax.linear import _closed_form, _host, _scores, ica, match_columns, mixing_error
from spread_jax.linear._whiten import principal_axes, whiten
from spread_jax.linear.sources import CustomSource, LaplaceSource, StudentTSource
from tests.linear._data import LAWS, direction_error, laplace_data, mixed_data, scale_error, signs_matrix

KEY = jax.random.key(0)


# Scores


def test_score_table_is_the_expected_spread_score(x64):
    s, d = np.array([0.1, 0.5, 1.0]), np.array([0.1, 0.3, 0.0])
    table = _scores.score_table(LaplaceSource(), s, d, jnp.float64)
    u = np.array([-3.0, -0.33, 0.0, 0.08, 0.41, 2.2])
    nodes = np.linspace(-9, 9, 4001)

    def psi(y, s):  # the closed form, in SciPy
        rate, log_ndtr = np.sqrt(2), scipy.special.log_ndtr
        right, left = -rate * y + log_ndtr(y / s - rate * s), rate * y + log_ndtr(-y / s - rate * s)
        return rate * np.tanh((right - left) / 2)

    expected = lambda u: np.stack([
        scipy.integrate.trapezoid(psi(u[:, None] + d[i] * nodes, s[i]) * scipy.stats.norm.pdf(nodes), nodes)
        for i in range(3)
    ])  # fmt: skip
    found, slope = _scores.look_up(table, jnp.asarray(np.tile(u, (3, 1))))
    np.testing.assert_allclose(found, expected(u), atol=2e-3)
    np.testing.assert_allclose(slope[:, 3], (expected(u[3:4] + 1e-3) - expected(u[3:4] - 1e-3))[:, 0] / 2e-3, rtol=0.03)


def test_score_table_continues_linearly(x64):
    table = np.asarray(_scores.score_table(StudentTSource(5.0), np.full(1, 0.3), np.full(1, 0.3), jnp.float64))
    psi, slope = _scores.look_up(table, np.array([[9.999, 30.0, 31.0]]))
    np.testing.assert_allclose(psi[0, 2] - psi[0, 1], slope[0, 0], rtol=1e-9)


def test_functions_have_their_slopes_and_combine_to_the_score(x64):
    law, u = _scores.AnyLaw.of(3, 1000), np.linspace(-4, 4, 30).reshape(3, 10)
    f, slope = law.functions(u)
    _, expected = jax.jvp(lambda u: law.functions(u)[0], (jnp.asarray(u),), (jnp.ones_like(u),))
    np.testing.assert_allclose(slope, expected, atol=1e-12)
    coefficients = np.random.default_rng(0).normal(size=(3, law.size))
    np.testing.assert_allclose(law.score(coefficients, u), np.einsum("zk,kzn->zn", coefficients, f))


POPULATIONS = {
    "laplace": scipy.stats.laplace(scale=np.sqrt(0.5)),
    "uniform": scipy.stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
    "gauss": scipy.stats.norm(),
    "gamma": scipy.stats.gamma(4, loc=-2, scale=0.5),
}


def test_projected_scores_are_those_of_quadrature():
    count = 40_000
    quantiles = (np.arange(count) + 0.5) / count
    u = np.stack([law.ppf(quantiles) for law in POPULATIONS.values()])
    u = (u - u.mean(axis=1, keepdims=True)) / u.std(axis=1, keepdims=True)
    law = _scores.AnyLaw.of(4, count)
    coefficients, information, variance = _scores.project(law, np.eye(4), _host.blocks(u, law.size), count)
    for row, name in enumerate(POPULATIONS):
        density, grid = POPULATIONS[name].pdf, np.linspace(*POPULATIONS[name].ppf([1e-9, 1 - 1e-9]), 40_001)
        average = lambda values, density=density, grid=grid: scipy.integrate.trapezoid(values * density(grid), grid)
        f, slope = (a[:, 0] for a in law.functions(grid[None]))
        f = f - average(f)[:, None]
        b = np.array([[average(one * two) for two in f] for one in f])
        d = average(slope)
        expected = np.linalg.lstsq(b + 1e-6 * np.diag(np.diag(b)), d, rcond=None)[0]
        near = coefficients[row] @ f - expected @ f
        # The shrinkage of what is not known well, and the ends of the grid.
        assert average(near**2) < 0.05 * d @ expected, name
        assert information[row] == pytest.approx(d @ expected, rel=0.12), name
        square = average((coefficients[row] @ f) ** 2)
        assert variance[row] == pytest.approx(square - average(coefficients[row] @ f) ** 2, rel=0.02), name
    # J = E psi^2: 2 for Laplace's law, of which the span has 1.93, 1 for the Gaussian; the uniform law's is infinite.
    assert information[0] == pytest.approx(1.9, abs=0.1)
    assert information[1] > 3
    assert information[2] == pytest.approx(1, abs=0.01)
    assert 1.6 < information[3] < 2


def test_a_named_law_gets_its_own_score():
    u = LAWS["laplace"](np.random.default_rng(0), (2, 50_000))
    table = np.asarray(_scores.score_table(LaplaceSource(), np.full(1, 0.1), np.full(1, 0.1), jnp.float32))
    law = _scores.NamedLaw(table)
    coefficients, information, _ = _scores.project(law, np.eye(2), _host.blocks(u, law.size), u.shape[1])
    psi, slope = _scores.look_up(table, u)
    alone = slope.mean(axis=1) ** 2 / psi.var(axis=1)
    assert np.all(alone <= information + 1e-3)
    assert np.all(information < 2)  # that of the clean law
    for row in range(2):
        assert np.corrcoef(law.score(coefficients, u)[row], psi[row])[0, 1] > 0.99


def test_sources_of_one_law_share_a_score():
    """Also where some are of another law; those are told apart, a skewed one too, whose even part has a sign."""
    rng, count = np.random.default_rng(0), 2000
    u = np.concatenate(
        [LAWS["laplace"](rng, (6, count)), LAWS["uniform"](rng, (2, count)), LAWS["gamma"](rng, (1, count))]
    )
    law = _scores.AnyLaw.of(9, count)
    coefficients, *_ = _scores.project(law, np.eye(9), _host.blocks(u), count)
    np.testing.assert_array_equal(coefficients[:6], coefficients[:1].repeat(6, axis=0))
    assert len(np.unique(coefficients, axis=0)) == 4
    np.testing.assert_allclose(coefficients[:6, list(law.even)], 0, atol=1e-12)
    assert (np.abs(coefficients[8, list(law.even)]) > 0).any()
    # In JAX from a histogram too, in which each example counts at the two points beside it.
    project = jax.jit(lambda u: _scores.project(law, jnp.eye(9), _host.blocks(u), count)[0])
    grid = np.linspace(-1.6, 1.6, 61) * np.ones((9, 1))
    on_device = np.asarray(project(jnp.asarray(u)))
    np.testing.assert_allclose(law.score(on_device, grid), law.score(coefficients, grid), atol=0.15, rtol=0.02)


def test_a_law_that_is_little_different_is_told_apart():
    rng, count = np.random.default_rng(0), 2000
    u = np.concatenate([LAWS["laplace"](rng, (8, count)), LAWS["logistic"](rng, (1, count))])
    coefficients, *_ = _scores.project(_scores.AnyLaw.of(9, count), np.eye(9), _host.blocks(u), count)
    assert len(np.unique(coefficients[:8], axis=0)) == 1
    assert np.abs(coefficients[8] - coefficients[0]).max() > 0


def test_functions_that_chance_alone_asks_for_do_not_count():
    """The score of a Gaussian source is u; three of seven functions always count."""
    grid, count, errors = np.linspace(-5, 5, 401), 1000, []
    law, density = _scores.AnyLaw.of(1, count), scipy.stats.norm.pdf(grid)
    for seed in range(20):
        u = np.random.default_rng(seed).normal(size=(1, count))
        coefficients, *_ = _scores.project(law, np.eye(1), _host.blocks(u), count)
        errors.append(density @ (law.score(coefficients, grid[None])[0] - grid) ** 2 / density.sum())
    assert np.mean(errors) < 0.15  # 0.06; 0.4 if all of them counted


def test_a_score_of_two_values_is_no_accident():
    """For signs, even functions hardly vary: what their coefficients would be is chance."""
    mixing = np.array([[1.0, 0.5], [0.5, 1.0]])
    errors = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        z = np.stack([LAWS[law](rng, 1000) for law in ("signs", "student_5")], axis=1)
        errors.append(mixing_error(ica.fit(z @ mixing.T, 2, key=KEY).mixing, mixing, kind="direction"))
    assert np.mean(errors) < 0.012  # 0.02, were nothing taken off


# Steps


@pytest.mark.parametrize("laws", [("laplace", "uniform"), ("student_5", "gamma"), ("gauss", "laplace", "logistic")])
def test_the_predicted_errors_are_those_that_occur(laws):
    errors, predicted, fits = [], [], 60
    for seed in range(fits):
        x, mixing = mixed_data(seed, 5000, laws)
        result = ica.fit(x, len(laws), key=KEY)
        sources = np.asarray(result.unmixing) @ mixing
        order = np.abs(sources / np.linalg.norm(sources, axis=0)).argmax(axis=0)
        assert len(set(order)) == len(laws)
        sources = sources[order] / np.diag(sources[order])[:, None]
        errors.append(sources - np.eye(len(laws)))
        predicted.append(np.asarray(result.leakage)[order][:, order])
    errors, predicted = np.sqrt(np.mean(np.square(errors), axis=0)), np.sqrt(np.mean(np.square(predicted), axis=0))
    off = ~np.eye(len(laws), dtype=bool)
    # A standard deviation over 60 fits is known to 9 %.
    np.testing.assert_allclose(errors[off], predicted[off], rtol=0.3)


def test_the_predicted_error_of_a_column_is_that_of_the_mixing():
    mixing = np.random.default_rng(0).normal(size=(4, 4))
    errors, predicted = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        z = np.stack([LAWS[law](rng, 4000) for law in ("laplace", "uniform", "gamma", "student_5")], axis=1)
        result = ica.fit(z @ mixing.T, 4, key=KEY)
        matched = match_columns(result.mixing, mixing, kind="direction")
        order = np.abs(matched.T @ result.mixing / np.linalg.norm(result.mixing, axis=0)).argmax(axis=1)
        errors.append(np.square(matched - mixing).sum(axis=0) / np.square(mixing).sum(axis=0))
        predicted.append(np.square(result.column_errors[order]))
    # The part along the column is no error of its direction, so that the prediction is an upper bound.
    ratio = np.sqrt(np.mean(errors, axis=0) / np.mean(predicted, axis=0))
    assert np.all(ratio < 1.25)
    assert ratio.max() > 0.6


def test_sources_that_the_data_cannot_tell_apart_are_named_and_not_waited_for():
    x, mixing = mixed_data(0, 5000, ("gauss", "laplace", "gauss", "uniform"))
    result = ica.fit(x, 4, key=KEY)
    assert bool(result.converged)
    assert int(result.num_iterations) < 100
    untold = (result.leakage == 1).any(axis=1)
    sources = np.abs(result.unmixing @ mixing)
    assert sorted(sources[:, [0, 2]].max(axis=1) > 0.3) == [False, False, True, True]
    np.testing.assert_array_equal(untold, sources[:, [0, 2]].max(axis=1) > 0.3)
    assert result.leakage[~untold].max() < 0.1


def test_pairs_that_mix_two_sources_alike_are_parted():
    v = LAWS["sparse"](np.random.default_rng(0), (4, 4096))
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    parted = _closed_form.part_pairs(v, turn, False)
    np.testing.assert_allclose(np.abs(parted).max(axis=1), 1, atol=0.02)
    np.testing.assert_allclose(parted @ parted.T, np.eye(4), atol=1e-12)
    np.testing.assert_array_equal(_closed_form.part_pairs(v, np.eye(4), False), np.eye(4))
    np.testing.assert_allclose(_closed_form.part_pairs(jnp.asarray(v), jnp.asarray(turn), False), parted, atol=1e-4)


def test_columns_looked_at_do_not_keep_time_with_the_data():
    wave = np.sin(2 * np.pi * np.arange(100_000) / 20)[None]
    assert _host.some_columns(wave, 5000).std() == pytest.approx(np.sqrt(0.5), rel=0.02)
    np.testing.assert_array_equal(_host.some_columns(wave, 100_000), wave)


# Whitening


@pytest.mark.parametrize("case", ["units", "offsets", "order", "turn"])
def test_units_offsets_and_order_of_the_columns_do_not_matter(case):
    rng = np.random.default_rng(1)
    x, _ = mixed_data(3, 3000, ("laplace", "uniform", "gamma", "signs", "student_5"))
    plain = ica.fit(x, 5, tolerance=1e-3, key=KEY)
    if case == "units":
        other = x * 10.0 ** np.array([-13, -5, 0, 6, 9])
    elif case == "offsets":
        other = x + np.array([0, 1e6, 0, -1e3, 1.7e9])
    elif case == "order":
        other = x[:, ::-1]
    else:
        other = x @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    result = ica.fit(other, 5, tolerance=1e-3, key=KEY)
    sources = [(data - fit.mean) @ fit.unmixing.T for data, fit in ((x, plain), (other, result))]
    together = np.abs(sources[0].T @ sources[1]) / len(x)
    # The same sources in some order: they differ by less than a standard error, 0.02 for each other source.
    np.testing.assert_allclose(np.sort(together.max(axis=1)), 1, atol=1e-4)


def test_each_column_has_its_own_floor():
    rng = np.random.default_rng(0)
    columns = [
        1.7e9 + rng.random(2000),  # Unix time
        1e-13 * rng.normal(size=2000),  # tesla
        8e9 * rng.random(2000),
        np.full(2000, 7.7),
    ]
    x = np.stack([*columns, 3 * columns[1] - 1e-22 * columns[2]], axis=1)
    axes = principal_axes(x)
    assert axes.rank == 3
    assert axes.redundant() == ([3], [4])
    v, from_white, to_white, _ = whiten(x, axes, 3)
    np.testing.assert_allclose(v @ v.T / 2000, np.eye(3), atol=1e-9)
    scale = np.where(x.std(axis=0) > 1e-20, x.std(axis=0), 1)
    np.testing.assert_allclose((v.T @ from_white.T + axes.mean - x) / scale, 0, atol=1e-6)
    np.testing.assert_allclose(to_white @ from_white, np.eye(3), atol=1e-9)
    single = principal_axes(jnp.asarray(x[:, [1, 2]], jnp.float32))
    assert single.rank == 2


def test_fewer_rows_than_columns():
    x, truth = laplace_data(12, 300, 400, 2)
    for data in (x, jnp.asarray(x)):
        assert direction_error(ica.fit(data, 2, key=KEY).mixing, truth) < 0.2


# Fits


def cramer_rao(count):
    """Direction error of the best unbiased estimate of a +-1 matrix with ten Laplace sources."""
    return np.sqrt(2 / np.pi * 6 / count)


@pytest.fixture(scope="module")
def large():
    return laplace_data(5, 20_000, 20, 10)


def test_closed_form_reaches_the_cramer_rao_bound_and_beats_fastica(large):
    from sklearn.decomposition import FastICA

    x, truth = large
    fitted = ica.fit(x, 10, source="laplace", key=KEY)
    # The error itself varies by a tenth between data sets of 20,000.
    assert bool(fitted.converged)
    assert int(fitted.num_iterations) < 40  # Newton's steps; others that vanish with F take many more
    assert direction_error(fitted.mixing, truth) < 1.25 * cramer_rao(20_000)
    assert scale_error(fitted, truth) < 4 / np.sqrt(20_000)
    peer = FastICA(10, whiten="unit-variance", random_state=1).fit(x)
    for result in (fitted, ica.fit(x, 10, key=KEY)):
        assert direction_error(result.mixing, truth) < direction_error(peer.mixing_, truth)
        z = (x - result.mean) @ result.unmixing.T
        np.testing.assert_allclose(z @ result.mixing.T + result.mean, x, atol=2e-3)
        np.testing.assert_allclose(z.std(axis=0), 1, atol=0.05)


def test_without_the_law_the_error_is_nearly_that_with_it():
    """Ten sources of one law and few examples: each alone would have its score from a tenth of them."""
    errors = []
    for seed in range(6):
        x, truth = laplace_data(seed, 1000, 20, 10)
        fits = [ica.fit(x, 10, source=source, key=KEY) for source in ("auto", "laplace")]
        errors.append([direction_error(result.mixing, truth) for result in fits])
    unknown, known = np.mean(errors, axis=0)
    assert unknown < 1.06 * known  # 1.12 with scores of each source's own


def test_many_sources_and_few_examples():
    """Of 8,192 examples no fixed point finds anything of 128 sources."""
    rng = np.random.default_rng(0)
    z = LAWS["laplace"](rng, (10_000, 128))
    z[:, ::2] = LAWS["uniform"](rng, (10_000, 64))
    mixing = rng.normal(size=(128, 128))
    result = ica.fit((z @ mixing.T).astype(np.float32), 128, key=KEY)
    assert bool(result.converged)
    sources = np.abs(result.unmixing @ mixing)
    assert sorted(sources.argmax(axis=0)) == list(range(128))
    assert sources.max(axis=0).min() > 0.95


# A heavy or a Gaussian tail with a light one.
@pytest.mark.parametrize(
    "laws",
    [
        ("logistic", "uniform"),
        ("gauss", "uniform"),
        ("laplace", "uniform"),
        ("signs", "student_5"),
        ("gamma", "logistic"),
        ("gauss", "student_5", "uniform", "gamma"),
    ],
)
def test_sources_of_different_laws_are_found_better_than_by_fastica(laws):
    from sklearn.decomposition import FastICA

    ours, peers = [], []
    for seed in range(12):
        x, mixing = mixed_data(seed, 4000, laws)
        result = ica.fit(x, len(laws), key=KEY)
        assert bool(result.converged)
        ours.append(mixing_error(result.mixing, mixing, kind="direction"))
        peer = FastICA(len(laws), whiten="unit-variance", random_state=seed, max_iter=1000).fit(x)
        peers.append(mixing_error(peer.mixing_, mixing, kind="direction"))
    assert np.median(ours) < 0.9 * np.median(peers)


def test_hum_of_the_mains_and_a_signal_are_parted():
    rng = np.random.default_rng(0)
    n = 20_000
    z = np.stack([LAWS["logistic"](rng, n), np.sqrt(2) * np.sin(2 * np.pi * 50 * np.arange(n) / 1000)], axis=1)
    mixing = np.array([[1, 0.5], [0.5, 1]])
    result = ica.fit(z @ mixing.T, 2, key=KEY)
    assert mixing_error(result.mixing, mixing, kind="direction") < 0.003


def test_known_observation_noise_is_taken_off():
    x, truth = laplace_data(4, 20_000, 8, 4)
    x = x + 0.7 * np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    unaware = ica.fit(x, 4, source="laplace", key=KEY)
    assert scale_error(unaware, truth) > 0.03
    for source in ("laplace", "auto"):
        for data in (x, jnp.asarray(x)) if source == "auto" else (x,):
            aware = ica.fit(data, 4, source=source, observation_scale=0.7, key=KEY)
            assert scale_error(aware, truth) < 0.03
            assert direction_error(aware.mixing, truth) < 0.04


def test_numpy_and_jax_agree_under_jit_and_vmap_and_in_double_precision(x64):
    data = [laplace_data(seed, 800, 4, 3)[0].astype(np.float64) for seed in (10, 11)]
    fit = lambda x: ica.fit(x, 3, tolerance=1e-3, num_restarts=2, key=KEY)
    together = jax.jit(jax.vmap(fit))(jnp.asarray(data))
    for index, x in enumerate(data):
        alone = fit(x)
        assert alone.mixing.dtype == together.mixing.dtype == np.float64
        assert isinstance(alone.mixing, np.ndarray)
        np.testing.assert_allclose(together.mixing[index], alone.mixing, atol=5e-3)  # a sixth of the standard error
        np.testing.assert_allclose(together.leakage[index], alone.leakage, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_no_more_iterations_than_allowed(most):
    x, _ = laplace_data(0, 500, 4, 3)
    assert int(ica.fit(x, 3, max_iterations=most, tolerance=1e-9, key=KEY).num_iterations) <= most


def test_restarts_keep_the_best():
    x, truth = laplace_data(9, 500, 6, 5)
    assert direction_error(ica.fit(x, 5, num_restarts=4, key=KEY).mixing, truth) < 0.2


def test_a_callers_law_serves_as_source():
    density = CustomSource(lambda z: -jnp.sqrt(2.0) * jnp.abs(z))
    x, _ = laplace_data(13, 3000, 4, 3)
    named, given = (ica.fit(x, 3, source=source, noise_scale=0.3, key=KEY) for source in ("laplace", density))
    np.testing.assert_allclose(given.mixing, named.mixing, atol=0.01)


def test_a_law_that_is_wrong_for_one_source_does_no_harm():
    rng = np.random.default_rng(0)
    mixing = signs_matrix(rng, 3, 3)
    z = np.stack([LAWS[law](rng, 8000) for law in ("laplace", "uniform", "laplace")], axis=1)
    result = ica.fit(z @ mixing.T, 3, source="laplace", key=KEY)
    assert mixing_error(result.mixing, mixing, kind="direction") < 0.03


@pytest.mark.parametrize("count", [300, 5000, 20011])
def test_averages_over_blocks_are_those_over_all(count):
    """Also of what is not zero at zero, where a block is padded with it."""
    v = np.random.default_rng(0).normal(size=(9, count)).astype(np.float32)
    statistics = lambda v, weigh: (weigh(1 / (1 + v * v)).sum(axis=1), weigh(v) @ v.T)
    want = (1 / (1 + np.float64(v) ** 2)).mean(axis=1), np.float64(v) @ v.T / count
    for array in (v, jnp.asarray(v)):
        for found, expected in zip(_host.mean_over(statistics, _host.blocks(array)), want, strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-6)
