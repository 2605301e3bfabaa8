"""A scale for each example: every method is that of the example's own noise; pairs of examples are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spread_jax as sj
from spread_jax import CauchyNoise, GaussianNoise, LaplaceNoise, LogisticNoise, LowRankGaussianNoise, TransformedNoise

X, Y = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
FACTOR = np.random.default_rng(1).normal(size=(3, 2, 2)).astype(np.float32)
SCALES = np.array([0.3, 0.7, 1.0, 2.0], np.float32).reshape(4, 1, 1)
MAKES = {
    "gaussian": GaussianNoise,
    "laplace": LaplaceNoise,
    "logistic": LogisticNoise,
    "cauchy": CauchyNoise,
    "student": lambda s: sj.StudentTNoise(s, 3.0 + s),  # degrees of freedom of each example too
    "uniform": sj.UniformNoise,
    "low_rank": lambda s: LowRankGaussianNoise(s, FACTOR),
    "transformed": lambda s: TransformedNoise(LaplaceNoise(s), jnp.tanh),
}
METHODS = {
    "log_prob": (Y, X),
    "kl": (X, Y),
    "expected_log_prob": (X, Y),
    "squared_hellinger": (X, Y),
    "chi_squared": (0.1 * X, 0.1 * Y),
    "entropy": (X,),
    "characteristic_function": (0.3 * X,),
}


def methods_of(noise):
    return [name for name in METHODS if hasattr(noise, name) and (type(noise), name) != (sj.UniformNoise, "log_prob")]


@pytest.mark.parametrize("name", MAKES)
def test_every_method_is_that_of_the_examples_own_noise(name, key):
    make = MAKES[name]
    names = methods_of(make(0.5))
    together = jax.jit(lambda s: {n: getattr(make(s), n)(*METHODS[n]) for n in names})(SCALES)

    def alone(scale, rows):
        noise = make(scale)
        return {n: getattr(noise, n)(*(row[None] for row in rows[n]))[0] for n in names}

    want = jax.jit(jax.vmap(alone))(SCALES.reshape(4), {n: METHODS[n] for n in names})
    assert len(names) >= 2
    for n in names:
        np.testing.assert_allclose(together[n], want[n], rtol=3e-5, atol=1e-6, err_msg=n)
    # A sample moves by its own scale: y - f(x) is that of a unit scale, times it.
    if name not in ("low_rank", "student"):
        unit = make(1.0).sample(X, key=key) - make(1.0).location(X)
        np.testing.assert_allclose(
            make(SCALES).sample(X, key=key), make(1.0).location(X) + SCALES * unit, rtol=1e-5, atol=1e-5
        )


def test_samples_of_low_rank_noise_have_each_examples_variance(key):
    x = jnp.zeros((20_000, 2))
    scales = jnp.where(jnp.arange(len(x)) % 2 == 0, 0.5, 2.0)[:, None]
    y = LowRankGaussianNoise(scales, jnp.array([[1.0], [0.0]])).sample(x, key=key)
    for start, scale in ((0, 0.5), (1, 2.0)):
        want = np.array([scale**2 + 1, scale**2])
        np.testing.assert_allclose(y[start::2].var(axis=0), want, atol=6 * want.max() * np.sqrt(2 / 10_000))


@pytest.mark.parametrize("name", MAKES)
def test_the_wrong_number_of_scales_and_pairs_are_refused(name, key):
    make = MAKES[name]
    for scales in (SCALES[:3], SCALES[:1]):
        with pytest.raises(ValueError, match=r"must be a number .*, or have one for each example, \(4, 1,"):
            make(scales).sample(X, key=key)
    for method in ("mmd_kernel", "pairwise_log_prob", "standardise", "log_mmd_kernel"):
        if hasattr(make(0.5), method):
            with pytest.raises(ValueError, match=r"numbers for each example have no matrix of pairs, so use jax.vmap"):
                getattr(make(SCALES), method)(X, X)
    with pytest.raises(ValueError, match="scale must be one number for each example beside a factor"):
        LowRankGaussianNoise(SCALES * jnp.ones((3, 2)), FACTOR).log_prob(Y, X)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "low_rank", "transformed"])
@pytest.mark.parametrize("keys_per_example", [False, True])
def test_bounds_and_draws_follow_their_examples(name, keys_per_example, key):
    """The bound of an example is that of its own noise, whatever the others' and however many draws."""
    make = MAKES[name]
    keys = sj.example_keys(key, jnp.arange(4)) if keys_per_example else key
    flat = lambda y: y.reshape(len(y), -1)
    encode = lambda y: (flat(y)[:, :2], jnp.zeros((len(y), 2)))
    decode = lambda z: jnp.tile(z, (1, 3)).reshape(-1, 3, 2)

    @functools.partial(jax.jit, static_argnames="bound")
    def terms(scale, bound):
        if bound == "elbo":
            return sj.spread_elbo(X, encode, decode, make(scale), key=keys, num_spread_samples=2, num_latent_samples=3)
        return sj.spread_importance_bound(X, encode, decode, make(scale), key=keys, num_samples=3, num_spread_samples=2)

    for bound in ("elbo", "importance"):
        mixed, low, high = (terms(scale, bound) for scale in (SCALES, np.float32(0.3), np.float32(2.0)))
        for got, first, last in zip(mixed, low, high, strict=True):
            np.testing.assert_allclose(got[0], first[0], rtol=2e-5)
            np.testing.assert_allclose(got[3], last[3], rtol=2e-5)
            assert not np.allclose(got[1], first[1], rtol=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "low_rank", "transformed"])
