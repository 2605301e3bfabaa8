"""A noise schedule compiles once, and eager equals compiled: every method of every noise, every objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spread_jax as sj

RNG = np.random.default_rng(5)
X, Y = (jnp.asarray(a, jnp.float32) for a in RNG.normal(size=(2, 6, 3)))
FACTOR = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, size=(2, 6, 2)))
SCHEDULE = (0.9, 0.7, 0.5)
NOISES = {
    "gaussian": sj.GaussianNoise,
    "laplace": sj.LaplaceNoise,
    "logistic": sj.LogisticNoise,
    "cauchy": sj.CauchyNoise,
    "student": lambda s: sj.StudentTNoise(s, 2 + s),
    "uniform": sj.UniformNoise,
    "low_rank": lambda s: sj.LowRankGaussianNoise(s, FACTOR),
    "low_rank_volume": lambda s: sj.LowRankGaussianNoise(s, FACTOR).with_volume(s),
    "low_rank_entropy": lambda s: sj.LowRankGaussianNoise(s, FACTOR).with_entropy(5 + s),
    "transformed": lambda s: sj.TransformedNoise(sj.GaussianNoise(s), jax.tree_util.Partial(jnp.multiply, 2 - s)),
    "discrete": lambda s: sj.DiscreteNoise.uniform_mixture(3, s),
}
PAIRED = ("log_prob", "kl", "expected_log_prob", "mmd_kernel", "pairwise_log_prob")
SINGLE = ("characteristic_function", "entropy", "location")


def along_the_schedule(function):
    """function(scale) at the schedule's end, compiled; it must have been traced once."""
    traces = []

    @jax.jit
    def compiled(scale):
        traces.append(scale)
        return function(scale)

    for scale in SCHEDULE:
        value = compiled(jnp.float32(scale))
    assert len(traces) == 1
    return value


def assert_close(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", NOISES)
def test_noises(name, key):
    x, y = LABELS if name == "discrete" else (X, Y)

    def everything(scale):
        noise = NOISES[name](scale)
        results = {"sample": noise.sample(x, key=key)}
        for method in PAIRED:
            if hasattr(noise, method) and (name, method) != ("uniform", "log_prob"):
                results[method] = getattr(noise, method)(y, x)
        return results | {method: getattr(noise, method)(x) for method in SINGLE if hasattr(noise, method)}

    compiled = along_the_schedule(everything)
    assert len(compiled) >= 4
    assert_close(compiled, everything(SCHEDULE[-1]))


def networks(w):
    encode = lambda y: (jnp.tanh(y @ w), jnp.full((len(y), 2), -1.0))
    return encode, lambda z: z @ w.T


WITH_NOISE = {
    "elbo": lambda w, noise, key: sj.elbo(X, *networks(w), noise, key=key),
    "spread_elbo": lambda w, noise, key: sj.spread_elbo(X, *networks(w), noise, key=key, num_latent_samples=2),
    "low_variance": lambda w, noise, key: sj.spread_elbo(X, *networks(w), noise, key=key, low_variance=True),
    "importance": lambda w, noise, key: sj.spread_importance_bound(X, *networks(w), noise, key=key, num_samples=2),
    "gan": lambda w, noise, key: sj.spread_gan_losses(X, X @ w @ w.T, lambda y: (y @ w)[:, 0], noise, key=key),
    "divergence": lambda w, noise, key: sj.spread_divergence(X, X @ w @ w.T, noise, num_samples=7, key=key),
    "kl": lambda w, noise, key: sj.spread_kl(
        X,
        lambda num, *, key: jax.random.normal(key, (num, 2)) @ w.T,
        noise,
        num_samples=6,
        num_model_samples=9,
        key=key,
    ),
    "log_spread_density": lambda w, noise, key: sj.log_spread_density(Y, X @ w @ w.T, noise, chunk_size=4),
    "l2": lambda w, noise, key: sj.spread_l2_squared(X, X @ w @ w.T, noise),
    # The prior's samples come from the key; here the schedule is the penalty's weight.
    "wae": lambda w, noise, key: sj.wae_mmd_loss(X, lambda x: x @ w, lambda z: z @ w.T, key=key, weight=noise.scale),
    "fisher": lambda w, noise, key: sj.gaussian_fisher_information(
        lambda w: w[:, 0], lambda w: w @ w.T, w, noise=sj.GaussianNoise(noise.scale)
    ),
}


@pytest.mark.parametrize("name", WITH_NOISE)
def test_objectives_and_divergences(name, key):
    terms_at = lambda scale: WITH_NOISE[name](FACTOR, sj.LaplaceNoise(scale), key)
    assert_close(along_the_schedule(terms_at), terms_at(SCHEDULE[-1]))
