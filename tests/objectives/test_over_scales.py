"""Gradients of a generator by density ratios and by scores, against the closed form and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spread_jax import (
    GaussianNoise,
    GridScales,
    LaplaceNoise,
    LogUniformScales,
    chi_squared,
    denoising_loss,
    density_ratio_losses,
    divergence_over_scales,
    example_keys,
    f_divergence,
    jensen_shannon,
    kl,
    log_spread_density,
    non_saturating,
    preconditioned,
    reverse_kl,
    score_difference_loss,
    spread_kl_gaussians,
    spread_over_scales,
    squared_hellinger,
    total_variation,
)

LAW = LogUniformScales(0.5, 1.5)
MEAN, COV = np.array([0.5, -0.3]), np.array([[0.6, 0.2], [0.2, 0.3]])
PARAMS = {"a": np.array([[1.2], [-0.5]]), "b": np.array([0.2, 0.1])}  # x = a z + b: a line in the plane
KEYS, EXAMPLES = 200, 64


def generate(params, z):
    return z @ params["a"].T + params["b"]


def moments(params, side):
    return (MEAN, COV) if side == "data" else (params["b"], params["a"] @ params["a"].T)


def spread_moments(params, side, sigma):
    mean, cov = moments(params, side)
    return jnp.asarray(mean), jnp.asarray(cov) + jnp.square(sigma)[..., None, None] * jnp.eye(2)


def log_density(params, side, y, sigma):
    mean, cov = spread_moments(params, side, sigma)
    log_pdf = lambda y, cov: jax.scipy.stats.multivariate_normal.logpdf(y, mean, cov)
    return jax.vmap(log_pdf)(y, cov)


def exact_critic(params):
    fixed = jax.lax.stop_gradient(params)
    return lambda y, sigma: log_density(fixed, "data", y, sigma) - log_density(fixed, "model", y, sigma)


def exact_denoiser(params, side):
    def denoise(y, sigma):
        mean, cov = spread_moments(jax.lax.stop_gradient(params), side, sigma)
        solved = jax.vmap(jnp.linalg.solve)(cov, (y - mean)[..., None])[..., 0]
        return y - jnp.square(sigma)[:, None] * solved  # Tweedie

    return denoise


def draw(key):
    data_key, z_key, key = jax.random.split(key, 3)
    x = jnp.asarray(MEAN) + jax.random.normal(data_key, (EXAMPLES, 2)) @ np.linalg.cholesky(COV).T
    return x, jax.random.normal(z_key, (EXAMPLES, 1)), key


@functools.partial(jax.jit, static_argnames=("divergence", "weight"))
def ratio_gradients(params, keys, divergence, weight=None):
    """The generator's gradient for each key."""

    def one(key):
        x, z, key = draw(key)

        def loss(params):
            losses = density_ratio_losses(
                x, generate(params, z), exact_critic(params), LAW, key=key, divergence=divergence, weight=weight
            )
            return losses.generator

        return jax.grad(loss)(params)

    return jax.lax.map(one, keys, batch_size=20)


@functools.partial(jax.jit, static_argnames=("weight",))
def score_gradients(params, keys, weight=None):
    def one(key):
        _, z, key = draw(key)
        denoisers = exact_denoiser(params, "data"), exact_denoiser(params, "model")

        def loss(params):
            model_key = jax.random.split(key)[1]  # that of the generated in `density_ratio_losses`
            return score_difference_loss(generate(params, z), *denoisers, LAW, key=model_key, weight=weight).loss.mean()

        return jax.grad(loss)(params)

    return jax.lax.map(one, keys, batch_size=20)


def closed_form(params, divergence, weight=None):
    """The gradient of D_w in closed form: KL of Gaussians, or by quadrature over the plane."""

    def at(sigma, params):
        data, model = moments(params, "data"), moments(params, "model")
        if divergence is reverse_kl:
            return spread_kl_gaussians(*model, *data, GaussianNoise(sigma))
        if divergence is kl:
            return spread_kl_gaussians(*data, *model, GaussianNoise(sigma))
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
        mean, cov = spread_moments(params, "data", sigma)
        y = mean + grid @ jnp.linalg.cholesky(cov).T
        mass = np.multiply.outer(weights, weights).reshape(-1) / (2 * np.pi)
        full = jnp.full(len(y), sigma)
        log_ratio = log_density(params, "data", y, full) - log_density(params, "model", y, full)
        return (mass * divergence.from_p(log_ratio)).sum()

    of_params = lambda params: divergence_over_scales(lambda sigma: at(sigma, params), LAW, weight=weight, num_scales=8)
    return jax.jit(jax.grad(of_params))(params)


