"""One key for each example: its noise follows the example, whatever else is in the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spread_jax as sj
from spread_jax import (
    GaussianNoise,
    LaplaceNoise,
    LowRankGaussianNoise,
    elbo,
    example_keys,
    spread,
    spread_elbo,
    spread_gan_losses,
    spread_importance_bound,
    wae_mmd_loss,
)

SIGMA = 0.5
W = np.array([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]])


def encode(y):
    return jnp.tanh(y @ W.T.astype(y.dtype)), jnp.full((len(y), 2), -0.3, y.dtype)


def decode(z):
    return z @ W.astype(z.dtype)


def data(num=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(num, 3)), jnp.float32)


def test_spread_elbo_against_the_formula_for_each_example(x64, key):
    """NumPy, one example at a time, with the draws that each key gives."""
    x = jnp.asarray(data(), jnp.float64)
    keys = example_keys(key, jnp.arange(4) + 10)
    terms = spread_elbo(x, encode, decode, GaussianNoise(SIGMA), key=keys, num_spread_samples=2, num_latent_samples=3)
    for i in range(4):
        spread_key, latent_key = jax.random.split(jax.random.fold_in(key, i + 10))
        y = np.asarray(x[i]) + SIGMA * np.asarray(jax.random.normal(spread_key, (2, 3), x.dtype))
        mean = np.tanh(y @ W.T)
        epsilon = np.asarray(jax.random.normal(latent_key, (6, 2), x.dtype)).reshape(2, 3, 2)
        z = mean[:, None] + math.exp(-0.3) * epsilon
        error = np.square(y[:, None] - z @ W).sum(axis=-1) / (2 * SIGMA**2)
        log_likelihood = -(error + 1.5 * math.log(2 * math.pi * SIGMA**2)).mean()
        kl = (0.5 * (np.square(mean) + math.exp(-0.6) - 1 + 0.6)).sum(axis=1).mean()
        np.testing.assert_allclose(terms.log_likelihood[i], log_likelihood, rtol=1e-12)
        np.testing.assert_allclose(terms.elbo[i], log_likelihood - kl, rtol=1e-12)


def test_bounds_follow_their_examples(key):
    """Another order, another batch size: each example keeps its number, for every kind of noise."""
    x, keys, order = data(), example_keys(key, jnp.arange(4)), np.array([2, 0, 3, 1])
    noises = GaussianNoise(SIGMA), LaplaceNoise(0.4), LowRankGaussianNoise(SIGMA, jnp.ones((3, 1)))

    @jax.jit
    def bounds(x, keys):
        found = [spread_elbo(x, encode, decode, noise, key=keys).elbo for noise in noises]
        tighter = spread_importance_bound(x, encode, decode, noises[0], key=keys, num_samples=3, num_spread_samples=2)
        return jnp.stack([*found, elbo(x, encode, decode, noises[0], key=keys).elbo, tighter.bound], axis=1)

    want = bounds(x, keys)
    np.testing.assert_allclose(bounds(x[order], keys[order]), want[order], rtol=1e-5)
    np.testing.assert_allclose(bounds(x[:1], keys[:1]), want[:1], rtol=1e-5)
    assert np.ptp(bounds(jnp.tile(x[:1], (4, 1)), keys), axis=0).min() > 1e-3  # and no two share a draw


def test_losses_of_sets_do_not_depend_on_the_order(key):
    x, keys, order = data(), example_keys(key, jnp.arange(4)), np.array([2, 0, 3, 1])
    critic = lambda y: jnp.tanh(y).sum(axis=1)
    gan = lambda x, keys: spread_gan_losses(x, x + 1, critic, GaussianNoise(SIGMA), key=keys).divergence
    wae = lambda x, keys: wae_mmd_loss(x, lambda x: encode(x)[0], decode, key=keys, weight=1.0).loss
    for loss in (gan, wae):
        np.testing.assert_allclose(loss(x[order], keys[order]), loss(x, keys), rtol=1e-5)
    assert abs(gan(x, keys[order]) - gan(x, keys)) > 1e-4


def test_keys_of_another_number_are_refused(key):
    keys = example_keys(key, jnp.arange(3))
    with pytest.raises(ValueError, match=r"one random key or one for each of the 4 examples, got shape \(3,\)"):
        spread_elbo(data(), encode, decode, GaussianNoise(SIGMA), key=keys)
    with pytest.raises(ValueError, match="one for each of the 5 examples"):
        spread_gan_losses(data(3), data(5), lambda y: y.sum(axis=1), GaussianNoise(SIGMA), key=keys)
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        example_keys(key, jnp.ones(3))
    with pytest.raises(ValueError, match=r"indices must have shape \[batch\], got \(\)"):
        example_keys(key, 3)


def test_keys_of_the_old_kind_are_those_of_the_new(key):
    """jax.random.PRNGKey gives arrays of numbers: one, or one for each example."""
    old = jax.random.key_data(key)
    bound = lambda key: elbo(data(), encode, decode, GaussianNoise(SIGMA), key=key).elbo
    np.testing.assert_array_equal(bound(old), bound(key))
    keys = example_keys(key, jnp.arange(4))
    np.testing.assert_array_equal(jax.random.key_data(example_keys(old, jnp.arange(4))), jax.random.key_data(keys))
    np.testing.assert_array_equal(bound(jax.random.key_data(keys)), bound(keys))
    draw = lambda key: LaplaceNoise(SIGMA).sample(data(), key=key)
    np.testing.assert_array_equal(draw(old), draw(key))


X, N = jnp.ones((4, 3)), GaussianNoise(1.0)
SAMPLER = lambda params, num, *, key: params + jax.random.normal(key, (num, 3))
LAW = sj.LogUniformScales(0.1, 1.0)
DRAWS = {
    "noise": lambda key: N.sample(X, key=key),
    "noise around f": lambda key: sj.TransformedNoise(LaplaceNoise(1.0), jnp.tanh).sample(X, key=key),
    "low rank": lambda key: LowRankGaussianNoise(1.0, X[:3, :1]).sample(X, key=key),
    "labels": lambda key: sj.DiscreteNoise.uniform_mixture(3, 0.5).sample(jnp.array([1]), key=key),
    "learned noise": lambda key: sj.LearnedCovariance(rank=1).init((3,), key=key),
    "keys": lambda key: example_keys(key, jnp.arange(2)),
    "divergence": lambda key: sj.spread_divergence(X, X, N, num_samples=4, key=key),
    "KL": lambda key: sj.spread_kl(
        X, lambda num, *, key: jnp.ones((num, 3)), N, num_samples=4, num_model_samples=2, key=key
    ),
    "L1": lambda key: sj.spread_l1(X, X, N, num_samples=4, key=key),
    "over scales": lambda key: sj.spread_divergence_over_scales(X, X, LAW, num_samples=4, key=key),
    "information": lambda key: sj.spread_fisher_information(
        SAMPLER, jnp.zeros(3), N, num_samples=4, num_model_samples=3, key=key
    ),
}
MANY = {
    "spread": lambda key: spread(X, N, key=key),
    "scales": lambda key: LAW.sample(X, key=key),
    "elbo": lambda key: elbo(X, encode, decode, N, key=key),
}


@pytest.mark.parametrize("name", [*DRAWS, *MANY])
def test_what_is_no_key_gets_a_sentence(name, key):
    draw = {**DRAWS, **MANY}[name]
    for wrong, got in ((0, "int"), (None, "NoneType"), (jnp.ones(2), r"float32 of shape \(2,\)"),
                       (jnp.ones(3, jnp.uint32), r"uint32 of shape \(3,\)")):  # fmt: skip
        with pytest.raises(TypeError, match=f"key must be a JAX random key, such as .*, got {got}"):
            draw(wrong)
    if name in DRAWS:
        with pytest.raises(ValueError, match=r"key must be one random key, got shape \(4,\)"):
            draw(jax.random.split(key, 4))
