"""Every continuous noise against SciPy and quadrature: densities, transforms, KL, entropy, samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import (
    CauchyNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    SpreadNoise,
    StudentTNoise,
    UniformNoise,
)

PEERS = {
    "gaussian": (GaussianNoise, scipy.stats.norm),
    "laplace": (LaplaceNoise, scipy.stats.laplace),
    "logistic": (LogisticNoise, scipy.stats.logistic),
    "cauchy": (CauchyNoise, scipy.stats.cauchy),
    "student3": (lambda scale: StudentTNoise(scale, 3.0), scipy.stats.t(3.0)),
    "student0.7": (lambda scale: StudentTNoise(scale, 0.7), scipy.stats.t(0.7)),
}
CLOSED = ["gaussian", "laplace", "logistic", "cauchy"]


def quadrature(integrand, *points):
    """The integral over the line, cut at the given points (kinks and centres)."""
    cuts = sorted({-60.0, -12.0, *points, 12.0, 60.0})
    inner = sum(
        scipy.integrate.quad(integrand, a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
        for a, b in itertools.pairwise(cuts)
    )
    tails = (
        scipy.integrate.quad(integrand, -np.inf, cuts[0], epsabs=1e-13, limit=200)[0]
        + scipy.integrate.quad(integrand, cuts[-1], np.inf, epsabs=1e-13, limit=200)[0]
    )
    return inner + tails


def density_of(peer, scale):
    """SciPy's density at y - x, with a scale: frozen distributions take none."""
    pdf = peer.pdf
    return lambda d: pdf(d / scale) / scale


@pytest.mark.parametrize("name", PEERS)
def test_log_prob_and_its_gradients_match_scipy(name, dtype):
    make, peer = PEERS[name]
    rng = np.random.default_rng(0)
    y, x = rng.normal(size=(2, 5, 2, 3)) * 3
    scale = rng.uniform(0.5, 2.0, size=(2, 3))
    expected = (peer.logpdf((y - x) / scale) - np.log(scale)).sum(axis=(1, 2))
    arrays = [jnp.asarray(a, dtype) for a in (scale, y, x)]
    rtol = 2e-6 if dtype == "float32" else 1e-13
    # The gradient to each argument against a central difference of SciPy's density.
    step = 1e-6
    total = lambda *a: (lambda value: (value.sum(), value))(make(a[0]).log_prob(*a[1:]))
    grads, value = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(value, expected, rtol=rtol)
    for grad, index in zip(grads, range(3), strict=True):
        moved = []
        for sign in (1, -1):
            args = [scale, y, x]
            args[index] = args[index] + sign * step * np.ones_like(args[index])
            s, v, u = args
            moved.append((peer.logpdf((v - u) / s) - np.log(s)).sum())
        slope = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(grad), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_samples_follow_the_density_and_are_reparameterised(name, key):
    make, peer = PEERS[name]
    x = np.full((4000, 1), 0.7, np.float32)
    sample = lambda scale: make(scale).sample(x, key=key)
    y, slope = jax.jit(lambda s: jax.jvp(sample, (s,), (jnp.ones_like(s),)))(np.float32(1.3))
    y = np.asarray(y)
    # One-sample Kolmogorov-Smirnov; the level is far below anything a fixed key meets by chance.
    u = np.asarray((y[:, 0] - 0.7) / 1.3, np.float64)
    assert scipy.stats.kstest(u, peer.cdf).pvalue > 1e-4
    np.testing.assert_allclose(slope, (y - x) / 1.3, rtol=1e-3, atol=1e-4)


def test_student_samples_are_differentiable_in_the_degrees_of_freedom(key):
    # E (y - x)^2 = v / (v - 2), so its slope in v is -2 / (v - 2)^2.
    def second_moment(v):
        y = StudentTNoise(1.0, v).sample(jnp.zeros((20000, 1)), key=key)
        return jnp.square(y[:, 0])

    slopes = np.asarray(jax.jit(jax.jacfwd(second_moment))(12.0))
    assert abs(slopes.mean() + 2 / 100) < 6 * slopes.std() / np.sqrt(len(slopes))


@pytest.mark.parametrize("name", PEERS)
def test_characteristic_function_matches_quadrature(name, x64):
    make, peer = PEERS[name]
    scale = 0.8
    omega = np.array([0.0, 0.2, 1.0, 3.5])
    pdf = density_of(peer, scale)
    # 2 int_0^inf pdf cos, with the oscillation handled by SciPy's Fourier weight.
    expected = [1.0] + [
        2 * scipy.integrate.quad(pdf, 0, np.inf, weight="cos", wvar=w, limlst=200)[0] for w in omega[1:]
    ]
    transform = lambda omega: make(scale).characteristic_function(omega)
    result, pair = jax.jit(lambda a, b: (transform(a), transform(b)))(omega[:, None], omega[None, 1::2])
    np.testing.assert_allclose(result, expected, atol=2e-8)
    np.testing.assert_allclose(pair, [expected[1] * expected[3]], atol=2e-8)


