"""ELBO <= importance bound <= log p~ on random linear-Gaussian models, with equality at the exact posterior."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from spread_jax import GaussianNoise, elbo, spread_elbo, spread_importance_bound

NUM_KEYS = 1000


@jax.jit
def bounds(x, a, scale, gain, shift, log_std, keys):
    """For each key the spread ELBO, importance bounds with 2 and 8 draws, the clean ELBO; and the y of the key."""
    noise = GaussianNoise(scale)
    encode = lambda y: (y @ gain[:, None] + shift, jnp.full((len(y), 1), log_std, y.dtype))
    decode = lambda z: z * a

    def one(key):
        y = noise.sample(x, key=jax.random.split(key)[0])  # what every spread objective draws first
        importance = [
            spread_importance_bound(x, encode, decode, noise, key=key, num_samples=k).bound for k in (2, 8)
        ]  # fmt: skip
        spread = spread_elbo(x, encode, decode, noise, key=key).elbo
        return jnp.stack([spread, *importance, elbo(x, encode, decode, noise, key=key).elbo])[:, 0], y[0]

    return jax.vmap(one)(keys)


@hypothesis.given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.4, 2.0))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_order_of_the_bounds(seed, scale):
    rng = np.random.default_rng(seed)
    a, x = rng.normal(size=(2, 3))
    variance = 1 / (1 + a @ a / scale**2)  # of the exact posterior of z, whose mean is gain . y
    gain, log_std = variance * a / scale**2, 0.5 * np.log(variance)
    marginal = scipy.stats.multivariate_normal(np.zeros(3), np.outer(a, a) + scale**2 * np.eye(3))
    keys = jax.random.split(jax.random.key(seed), NUM_KEYS)
    mean = lambda values: (values.mean(axis=0), 6 * values.std(axis=0) / np.sqrt(NUM_KEYS) + 1e-12)
    off = 0.5 * rng.normal(size=3), 0.3 * rng.normal(), 0.3 * rng.normal()
    with jax.enable_x64(True):
        tight, y = map(np.asarray, bounds(x[None], a, scale, gain, 0.0, log_std, keys))
        loose, _ = map(np.asarray, bounds(x[None], a, scale, gain + off[0] * variance, off[1], log_std + off[2], keys))
    exact = marginal.logpdf(y)
    # At the exact posterior each importance bound is the log-density of its y, whatever z was drawn.
    np.testing.assert_allclose(tight[:, 1], exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(tight[:, 2], exact, rtol=1e-9, atol=1e-9)
    gap, error = mean(exact - tight[:, 0])
    assert abs(gap) < error
    gap, error = mean(marginal.logpdf(x) - tight[:, 3])
    assert abs(gap) < error
    # Elsewhere the order holds on average over z; pairs share their key, hence their y.
    for better, worse in ((exact, loose[:, 2]), (loose[:, 2], loose[:, 1]), (loose[:, 1], loose[:, 0])):
        gap, error = mean(better - worse)
        assert gap > -error
    # The gap of the ELBO is the KL of the encoder's distribution from the exact posterior, averaged over y.
    encoder_mean = y @ (gain + off[0] * variance) + off[1]
    ratio = np.exp(2 * off[2])
    divergence = 0.5 * (ratio - 1 - np.log(ratio) + (encoder_mean - y @ gain) ** 2 / variance)
    gap, error = mean(exact - loose[:, 0] - divergence)
    assert abs(gap) < error
