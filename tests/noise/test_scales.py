"""Laws of scales against SciPy and quadrature; draws by key and by keys; annealing without compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax import GaussianNoise, GridScales, LogUniformScales, SampledScales, ScaleLaw, example_keys

LOW, HIGH = 0.2, 1.5


def rising_sampler(key, shape, dtype):
    return LOW + (HIGH - LOW) * jnp.sqrt(jax.random.uniform(key, shape, dtype))


def rising_density(sigma):
    u = (sigma - LOW) / (HIGH - LOW)
    return jnp.log(2 * u) - np.log(HIGH - LOW)


LAWS = {
    "log_uniform": (LogUniformScales(LOW, HIGH), scipy.stats.loguniform(LOW, HIGH)),
    "sampled": (SampledScales(rising_sampler, rising_density, LOW, HIGH), scipy.stats.beta(2, 1, LOW, HIGH - LOW)),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_density_and_quadrature_match_scipy(name, dtype, key):
    law, peer = LAWS[name]
    x = jnp.zeros((4000, 2, 1), dtype)
    sigma = jax.jit(lambda key: law.sample(x, key=key))(key)
    assert sigma.shape == (4000, 1, 1)
    assert sigma.dtype == x.dtype
    assert scipy.stats.kstest(np.asarray(sigma, np.float64).ravel(), peer.cdf).pvalue > 1e-4
    at = np.array([0.21, 0.5, 1.49])
    rtol = 2e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(law.log_prob(jnp.asarray(at, dtype)), peer.logpdf(at), rtol=rtol, atol=rtol)
    scales, weights = law.quadrature(24)
    for h in (np.ones_like, lambda s: 1 / s**2, np.sin):
        expected = scipy.integrate.quad(lambda s, h=h: peer.pdf(s) * h(s), LOW, HIGH, epsabs=1e-12)[0]
        np.testing.assert_allclose((weights * h(np.asarray(scales))).sum(), expected, rtol=max(rtol, 1e-7))


def test_a_density_outside_of_the_ends_is_zero():
    np.testing.assert_array_equal(LogUniformScales(0.2, 1.5).log_prob(jnp.array([0.1, 2.0])), -np.inf)
    np.testing.assert_array_equal(GridScales(jnp.array([0.5, 1.0])).log_prob(jnp.array([0.4])), -np.inf)


def test_a_grid_has_its_probabilities(key):
    law = GridScales(jnp.array([0.1, 0.5, 2.0]), jnp.array([1.0, 2.0, 1.0]))
    sigma = np.asarray(law.sample(jnp.zeros((4000, 1)), key=key)).ravel()
    share = np.array([(sigma == np.float32(s)).mean() for s in (0.1, 0.5, 2.0)])
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=6 * 0.5 / np.sqrt(4000))
    np.testing.assert_allclose(np.exp(law.log_prob(jnp.array([0.5, 2.0]))), [0.5, 0.25], rtol=1e-6)
    scales, weights = law.quadrature(7)
    np.testing.assert_allclose((weights * scales).sum(), 0.775, rtol=1e-6)
    np.testing.assert_array_equal(GridScales(0.3).sample(jnp.zeros((2, 5)), key=key), np.full((2, 1), np.float32(0.3)))


def test_each_example_has_its_key_and_annealed_ends_compile_once(key):
    x, keys = jnp.zeros((6, 2)), example_keys(key, jnp.arange(6))
    traces = []

    @jax.jit
    def draw(law, x, keys):
        traces.append(1)
        return law.sample(x, key=keys)

    some = [draw(LogUniformScales(jnp.float32(low), jnp.float32(2.0)), x, keys) for low in (0.1, 0.5)]
    assert len(traces) == 1
    assert (some[1] >= 0.5).all()
    assert some[0].min() < 0.5
    np.testing.assert_allclose(LogUniformScales(0.1, 2.0).sample(x[2:], key=keys[2:]), some[0][2:], rtol=1e-6)
    # A scale as a noise takes it, and differentiable in the ends.
    slope = jax.grad(lambda low: LogUniformScales(low, 2.0).sample(x, key=keys).sum())(0.1)
    assert slope > 0
    assert GaussianNoise(some[0]).sample(x, key=key).shape == x.shape
    assert all(isinstance(law, ScaleLaw) for law, _ in LAWS.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LogUniformScales(1.0, 0.5), ValueError, "lowest must be below highest, got 1.0 and 0.5"),
        (lambda: LogUniformScales(0.5, 0.5), ValueError, "for one scale use GridScales"),
        (lambda: LogUniformScales(0.0, 0.5), ValueError, "lowest must be positive and finite, got 0.0"),
        (lambda: LogUniformScales(0.1, None), TypeError, "highest must be a number or an array, got NoneType"),
        (lambda: GridScales(jnp.array([0.1, -1.0])), ValueError, "scales must be positive and finite"),
        (lambda: GridScales(jnp.ones((2, 1))), ValueError, r"scales must have shape \[K\], got \(2, 1\)"),
        (lambda: GridScales(jnp.ones(2), jnp.ones(3)), ValueError, "weights must have one number for each scale"),
        (lambda: SampledScales(None, rising_density, 0.1, 1.0), TypeError, "sampler must be callable"),
        (lambda: SampledScales(rising_sampler, 1.0, 0.1, 1.0), TypeError, "log_density must be callable"),
        (
            lambda: SampledScales(lambda key, shape, dtype: jnp.ones(3), rising_density, 0.1, 1.0).sample(
                jnp.ones((2, 1)), key=jax.random.key(0)
            ),
            ValueError,
            r"sampler must return scales of shape \(2,\), got \(3,\)",
        ),
        (lambda: LogUniformScales(0.1, 1.0).sample(jnp.ones(2), key=3), TypeError, "key must be a JAX random key"),
        (lambda: LogUniformScales(0.1, 1.0).quadrature(0), ValueError, "num_scales must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_sampler_of_another_dtype_gives_scales_of_the_images(key):
    law = SampledScales(lambda key, shape, dtype: jnp.full(shape, 0.5, jnp.float16), rising_density, LOW, HIGH)
    for keys in (key, example_keys(key, jnp.arange(3))):
        assert law.sample(jnp.zeros((3, 2)), key=keys).dtype == jnp.float32


def test_the_ends_of_a_law_belong_to_it():
    found = LogUniformScales(0.5, 2.0).log_prob(jnp.asarray([0.49, 0.5, 2.0, 2.01]))
    inside = -np.log([0.5, 2.0]) - np.log(np.log(4.0))
    np.testing.assert_allclose(found, [-np.inf, *inside, -np.inf], rtol=1e-6)
