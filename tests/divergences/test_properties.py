"""What every spread divergence must obey, on random distributions: exact by quadrature or in closed form."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import (
    CauchyNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    chi_squared,
    jensen_shannon,
    kl,
    log_spread_density,
    reverse_kl,
    spread_divergence,
    spread_hellinger_gaussians,
    spread_kl_deltas,
    spread_kl_gaussians,
    spread_l2_squared,
    squared_hellinger,
    total_variation,
)

DIVERGENCES = (kl, reverse_kl, jensen_shannon, squared_hellinger, chi_squared, total_variation)
SYMMETRIC = np.array([d in (jensen_shannon, squared_hellinger, total_variation) for d in DIVERGENCES])
SEEDS = st.integers(0, 2**31 - 1)
SCALES = st.floats(0.8, 1.6)
GRID = np.linspace(-28, 28, 1401)
STEP = GRID[1] - GRID[0]
# The rule is exact to rounding for smooth densities; at the kinks of Laplace ones its error is STEP^2 / 12 of the
# jump in slope. The absolute values of total variation have a kink in any case.
ATOL = {GaussianNoise: np.where(SYMMETRIC, 2e-4, 1e-8), LaplaceNoise: np.full(6, 1e-3)}


def in_double(function):
    """function compiled and run in float64, its results as NumPy arrays."""
    compiled = jax.jit(function)

    def run(*args):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(*args))

    return run


on_random_input = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


def distributions(seed, count=4):
    """Two sets of `count` atoms in [-1, 1] and log-weights for each."""
    rng = np.random.default_rng(seed)
    p, q = rng.uniform(-1, 1, size=(2, count, 1))
    return p, np.log(rng.dirichlet(np.ones(count))), q, np.log(rng.dirichlet(np.ones(count)))


def between_spreads_of(make, p, log_weights_p, q, log_weights_q, scale):
    """All divergences of p~ and q~ by the trapezoidal rule [6], those of y in coarse bins [6], and the mass of p~."""
    log_density = lambda atoms, weights: log_spread_density(GRID[:, None], atoms, make(scale), log_weights=weights)
    log_p, log_q = (log_density(*side) + np.log(STEP) for side in ((p, log_weights_p), (q, log_weights_q)))
    coarse = [jax.nn.logsumexp(side.reshape(-1, 3), axis=1) for side in (log_p[:1398], log_q[:1398])]
    values = [jnp.stack([d.between(*pair) for d in DIVERGENCES]) for pair in ((log_p, log_q), coarse)]
    return *values, jnp.exp(jax.nn.logsumexp(log_p))


between_spreads = {
    make: in_double(functools.partial(between_spreads_of, make)) for make in (GaussianNoise, LaplaceNoise)
}
of_weights = in_double(lambda log_p, log_q: jnp.stack([d.between(log_p, log_q) for d in DIVERGENCES]))


@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise])
@hypothesis.given(seed=SEEDS, scale=SCALES, shift=st.floats(-2, 2), factor=st.floats(0.8, 1.25))
@on_random_input
def test_divergences_of_spread_distributions(make, seed, scale, shift, factor):
    p, log_weights_p, q, log_weights_q = distributions(seed)
    between = lambda *args: between_spreads[make](*args)[0]
    value, binned, mass = between_spreads[make](p, log_weights_p, q, log_weights_q, scale)
    swapped = between(q, log_weights_q, p, log_weights_p, scale)
    order = np.random.default_rng(seed).permutation(4)
    permuted = between(p[order], log_weights_p[order], q, log_weights_q, scale)
    same = between(p, log_weights_p, p[order], log_weights_p[order], scale)
    shifted = between(p + shift, log_weights_p, q + shift, log_weights_q, scale)
    scaled = between(factor * p, log_weights_p, factor * q, log_weights_q, factor * scale)
    noisier = between(p, log_weights_p, q, log_weights_q, 1.3 * scale)
    common = between(p, log_weights_p, p, log_weights_q, scale)
    clean = of_weights(log_weights_p, log_weights_q)
    np.testing.assert_allclose(mass, 1, atol=1e-3)
    bounds = np.array([d.upper_bound for d in DIVERGENCES])
    assert (value > 0).all()
    assert (value < bounds).all()
    np.testing.assert_allclose(same, np.zeros(6), atol=1e-14)
    means = [np.exp(w) @ atoms[:, 0] for atoms, w in ((p, log_weights_p), (q, log_weights_q))]
    # |E_p y - E_q y|^2 = |int y (p~ - q~)|^2 <= chi^2 Var_q~ (Cauchy-Schwarz); Var of at most 1 + 2 scale^2.
    assert value[4] >= (np.subtract(*means) ** 2) / (1 + 2 * scale**2) - 1e-3
    np.testing.assert_allclose(permuted, value, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(swapped[SYMMETRIC], value[SYMMETRIC], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(swapped[:2], value[1::-1], rtol=1e-10, atol=1e-14)  # reverse_kl is kl, swapped
    for other in (shifted, scaled):
        assert (np.abs(other - value) <= 1e-6 * value + ATOL[make]).all()
    # Data processing: more noise, coarser data, or any noise at all.
    assert (noisier < value).all()
    assert (binned <= value * (1 + 1e-12)).all()
    assert (common <= clean + 1e-12).all()
    # Orders that hold between divergences: TV^2 <= KL / 2 (Pinsker), H^2 <= TV, KL <= log(1 + chi^2).
    assert value[5] ** 2 <= value[0] / 2 + 1e-9
    assert value[3] <= value[5] + 1e-9
    assert value[0] <= np.log1p(value[4]) + 1e-9


def random_gaussians(seed):
    """Means and covariances of rank 2 of p and q in three dimensions, and a rotation."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, 2))
    return rng.normal(size=3), a @ a.T, rng.normal(size=3), b @ b.T, np.linalg.qr(rng.normal(size=(3, 3)))[0]