@pytest.mark.parametrize("v", [0.3, 1.0, 5.0, 300.0])
def test_student_characteristic_function_matches_bessel(v, dtype):
    omega = np.array([0.3, 0.5, 2.0])
    z = np.sqrt(v) * omega
    expected = scipy.special.kv(v / 2, z) * np.exp(
        v / 2 * np.log(z) - scipy.special.gammaln(v / 2) - (v / 2 - 1) * np.log(2)
    )
    transform = jax.jit(StudentTNoise(1.0, v).characteristic_function)
    result = transform(omega[:, None].astype(dtype))
    rtol = 2e-5 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(result, expected, rtol=rtol)


@pytest.mark.parametrize("name", CLOSED)
def test_kl_entropy_and_expected_log_prob_match_quadrature(name, x64):
    make, peer = PEERS[name]
    scale, x, x2 = 0.8, 0.3, np.array([0.3, 0.31, -1.9, 6.0])
    noise, pdf = make(scale), density_of(peer, scale)
    log_pdf = lambda d: peer.logpdf(d / scale) - np.log(scale)
    methods = jax.jit(lambda a, b: (noise.expected_log_prob(a, b), noise.kl(a, b), noise.entropy(a)))
    cross, kl, entropy = methods(np.full((4, 1), x), x2[:, None])
    for other, cross_of_other, kl_of_other in zip(x2, cross, kl, strict=True):
        want = quadrature(lambda y, o=other: pdf(y - x) * log_pdf(y - o), x, other)
        np.testing.assert_allclose(cross_of_other, want, rtol=1e-7)
        want = quadrature(lambda y, o=other: pdf(y - x) * (log_pdf(y - x) - log_pdf(y - o)), x, other)
        np.testing.assert_allclose(kl_of_other, want, rtol=1e-6, atol=1e-11)
    np.testing.assert_allclose(entropy, np.full(4, peer.entropy() + np.log(scale)), rtol=1e-12)
    # Dimensions add, each with its own scale.
    kl_of = jax.jit(lambda s, a, b: make(s).kl(a, b))
    two = kl_of(np.array([0.8, 2.0]), np.array([[0.3, 1.0]]), np.array([[-1.9, 0.0]]))
    parts = kl_of(np.array([0.8, 0.8]), np.array([[0.3, 0.4]]), np.array([[-1.9, 0.0]]))
    np.testing.assert_allclose(two, parts, rtol=1e-12)  # 1 / 2.0 = 0.4 / 0.8
    np.testing.assert_allclose(parts, [kl[2] + kl_of(0.8, np.array([[0.4]]), np.zeros((1, 1)))[0]], rtol=1e-12)


@pytest.mark.parametrize("name", CLOSED)
def test_mmd_kernel_matches_quadrature(name, x64):
    make, peer = PEERS[name]
    noise, pdf = make(0.8), density_of(peer, 0.8)
    x, x2 = np.array([0.3, -2.0]), np.array([0.3, 0.30001, 1.5])
    expected = [[quadrature(lambda y, a=a, b=b: pdf(y - a) * pdf(y - b), a, b) for b in x2] for a in x]
    result = jax.jit(noise.mmd_kernel)(x[:, None], x2[:, None])
    np.testing.assert_allclose(result, expected, rtol=1e-8)
    both = jax.jit(noise.mmd_kernel)(np.array([[0.3, -2.0]]), np.array([[1.5, 0.3]]))
    np.testing.assert_allclose(both, [[expected[0][2] * expected[1][0]]], rtol=1e-8)


