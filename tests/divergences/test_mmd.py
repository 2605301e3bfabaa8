"""MMD against NumPy, spread distances against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import sklearn.metrics.pairwise

from spread_jax import (
    CauchyNoise,
    GaussianKernel,
    GaussianNoise,
    InverseMultiquadricKernel,
    LaplaceKernel,
    LaplaceNoise,
    LogisticNoise,
    MixtureKernel,
    StudentTNoise,
    UniformNoise,
    mmd_squared,
    spread_l1,
    spread_l2_squared,
)

X, Y = np.random.default_rng(7).normal(size=(2, 9, 2, 2))
X = X[:7] + 0.5
FLAT_X, FLAT_Y = X.reshape(7, 4), Y.reshape(9, 4)
peers = sklearn.metrics.pairwise
KERNELS = {
    "gaussian": (lambda: GaussianKernel(0.8), lambda a, b: peers.rbf_kernel(a, b, gamma=0.5 / 0.64)),
    "laplace": (lambda: LaplaceKernel(0.8), lambda a, b: peers.laplacian_kernel(a, b, gamma=1 / 0.8)),
    "imq": (
        lambda: InverseMultiquadricKernel(2.0),
        lambda a, b: 2 / (2 + peers.euclidean_distances(a, b, squared=True)),
    ),
    "mixture": (
        lambda: MixtureKernel([GaussianKernel(0.8), LaplaceKernel(2.0)], [0.25, 0.5]),
        lambda a, b: 0.25 * peers.rbf_kernel(a, b, gamma=0.5 / 0.64) + 0.5 * peers.laplacian_kernel(a, b, gamma=0.5),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_mmd_matches_numpy_in_blocks_of_any_size(name, dtype):
    make, peer = KERNELS[name]
    xx, yy, xy = peer(FLAT_X, FLAT_X), peer(FLAT_Y, FLAT_Y), peer(FLAT_X, FLAT_Y)
    biased = xx.mean() + yy.mean() - 2 * xy.mean()
    off = lambda k: (k.sum() - np.trace(k)) / len(k) / (len(k) - 1)
    unbiased = off(xx) + off(yy) - 2 * xy.mean()
    x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
    tol = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-12}
    value = jax.jit(mmd_squared, static_argnames=("unbiased", "chunk_size"))
    np.testing.assert_allclose(value(x, y, make(), chunk_size=4), unbiased, **tol)
    np.testing.assert_allclose(value(x, y, make(), unbiased=False), biased, **tol)


def test_gradients_do_not_depend_on_blocks_and_both_modes_agree(x64):
    x, y = jnp.asarray(X), jnp.asarray(Y)
    loss = lambda x, y, s, c: mmd_squared(x, y, MixtureKernel([GaussianKernel(s), LaplaceKernel(s)]), chunk_size=c)

    @jax.jit
    def all_of_them(x, y, s):
        blocks = jax.grad(lambda *a: loss(*a, 3), argnums=(0, 1, 2))(x, y, s)
        whole = jax.grad(lambda *a: loss(*a, None), argnums=(0, 1, 2))(x, y, s)
        forward = jax.jvp(lambda *a: loss(*a, 3), (x, y, s), (x**2, y, s))[1]
        slope = (loss(x, y, s + 1e-5, None) - loss(x, y, s - 1e-5, None)) / 2e-5
        return blocks, whole, forward, slope

    blocks, whole, forward, slope = all_of_them(x, y, 0.8)
    for a, b in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    inner = sum((g * v).sum() for g, v in zip(whole, (x**2, y, 0.8), strict=True))
    np.testing.assert_allclose(forward, inner, rtol=1e-9)
    np.testing.assert_allclose(whole[2], slope, rtol=1e-6)


def test_unbiased_is_unbiased_and_biased_is_not(key):
    # Equal distributions: the squared MMD is zero.
    kernel = GaussianKernel(1.0)
    draws = jax.random.normal(key, (400, 2, 5, 1))
    both = jax.jit(jax.vmap(lambda d: [mmd_squared(*d, kernel, unbiased=u) for u in (True, False)]))
    unbiased, biased = (np.asarray(v) for v in both(draws))
    assert abs(unbiased.mean()) < 6 * unbiased.std() / 20
    assert biased.mean() > 6 * biased.std() / 20
    assert (biased >= -1e-6).all()


def test_memory_does_not_hold_the_kernel_matrix():
    x = jnp.zeros((3000, 2))
    loss = lambda x, y: mmd_squared(x, y, GaussianKernel(1.0), chunk_size=64)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise, LogisticNoise, CauchyNoise, UniformNoise])
def test_spread_l2_is_the_integral_of_the_squared_difference(make, x64):
    x, z, noise = np.array([-1.0, 0.4, 2.0]), np.array([0.0, 1.0]), make(0.7)
    grid = np.linspace(-400, 400, 400_001)

    def density(atoms):
        difference = (grid[:, None] - atoms) / 0.7
        kernel = {
            GaussianNoise: lambda u: np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi),
            LaplaceNoise: lambda u: np.exp(-np.abs(u)) / 2,
            LogisticNoise: lambda u: 0.25 / np.cosh(np.clip(u / 2, -300, 300)) ** 2,
            CauchyNoise: lambda u: 1 / np.pi / (1 + u**2),
            UniformNoise: lambda u: 0.5 * (np.abs(u) < 1),
        }[make]
        return kernel(difference).mean(axis=1) / 0.7

    expected = np.trapezoid((density(x) - density(z)) ** 2, grid)
    result = jax.jit(spread_l2_squared)(x[:, None], z[:, None], noise)
    np.testing.assert_allclose(result, expected, rtol=2e-3 if make is UniformNoise else 1e-5)


def test_spread_l1_matches_quadrature(key):
    x, z = np.array([-1.0, 0.4, 2.0]), np.array([0.0, 1.0])
    density = lambda y, atoms: np.exp(-((y - atoms) ** 2) / 2 / 0.49).mean() / 0.7 / np.sqrt(2 * np.pi)
    exact = scipy.integrate.quad(lambda y: abs(density(y, x) - density(y, z)), -8, 9, limit=200)[0]
    estimate = jax.jit(lambda x, z: spread_l1(x, z, GaussianNoise(0.7), num_samples=3000, key=key))
    value, error = estimate(x.astype(np.float32)[:, None], z.astype(np.float32)[:, None])
    assert abs(value - exact) < 6 * error
    assert error < 0.05 * exact


def test_bad_arguments_are_refused():
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="at least two samples for unbiased=True"):
        mmd_squared(x[:1], x, GaussianKernel(1.0))
    with pytest.raises(TypeError, match="kernel must be callable"):
        mmd_squared(x, x, "gaussian")
    with pytest.raises(ValueError, match=r"kernel must return shape \[n, m\]"):
        mmd_squared(x, x, lambda a, b: jnp.zeros(3))
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        GaussianKernel(0.0)
    with pytest.raises(ValueError, match="weights must have 1 entries"):
        MixtureKernel([GaussianKernel(1.0)], [0.5, 0.5])
    with pytest.raises(TypeError, match="StudentTNoise has no closed-form mmd_kernel"):
        spread_l2_squared(x, x, StudentTNoise(1.0, 3.0))
    with pytest.raises(ValueError, match="x and y must share their event shape"):
        mmd_squared(x, jnp.zeros((3, 1)), GaussianKernel(1.0))


@pytest.mark.parametrize(("scale", "rtol"), [(1e-3, 2e-2), (1e-2, 1e-3)])  # the textbook product: 1 and more
def test_the_kernel_of_near_duplicates_keeps_its_digits(scale, rtol):
    """Pairs within a scale of one another, far from the origin, in 64 dimensions of float32."""
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(8, 64)) + 3).astype(np.float32)
    x2 = (x + scale / 8 * rng.normal(size=x.shape)).astype(np.float32)
    distances = np.square(x.astype(float) - x2).sum(axis=1)
    want = np.exp(-distances / (2 * scale**2))
    got = np.diagonal(jax.jit(GaussianKernel(scale))(x, x2))
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_the_standard_error_of_spread_l1_is_its_deviation_over_keys(key):
    x, z = jnp.array([[0.0], [0.7]]), jnp.array([[0.4], [1.5]])
    one = lambda key: spread_l1(x, z, GaussianNoise(0.7), num_samples=40, key=key)
    values, errors = jax.jit(jax.vmap(one))(jax.random.split(key, 300))
    np.testing.assert_allclose(np.sqrt(np.square(errors).mean()), values.std(ddof=1), rtol=0.25)
