"""Source laws against SciPy, quadrature and their own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from spread_jax.linear.sources import (
    BernoulliGaussSource,
    CustomSource,
    LaplaceSource,
    LogisticSource,
    Source,
    StudentTSource,
    as_source,
)


def bernoulli_gauss_log_density(z, probability=0.2, spike=0.05):
    wide = np.sqrt((1 - (1 - probability) * spike**2) / probability)
    normal = scipy.stats.norm.logpdf
    return np.logaddexp(np.log(probability) + normal(z, scale=wide), np.log1p(-probability) + normal(z, scale=spike))


SOURCES = {
    "laplace": (LaplaceSource(), lambda z: scipy.stats.laplace.logpdf(z, scale=np.sqrt(0.5))),
    "logistic": (LogisticSource(), lambda z: scipy.stats.logistic.logpdf(z, scale=np.sqrt(3) / np.pi)),
    "student_t": (StudentTSource(5.0), lambda z: scipy.stats.t.logpdf(z, 5, scale=np.sqrt(3 / 5))),
    "bernoulli_gauss": (BernoulliGaussSource(0.2, 0.05), bernoulli_gauss_log_density),
    "custom": (CustomSource(lambda z: -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)), scipy.stats.norm.logpdf),
}
EACH = pytest.mark.parametrize(("source", "log_density"), SOURCES.values(), ids=SOURCES)
SAMPLED = pytest.mark.parametrize("name", ["laplace", "logistic", "student_t", "bernoulli_gauss"])
Z = np.array([-7.0, -1.3, -0.05, 0.02, 0.6, 3.0])


@EACH
def test_log_density_is_scipys(source, log_density, dtype):
    z = jnp.asarray(Z, dtype)
    log_prob = jax.jit(source.log_prob)(z)
    assert log_prob.dtype == dtype
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(log_prob, log_density(np.asarray(z, np.float64)), rtol=tolerance, atol=tolerance)


@EACH
def test_variance_is_one(source, log_density, x64):
    density = lambda z: np.exp(log_density(z))
    moment = lambda k: scipy.integrate.quad(lambda z: z**k * density(z), -np.inf, np.inf, limit=500)[0]
    np.testing.assert_allclose([moment(0), moment(1), moment(2)], [1, 0, 1], atol=1e-6)


@EACH
def test_score_is_minus_the_derivative(source, log_density, x64):
    z = jnp.asarray(Z)
    step = 1e-5
    slope = (log_density(Z + step) - log_density(Z - step)) / (2 * step)
    np.testing.assert_allclose(source.score(z), -slope, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(source.score)(z), source.score(z))


@EACH
@pytest.mark.parametrize("scale", [0.1, 0.7])
def test_spread_law_is_the_convolution(source, log_density, scale, x64):
    def quadrature(y):
        integrand = lambda z: np.exp(log_density(z)) * scipy.stats.norm.pdf(y, z, scale)
        return scipy.integrate.quad(integrand, y - 12 * scale, y + 12 * scale, points=[0, y], limit=500)[0]

    y = jnp.asarray(Z)
    log_prob, slope = jax.jvp(lambda y: source.spread_log_prob(y, scale), (y,), (jnp.ones_like(y),))
    np.testing.assert_allclose(log_prob, np.log([quadrature(v) for v in Z]), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(source.spread_score(y, scale), -slope, rtol=1e-7, atol=1e-7)


def test_the_laplace_closed_form_agrees_with_quadrature_of_the_base_class(x64):
    custom = CustomSource(LaplaceSource().log_prob)
    y, scale = jnp.asarray(Z), 0.4
    np.testing.assert_allclose(custom.spread_log_prob(y, scale), LaplaceSource().spread_log_prob(y, scale), atol=1e-3)
    np.testing.assert_allclose(custom.spread_score(y, scale), LaplaceSource().spread_score(y, scale), atol=5e-3)


@pytest.mark.parametrize("y", [0.0, 30.0, -300.0])
def test_spread_laplace_has_finite_values_and_slopes_far_out(y, dtype):
    y = jnp.asarray(y, dtype)
    value, slope = jax.value_and_grad(lambda y: LaplaceSource().spread_log_prob(y, 0.1))(y)
    assert jnp.isfinite(value)
    np.testing.assert_allclose(slope, -np.sqrt(2) * np.sign(y), atol=1e-4)


@SAMPLED
def test_draws_follow_the_law(name, key):
    source, log_density = SOURCES[name]
    draws = np.asarray(source.sample((4000,), key=key), np.float64)
    grid = np.linspace(-40, 40, 160_001)
    distribution = np.cumsum(np.exp(log_density(grid))) * (grid[1] - grid[0])
    assert scipy.stats.kstest(draws, lambda z: np.interp(z, grid, distribution)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["laplace", "student_t", "bernoulli_gauss"])
def test_scale_mixtures_leave_their_law_unchanged(name, key):
    # z ~ p, tau^2 ~ p(tau^2|z), z' ~ N(0, tau^2): z' has the law of z, and is nearly independent of its sign.
    source, log_density = SOURCES[name]
    keys = jax.random.split(key, 3)
    z = source.sample((4000,), key=keys[0])
    tau2 = source.conditional_variance(z, key=keys[1])
    again = np.asarray(jnp.sqrt(tau2) * jax.random.normal(keys[2], z.shape), np.float64)
    grid = np.linspace(-40, 40, 160_001)
    distribution = np.cumsum(np.exp(log_density(grid))) * (grid[1] - grid[0])
    assert scipy.stats.kstest(again, lambda v: np.interp(v, grid, distribution)).pvalue > 1e-3
    if name == "laplace":  # the mixing law is known: Exp(1)
        assert scipy.stats.kstest(np.asarray(tau2, np.float64), "expon").pvalue > 1e-3


def test_conditional_variance_at_zero_is_finite_and_positive(key):
    tau2 = LaplaceSource().conditional_variance(jnp.zeros(1000), key=key)
    assert bool(jnp.isfinite(tau2).all() and (tau2 >= 0).all())


def test_names_sources_and_densities_make_sources():
    assert isinstance(as_source("logistic"), LogisticSource)
    assert as_source(StudentTSource(7.0)).df == 7.0
    assert isinstance(as_source(lambda z: -jnp.abs(z)), CustomSource)
    assert all(isinstance(source, Source) for source, _ in SOURCES.values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: as_source("laplas"), ValueError, "source must be one of 'laplace'"),
        (lambda: as_source(3), TypeError, "source must be a name, a Source or a log-density, got int"),
        (lambda: StudentTSource(2.0), ValueError, "df must be finite and above 2"),
        (lambda: BernoulliGaussSource(1.5), ValueError, "probability must lie between 0 and 1, got 1.5"),
        (lambda: BernoulliGaussSource(0.5, 0.0), ValueError, "spike_scale must be positive"),
        (lambda: BernoulliGaussSource(0.5, 2.0), ValueError, "spike_scale must be below 1"),
        (lambda: CustomSource("abs"), TypeError, "log_density must be callable, got str"),
    ],
)
def test_bad_sources_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
