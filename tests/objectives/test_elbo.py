"""The bounds against exact linear-Gaussian results, NumPy, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spread_jax import ElboTerms, GaussianNoise, elbo, spread_elbo

RNG = np.random.default_rng(1)
F = RNG.normal(size=(4, 2))  # x = F z
SIGMA = 0.6
X = RNG.normal(size=(3, 2)) @ F.T
MARGINAL = F @ F.T + SIGMA**2 * np.eye(4)
POSTERIOR = np.linalg.inv(F.T @ F / SIGMA**2 + np.eye(2))


def decode(z):
    return z @ jnp.asarray(F.T, z.dtype)


def mean_field_encode(y):
    """The exact posterior's mean, and the best factorised standard deviations."""
    mean = y @ jnp.asarray((POSTERIOR @ F.T / SIGMA**2).T, y.dtype)
    log_std = -0.5 * np.log(np.diag(np.linalg.inv(POSTERIOR)))
    return mean, jnp.broadcast_to(jnp.asarray(log_std, y.dtype), mean.shape)


def exact_elbo(y):
    """The bound of `mean_field_encode` at y in closed form, by NumPy."""
    mean = y @ (POSTERIOR @ F.T / SIGMA**2).T
    variance = 1 / np.diag(np.linalg.inv(POSTERIOR))
    residual = ((y - mean @ F.T) ** 2).sum(1) + (F**2 @ variance).sum()
    log_likelihood = -0.5 * residual / SIGMA**2 - 4 * np.log(SIGMA) - 2 * np.log(2 * np.pi)
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(1)
    return log_likelihood, kl


def test_elbo_equals_closed_form(key, dtype):
    samples = 4000
    terms = elbo(
        jnp.asarray(X, dtype), mean_field_encode, decode, GaussianNoise(SIGMA), key=key, num_latent_samples=samples
    )
    assert all(term.dtype == dtype for term in terms)
    log_likelihood, kl = exact_elbo(X)
    np.testing.assert_allclose(terms.kl, kl, rtol=1e-5)
    # The likelihood's spread over z is of the order of its own quadratic term: at most |residual| / sigma^2.
    np.testing.assert_allclose(terms.log_likelihood, log_likelihood, atol=6 * 4.0 / np.sqrt(samples))
    np.testing.assert_allclose(terms.elbo, terms.log_likelihood - terms.kl, rtol=1e-6)


def test_elbo_bounds_the_log_likelihood_and_meets_it_at_the_exact_posterior(key):
    """With one latent the Gaussian family contains the posterior, and every draw of the bound averages to log p."""
    f = F[:, :1]
    marginal = stats.multivariate_normal(np.zeros(4), f @ f.T + SIGMA**2 * np.eye(4))
    variance = 1 / (1 + (f**2).sum() / SIGMA**2)

    def encode(y, shift=0.0):
        mean = variance / SIGMA**2 * y @ jnp.asarray(f, y.dtype) + shift
        return mean, jnp.full_like(mean, 0.5 * np.log(variance))

    decode_one = lambda z: z @ jnp.asarray(f.T, z.dtype)
    options = {"key": key, "num_latent_samples": 20_000}
    x = jnp.asarray(X, jnp.float32)
    tight = elbo(x, encode, decode_one, GaussianNoise(SIGMA), **options).elbo
    loose = elbo(x, lambda y: encode(y, 0.5), decode_one, GaussianNoise(SIGMA), **options).elbo
    np.testing.assert_allclose(tight, marginal.logpdf(X), atol=6 * 2.0 / np.sqrt(20_000))
    assert (np.asarray(loose) < marginal.logpdf(X) - 0.05).all()