def assert_within_errors(gradients, want):
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        error = np.std(got, axis=0, ddof=1) / np.sqrt(len(got))
        assert (np.abs(np.mean(got, axis=0) - expected) < 5 * error).all()
        assert (error < 0.2 * np.abs(expected).max()).all()  # or nothing is tested


@pytest.mark.parametrize("divergence", [reverse_kl, kl, jensen_shannon, squared_hellinger], ids=lambda d: d.name)
def test_density_ratio_gradients_are_those_of_the_closed_form(divergence, key, x64):
    got = ratio_gradients(PARAMS, jax.random.split(key, KEYS), divergence)
    assert_within_errors(got, closed_form(PARAMS, divergence))


def test_scores_give_the_closed_form_and_the_same_numbers_as_ratios(key, x64):
    keys = jax.random.split(key, KEYS)
    for weight in (None, jnp.square):
        by_scores = score_gradients(PARAMS, keys, weight)
        assert_within_errors(by_scores, closed_form(PARAMS, reverse_kl, weight))
        by_ratios = ratio_gradients(PARAMS, keys, reverse_kl, weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), by_scores, by_ratios)


def test_the_non_saturating_gradient_is_jensen_shannons_of_each_y_reweighted(key, x64):
    """d softplus(-v) = -(1 - s) dv where Jensen-Shannon has -s/2 dv, s = sigmoid(v)."""
    x, z, key = draw(key)

    def gradient(divergence, of_key):
        loss = lambda generated: (
            density_ratio_losses(x, generated, exact_critic(PARAMS), LAW, key=of_key, divergence=divergence).generator
        )
        return jax.grad(loss)(generate(PARAMS, z))

    of_ratio = lambda divergence: jax.jit(functools.partial(gradient, divergence))(key)
    y, sigma = spread_over_scales(generate(PARAMS, z), LAW, key=jax.random.split(key)[1])
    v = exact_critic(PARAMS)(y, sigma)[:, None]
    np.testing.assert_allclose(of_ratio(non_saturating), jnp.exp(-v) * 2 * of_ratio(jensen_shannon), rtol=1e-9)


def test_mixtures_against_the_exact_ratio(key, x64):
    """Deltas moved by theta, p~ and q~ mixtures: the gradient of reverse KL by SciPy on a grid."""
    atoms, model, theta = np.array([[-0.6], [0.2], [1.0]]), np.array([[-0.4], [0.7]]), 0.15
    law = GridScales(jnp.array([0.3, 0.8]))
    of_each = lambda sigma: GaussianNoise(sigma[:, None])
    density = lambda y, sigma, a: log_spread_density(y, a, of_each(sigma))
    x, generated = jnp.tile(atoms, (20, 1)), jnp.tile(model, (30, 1))

    @jax.jit
    def gradients(keys):
        def loss(theta, key):
            fixed = jax.lax.stop_gradient(theta)
            critic = lambda y, sigma: density(y, sigma, atoms) - density(y, sigma, model + fixed)
            return density_ratio_losses(x, generated + theta, critic, law, key=key).generator

        return jax.lax.map(lambda key: jax.grad(loss)(theta, key), keys, batch_size=20)

    y = np.linspace(-8, 8, 8001)
    pdf = lambda a, s: np.mean([scipy.stats.norm.pdf(y, m, s) for m in a[:, 0]], axis=0)

    def value(theta):
        parts = [(q * np.log(q / p)).sum() for s in (0.3, 0.8) for p, q in [(pdf(atoms, s), pdf(model + theta, s))]]
        return np.mean(parts) * (y[1] - y[0])

    want = (value(theta + 1e-4) - value(theta - 1e-4)) / 2e-4
    got = np.asarray(gradients(jax.random.split(key, KEYS)))
    error = got.std(ddof=1) / np.sqrt(len(got))
    assert abs(got.mean() - want) < 5 * error < abs(want)