def test_a_mixture_is_that_of_each_examples_scale(name, dtype):
    x, y, scales, factor = (jnp.asarray(a, dtype) for a in (X, Y, SCALES, FACTOR))
    weights = jnp.log(jnp.arange(1.0, 5.0, dtype=dtype))
    make = MAKES[name] if name != "low_rank" else lambda s: LowRankGaussianNoise(s, factor)
    density = lambda y, s: sj.log_spread_density(y, x, make(s), log_weights=weights)
    each = lambda y, s: jax.vmap(lambda y, s: density(y[None], s)[0])(y, s.reshape(4))

    @jax.jit
    def both(s):
        slopes = [jax.grad(lambda s, f=f: f(y, s).sum())(s) for f in (density, each)]
        return density(y, s), each(y, s), *slopes

    got, want, slope, want_slope = both(scales)
    rtol = 3e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(got, want, rtol=rtol)
    np.testing.assert_allclose(slope, want_slope, rtol=20 * rtol)


def test_diagnostics_of_a_learned_covariance_are_means_over_examples(key):
    model = sj.LearnedCovariance(rank=2)
    params, state = model.init((3, 2), key=key)
    ratio = lambda s: model.diagnostics(model.noise(params, state, s), (3, 2))["noise_entropy_ratio"]
    np.testing.assert_allclose(ratio(SCALES), np.mean([ratio(s) for s in SCALES.reshape(4)]), rtol=1e-5)


def test_spread_puts_the_draws_of_an_example_together(key):
    noise = GaussianNoise(SCALES)
    one = sj.spread(X, noise, key=key, num_samples=2)
    assert one.shape == (8, 3, 2)
    keys = sj.example_keys(key, jnp.arange(4))
    each = sj.spread(X, noise, key=keys, num_samples=2)
    again = sj.spread(X[2:], GaussianNoise(SCALES[2:]), key=keys[2:], num_samples=2)
    np.testing.assert_allclose(each[4:], again, rtol=1e-6)
    far = np.abs(np.asarray(one - np.repeat(X, 2, axis=0))).reshape(4, -1).mean(axis=1)
    assert far[0] < far[3] / 3
    for bad, error, message in (
        (lambda: sj.spread(X, 0.5, key=key), TypeError, "noise must be a spread noise"),
        (lambda: sj.spread(X, noise, key=0), TypeError, "key must be a JAX random key, .* got int"),
        (lambda: sj.spread(X, noise, key=keys[:3]), ValueError, "one for each of the 4 examples"),
        (lambda: sj.spread(X, noise, key=key, num_samples=0), ValueError, "num_samples must be at least 1"),
        (lambda: sj.spread(1.0, noise, key=key), ValueError, "x must have shape"),
    ):
        with pytest.raises(error, match=message):
            bad()
    legacy = jax.random.PRNGKey(20)
    np.testing.assert_array_equal(sj.spread(X, noise, key=legacy), sj.spread(X, noise, key=jax.random.key(20)))
    assert sj.spread(X, noise, key=jax.random.split(legacy, 4)).shape == X.shape
