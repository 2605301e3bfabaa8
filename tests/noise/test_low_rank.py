"""Low-rank Gaussian noise against the dense covariance it never forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spread_jax import GaussianNoise, LowRankGaussianNoise


def dense(scale, factor):
    flat = np.asarray(factor, float).reshape(-1, factor.shape[-1])
    return np.diag(np.broadcast_to(scale, factor.shape[:-1]).ravel() ** 2) + flat @ flat.T


@pytest.fixture
def problem():
    rng = np.random.default_rng(3)
    return rng.uniform(0.5, 1.5, size=(2, 3)), rng.normal(size=(2, 3, 2)), *rng.normal(size=(2, 5, 2, 3))


def test_log_prob_kl_and_kernels_match_the_dense_gaussian(problem, dtype):
    scale, factor, y, x = problem
    covariance = dense(scale, factor)
    flat = (y - x).reshape(5, -1)
    arrays = [part.astype(dtype) for part in problem]

    @jax.jit
    def methods(scale, factor, y, x):
        noise = LowRankGaussianNoise(scale, factor)
        pairs = jnp.diagonal(noise.pairwise_log_prob(y, x)), jnp.diagonal(noise.mmd_kernel(y, x))
        wave = noise.characteristic_function(y - x)
        own = noise.log_prob(y, x), noise.entropy(x), noise.kl(y, x), noise.expected_log_prob(y, x)
        return *own, *pairs, wave

    log_prob, entropy, got_kl, expected_log_prob, pairs, kernel, got_wave = methods(*arrays)
    tol = {"rtol": 1e-5 if dtype == "float32" else 1e-12}
    peer = scipy.stats.multivariate_normal(np.zeros(6), covariance)
    np.testing.assert_allclose(log_prob, peer.logpdf(flat), **tol)
    np.testing.assert_allclose(pairs, peer.logpdf(flat), **tol)
    np.testing.assert_allclose(entropy, np.full(5, peer.entropy()), **tol)
    kl = 0.5 * np.einsum("ni,ij,nj->n", flat, np.linalg.inv(covariance), flat)
    np.testing.assert_allclose(got_kl, kl, **tol)
    np.testing.assert_allclose(expected_log_prob, -kl - peer.entropy(), **tol)
    wave = np.exp(-0.5 * np.einsum("ni,ij,nj->n", flat, covariance, flat))
    np.testing.assert_allclose(got_wave, wave, rtol=1e-4, atol=1e-12)
    pair = scipy.stats.multivariate_normal(np.zeros(6), 2 * covariance)
    np.testing.assert_allclose(kernel, pair.pdf(flat), rtol=1e-5)


def test_gradients_match_the_dense_form(problem, x64):
    scale, factor, y, x = (jnp.asarray(part) for part in problem)

    def dense_log_prob(scale, factor, y, x):
        flat = factor.reshape(-1, 2)
        covariance = jnp.diag(scale.ravel() ** 2) + flat @ flat.T
        u = (y - x).reshape(5, -1)
        quadratic = (u * jnp.linalg.solve(covariance, u.T).T).sum()
        return -0.5 * quadratic - 2.5 * jnp.linalg.slogdet(covariance)[1]

    low_rank = lambda s, f, y, x: LowRankGaussianNoise(s, f).log_prob(y, x).sum()
    argnums = (0, 1, 2, 3)
    expected = jax.jit(jax.grad(dense_log_prob, argnums))(scale, factor, y, x)
    for got, want in zip(jax.jit(jax.grad(low_rank, argnums))(scale, factor, y, x), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_sample_covariance_is_the_dense_one(problem, key):
    scale, factor, _, _ = problem
    covariance = dense(scale, factor)
    noise = LowRankGaussianNoise(jnp.asarray(scale, jnp.float32), jnp.asarray(factor, jnp.float32))
    count = 20000
    y = np.asarray(noise.sample(jnp.zeros((count, 2, 3)), key=key), float).reshape(count, 6)
    variances = np.diag(covariance)
    # Var of a sample covariance entry: (S_ii S_jj + S_ij^2) / n.
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert (np.abs(np.cov(y.T) - covariance) < 6 * error).all()


def test_huge_factor_keeps_its_digits_in_float32():
    # |L| / sigma = 1e5: the subtracting form of Woodbury would return noise of size 1e3 here.
    factor = np.full((20, 1), 1e3, np.float32)
    noise = LowRankGaussianNoise(0.01, factor)
    y = (3e3 + 0.01 * np.random.default_rng(4).normal(size=(1, 20))).astype(np.float32)
    u = np.asarray(y, np.longdouble)[0] / np.longdouble(np.float32(0.01))
    w = np.asarray(factor, np.longdouble)[:, 0] / np.longdouble(np.float32(0.01))
    exact = 0.5 * (u @ u - (u @ w) ** 2 / (1 + w @ w))
    np.testing.assert_allclose(jax.jit(noise.kl)(y, np.zeros((1, 20), np.float32)), [float(exact)], rtol=0.05)


def test_with_volume_fixes_the_volume_and_lets_gradients_through(problem, x64):
    scale, factor, _, _ = (jnp.asarray(part) for part in problem)
    with_volume = lambda f: LowRankGaussianNoise(scale, f).with_volume(3.0)
    noise = jax.jit(with_volume)(factor)
    flat = np.asarray(noise.factor).reshape(-1, 2)
    np.testing.assert_allclose(np.sqrt(np.linalg.det(flat.T @ flat)), 3.0, rtol=1e-12)
    ratio = np.asarray(noise.factor) / np.asarray(factor)
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0, 0]), rtol=1e-10)
    # The volume does not move with the free factor, so its gradient is zero; that of a single entry is not.
    both = lambda f: (with_volume(f).log_volume(), with_volume(f).factor[0, 0, 0])
    of_volume, of_entry = jax.jit(jax.jacrev(both))(factor)
    np.testing.assert_allclose(of_volume, np.zeros_like(factor), atol=1e-12)
    assert np.abs(of_entry).max() > 0.1


def test_with_entropy_of_one_column_is_closed_form(dtype):
    # X/2 log(2 pi e) + X log sigma + log(1 + c^2 |L|^2 / sigma^2) / 2, solved for c; the bracket is then a point.
    factor = jnp.asarray([[3.0], [4.0]], dtype)
    with_entropy = jax.jit(lambda e: LowRankGaussianNoise(0.5, factor).with_entropy(e).factor)
    without = np.log(2 * np.pi * np.e) + 2 * np.log(0.5)
    for excess in (1e-3, 1.0, 30.0):
        c = np.sqrt(np.expm1(2 * excess) * 0.25 / 25)
        rtol = 1e-5 if dtype == "float32" else 1e-9
        rtol += 4 * np.finfo(dtype).eps * abs(without + excess) / min(excess, 1)  # of rounding the entropy itself
        np.testing.assert_allclose(with_entropy(without + excess), c * np.asarray(factor), rtol=rtol)


@pytest.mark.parametrize("excess", [0.05, 15.0])
def test_with_entropy_fixes_the_dense_entropy_with_every_derivative(problem, excess, x64):
    scale, factor, _, _ = (jnp.asarray(part) for part in problem)
    factor = factor * jnp.array([1.0, 30.0])  # eigenvalues far apart
    without = 0.5 * 6 * np.log(2 * np.pi * np.e) + np.log(scale).sum()

    @jax.jit
    def build(scale, factor, excess):
        noise = LowRankGaussianNoise(scale, factor).with_entropy(without + excess)
        return noise.factor, noise.entropy(jnp.zeros((1, 2, 3)))[0]

    got, entropy = build(scale, factor, excess)
    dense_entropy = scipy.stats.multivariate_normal(np.zeros(6), dense(scale, got)).entropy()
    np.testing.assert_allclose(entropy, without + excess, rtol=1e-12)
    np.testing.assert_allclose(dense_entropy, without + excess, rtol=1e-9)  # a condition of 1e8 costs it digits
    # Directions stay: a positive multiple of the factor.
    ratio = np.asarray(got) / np.asarray(factor)
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0, 0]), rtol=1e-10)
    assert ratio[0, 0, 0] > 0

    entry = lambda scale, factor, excess: jnp.log(build(scale, factor, excess)[0][0, 0, 0] / factor[0, 0, 0])
    direction = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), (scale, factor))
    line = jax.jit(lambda t: entry(scale + t * direction[0], factor + t * direction[1], excess * (1 + t)))
    # Either mode, then the derivative of the derivative.
    forward, backward, second = jax.jit(lambda t: (jax.jacfwd(line)(t), jax.grad(line)(t), jax.hessian(line)(t)))(0.0)
    h = 1e-4
    values = [line(t) for t in (-2 * h, -h, 0.0, h, 2 * h)]
    first = np.dot(values, [1, -8, 0, 8, -1]) / (12 * h)
    np.testing.assert_allclose([forward, backward], [first, first], rtol=1e-6)
    np.testing.assert_allclose(second, np.dot(values, [-1, 16, -30, 16, -1]) / (12 * h**2), rtol=1e-3, atol=1e-4)


def test_with_entropy_survives_equal_and_vanishing_eigenvalues_and_vmap(x64):
    factor = jnp.asarray(np.eye(4, 3)) * jnp.array([1.0, 1.0, 0.0])
    without = 2 * np.log(2 * np.pi * np.e)
    both = jax.value_and_grad(lambda f, e: LowRankGaussianNoise(1.0, f).with_entropy(e).factor[0, 0])
    value, slope = jax.jit(jax.vmap(both, in_axes=(None, 0)))(factor, without + jnp.array([0.3, 2.0]))
    # Two eigenvalues of one: log(1 + c^2) = excess.
    np.testing.assert_allclose(value, np.sqrt(np.expm1([0.3, 2.0])), rtol=1e-10)
    assert np.isfinite(slope).all()
    # Scaling the free factor changes nothing: no slope along it.
    np.testing.assert_allclose((slope * factor).sum(axis=(1, 2)), np.zeros(2), atol=1e-12)


def test_with_entropy_refuses_what_cannot_be_reached():
    noise = LowRankGaussianNoise(0.5, jnp.ones((3, 1)))
    without = 1.5 * np.log(2 * np.pi * np.e) + 3 * np.log(0.5)
    for entropy in (without - 1, without - 1e-3, np.nan, np.inf):
        with pytest.raises(ValueError, match="entropy must be finite and above that of the noise without its factor"):
            noise.with_entropy(entropy)
    assert np.isnan(jax.jit(lambda e: noise.with_entropy(e).factor)(without - 1)).all()
    with pytest.raises(ValueError, match="factor must not be zero"):
        LowRankGaussianNoise(0.5, jnp.zeros((3, 1))).with_entropy(5.0)


def test_a_vanishing_factor_is_the_isotropic_gaussian(problem):
    _, factor, y, x = (part.astype(np.float32) for part in problem)
    low_rank = jax.jit(LowRankGaussianNoise(0.7, 1e-8 * factor).log_prob)
    np.testing.assert_allclose(low_rank(y, x), GaussianNoise(0.7).log_prob(y, x), rtol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="factor must have shape"):
        LowRankGaussianNoise(1.0, jnp.ones(3))
    with pytest.raises(TypeError, match="factor must have a floating-point dtype"):
        LowRankGaussianNoise(1.0, jnp.ones((3, 1), int))
    with pytest.raises(ValueError, match="scale must be positive"):
        LowRankGaussianNoise(0.0, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"for events of shape \(4,\)"):
        LowRankGaussianNoise(1.0, jnp.ones((3, 1))).log_prob(jnp.ones((2, 4)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="at most as many columns"):
        LowRankGaussianNoise(1.0, jnp.ones((2, 3))).with_volume()


def test_the_volume_is_that_of_r_dimensions(x64):
    """3 x 2: the factor grows by volume^(1/2), whatever the number of rows."""
    factor = np.random.default_rng(5).normal(size=(3, 2))
    volume = np.sqrt(np.linalg.det(factor.T @ factor))
    noise = LowRankGaussianNoise(1.0, jnp.asarray(factor))
    np.testing.assert_allclose(noise.log_volume(), np.log(volume), rtol=1e-12)
    np.testing.assert_allclose(noise.with_volume(4.0).factor, factor * np.sqrt(4.0 / volume), rtol=1e-12)