FS = [kl, reverse_kl, jensen_shannon, squared_hellinger, chi_squared, f_divergence(lambda u: (u - 1) ** 2 / (u + 1))]


@pytest.mark.parametrize("divergence", FS, ids=lambda d: d.name)
def test_every_critic_learns_the_log_ratio(divergence, x64):
    """At v = log p - log q its loss is stationary, convex, and minus the divergence: for labels, exactly."""
    p_counts, q_counts = np.array([4, 1, 3, 2]), np.array([1, 2, 3, 4])
    p, q = p_counts / 10, q_counts / 10
    x, generated = (
        jnp.repeat(jnp.arange(4.0), counts, total_repeat_length=10)[:, None] for counts in (p_counts, q_counts)
    )

    def loss(v):
        critic = lambda y, sigma: v[jnp.round(y[:, 0]).astype(int)]  # the noise is too small to change a label
        options = {"key": jax.random.key(0), "critic_divergence": divergence}
        return density_ratio_losses(x, generated, critic, GridScales(1e-6), **options).critic

    v = jnp.log(p / q)
    value, slope, curvature = jax.jit(lambda v: (loss(v), jax.grad(loss)(v), jax.hessian(loss)(v)))(v)
    np.testing.assert_allclose(-value, divergence.between(jnp.log(p), jnp.log(q)), rtol=1e-9)
    np.testing.assert_allclose(slope, np.zeros(4), atol=1e-12)
    assert np.linalg.eigvalsh(curvature).min() > 0


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon, squared_hellinger, non_saturating])
def test_a_critic_that_is_far_off_leaves_everything_finite(divergence):
    """Log-ratios of 40, where e^v has lost all digits beside 1: the loss and its gradient keep theirs."""
    x = jnp.ones((4, 1))

    def loss(v):
        critic = lambda y, sigma: jnp.where(jnp.arange(8) < 4, v, -v)
        return density_ratio_losses(x, x, critic, LAW, key=jax.random.key(0), divergence=divergence)

    losses, slopes = jax.jit(lambda v: jax.jvp(loss, (v,), (jnp.ones_like(v),)))(jnp.float32(40.0))
    assert all(np.isfinite(part) for part in (*losses, *slopes))
    np.testing.assert_allclose(losses.divergence, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.accuracy, 1.0)