def test_spread_elbo_is_the_mean_of_elbos_of_spread_data(key):
    """E over y of the closed form, by sampling y in NumPy; six standard errors of both sides."""
    draws = 4000
    noise = GaussianNoise(SIGMA)
    terms = spread_elbo(
        jnp.asarray(X, jnp.float32), mean_field_encode, decode, noise, key=key, num_spread_samples=draws
    )
    for row in range(len(X)):
        y = X[row] + SIGMA * np.random.default_rng(row).normal(size=(draws, 4))
        values = np.subtract(*exact_elbo(y))
        error = 6 * np.sqrt(2) * (values.std() + 4.0) / np.sqrt(draws)
        np.testing.assert_allclose(terms.elbo[row], values.mean(), atol=error)


def test_low_variance_drops_the_covariance_of_noise_and_reconstruction(key):
    """Its shift is E <y - x, g(z)> / sigma^2 = tr(F A) for an encoder of mean A y."""
    draws = 20_000
    gain = POSTERIOR @ F.T / SIGMA**2
    x, noise = jnp.asarray(X, jnp.float32), GaussianNoise(SIGMA)
    options = {"key": key, "num_spread_samples": draws}
    full = spread_elbo(x, mean_field_encode, decode, noise, **options)
    low = spread_elbo(x, mean_field_encode, decode, noise, low_variance=True, **options)
    np.testing.assert_allclose(full.elbo - low.elbo, np.trace(F @ gain), atol=6 * 3.0 / np.sqrt(draws))
    np.testing.assert_allclose(full.kl, low.kl, rtol=1e-6)


def test_low_variance_has_the_smaller_gradient_variance_with_many_dimensions():
    """The noise off the manifold, X - Z of its dimensions, no longer enters (measured: a tenth at X = 40, Z = 2)."""
    f = RNG.normal(size=(40, 2))
    precision = f.T @ f / SIGMA**2 + np.eye(2)
    gain = jnp.asarray(np.linalg.solve(precision, f.T).T / SIGMA**2, jnp.float32)
    log_std = jnp.asarray(-0.5 * np.log(np.diag(precision)), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(3, 2)) @ f.T, jnp.float32)

    def gradient(key, low_variance):
        encode = lambda y: (y @ gain, jnp.broadcast_to(log_std, (len(y), 2)))
        noise, options = GaussianNoise(SIGMA), {"key": key, "low_variance": low_variance}
        return jax.grad(lambda f: spread_elbo(x, encode, lambda z: z @ f.T, noise, **options).elbo.mean())(
            jnp.asarray(f, jnp.float32)
        )

    keys = jax.random.split(jax.random.key(3), 300)
    full, low = (jax.jit(jax.vmap(lambda k, v=v: gradient(k, v)))(keys).var(axis=0).sum() for v in (False, True))
    assert low < 0.3 * full


def test_networks_are_called_once_with_folded_samples(key):
    calls = []

    def encode(y):
        calls.append(("encode", y.shape))
        return mean_field_encode(y)

    def counted_decode(z):
        calls.append(("decode", z.shape))
        return decode(z)

    options = {"num_spread_samples": 2, "num_latent_samples": 5}
    spread_elbo(jnp.asarray(X, jnp.float32), encode, counted_decode, GaussianNoise(SIGMA), key=key, **options)
    assert calls == [("encode", (6, 4)), ("decode", (30, 2))]


def test_samples_of_an_example_stay_with_it(key):
    """Examples far apart: a sample folded into the wrong row would be off by thousands of nats."""
    x = jnp.asarray([[0.0], [100.0], [-300.0]])
    encode = lambda y: (jnp.round(y, -2), jnp.full_like(y, -5.0))
    terms = spread_elbo(x, encode, lambda z: z, GaussianNoise(1.0), key=key, num_spread_samples=3, num_latent_samples=4)
    assert (terms.log_likelihood > -20).all()
    np.testing.assert_allclose(terms.kl, 0.5 * (x[:, 0] ** 2 + np.exp(-10) - 1 + 10), rtol=1e-5)


def test_images_and_structured_latents(key):
    x = jnp.ones((2, 3, 3, 1))
    encode = lambda y: (jnp.zeros((y.shape[0], 2, 2)), jnp.zeros((y.shape[0], 2, 2)))
    terms = spread_elbo(x, encode, lambda z: jnp.ones((z.shape[0], 3, 3, 1)), GaussianNoise(1.0), key=key)
    assert all(term.shape == (2,) for term in terms)
    np.testing.assert_allclose(terms.kl, 0.0)


