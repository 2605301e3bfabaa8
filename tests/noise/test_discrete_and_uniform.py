"""The noises at the edges: labels, and the kernel that refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import (
    CauchyNoise,
    DiscreteNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    LowRankGaussianNoise,
    StudentTNoise,
    TransformedNoise,
    UniformNoise,
    check_valid_spread,
)

MATRIX = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.2], [0.1, 0.3, 0.7]], np.float32)


def test_discrete_tables_match_sums():
    noise = DiscreteNoise(jnp.asarray(MATRIX))
    x, x2 = np.divmod(np.arange(9), 3)
    log_matrix = np.log(MATRIX)
    np.testing.assert_allclose(noise.log_prob(x, x2), log_matrix[x, x2], rtol=1e-6)
    cross = [sum(MATRIX[i, a] * log_matrix[i, b] for i in range(3)) for a, b in zip(x, x2, strict=True)]
    own = [sum(MATRIX[i, a] * log_matrix[i, a] for i in range(3)) for a in x]
    np.testing.assert_allclose(noise.expected_log_prob(x, x2), cross, rtol=1e-5)
    np.testing.assert_allclose(noise.kl(x, x2), np.subtract(own, cross), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(noise.mmd_kernel(jnp.arange(3), jnp.arange(3)), MATRIX.T @ MATRIX, rtol=1e-5)
    np.testing.assert_allclose(noise.spread(jnp.array([0.2, 0.3, 0.5])), MATRIX @ [0.2, 0.3, 0.5], rtol=1e-6)
    # Entries of an event are independent: logs add, products multiply.
    pair = jnp.array([[0, 2]]), jnp.array([[1, 1]])
    np.testing.assert_allclose(noise.log_prob(*pair), [log_matrix[0, 1] + log_matrix[2, 1]], rtol=1e-6)
    gram = MATRIX.T @ MATRIX
    np.testing.assert_allclose(noise.mmd_kernel(*pair), [[gram[0, 1] * gram[2, 1]]], rtol=1e-5)


def test_discrete_samples_have_the_frequencies_of_the_matrix(key):
    count = 9000
    labels = jnp.repeat(jnp.arange(3), count)
    y = np.asarray(DiscreteNoise(jnp.asarray(MATRIX)).sample(labels, key=key)).reshape(3, count)
    frequencies = np.stack([np.bincount(row, minlength=3) / count for row in y], axis=1)
    assert (np.abs(frequencies - MATRIX) < 6 * np.sqrt(MATRIX * (1 - MATRIX) / count)).all()


def test_discrete_gradient_and_vmap_over_the_matrix():
    losses = jax.vmap(lambda rate: DiscreteNoise.uniform_mixture(3, rate).kl(jnp.array([0]), jnp.array([1]))[0])
    assert (np.diff(losses(jnp.array([0.1, 0.3, 0.9]))) < 0).all()  # more noise, less divergence


def test_discrete_refuses_what_is_not_column_stochastic():
    with pytest.raises(ValueError, match="columns that sum to one"):
        DiscreteNoise(jnp.asarray(MATRIX.T))
    with pytest.raises(ValueError, match="must be square"):
        DiscreteNoise(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="matrix must have a floating-point dtype"):
        DiscreteNoise(jnp.eye(3, dtype=int))
    with pytest.raises(TypeError, match="x must have an integer dtype"):
        DiscreteNoise(jnp.asarray(MATRIX)).mmd_kernel(jnp.ones(3), jnp.arange(3))


def test_uniform_kernel_and_transform_match_quadrature(x64):
    noise = UniformNoise(0.8)
    overlap = lambda d: max(0.0, 1.6 - abs(d)) / 1.6**2
    x, x2 = jnp.array([[0.0], [0.3]]), jnp.array([[0.5], [5.0]])
    expected = [[overlap(float(a - b)) for b in x2[:, 0]] for a in x[:, 0]]
    np.testing.assert_allclose(noise.mmd_kernel(x, x2), expected, atol=1e-12)
    for w in (0.0, 0.7, 4.0):
        wave = scipy.integrate.quad(lambda y, w=w: np.cos(w * y) / 1.6, -0.8, 0.8)[0]
        np.testing.assert_allclose(noise.characteristic_function(jnp.array([[w]])), [wave], atol=1e-10)
    np.testing.assert_allclose(noise.entropy(x), np.log([1.6, 1.6]))


def test_uniform_draws_fill_both_halves_of_the_interval(dtype):
    """A Kolmogorov-Smirnov test in each dimension, whose scale is its own, with draws of the dimensions unrelated."""
    scale, centre = np.array([0.3, 2.0, 0.01, 5.0]), np.array([1.0, -3.0, 0.0, 2.0])
    noise, x = UniformNoise(jnp.asarray(scale, dtype)), jnp.tile(jnp.asarray(centre, dtype), (4000, 1))
    y = np.asarray(noise.sample(x, key=jax.random.key(3)), np.float64)
    for d in range(4):
        assert scipy.stats.kstest(y[:, d], scipy.stats.uniform(centre[d] - scale[d], 2 * scale[d]).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(y.T) - np.eye(4)).max() < 5 / np.sqrt(4000)
    # Entropies of independent dimensions add up, whatever the shape of the event.
    expected = scipy.stats.uniform(0, 2 * scale).entropy().sum()
    np.testing.assert_allclose(noise.entropy(x[:2]), [expected] * 2, rtol=1e-6)
    square = UniformNoise(jnp.asarray(scale.reshape(2, 2), dtype))
    np.testing.assert_allclose(square.entropy(x[:2].reshape(2, 2, 2)), [expected] * 2, rtol=1e-6)
    np.testing.assert_allclose(UniformNoise(0.3).entropy(x[:1]), [4 * np.log(0.6)], rtol=1e-6)


def test_uniform_refuses_log_prob_and_says_why(key):
    x = jnp.zeros((50, 2))
    assert np.abs(UniformNoise(0.3).sample(x, key=key)).max() <= 0.3
    with pytest.raises(TypeError, match=r"bounded support.*\n?.*spread_l2_squared"):
        UniformNoise(1.0).log_prob(x, x)


@pytest.mark.parametrize(
    "noise",
    [
        GaussianNoise(1.0),
        LaplaceNoise(1.0),
        LogisticNoise(1.0),
        CauchyNoise(1.0),
        StudentTNoise(1.0, 2.0),
        LowRankGaussianNoise(1.0, jnp.ones((3, 1))),
        DiscreteNoise(jnp.asarray(MATRIX)),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_valid_noises_are_valid(noise):
    verdict = check_valid_spread(noise)
    assert verdict.valid is True
    assert str(verdict).startswith("valid")
    assert {c.name for c in verdict.conditions} >= {"support", "injective"}


@pytest.mark.parametrize(
    ("noise", "valid", "name", "holds"),
    [
        (UniformNoise(1.0), False, "support", False),
        (UniformNoise(1.0), False, "injective", True),
        (DiscreteNoise(jnp.full((2, 2), 0.5)), False, "injective", False),
        (DiscreteNoise(jnp.eye(3)), False, "support", False),
        (DiscreteNoise(jnp.eye(3)), False, "injective", True),
        (jax.tree.map(lambda s: -s, LaplaceNoise(1.0)), False, "scale", False),
        (TransformedNoise(GaussianNoise(1.0), jnp.tanh), None, "transform", None),
        (TransformedNoise(UniformNoise(1.0), jnp.tanh), False, "support", False),
        (object(), None, "support", None),
    ],
)
def test_each_condition_is_named(noise, valid, name, holds):
    verdict = check_valid_spread(noise)
    assert verdict.valid is valid
    assert {c.name: c.holds for c in verdict.conditions}[name] is holds


def test_a_tracer_is_refused():
    with pytest.raises(TypeError, match="concrete numbers"):
        jax.jit(lambda s: check_valid_spread(GaussianNoise(s)).valid)(1.0)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_rank_one_matrices_are_all_refused(size):
    column = np.random.default_rng(size).dirichlet(np.ones(size))
    verdict = check_valid_spread(DiscreteNoise(jnp.asarray(np.tile(column[:, None], (1, size)), jnp.float32)))
    assert {c.name: c.holds for c in verdict.conditions} == {"support": True, "injective": False}


def test_gradients_of_discrete_noise_are_those_of_the_sums():
    """d/dP of KL(P_0 || P_1) + E_{P_0} log P_1, written out by hand; a probability moves as a free number."""
    matrix = jnp.asarray(MATRIX, jnp.float32)
    zero, one = jnp.array([0]), jnp.array([1])
    total = lambda m: (DiscreteNoise(m).kl(zero, one) + DiscreteNoise(m).expected_log_prob(zero, one)).sum()
    slope = jax.jit(jax.grad(total))(matrix)
    expected = np.zeros_like(MATRIX)
    expected[:, 0] = np.log(MATRIX[:, 0]) + 1  # the two cross terms cancel: sum P_0 log P_0
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)