@in_double
def of_gaussians(mean_p, cov_p, mean_q, cov_q, scale):
    noise = GaussianNoise(scale)
    return jnp.stack(
        [f(mean_p, cov_p, mean_q, cov_q, noise) for f in (spread_kl_gaussians, spread_hellinger_gaussians)]
    )


@hypothesis.given(seed=SEEDS, scale=st.floats(0.2, 3.0), factor=st.floats(0.3, 3.0))
@on_random_input
def test_divergences_of_spread_gaussians(seed, scale, factor):
    mean_p, cov_p, mean_q, cov_q, q = random_gaussians(seed)
    value = of_gaussians(mean_p, cov_p, mean_q, cov_q, scale)
    rotated = of_gaussians(q @ mean_p, q @ cov_p @ q.T, q @ mean_q, q @ cov_q @ q.T, scale)
    moved = of_gaussians(mean_p + 5, cov_p, mean_q + 5, cov_q, scale)
    scaled = of_gaussians(
        factor * mean_p, factor**2 * cov_p, factor * mean_q, factor**2 * cov_q, factor * scale
    )  # fmt: skip
    swapped = of_gaussians(mean_q, cov_q, mean_p, cov_p, scale)
    same = of_gaussians(mean_p, cov_p, mean_p, cov_p, scale)
    noisier = of_gaussians(mean_p, cov_p, mean_q, cov_q, 1.2 * scale)
    # Full rank, so that the clean divergence exists; noise of 1e-6 stands for none.
    full = [cov + 0.3 * np.eye(3) for cov in (cov_p, cov_q)]
    clean, spread = (of_gaussians(mean_p, full[0], mean_q, full[1], s) for s in (1e-6, scale))
    assert (value > 0).all()
    np.testing.assert_allclose(same, np.zeros(2), atol=1e-14)
    for other in (rotated, moved, scaled):
        np.testing.assert_allclose(other, value, rtol=1e-8)
    np.testing.assert_allclose(swapped[1], value[1], rtol=1e-10)
    assert (noisier < value).all()
    assert (spread < clean).all()