@pytest.mark.parametrize("name", CLOSED)
def test_kl_is_accurate_and_smooth_from_tiny_to_huge_distances(name, dtype):
    noise = PEERS[name][0](1.0)
    distances = np.array([0.0, 1e-6, 1e-3, 0.0099, 0.0101, 0.1, 0.99, 1.01, 5.0, 80.0])
    x = distances[:, None].astype(dtype)
    of_x = lambda x: noise.kl(x, jnp.zeros_like(x))
    kl, slope = jax.jit(lambda x: jax.jvp(of_x, (x,), (jnp.ones_like(x),)))(x)
    d = distances.astype(np.longdouble)
    half = d / 2
    with np.errstate(all="ignore"):
        exact, exact_slope = {
            "gaussian": (d**2 / 2, d),
            "laplace": (d + np.expm1(-d), -np.expm1(-d)),
            "logistic": (
                np.where(d < 1e-2, d**2 / 6 - d**4 / 360, 2 * (half / np.tanh(half) - 1)),
                np.where(d < 1e-2, d / 3 - d**3 / 90, 1 / np.tanh(half) - half / np.sinh(half) ** 2),
            ),
            "cauchy": (np.log1p(d**2 / 4), (d / 2) / (1 + d**2 / 4)),
        }[name]
    rtol = 2e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(kl, exact.astype(float), rtol=rtol)
    np.testing.assert_allclose(slope, exact_slope.astype(float), rtol=rtol)


@pytest.mark.parametrize("name", [*PEERS, "uniform"])
def test_noise_is_a_pytree_that_runs_under_vmap_and_jacfwd(name):
    make = UniformNoise if name == "uniform" else PEERS[name][0]
    noise = make(0.5)
    assert isinstance(noise, SpreadNoise)
    assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(noise))
    omega = np.array([[0.3], [1.1]], np.float32)
    of_scale = jax.jit(lambda s: make(s).characteristic_function(omega))
    batched = jax.jit(jax.vmap(of_scale))(np.array([0.5, 1.0], np.float32))
    np.testing.assert_allclose(batched, [of_scale(0.5), of_scale(1.0)], rtol=1e-6)
    slopes = jax.jit(jax.jacfwd(noise.characteristic_function))(omega)
    assert slopes.shape == (2, 2, 1)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("make", [p[0] for p in PEERS.values()] + [UniformNoise])
@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_bad_scale_is_refused(make, scale):
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        make(scale)


@pytest.mark.parametrize("name", PEERS)
def test_traced_bad_scale_gives_nan_at_once_not_a_wrong_number(name):
    log_prob = jax.jit(lambda s: PEERS[name][0](s).log_prob(jnp.ones((1, 1)), jnp.zeros((1, 1))))
    assert np.isnan(log_prob(0.0)).all()
    assert np.isnan(log_prob(-1.0)).all()


@pytest.mark.parametrize("name", PEERS)
def test_bad_arrays_are_refused(name, key):
    noise = PEERS[name][0](1.0)
    with pytest.raises(TypeError, match="x must have a floating-point dtype, got int32"):
        noise.sample(jnp.zeros((2, 1), int), key=key)
    with pytest.raises(ValueError, match="same shape"):
        noise.log_prob(jnp.zeros((2, 1)), jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="scale must be a number or broadcast"):
        PEERS[name][0](jnp.ones(3)).log_prob(jnp.zeros((2, 2)), jnp.zeros((2, 2)))


@pytest.mark.parametrize("v", [30.0, 50.0, 1e4])
def test_student_density_with_many_degrees_of_freedom(v, dtype):
    """Above 40 the constant is a series: log-gammas of float32 would differ by their rounding."""
    y = np.array([0.0, 0.5, 3.0])[:, None]
    expected = scipy.stats.t(v).logpdf(y[:, 0])
    got = jax.jit(lambda v, y: StudentTNoise(1.0, v).log_prob(y, jnp.zeros_like(y)))(
        jnp.asarray(v, dtype), jnp.asarray(y, dtype)
    )
    np.testing.assert_allclose(got, expected, rtol=2e-6 if dtype == "float32" else 1e-9)


def test_uniform_draws_fill_their_interval_and_entropy_adds_over_dimensions(key):
    y = np.asarray(UniformNoise(0.5).sample(jnp.full((4000, 1), 2.0), key=key), np.float64)
    assert scipy.stats.kstest(y[:, 0], scipy.stats.uniform(1.5, 1.0).cdf).pvalue > 1e-4
    scale = jnp.array([[0.5, 1.0], [2.0, 0.25]])
    np.testing.assert_allclose(UniformNoise(scale).entropy(jnp.zeros((1, 2, 2))), [np.log(1 * 2 * 4 * 0.5)], rtol=1e-6)


def test_a_scale_that_would_enlarge_the_event_is_refused(key):
    with pytest.raises(ValueError, match=r"scale must be a number .*, got shape \(2, 3, 2\)"):
        GaussianNoise(jnp.ones((2, 3, 2))).sample(jnp.zeros((4, 3, 2)), key=key)
    with pytest.raises(ValueError, match=r"scale must be a number .*, got shape \(3, 2\)"):
        GaussianNoise(jnp.ones((3, 2))).sample(jnp.zeros((4, 1, 2)), key=key)