def test_aux_is_returned(key):
    terms, aux = spread_elbo(
        jnp.asarray(X, jnp.float32),
        lambda y: (mean_field_encode(y), {"seen": y.shape[0]}),
        lambda z: (decode(z), "decoded"),
        GaussianNoise(SIGMA),
        key=key,
        has_aux=True,
    )
    assert isinstance(terms, ElboTerms)
    assert aux == ({"seen": 3}, "decoded")


def test_jit_grad_vmap_agree_with_eager_and_a_noise_schedule_compiles_once(key, dtype):
    compilations = []
    x = jnp.asarray(X, dtype)

    def bound(scale, x):
        compilations.append(1)
        return spread_elbo(x, mean_field_encode, decode, GaussianNoise(scale), key=key).elbo.mean()

    compiled = jax.jit(jax.value_and_grad(bound))
    for scale in (0.5, 0.45, 0.4):
        value, gradient = compiled(scale, x)
    assert len(compilations) == 1
    rtol = {"float32": 2e-5, "float64": 1e-11}[dtype]
    np.testing.assert_allclose(value, bound(0.4, x), rtol=rtol)
    h = {"float32": 1e-2, "float64": 1e-5}[dtype]
    numeric = (bound(0.4 + h, x) - bound(0.4 - h, x)) / (2 * h)
    np.testing.assert_allclose(gradient, numeric, rtol={"float32": 2e-2, "float64": 1e-7}[dtype])
    mapped = jax.vmap(bound, in_axes=(0, None))(jnp.array([0.4, 0.5], dtype), x)
    np.testing.assert_allclose(mapped[0], value, rtol=rtol)


def test_low_precision_networks_leave_the_bound_in_the_datas_precision(key):
    half = lambda value: value.astype(jnp.bfloat16)
    terms = spread_elbo(
        jnp.asarray(X, jnp.float32),
        lambda y: tuple(map(half, mean_field_encode(y))),
        lambda z: half(decode(z)),
        GaussianNoise(SIGMA),
        key=key,
    )
    assert terms.elbo.dtype == jnp.float32


X32 = np.asarray(X, np.float32)
GOOD = {"x": X32, "encode": mean_field_encode, "decode": decode, "noise": GaussianNoise(1.0)}


class Bare:
    """A noise without closed forms."""

    def sample(self, x, *, key):
        return x

    def log_prob(self, y, x):
        return jnp.zeros(len(x))

    def location(self, x):
        return x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((3, 4), int)}, TypeError, "x must have a floating-point dtype"),
        ({"x": np.float32(1)}, ValueError, r"x must have shape \[batch, \*event\]"),
        ({"encode": lambda y: y}, ValueError, r"encode must return \(mean, log_std\)"),
        ({"encode": lambda y: (y, y[:, :1])}, ValueError, "encode must return mean and log_std of one shape"),
        ({"encode": lambda y: (y[:1], y[:1])}, ValueError, "with n = 3"),
        ({"decode": lambda z: z}, ValueError, r"decode must return shape \[n, \*event\] = \(3, 4\)"),
        ({"num_latent_samples": 0}, ValueError, "num_latent_samples must be at least 1"),
        ({"num_spread_samples": 1.5}, TypeError, "num_spread_samples must be a Python integer"),
        ({"has_aux": True}, ValueError, r"encode must return \(mean, log_std\)"),
        ({"noise": Bare(), "low_variance": True}, TypeError, "Bare has none"),
    ],
)
def test_refuses(change, error, message, key):
    arguments = {**GOOD, **change}
    with pytest.raises(error, match=message):
        spread_elbo(**arguments, key=key)


def test_the_key_has_no_default():
    with pytest.raises(TypeError, match="key"):
        spread_elbo(X32, mean_field_encode, decode, GaussianNoise(1.0))
