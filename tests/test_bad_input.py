"""What each public function says to input that it cannot use, where the test of its own module does not ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spread_jax as sj
from spread_jax import GaussianKernel, GaussianNoise, LowRankGaussianNoise, MixtureKernel, TransformedNoise

KEY = jax.random.key(0)
N = GaussianNoise(1.0)
X = jnp.ones((3, 2))
INTEGERS, EMPTY, NAN = X.astype(int), X[:0], X.at[0, 0].set(jnp.nan)
INFINITE = X.at[2, 1].set(jnp.inf)
LABELS = sj.DiscreteNoise.uniform_mixture(3, 0.5)
LOW_RANK = LowRankGaussianNoise(1.0, jnp.ones((2, 1)))
MEAN, COV = jnp.ones(2), jnp.eye(2)

encode = lambda y: (y, jnp.zeros_like(y))
identity = lambda x: x
critic = lambda y: y[:, 0]
sampler = lambda num, *, key: jnp.ones((num, 2))

DELTAS = ("spread_kl_deltas", "spread_hellinger_deltas", "spread_chi_squared_deltas", "spread_total_variation_deltas")
SCALED = {  # constructors by the name of their number
    "scale": (GaussianNoise, sj.LaplaceNoise, sj.LogisticNoise, sj.CauchyNoise, sj.UniformNoise,
              lambda s: sj.StudentTNoise(s, 3.0), lambda s: LowRankGaussianNoise(s, jnp.ones((2, 1)))),
    "degrees_of_freedom": (lambda v: sj.StudentTNoise(1.0, v),),
    "bandwidth": (GaussianKernel, sj.LaplaceKernel),
    "c": (sj.InverseMultiquadricKernel,),
    "weights": (lambda w: MixtureKernel([GaussianKernel(1.0)], [w]),),
    "volume": (LOW_RANK.with_volume,),
    "num_examples": (lambda n: sj.mle_covariance(COV, n),),
}  # fmt: skip
WRONG_NUMBERS = [
    (0.0, ValueError, "must be positive and finite, got 0.0"),
    (-1, ValueError, "must be positive and finite, got -1.0"),
    (np.array([1.0, np.nan]), ValueError, "must be positive and finite, got an array"),
    (None, TypeError, "must be a number or an array, got NoneType"),
    ("1", TypeError, "must be a number or an array, got str"),
    ([1.0, 2.0], TypeError, "must be a number or an array, got list; make an array of it first"),
    (1j, TypeError, "must be a number or an array, got complex"),
    (np.array([True]), TypeError, "must be a real number, got bool"),
]


def refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(("value", "error", "message"), WRONG_NUMBERS)
def test_numbers_that_must_be_positive(name, value, error, message):
    for make in SCALED[name]:
        refuses(lambda make=make: make(value), error, f"{name} {message}")


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize(
    ("mu_p", "mu_q", "error", "message"),
    [
        (INTEGERS, X, TypeError, "mu_p must have a floating-point dtype, got int32"),
        (X, INTEGERS, TypeError, "mu_q must have a floating-point dtype, got int32"),
        (None, X, TypeError, "mu_p must be a floating-point array, got NoneType"),
        (X, "x", TypeError, "mu_q must be a floating-point array, got str"),
        (X, X[:1], ValueError, r"mu_p and mu_q must have the same shape .*, got \(3, 2\) and \(1, 2\)"),
        (jnp.float32(1), jnp.float32(1), ValueError, r"mu_p must have shape \[batch, \*event\], got a scalar"),
    ],
)
def test_deltas(name, mu_p, mu_q, error, message):
    refuses(lambda: getattr(sj, name)(mu_p, mu_q, N), error, message)


@pytest.mark.parametrize("name", DELTAS)
def test_deltas_that_are_not_finite_give_nan_and_no_deltas_give_none(name):
    function = getattr(sj, name)
    assert np.isnan(function(NAN, X, N)[0])
    np.testing.assert_array_equal(function(NAN, X, N)[1:], [0, 0])
    assert function(EMPTY, EMPTY, N).shape == (0,)


NOISES = [GaussianNoise(1.0), sj.LaplaceNoise(1.0), sj.LogisticNoise(1.0), sj.CauchyNoise(1.0), LOW_RANK,
          sj.StudentTNoise(1.0, 3.0), TransformedNoise(N, identity)]  # fmt: skip


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_noises(noise):
    for name, first, second in (("log_prob", "y", "x"), ("kl", "x", "x2"), ("expected_log_prob", "x", "x2")):
        if hasattr(noise, name):
            call = lambda n=name: getattr(noise, n)(X, X[:1])
            refuses(call, ValueError, f"{first} and {second} must have the same shape")
    for name in ("mmd_kernel", "pairwise_log_prob"):
        if hasattr(noise, name):
            call = lambda n=name: getattr(noise, n)(X, X[:, :1])
            refuses(call, ValueError, "must share their event shape|for events of shape")
    for name in ("characteristic_function", "entropy"):
        if hasattr(noise, name):
            argument = "omega" if name == "characteristic_function" else "x"
            refuses(lambda n=name: getattr(noise, n)(INTEGERS), TypeError, f"{argument} must have a floating-point")
    refuses(lambda: noise.sample(None, key=KEY), TypeError, "x must be a floating-point array, got NoneType")
    refuses(lambda: noise.sample(X), TypeError, "key")
    # An empty batch is one: samples and densities of it are empty.
    assert noise.sample(EMPTY, key=KEY).shape == (0, 2)
    assert noise.log_prob(EMPTY, EMPTY).shape == (0,)


def test_labels():
    refuses(
        lambda: LABELS.log_prob(jnp.array([3]), jnp.array([0])),
        ValueError,
        r"y must hold labels 0 \.\. 2, got labels from 3",
    )
    refuses(lambda: LABELS.sample(jnp.array([-1]), key=KEY), ValueError, r"x must hold labels 0 \.\. 2")
    refuses(lambda: LABELS.kl(jnp.array([0]), jnp.array([0, 1])), ValueError, "x and x2 must have the same shape")
    refuses(lambda: LABELS.spread(jnp.ones(2)), ValueError, "probabilities must have 3 entries")
    refuses(lambda: sj.DiscreteNoise.uniform_mixture(0, 0.5), ValueError, "num_labels must be at least 1")
    refuses(lambda: sj.DiscreteNoise.uniform_mixture(2, 1.0), ValueError, "rate must be below 1")
    refuses(lambda: sj.DiscreteNoise.uniform_mixture(2, 0.0), ValueError, "rate must be positive")
    refuses(lambda: sj.DiscreteNoise(jnp.full((2, 2), jnp.nan)), ValueError, "matrix must have non-negative entries")
    # Indexing alone would clamp a traced label, or count it from the end.
    traced = jax.jit(lambda y, x: (LABELS.log_prob(y, x), LABELS.kl(y, x), LABELS.mmd_kernel(y, x)))
    log_prob, kl, kernel = traced(jnp.array([0, 3, -1]), jnp.array([1, 1, 1]))
    np.testing.assert_array_equal(np.isnan(log_prob), [False, True, True])
    np.testing.assert_array_equal(np.isnan(kl), [False, True, True])
    np.testing.assert_array_equal(np.isnan(kernel).any(axis=1), [False, True, True])
    labels = jnp.array([0, 1])
    assert jax.jit(lambda: LABELS.log_prob(labels, labels))().shape == (2,)  # concrete labels inside of jit


def objective_calls():
    """(call with x, encode, decode and noise replaced) for each objective that takes them."""
    return {
        "elbo": lambda x=X, e=encode, d=identity, noise=N: sj.elbo(x, e, d, noise, key=KEY),
        "spread_elbo": lambda x=X, e=encode, d=identity, noise=N: sj.spread_elbo(x, e, d, noise, key=KEY),
        "spread_importance_bound": lambda x=X, e=encode, d=identity, noise=N: sj.spread_importance_bound(
            x, e, d, noise, key=KEY, num_samples=2
        ),
        "wae_mmd_loss": lambda x=X, e=identity, d=identity, noise=N: sj.wae_mmd_loss(x, e, d, key=KEY, weight=1.0),
    }


@pytest.mark.parametrize("name", objective_calls())
def test_objectives(name):
    call = objective_calls()[name]
    refuses(lambda: call(x=INTEGERS), TypeError, "x must have a floating-point dtype, got int32")
    refuses(lambda: call(x=EMPTY), ValueError, r"x must hold at least one example, got shape \(0, 2\)")
    refuses(lambda: call(e=None), TypeError, "encode must be callable, got NoneType")
    refuses(lambda: call(d=3), TypeError, "decode must be callable, got int")
    if name != "wae_mmd_loss":
        refuses(lambda: call(noise=0.5), TypeError, "noise must be a spread noise, .* got float")
        refuses(lambda: call(noise=sj.UniformNoise(1.0)), TypeError, "bounded support")
        # Losses of bad data are reported by training, not hidden: NaN, for that example only.
        np.testing.assert_array_equal(np.isnan(call(x=NAN)[0]), [True, False, False])


KL_OPTIONS = {"num_samples": 3, "num_model_samples": 2, "key": KEY}
ESTIMATE = {"num_samples": 3, "key": KEY}
WAE = {"key": KEY, "weight": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sj.wae_mmd_loss(X, encode, identity, **WAE), ValueError, "encode must return one array z"),
        (lambda: sj.wae_mmd_loss(X, identity, identity, key=KEY, weight=-1.0), ValueError, "weight must be at least 0"),
        (lambda: sj.wae_mmd_loss(NAN, identity, identity, **WAE), ValueError, "x must be finite"),
        (lambda: sj.wae_mmd_loss(X, identity, identity, **WAE, kernel=3), TypeError, "kernel must be callable"),
        (lambda: sj.spread_gan_losses(X, X, None, N, key=KEY), TypeError, "critic must be callable"),
        (lambda: sj.spread_gan_losses(X, X, critic, None, key=KEY), TypeError, "noise must be a spread noise"),
        (lambda: sj.spread_gan_losses(X, INFINITE, critic, N, key=KEY), ValueError, "generated must be finite"),
        (lambda: sj.spread_gan_losses(EMPTY, X, critic, N, key=KEY), ValueError, "x must hold at least one sample"),
        (lambda: sj.spread_divergence(X, X, None, **ESTIMATE), TypeError, "noise must be a spread noise"),
        (lambda: sj.spread_divergence(X, INFINITE, N, **ESTIMATE), ValueError, "q_samples must be finite"),
        (lambda: sj.spread_divergence(INTEGERS, X, N, **ESTIMATE), TypeError, "p_samples must have a floating"),
        (lambda: sj.spread_divergence(X, X, N, num_samples=0, key=KEY), ValueError, "num_samples must be at least 1"),
        (lambda: sj.spread_divergence(X, X, N, num_samples=3), TypeError, "key"),
        (lambda: sj.spread_kl(X, X, N, **KL_OPTIONS), TypeError, "sampler must be callable"),
        (lambda: sj.spread_kl(X, sampler, 1.0, **KL_OPTIONS), TypeError, "noise must be a spread noise"),
        (lambda: sj.spread_kl(NAN, sampler, N, **KL_OPTIONS), ValueError, "p_samples must be finite"),
        (
            lambda: sj.spread_kl(X[:, :1], sampler, N, **KL_OPTIONS),
            ValueError,
            r"p_samples and sampler\(num, key=key\) must share their event shape, got \(1,\) and \(2,\)",
        ),
        (lambda: sj.spread_l1(X, EMPTY, N, **ESTIMATE), ValueError, "q_samples must hold at least one sample"),
        (lambda: sj.spread_l2_squared(X, NAN, N), ValueError, "q_samples must be finite"),
        (lambda: sj.spread_l2_squared(X, X[:, :1], N), ValueError, "p_samples and q_samples must share"),
        (lambda: sj.spread_l2_squared(X, X, None), TypeError, "noise NoneType has no closed-form mmd_kernel"),
        (lambda: sj.mmd_squared(NAN, X, GaussianKernel(1.0)), ValueError, "x must be finite"),
        (lambda: sj.mmd_squared(X, X, GaussianKernel(1.0), chunk_size=0), ValueError, "chunk_size must be at least 1"),
        (lambda: GaussianKernel(1.0)(X, X[:, :1]), ValueError, "x and x2 must share their event shape"),
        (lambda: sj.LaplaceKernel(1.0)(INTEGERS, X), TypeError, "x must have a floating-point dtype"),
        (lambda: sj.InverseMultiquadricKernel(1.0)(X, X[:, :1]), ValueError, "x and x2 must share"),
        (lambda: MixtureKernel([]), ValueError, "kernels must hold at least one kernel"),
        (lambda: MixtureKernel([1.0]), TypeError, "kernels must be callable, got float"),
        (lambda: sj.log_spread_density(X, X, None), TypeError, "noise must be a spread noise"),
        (lambda: sj.log_spread_density(X, INFINITE, N), ValueError, "atoms must be finite"),
        (lambda: sj.log_spread_density(X, X, N, log_weights=jnp.full(3, -jnp.inf)), ValueError, "log_weights must"),
        (lambda: sj.log_spread_density(X, X, N, log_weights=NAN[:, 0]), ValueError, "log_weights must hold"),
        (lambda: sj.log_spread_density(X, X, N, log_weights=INTEGERS[:, 0]), TypeError, "log_weights must have"),
        (lambda: sj.spread_kl_gaussians(X, COV, MEAN, COV, N), ValueError, r"mean_p must have shape \[X\]"),
        (lambda: sj.spread_kl_gaussians(MEAN, jnp.eye(3), MEAN, COV, N), ValueError, r"cov_p must have shape \(2, 2\)"),
        (lambda: sj.spread_hellinger_gaussians(MEAN.astype(int), COV, MEAN, COV, N), TypeError, "mean_p must have a"),
        (lambda: sj.spread_hellinger_gaussians(MEAN, COV, MEAN, COV, sj.LaplaceNoise(1.0)), TypeError, "noise must be"),
        (lambda: sj.spread_kl_gaussians(MEAN, COV, MEAN, COV, GaussianNoise(jnp.ones(3))), ValueError, "scale must be"),
        (
            lambda: sj.spread_kl_gaussians(MEAN, COV, MEAN, COV, LowRankGaussianNoise(1.0, jnp.ones((3, 1)))),
            ValueError,
            r"factor must have shape .* for events of shape \(2,\), got \(3, 1\)",
        ),
        (lambda: LowRankGaussianNoise(1.0, None), TypeError, r"factor must be an array of shape \[\*event, R\]"),
        (lambda: LowRankGaussianNoise(1.0, NAN), ValueError, "factor must be finite"),
        (lambda: LowRankGaussianNoise(1.0, 0 * X).with_volume(), ValueError, "factor must have independent columns"),
        (lambda: TransformedNoise(1.0, identity), TypeError, "base must be a spread noise"),
        (lambda: TransformedNoise(N, 1.0), TypeError, "transform must be callable"),
        (lambda: TransformedNoise(N, lambda x: x[:1]).location(X), ValueError, "transform must keep the batch axis"),
        (lambda: TransformedNoise(N, lambda x: 1).location(X), TypeError, r"transform\(x\) must have a floating-point"),
        (lambda: sj.f_divergence(lambda u: jnp.nan * u), ValueError, r"f\(1\) must be 0, got nan"),
        (lambda: sj.kl.between(jnp.float32(0), jnp.float32(0)), ValueError, r"one shape \[..., n\]"),
    ],
)  # fmt: skip
def test_the_message_names_the_argument(call, error, message):
    refuses(call, error, message)


def test_a_batch_that_is_traced_is_checked_for_shape_and_dtype_only():
    with pytest.raises(TypeError, match="x must have a floating-point dtype"):
        jax.eval_shape(lambda x: sj.elbo(x, encode, identity, N, key=KEY), INTEGERS)
    traced = jax.jit(lambda p: sj.mmd_squared(p, X, GaussianKernel(1.0)))
    assert np.isnan(traced(NAN))
    weights = jnp.zeros(3)  # concrete, inside of jit
    assert jax.jit(lambda: sj.log_spread_density(X, X, N, log_weights=weights))().shape == (3,)