def test_the_critics_terms_are_those_of_logistic_regression(key, x64):
    x, z, key = draw(key)
    generated = generate(PARAMS, z)
    critic = lambda y, sigma: 0.3 * y[:, :1] - jnp.log(sigma)[:, None]  # [k, 1] is as good as [k]
    losses = density_ratio_losses(x, generated, critic, LAW, key=key, weight=jnp.square, divergence=kl)
    keys = jax.random.split(key)
    (y, s), (y2, s2) = spread_over_scales(x, LAW, key=keys[0]), spread_over_scales(generated, LAW, key=keys[1])
    v, v2 = (np.asarray(critic(*side), float)[:, 0] for side in ((y, s), (y2, s2)))
    cross_entropy = np.log1p(np.exp(-v)).mean() + np.log1p(np.exp(v2)).mean()
    np.testing.assert_allclose(losses.critic, 0.5 * cross_entropy - np.log(2), rtol=1e-5)
    np.testing.assert_allclose(losses.divergence, np.log(2) - 0.5 * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(losses.generator, -(np.exp(v2) * np.asarray(s2) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(losses.accuracy, 0.5 * ((v > 0).mean() + (v2 <= 0).mean()), rtol=1e-6)


def test_other_noises_and_a_key_for_each_example(key, x64):
    x, z, key = draw(key)
    generated, keys = generate(PARAMS, z), example_keys(key, jnp.arange(EXAMPLES))
    critic = lambda y, sigma: jnp.tanh(y).sum(axis=1) / sigma
    make = lambda sigma: LaplaceNoise(sigma / np.sqrt(2))
    draws = jax.jit(lambda x, keys: spread_over_scales(x, LAW, make, key=keys))
    y, sigma = draws(x, keys)
    assert abs(np.mean(np.abs(y - x) / np.asarray(sigma)[:, None]) - np.sqrt(0.5)) < 6 * np.sqrt(0.5 / y.size)
    np.testing.assert_allclose(y[10:], draws(x[10:], keys[10:])[0], rtol=1e-5)
    at = jax.jit(lambda x, generated, keys: density_ratio_losses(x, generated, critic, LAW, make, key=keys))
    halves = [at(x[rows], generated[rows], keys[rows]) for rows in (slice(None, 32), slice(32, None))]
    for whole, *parts in zip(at(x, generated, keys), *halves, strict=True):
        np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-5)


def test_denoisers_and_their_preconditioning(key, x64):
    """The exact denoiser has the least loss, the one of N(m, s^2) is the network that returns zero."""
    x, _, key = draw(key)
    keys = example_keys(key, jnp.arange(EXAMPLES))
    exact = exact_denoiser(PARAMS, "data")
    denoise, weight = preconditioned(lambda u, sigma: jnp.zeros_like(u), data_scale=0.5, data_mean=0.3)
    y, sigma = spread_over_scales(x, LAW, key=keys)
    variance = 0.25 + np.asarray(sigma)[:, None] ** 2
    np.testing.assert_allclose(denoise(y, sigma), 0.3 + 0.25 / variance * (y - 0.3), rtol=1e-9)
    error = denoising_loss(x, denoise, LAW, key=keys, weight=weight)
    np.testing.assert_allclose(error, np.square(denoise(y, sigma) - x).sum(axis=1) * weight(sigma), rtol=1e-9)
    # The network's own error: target and input of unit variance for data of N(m, s^2).
    target = (x - denoise(y, sigma)) * np.sqrt(variance) / (0.5 * np.asarray(sigma)[:, None])
    np.testing.assert_allclose(error, np.square(target).sum(axis=1), rtol=1e-9)
    least = denoising_loss(x, exact, LAW, key=keys)
    for other in (lambda y, sigma: exact(y, sigma) + 0.5, lambda y, sigma: 0.2 * exact(y, sigma)):
        worse = denoising_loss(x, other, LAW, key=keys) - least
        assert worse.mean() > 2 * worse.std() / np.sqrt(EXAMPLES)
    # So it is for a network that returns something else.
    network = lambda u, sigma: 0.7 * u * sigma[:, None]
    denoise, weight = preconditioned(network, data_scale=0.5, data_mean=0.3)
    own = network((y - 0.3) / np.sqrt(variance), sigma)
    error = denoising_loss(x, denoise, LAW, key=keys, weight=weight)
    np.testing.assert_allclose(error, np.square(own - target).sum(axis=1), rtol=1e-9)
    # Samples are held fixed.
    assert not np.asarray(jax.grad(lambda x: denoising_loss(x, exact, LAW, key=keys).sum())(x)).any()


@pytest.mark.parametrize("weight", [None, jnp.square])
def test_the_squared_difference_is_the_fisher_divergence_of_gaussians(weight, key, x64):
    """E |C^-1 (y - m) - D^-1 (y - n)|^2 for y of N(n, D) in closed form, whatever weight the gradient has."""
    z_key, key = jax.random.split(key)
    sigma, data, model = 0.7, moments(PARAMS, "data"), moments(PARAMS, "model")
    (m, c), (n, d) = ((mean, cov + sigma**2 * np.eye(2)) for mean, cov in (data, model))
    apart, shift = np.linalg.inv(c) - np.linalg.inv(d), np.linalg.solve(c, n - m)
    want = np.trace(apart @ d @ apart) + shift @ shift

    denoisers = exact_denoiser(PARAMS, "data"), exact_denoiser(PARAMS, "model")
    x = generate(PARAMS, jax.random.normal(z_key, (4000, 1)))
    terms = score_difference_loss(x, *denoisers, GridScales(sigma), key=key, weight=weight)
    error = terms.squared_difference.std(ddof=1) / np.sqrt(len(x))
    assert abs(terms.squared_difference.mean() - want) < 5 * error < 0.2 * want


def test_the_fisher_divergence_vanishes_where_model_and_data_agree(key, x64):
    x, _, key = draw(key)
    same = exact_denoiser(PARAMS, "data")
    terms = score_difference_loss(x, same, same, LAW, key=key)
    np.testing.assert_array_equal(terms.squared_difference, np.zeros(EXAMPLES))
    np.testing.assert_array_equal(
        jax.grad(lambda x: score_difference_loss(x, same, same, LAW, key=key).loss.sum())(x), 0
    )


X = jnp.ones((3, 2))
OPTIONS = {"key": jax.random.key(0)}
flat = lambda y, sigma: y[:, 0]
still = lambda y, sigma: y


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: density_ratio_losses(X, X, None, LAW, **OPTIONS), TypeError, "critic must be callable"),
        (lambda: density_ratio_losses(X, X, flat, 0.5, **OPTIONS), TypeError, "law must be a law of noise scales"),
        (
            lambda: density_ratio_losses(X, X, flat, LAW, GaussianNoise(1.0), **OPTIONS),
            TypeError,
            "noise must be callable, got GaussianNoise",
        ),
        (
            lambda: density_ratio_losses(X, X, flat, LAW, critic_divergence=total_variation, **OPTIONS),
            ValueError,
            "critic_divergence must have a curved f, .* that of total_variation is straight",
        ),
        (
            lambda: density_ratio_losses(X, X, flat, LAW, divergence="kl", **OPTIONS),
            TypeError,
            "divergence must be callable, got str",
        ),
        (
            lambda: density_ratio_losses(X, X, flat, LAW, critic_divergence=non_saturating, **OPTIONS),
            TypeError,
            "critic_divergence must be an FDivergence",
        ),
        (
            lambda: density_ratio_losses(X, X, still, LAW, **OPTIONS),
            ValueError,
            r"critic must return shape \(6,\) or \(6, 1\), got \(6, 2\)",
        ),
        (lambda: density_ratio_losses(X, X[:, :1], flat, LAW, **OPTIONS), ValueError, "x and generated must share"),
        (lambda: density_ratio_losses(X, X, flat, LAW, key=0), TypeError, "key must be a JAX random key"),
        (
            lambda: density_ratio_losses(X, X, flat, LAW, weight=2.0, **OPTIONS),
            TypeError,
            "weight must be callable, got float",
        ),
        (lambda: score_difference_loss(X, None, still, LAW, **OPTIONS), TypeError, "denoise_data must be callable"),
        (
            lambda: score_difference_loss(X, still, flat, LAW, **OPTIONS),
            ValueError,
            r"denoise_model must return the shape of y, \(3, 2\), got \(3,\)",
        ),
        (lambda: denoising_loss(X[:0], still, LAW, **OPTIONS), ValueError, "x must hold at least one example"),
        (lambda: denoising_loss(X, still, None, **OPTIONS), TypeError, "law must be a law of noise scales"),
        (lambda: preconditioned(None, data_scale=1.0), TypeError, "network must be callable"),
        (lambda: preconditioned(still, data_scale=0.0), ValueError, "data_scale must be positive"),
        (lambda: preconditioned(flat, data_scale=1.0)[0](X, X[:, 0]), ValueError, "network must return the shape of y"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_noise_knows_nothing_of_its_scale(key):
    """One number for each example: the draws of both would be functions of one another, were their keys the same."""
    for keys in (key, example_keys(key, jnp.arange(4000))):
        y, sigma = spread_over_scales(jnp.zeros((4000, 1)), LogUniformScales(0.1, 1.0), key=keys)
        epsilon = y[:, 0] / sigma
        assert scipy.stats.kstest(np.asarray(epsilon), "norm").pvalue > 1e-4
        for other in (jnp.log(sigma), jnp.square(jnp.log(sigma) - jnp.log(sigma).mean())):
            for of_noise in (epsilon, jnp.square(epsilon)):
                assert abs(np.corrcoef(other, of_noise)[0, 1]) < 6 / np.sqrt(4000)


def test_a_critic_that_knows_nothing_is_right_half_the_time(key):
    critic = lambda y, sigma: jnp.zeros(len(y))
    x = jnp.ones((6, 2))
    assert density_ratio_losses(x, x, critic, LogUniformScales(0.1, 1.0), key=key).accuracy == 0.5
