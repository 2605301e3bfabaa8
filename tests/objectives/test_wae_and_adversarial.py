"""The autoencoder and adversarial peers: against NumPy and against the divergence they bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import (
    GaussianKernel,
    GaussianNoise,
    chi_squared,
    f_divergence,
    jensen_shannon,
    kl,
    reverse_kl,
    spread_gan_losses,
    spread_kl_deltas,
    squared_hellinger,
    total_variation,
    wae_mmd_loss,
)


@pytest.mark.parametrize("published", [True, False])
def test_wae_matches_numpy(published, dtype, key):
    x = np.random.default_rng(11).normal(size=(6, 3))
    w = np.array([[0.5, 0.0], [0.2, 1.0], [0.0, -0.7]])
    encode, decode = lambda x: x @ jnp.asarray(w, x.dtype), lambda z: z @ jnp.asarray(w.T, z.dtype)
    kernel = None if published else GaussianKernel(0.9)
    terms = jax.jit(lambda x: wae_mmd_loss(x, encode, decode, key=key, weight=3.0, kernel=kernel))(
        jnp.asarray(x, dtype)
    )
    z = x @ w
    prior = np.asarray(jax.random.normal(key, (6, 2), dtype), float)

    def gram(a, b):
        square = ((a[:, None] - b) ** 2).sum(-1)
        if published:
            return sum(4 * s / (4 * s + square) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))
        return np.exp(-square / 2 / 0.81)

    off = lambda k: (k.sum() - np.trace(k)) / 30
    mmd = off(gram(z, z)) + off(gram(prior, prior)) - 2 * gram(z, prior).mean()
    reconstruction = ((x - z @ w.T) ** 2).sum(axis=1)
    tol = {"rtol": 1e-5 if dtype == "float32" else 1e-11}
    np.testing.assert_allclose(terms.mmd, mmd, **tol)
    np.testing.assert_allclose(terms.reconstruction, reconstruction, **tol)
    np.testing.assert_allclose(terms.loss, reconstruction.mean() + 3 * mmd, **tol)


def test_wae_trains_aux_and_refuses_bad_returns(key):
    x = jax.random.normal(key, (16, 2))
    kernel = GaussianKernel(1.0)
    loss = lambda w: wae_mmd_loss(
        x, lambda x: w * x, lambda z: z / w, key=key, weight=1.0, kernel=kernel
    ).loss  # fmt: skip
    # Standardised data are the prior already: the penalty pulls a collapsed encoder outwards.
    assert jax.jit(jax.grad(loss))(0.2) < 0
    terms, aux = wae_mmd_loss(
        x, lambda x: (x, 1), lambda z: (z, 2), key=key, weight=0.0, kernel=kernel, has_aux=True
    )  # fmt: skip
    assert aux == (1, 2)
    assert terms.loss == 0
    with pytest.raises(ValueError, match="decode must return shape"):
        wae_mmd_loss(x, lambda x: x, lambda z: z[:, :1], key=key, weight=1.0)
    with pytest.raises(ValueError, match="at least two samples"):
        wae_mmd_loss(x[:1], lambda x: x, lambda z: z, key=key, weight=1.0)


NOISE = GaussianNoise(1.0)
CUSTOM = f_divergence(lambda u: u * jnp.log(u), name="custom_kl")


@pytest.mark.parametrize(
    "divergence",
    [kl, reverse_kl, jensen_shannon, squared_hellinger, total_variation, chi_squared, CUSTOM],
    ids=lambda d: d.name,
)
def test_gan_bound_is_tight_at_the_best_critic_and_below_it_elsewhere(divergence, key):
    # Two deltas at distance d under sigma = 1: the log-ratio is d (y - d / 2) with the data at d. Near enough for
    # chi-squared, exp(d^2) - 1, to be told from zero and from its double.
    d = 0.5
    x, generated = jnp.full((40_000, 1), d), jnp.zeros((40_000, 1))
    log_ratio = lambda y: d * (y[:, 0] - d / 2)
    best = {
        "kl": lambda t: 1 + t,
        "reverse_kl": lambda t: t,
        "jensen_shannon": lambda t: t,
        "squared_hellinger": lambda t: t / 2,
        "total_variation": lambda t: 1e3 * t,
        "chi_squared": lambda t: 2 * jnp.expm1(t),
        "custom_kl": lambda t: t,
    }[divergence.name]
    losses = jax.jit(
        lambda scale: spread_gan_losses(
            x,
            generated,
            lambda y: scale * best(log_ratio(y)),
            GaussianNoise(1.0),
            key=key,
            divergence=divergence,
        )
    )
    y = np.random.default_rng(12).normal(size=100_000)
    t = jnp.asarray(np.concatenate([d * (y + d / 2), d * (y - d / 2)]), jnp.float32)
    terms = np.asarray(divergence.from_mixture(t), float)
    exact = terms.mean()
    if divergence in (kl, reverse_kl, CUSTOM):
        np.testing.assert_allclose(exact, d**2 / 2, atol=0.01)
        np.testing.assert_allclose(spread_kl_deltas(x[:1], generated[:1], NOISE), [d**2 / 2], rtol=1e-6)
    if divergence is chi_squared:
        np.testing.assert_allclose(exact, np.expm1(d**2), rtol=0.02)
    # The draws of the bound: 40,000 from each side.
    at_best = losses(1.0)
    values = (
        np.asarray(divergence.activation(best(t)), float),
        np.asarray(divergence.conjugate_of_activation(best(t)), float),
    )
    error = 6 * np.sqrt(sum(v.var() for v in values) / 40_000) + 6 * terms.std() / np.sqrt(len(terms))
    assert abs(at_best.divergence - exact) < error < 0.4 * exact
    np.testing.assert_allclose(at_best.critic, -at_best.divergence)
    if divergence is not total_variation:  # whose critic is a sign, which no positive factor changes
        assert losses(0.3).divergence < exact
    else:
        assert losses(-1.0).divergence < 0


def test_gan_gradients_reach_both_players_and_stay_finite_far_apart(key):
    x, generated = jnp.zeros((8, 2)), jnp.full((8, 2), 50.0)

    def losses(w, generated):
        return spread_gan_losses(x, generated, lambda y: y @ w, GaussianNoise(0.1), key=key)

    w = jnp.array([-1.0, -1.0])  # sees data at 0 and samples at 50
    generator_slope = jax.jit(jax.grad(lambda g: losses(w, g).generator))(generated)
    assert (generator_slope > 0).all()  # descent moves the samples towards the data
    critic_slope = jax.jit(jax.grad(lambda w: losses(w, generated).critic))(jnp.zeros(2))
    assert (critic_slope > 0).all()  # descent makes the critic lower at the samples
    assert np.isfinite(critic_slope).all()


def test_gan_refuses_a_critic_of_another_shape(key):
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"critic must return shape \(6,\) or \(6, 1\)"):
        spread_gan_losses(x, x, lambda y: y, GaussianNoise(1.0), key=key)
    with pytest.raises(TypeError, match="divergence must be an FDivergence"):
        spread_gan_losses(x, x, lambda y: y[:, 0], GaussianNoise(1.0), key=key, divergence="kl")
