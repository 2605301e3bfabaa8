"""Streamed mixture densities against SciPy and the dense form: values, every derivative, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from spread_jax import (
    GaussianNoise,
    LaplaceNoise,
    LowRankGaussianNoise,
    TransformedNoise,
    UniformNoise,
    log_spread_density,
)
from spread_jax._pairwise import exp2


def problem(dtype, seed=0, event=(2, 2)):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(11, *event)), rng.normal(size=(7, *event)), rng.normal(size=7)
    return tuple(jnp.asarray(a, dtype) for a in arrays)


@pytest.mark.parametrize("peer", [scipy.stats.norm, scipy.stats.laplace], ids=["gaussian", "laplace"])
def test_value_matches_scipy(peer, dtype):
    y, atoms, _ = problem(dtype)
    noise = (GaussianNoise if peer is scipy.stats.norm else LaplaceNoise)(0.3)
    pairs = peer.logpdf(np.asarray(y, float)[:, None], np.asarray(atoms, float), 0.3).sum(axis=(2, 3))
    expected = scipy.special.logsumexp(pairs, axis=1) - np.log(7)
    result = jax.jit(lambda y, atoms: log_spread_density(y, atoms, noise, chunk_size=3))(y, atoms)
    np.testing.assert_allclose(result, expected, rtol=2e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize(
    ("make", "event"),
    [
        (lambda t: GaussianNoise(2 * t[0]), (3, 3)),  # pairs are one product
        (lambda t: LaplaceNoise(t[0]), (2, 2)),
        (lambda t: LowRankGaussianNoise(t[0], t[1]), (2, 2)),
        (lambda t: TransformedNoise(LaplaceNoise(t[0]), jax.tree_util.Partial(jnp.multiply, t[2])), (2, 2)),
    ],
    ids=["gaussian", "laplace", "low_rank", "transformed"],
)
def test_streamed_derivatives_in_both_modes_equal_the_dense_ones(make, event, x64):
    y, atoms, log_weights = problem("float64", event=event)
    rng = np.random.default_rng(1)
    numbers = (0.4, jnp.asarray(rng.normal(size=(2, 2, 1))), 1.3)
    weights = jnp.arange(11.0)

    def streamed(y, atoms, log_weights, numbers):
        density = log_spread_density(y, atoms, make(numbers), log_weights=log_weights, chunk_size=3)
        return (weights * density).sum(), density

    def reference(y, atoms, log_weights, numbers):
        noise = make(numbers)
        density = dense_of(noise)(y, atoms, log_weights)
        return (weights * density).sum(), density

    def dense_of(noise):
        def f(y, atoms, log_weights):
            one = lambda row: jax.nn.logsumexp(
                noise.log_prob(jnp.broadcast_to(row, atoms.shape), atoms) + jax.nn.log_softmax(log_weights)
            )
            return jax.vmap(one)(y)

        return f

    args = (y, atoms, log_weights, numbers)

    @jax.jit
    def everything(args):
        gradients = [jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True)(*args) for f in (streamed, reference)]
        forward = [jax.jvp(lambda *a, f=f: f(*a)[1], args, args)[1] for f in (streamed, reference)]
        return gradients, forward

    (got, want), (got_forward, want_forward) = everything(args)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got_forward, want_forward, rtol=1e-9)


def test_blocks_by_one_product_keep_their_digits_whatever_their_order():
    """12 dimensions, more atoms than a block holds: values and gradients against double precision, where the first
    block is far from all points, where the first atoms are left out, and where one product would lose digits.
    """
    rng = np.random.default_rng(3)
    half = np.where(np.arange(1024) < 512, -8.0, 8.0)[:, None] * np.eye(12)[0]
    clusters = half + rng.normal(size=(1024, 12))  # 128 nats apart
    late = np.where(np.arange(1024) < 100, -np.inf, rng.normal(size=1024))
    cases = [(clusters, np.zeros(1024), 1.0), (clusters, late, 1.0), (clusters / 8, late, 0.02)]
    loss = lambda y, atoms, w, s: log_spread_density(y, atoms, GaussianNoise(s), log_weights=w, chunk_size=512).sum()
    value_and_gradients = jax.jit(
        lambda *args: (log_spread_density(*args[:2], GaussianNoise(args[3]), log_weights=args[2], chunk_size=512),
                       jax.grad(loss, argnums=(0, 1, 2, 3))(*args))
    )  # fmt: skip
    for atoms, log_weights, scale in cases:
        y = atoms[::16] + scale * rng.normal(size=(64, 12))
        y, atoms, log_weights = (a.astype(np.float32).astype(float) for a in (y, atoms, log_weights))
        log_weights -= scipy.special.logsumexp(log_weights)
        offsets = y[:, None] - atoms
        joint = log_weights + scipy.stats.norm.logpdf(offsets, scale=np.float32(scale)).sum(axis=2)
        shares = scipy.special.softmax(joint, axis=1)
        pulls = shares[..., None] * offsets / scale**2
        expected = (
            -pulls.sum(axis=1),
            pulls.sum(axis=0),
            shares.sum(axis=0) - 64 * np.exp(log_weights),
            (shares * (np.square(offsets).sum(axis=2) / scale**3 - 12 / scale)).sum(),
        )
        value, gradients = value_and_gradients(*(a.astype(np.float32) for a in (y, atoms, log_weights)), scale)
        np.testing.assert_allclose(value, scipy.special.logsumexp(joint, axis=1), rtol=1e-6, atol=5e-5)
        *sizes, of_scale = (np.abs(want).max() for want in expected)
        sizes.append(max(of_scale, 64 * 12 / scale))  # its terms cancel
        for got, want, size in zip(gradients, expected, sizes, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5 * size)
        left_out = np.isinf(log_weights)
        assert (np.asarray(gradients[1])[left_out] == 0).all()


def test_powers_of_two():
    x = np.concatenate([np.linspace(-126, 126.9, 100_001), [0, 1, -1, 0.5, -0.5]]).astype(np.float32)
    power = jax.jit(exp2)
    np.testing.assert_allclose(power(x), 2.0 ** x.astype(float), rtol=3e-7)
    edges = np.array([-127.5, -1e9, -np.inf, 0, np.nan, 128, np.inf], np.float32)
    np.testing.assert_array_equal(power(edges), np.array([0, 0, 0, 1, np.nan, np.inf, np.inf], np.float32))


def test_second_derivative_vmap_and_jacfwd(x64):
    y, atoms, _ = problem("float64", event=(9,))  # one product at 0.6, split ones at 0.3
    f = jax.jit(lambda s: log_spread_density(y, atoms, GaussianNoise(s), chunk_size=4).sum())
    slope = lambda s: (f(s + 1e-5) - f(s - 1e-5)) / 2e-5
    first, second = jax.jit(lambda s: (jax.jacfwd(f)(s), jax.grad(jax.grad(f))(s)))(0.6)
    np.testing.assert_allclose(first, slope(0.6), rtol=1e-6)
    np.testing.assert_allclose(second, (f(0.601) - 2 * f(0.6) + f(0.599)) / 1e-6, rtol=1e-4)
    scales = jnp.array([0.3, 0.6, 2.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(scales), [f(s) for s in scales], rtol=1e-12)


def test_chunks_do_not_change_the_result_and_minus_infinity_leaves_atoms_out():
    y, atoms, log_weights = problem("float32")
    noise = GaussianNoise(0.5)
    density = jax.jit(
        lambda atoms, log_weights, chunk_size=None: log_spread_density(
            y, atoms, noise, log_weights=log_weights, chunk_size=chunk_size
        ),
        static_argnums=2,
    )
    whole = density(atoms, log_weights)
    for chunk_size in (1, 4, 100):
        np.testing.assert_allclose(density(atoms, log_weights, chunk_size), whole, rtol=1e-5)
    np.testing.assert_allclose(density(atoms, np.asarray(log_weights) + 5), whole, rtol=1e-5)
    some = np.where(np.arange(7) < 3, log_weights, -np.inf).astype(np.float32)
    kept = density(atoms[:3], log_weights[:3])
    np.testing.assert_allclose(density(atoms, some, 2), kept, rtol=1e-5)
    grads = np.asarray(jax.jit(jax.grad(lambda a: density(a, some, 2).sum()))(atoms))
    assert np.isfinite(grads).all()
    assert (grads[3:] == 0).all()


def test_it_is_a_density_and_far_points_stay_finite(x64):
    atoms = jnp.array([[-1.0], [0.5], [2.0]])
    grid = np.linspace(-60, 60, 20001)[:, None]
    for noise in (GaussianNoise(0.3), LaplaceNoise(0.8)):
        density = np.exp(jax.jit(log_spread_density)(grid, atoms, noise))
        np.testing.assert_allclose(np.trapezoid(density, grid[:, 0]), 1.0, rtol=1e-4)
    far = jnp.array([[1e4]])
    at_far = jax.value_and_grad(lambda y: log_spread_density(y, atoms, GaussianNoise(0.3))[0])
    value, slope = jax.jit(at_far)(far)
    # Only the nearest atom counts: its density, a third of the weight.
    np.testing.assert_allclose(value, scipy.stats.norm.logpdf(1e4, 2.0, 0.3) - np.log(3), rtol=1e-12)
    np.testing.assert_allclose(slope, [[-(1e4 - 2) / 0.09]], rtol=1e-9)


@pytest.mark.parametrize(("make", "size"), [(GaussianNoise, 12), (LaplaceNoise, 4)])
def test_memory_does_not_hold_the_pairs(make, size):
    # 3000 x 3000 pairs are 36 MB; with 64 x 64 blocks the gradient needs a fraction of that.
    y, atoms = jnp.zeros((3000, size)), jnp.zeros((3000, size))
    loss = lambda y, atoms, s: log_spread_density(y, atoms, make(s), chunk_size=64).sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(y, atoms, 1.0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


def test_bad_arguments_are_refused():
    y, noise = jnp.zeros((3, 2)), GaussianNoise(1.0)
    with pytest.raises(ValueError, match="atoms must hold at least one sample"):
        log_spread_density(y, jnp.zeros((0, 2)), noise)
    with pytest.raises(ValueError, match="y and atoms must share their event shape"):
        log_spread_density(y, jnp.zeros((3, 1)), noise)
    with pytest.raises(ValueError, match="atoms must be finite"):
        log_spread_density(y, jnp.full((3, 2), jnp.nan), noise)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(3,\)"):
        log_spread_density(y, y, noise, log_weights=jnp.zeros(2))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        log_spread_density(y, y, noise, chunk_size=0)
    with pytest.raises(TypeError, match="y must have a floating-point dtype"):
        log_spread_density(jnp.zeros((3, 2), int), y, noise)
    with pytest.raises(TypeError, match="bounded support"):
        log_spread_density(y, y, UniformNoise(1.0))
    assert log_spread_density(jnp.zeros((0, 2)), y, noise).shape == (0,)
