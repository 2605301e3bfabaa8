"""Where digits used to cancel, overflow or vanish: against NumPy in long double, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import spread_jax as sj
from spread_jax import (
    CauchyNoise,
    DiscreteNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    LowRankGaussianNoise,
    StudentTNoise,
    UniformNoise,
    f_divergence,
    log_spread_density,
    spread_hellinger_deltas,
    spread_hellinger_gaussians,
    spread_kl_gaussians,
)

V = np.array([-45.0, -18.0, -3.0, 0.0, 1.9, 2.1, 7.9, 8.1, 18.0, 20.0, 45.0])
CUSTOM = {  # f, and v -> (f'(e^v), f*(f'(e^v)))
    "jensen_shannon": (
        lambda u: 0.5 * (u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)),
        lambda v: (0.5 * (np.log(2) - np.logaddexp(0, -v)), 0.5 * (np.logaddexp(0, v) - np.log(2))),
    ),
    "triangular": (
        lambda u: (u - 1) ** 2 / (u + 1),
        lambda v: (1 - 4 / (1 + np.exp(v)) ** 2, 3 - 4 * (1 + 2 * np.exp(v)) / (1 + np.exp(v)) ** 2),
    ),
    "kl": (lambda u: u * jnp.log(u), lambda v: (1 + v, np.exp(v))),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_the_critic_of_a_custom_f_keeps_its_digits(name, dtype):
    f, exact = CUSTOM[name]
    divergence = f_divergence(f)
    v = V if name != "kl" else V[:-1]  # its conjugate grows without end, and is continued linearly
    want = exact(v.astype(np.float64))
    # Beyond the table the continuation is linear, which misses what is left of e^-26.
    rtol = np.where(np.abs(v) > 26, 3e-5, 3e-5 if dtype == "float32" else 1e-7)
    of_v = lambda v: (divergence.activation(v), divergence.conjugate_of_activation(v))
    got, slopes = jax.jit(lambda v: jax.jvp(of_v, (v,), (jnp.ones_like(v),)))(jnp.asarray(v, dtype))
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_array_less(np.abs(value - expected), rtol * (1 + np.abs(expected)))
    step = 1e-5
    for slope, above, below in zip(slopes, exact(v + step), exact(v - step), strict=True):
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-3, atol=1e-3)


def test_a_custom_f_can_be_made_while_tracing():
    at = jax.jit(lambda t: f_divergence(lambda u: u * jnp.log(u)).from_p(t))
    np.testing.assert_allclose(at(jnp.array([0.5])), [0.5], rtol=1e-6)


@pytest.mark.parametrize("distance", [1e-4, 2.5e-3, 3e-3, 0.05, 0.3, 0.9, 1.1, 8.0, 60.0])
@pytest.mark.parametrize("make", [LogisticNoise, LaplaceNoise])
def test_hellinger_of_near_shifts(make, distance, dtype):
    half = np.longdouble(distance) / 2
    if make is LaplaceNoise:
        log_affinity = np.log1p(half) - half
    else:
        log_affinity = -np.log(np.sinh(half) / half)
    if distance < 1e-3:  # where even a long double loses digits
        log_affinity = -(half**2) / 2 if make is LaplaceNoise else -(half**2) / 6
        rtol = 1e-4
    else:
        rtol = 3e-6 if dtype == "float32" else 2e-12
    got = jax.jit(lambda d: spread_hellinger_deltas(d, jnp.zeros_like(d), make(1.0)))(jnp.full((1, 1), distance, dtype))
    np.testing.assert_allclose(got, [float(-np.expm1(log_affinity))], rtol=rtol)


def test_hellinger_of_near_equal_gaussians_in_many_dimensions():
    size = 256
    a = np.random.default_rng(0).normal(size=(size, size)) / 16
    cov = a @ a.T
    for change in (1e-3, 3e-2, 0.3):
        other = cov + change * np.diag(np.linspace(-0.3, 1, size)) * (cov.trace() / size)
        other = other + 0.3 * change * np.eye(size)
        spread = [np.asarray(c, np.float64) + 0.25 * np.eye(size) for c in (cov, other)]
        log_det = lambda m: np.linalg.slogdet(m)[1]
        log_affinity = 0.25 * sum(map(log_det, spread)) - 0.5 * log_det(sum(spread) / 2)
        args = [jnp.asarray(v, jnp.float32) for v in (np.zeros(size), cov, np.zeros(size), other)]
        value, slope = jax.jit(jax.value_and_grad(lambda c, args=args: spread_hellinger_gaussians(
            args[0], args[1], args[2], c, GaussianNoise(0.5))))(args[3])  # fmt: skip
        np.testing.assert_allclose(value, -np.expm1(log_affinity), rtol=2e-3, atol=1e-9)
        # d(1 - BC)/dB = -BC (B^-1 / 4 - M^-1 / 4), the mean term aside.
        expected = -np.exp(log_affinity) * (np.linalg.inv(spread[1]) - np.linalg.inv(sum(spread) / 2)) / 4
        np.testing.assert_allclose(slope, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise, UniformNoise])
def test_the_squared_l2_distance_in_the_dimensions_of_an_image_is_infinite_or_zero_and_never_nan(make):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 784)), jnp.float32) / 100
    distance = jax.jit(lambda x, y, scale: sj.spread_l2_squared(x, y, make(scale)))
    assert distance(x, x + 0.01, 0.1) == jnp.inf
    assert distance(x, x + 0.01, 5.0) == 0
    # At a scale where the numbers fit, NumPy on the sums of logarithms.
    scale = {GaussianNoise: 0.28, LaplaceNoise: 0.25, UniformNoise: 0.5}[make]
    with jax.enable_x64(True):
        kernel = lambda a, b: np.exp(np.asarray(make(scale).log_mmd_kernel(np.float64(a), np.float64(b))))
        y = np.asarray(x) + 0.01
        expected = kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()
    np.testing.assert_allclose(distance(x, y, scale), expected, rtol=1e-3)


@pytest.mark.parametrize("make", [GaussianNoise, LaplaceNoise, LogisticNoise, CauchyNoise])
def test_the_logarithm_of_a_kernel_in_the_dimensions_of_an_image(make):
    x, x2 = np.random.default_rng(0).normal(size=(2, 3, 784)).astype(np.float32) / 4
    log_kernel = jax.jit(make(0.1).log_mmd_kernel)(x, x2)
    one = lambda a, b: np.log(np.asarray(make(0.1).mmd_kernel(a[:, None], b[:, None]), np.float64))
    with jax.enable_x64(True):
        expected = [np.trace(one(np.float64(x[i]), np.float64(x2[i]))) for i in range(3)]
    np.testing.assert_allclose(np.diagonal(log_kernel), expected, rtol=1e-4)
    assert np.isfinite(log_kernel).all()


def test_the_kernel_of_uniform_noise_holds_where_its_factors_do_not():
    x = jnp.zeros((1, 1000))
    kernel = jax.jit(UniformNoise(0.5).mmd_kernel)(x, jnp.concatenate([x, x + 0.5, x + 2]))
    np.testing.assert_allclose(kernel, [[1.0, 0.0, 0.0]], atol=1e-30)
    half = jax.jit(UniformNoise(0.25).mmd_kernel)(x, x + 0.25)  # (1/2 * 2)^1000
    np.testing.assert_allclose(half, [[1.0]], rtol=1e-5)


@pytest.mark.parametrize("omega", [0.0, 1e-20, 1e-10, 1e-3])
@pytest.mark.parametrize(
    ("noise", "curvature"),
    [(StudentTNoise(1.0, 5.0), 5 / 3), (LogisticNoise(1.0), np.pi**2 / 3), (UniformNoise(1.0), 1 / 3)],
)
def test_characteristic_functions_are_flat_at_zero(noise, curvature, omega):
    """Their slope is -omega times the variance."""
    of_omega = lambda w: noise.characteristic_function(jnp.full((1, 1024), w)).sum()
    slope = jax.jit(jax.grad(of_omega))(jnp.float32(omega))
    np.testing.assert_allclose(slope, -1024 * curvature * omega, rtol=2e-2, atol=1e-12)


def test_a_zero_in_a_discrete_noise_has_no_say_in_the_gradient():
    labels = jnp.array([0, 1]), jnp.array([1, 1])
    matrix = jnp.array([[0.7, 0.4, 0.2], [0.3, 0.6, 0.3], [0.0, 0.0, 0.5]])
    kl = lambda m: DiscreteNoise(m).kl(*labels).sum()
    value, slope = jax.jit(jax.value_and_grad(kl))(matrix)
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(), rtol=1e-6)
    expected = np.zeros((3, 3))
    expected[:2, 0], expected[:2, 1] = np.log(p / q) + 1, -p / q
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_divergences_of_labels_that_one_side_lacks():
    p, q = jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0])), jnp.log(jnp.array([0.0, 0.5, 0.5, 0.0]))
    found = {d.name: float(d.between(p, q)) for d in (sj.kl, sj.reverse_kl, sj.chi_squared)}
    assert set(found.values()) == {np.inf}
    np.testing.assert_allclose(sj.jensen_shannon.between(p, q), 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(sj.total_variation.between(p, q), 0.5, rtol=1e-6)
    np.testing.assert_allclose(sj.squared_hellinger.between(p, q), 0.5, rtol=1e-6)
    apart = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(sj.jensen_shannon.between(*apart), np.log(2), rtol=1e-6)
    # A label that p alone lacks costs the KL nothing.
    np.testing.assert_allclose(sj.kl.between(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))), np.log(2))


@pytest.mark.parametrize("half", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    rng = np.random.default_rng(0)
    atoms, y = (jnp.asarray(rng.normal(size=shape), half) for shape in ((3000, 4), (5, 4)))
    got = jax.jit(log_spread_density)(y, atoms, GaussianNoise(0.5))
    assert got.dtype == jnp.float32
    exact = jax.jit(log_spread_density)(y.astype(jnp.float32), atoms.astype(jnp.float32), GaussianNoise(0.5))
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    factor = jnp.asarray(rng.normal(size=(4, 2)), half)
    low_rank = jax.jit(lambda y, x: LowRankGaussianNoise(0.5, factor).log_prob(y, x))(y, y[::-1])
    cov = 0.25 * np.eye(4) + np.asarray(factor, float) @ np.asarray(factor, float).T
    want = [
        scipy.stats.multivariate_normal.logpdf(np.asarray(a - b, float), None, cov)
        for a, b in zip(y, y[::-1], strict=True)
    ]
    np.testing.assert_allclose(low_rank, want, rtol=2e-2)
    gaussians = jnp.zeros(4, half), jnp.eye(4, dtype=half), jnp.ones(4, half), 2 * jnp.eye(4, dtype=half)
    a, b = 1.25, 2.25
    kl = 0.5 * 4 * (a / b - 1 + np.log(b / a) + 1 / b)
    np.testing.assert_allclose(jax.jit(spread_kl_gaussians)(*gaussians, GaussianNoise(0.5)), kl, rtol=1e-2)


def test_no_weight_means_no_effective_sample():
    far = jnp.full((2, 1), 1e30)
    encode = lambda y: (jnp.zeros_like(y), jnp.zeros_like(y))
    terms = sj.spread_importance_bound(
        far, encode, lambda z: z, GaussianNoise(1.0), key=jax.random.key(0), num_samples=3
    )
    np.testing.assert_array_equal(terms.effective_sample_size, [0.0, 0.0])
    np.testing.assert_array_equal(terms.bound, [-np.inf, -np.inf])