NOISES = (GaussianNoise, LaplaceNoise, LogisticNoise, CauchyNoise)


@in_double
def of_deltas(mu_p, mu_q, scale):
    return jnp.stack([spread_kl_deltas(mu_p, mu_q, make(scale))[0] for make in NOISES])


@hypothesis.given(seed=SEEDS, scale=st.floats(0.2, 3.0), factor=st.floats(0.3, 3.0))
@on_random_input
def test_kl_of_spread_deltas(seed, scale, factor):
    rng = np.random.default_rng(seed)
    mu_p, mu_q, third = rng.normal(size=(3, 1, 3))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(3)
    value = of_deltas(mu_p, mu_q, scale)
    others = [
        of_deltas(mu_q, mu_p, scale),
        of_deltas(mu_p + third, mu_q + third, scale),
        of_deltas(factor * mu_p, factor * mu_q, factor * scale),
        of_deltas(mu_p[:, order], mu_q[:, order], scale),
    ]
    rotated = of_deltas(mu_p @ rotation, mu_q @ rotation, scale)
    same, noisier = of_deltas(mu_p, mu_p, scale), of_deltas(mu_p, mu_q, 1.1 * scale)
    farther = of_deltas(mu_p, mu_p + 1.1 * (mu_q - mu_p), scale)
    assert (value > 0).all()
    assert (same == 0).all()
    for other in others:
        np.testing.assert_allclose(other, value, rtol=1e-9)
    np.testing.assert_allclose(rotated[0], value[0], rtol=1e-9)  # only Gaussian noise is isotropic
    assert (np.abs(rotated[1:] / value[1:] - 1) > 1e-6).any()
    assert (noisier < value).all()
    assert (farther > value).all()


l2_squared = in_double(lambda p, q, scale: spread_l2_squared(p, q, GaussianNoise(scale)))


@hypothesis.given(seed=SEEDS, scale=st.floats(0.3, 2.0), factor=st.floats(0.5, 2.0))
@on_random_input
def test_l2_distance_of_spread_samples(seed, scale, factor):
    rng = np.random.default_rng(seed)
    p, q = rng.normal(size=(2, 5, 2))
    rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    value = l2_squared(p, q, scale)
    others = [l2_squared(q, p, scale), l2_squared(p[::-1], q, scale), l2_squared(p - 3, q - 3, scale)]
    others += [l2_squared(p @ rotation, q @ rotation, scale)]
    others += [l2_squared(factor * p, factor * q, factor * scale) * factor**2]  # a density, per unit of volume
    same, noisier = l2_squared(p, rng.permutation(p), scale), l2_squared(p, q, 1.1 * scale)
    assert value > 0
    assert abs(same) < 1e-14
    np.testing.assert_allclose(others, np.full(5, value), rtol=1e-8)
    assert noisier < value


@in_double
def estimates(p, q, scale, keys):
    one = lambda key, d: spread_divergence(p, q, GaussianNoise(scale), divergence=d, num_samples=6, key=key).value
    return jnp.stack([jax.vmap(lambda key, d=d: one(key, d))(keys) for d in (kl, jensen_shannon)])


@hypothesis.given(seed=SEEDS, scale=SCALES)
@hypothesis.settings(on_random_input, max_examples=10)
def test_estimates_are_unbiased(seed, scale):
    p, _, q, _ = distributions(seed)
    equal = np.zeros(4)
    exact = between_spreads[GaussianNoise](p, equal, q, equal, scale)[0][[0, 2]]
    values = estimates(p, q, scale, jax.random.split(jax.random.key(seed), 2000))
    assert (np.abs(values.mean(axis=1) - exact) < 6 * values.std(axis=1) / np.sqrt(2000)).all()
