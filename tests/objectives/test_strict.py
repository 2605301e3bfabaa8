"""Everything traces under JAX's strictest promotion of ranks and dtypes, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spread_jax as sj

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(a, jnp.float32) for a in RNG.normal(size=(2, 4, 3)))
MANY = jnp.asarray(RNG.normal(size=(1300, 9)), jnp.float32)
FACTOR = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
SCALES = {"one": 0.5, "each dimension": jnp.full(3, 0.5), "each example": jnp.full((4, 1), 0.5)}
NOISES = {
    "gaussian": sj.GaussianNoise,
    "laplace": sj.LaplaceNoise,
    "logistic": sj.LogisticNoise,
    "cauchy": sj.CauchyNoise,
    "student": lambda s: sj.StudentTNoise(s, 3.0),
    "uniform": sj.UniformNoise,
    "low_rank": lambda s: sj.LowRankGaussianNoise(s, FACTOR),
    "transformed": lambda s: sj.TransformedNoise(sj.LaplaceNoise(s), jnp.tanh),
}
COV = 0.3 * jnp.eye(3)
KEY = jax.random.key(0)
KEYS = sj.example_keys(KEY, jnp.arange(4))

encode = lambda y: (y[:, :2], jnp.tanh(y[:, :2]))
decode = lambda z: jnp.concatenate([z, z[:, :1]], axis=1)
critic = lambda y, sigma: y.sum(axis=1) / sigma


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def traces(function, *args):
    """Values and the gradient to the first argument."""
    jax.eval_shape(lambda *args: jax.vjp(function, *args)[0], *args)


@pytest.mark.parametrize("shape", SCALES)
@pytest.mark.parametrize("name", NOISES)
def test_noises(name, shape):
    noise = NOISES[name](SCALES[shape])
    pairs = () if shape == "each example" else ("mmd_kernel", "log_mmd_kernel", "pairwise_log_prob", "standardise")
    shifts = ("log_prob", "kl", "expected_log_prob", "squared_hellinger", "chi_squared")
    for method in (*shifts, *pairs):
        if hasattr(noise, method) and (name, method) != ("uniform", "log_prob"):
            traces(getattr(noise, method), Y, X)
    for method in ("entropy", "characteristic_function"):
        if hasattr(noise, method):
            traces(getattr(noise, method), X)
    traces(lambda x: noise.sample(x, key=KEY), X)
    if name in ("gaussian", "low_rank", "transformed"):
        traces(lambda y, x: sj.log_spread_density(y, x, noise), Y, X)
        for key in (KEY, KEYS):
            counts = {"num_spread_samples": 2, "key": key}
            traces(lambda x, o=counts: sj.spread_elbo(x, encode, decode, noise, num_latent_samples=2, **o).elbo, X)
            traces(lambda x, o=counts: sj.spread_importance_bound(x, encode, decode, noise, num_samples=2, **o), X)
            traces(lambda x, k=key: sj.spread_gan_losses(x, Y, lambda y: y[:, 0], noise, key=k), X)
        if pairs:
            traces(lambda x: sj.spread_divergence(x, Y, noise, num_samples=8, key=KEY).value, X)
            if hasattr(noise, "mmd_kernel"):
                traces(lambda x: sj.spread_l2_squared(x, Y, noise), X)


@pytest.mark.parametrize("noise", [sj.GaussianNoise(0.5), sj.LaplaceNoise(0.5)], ids=["gaussian", "laplace"])
def test_many_atoms(noise):
    traces(lambda atoms: sj.log_spread_density(atoms[:20], atoms, noise), MANY)


@pytest.mark.parametrize("noise", [NOISES["gaussian"](0.5), NOISES["low_rank"](0.5)], ids=["gaussian", "low_rank"])
def test_gaussians_and_information(noise):
    for function in (sj.spread_kl_gaussians, sj.spread_hellinger_gaussians):
        traces(lambda mean, f=function: f(mean, COV, Y[0], 2 * COV, noise), X[0])
    traces(lambda a: sj.gaussian_fisher_information(lambda a: a, lambda a: jnp.outer(a, a), a, noise=noise), X[0])
    log_density = lambda mean, x: -0.5 * jnp.square(x - mean[None]).sum(axis=1)
    for function in (sj.fisher_information, sj.sandwich_covariance):
        traces(lambda x, f=function: f(log_density, X[0], x, chunk_size=3), X)
    sampler = lambda mean, num, *, key: mean[None] + jax.random.normal(key, (num, 3))
    options = {"num_samples": 4, "num_model_samples": 3, "key": KEY}
    traces(lambda mean: sj.spread_fisher_information(sampler, mean, noise, **options), X[0])


@pytest.mark.parametrize(
    "law",
    [
        sj.LogUniformScales(0.1, 1.0),
        sj.GridScales(0.5),
        sj.GridScales(jnp.array([0.1, 0.5])),
        sj.SampledScales(
            lambda key, shape, dtype: 0.1 + 0.9 * jax.random.uniform(key, shape, dtype), jnp.zeros_like, 0.1, 1.0
        ),
    ],
)
def test_scales(law):
    denoise, weight = sj.preconditioned(lambda u, sigma: u, data_scale=0.5, data_mean=0.5)
    for key in (KEY, KEYS):
        options = {"key": key, "weight": jnp.square}
        traces(lambda g, o=options: sj.density_ratio_losses(X, g, critic, law, **o), Y)
        traces(lambda g, o=options: sj.score_difference_loss(g, denoise, denoise, law, **o), Y)
        traces(lambda x, k=key: sj.denoising_loss(x, denoise, law, key=k, weight=weight), X)
    traces(lambda x: sj.divergence_over_scales(lambda s: sj.spread_kl_deltas(x, Y, sj.GaussianNoise(s)), law), X)
    traces(lambda x: sj.spread_divergence_over_scales(x, Y, law, num_samples=4, key=KEY).value, X)
    traces(law.log_prob, jnp.full((4, 1), 0.5))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sums_in_no_narrower_a_dtype_than_float32(dtype):
    """Nothing is promoted where the numbers are as wide already, or wider."""
    with jax.enable_x64(True):
        x, factor = X.astype(dtype), FACTOR.astype(dtype)
        low_rank = sj.LowRankGaussianNoise(0.5, factor)
        traces(lambda x: low_rank.log_prob(x, x), x)
        traces(lambda x: sj.log_spread_density(x, x, low_rank), x)
        traces(lambda mean: sj.spread_kl_gaussians(mean, COV.astype(dtype), x[1], COV.astype(dtype), low_rank), x[0])


def test_the_rest():
    for kernel in (sj.GaussianKernel(1.0), sj.LaplaceKernel(1.0), sj.InverseMultiquadricKernel(1.0)):
        traces(lambda x, k=kernel: sj.mmd_squared(x, Y, k), X)
    traces(lambda x: sj.wae_mmd_loss(x, lambda x: x[:, :2], decode, key=KEY, weight=1.0), X)
    labels, noise = jnp.array([0, 1, 2]), sj.DiscreteNoise.uniform_mixture(3, 0.5)
    for method in ("log_prob", "kl", "expected_log_prob", "mmd_kernel"):
        jax.eval_shape(getattr(noise, method), labels, labels)
    for divergence in (sj.kl, sj.jensen_shannon, sj.f_divergence(lambda u: (u - 1) ** 2 / (u + 1))):
        for method in ("from_p", "from_q", "from_mixture", "activation", "conjugate_of_activation"):
            traces(getattr(divergence, method), X[0])
        traces(divergence.between, X, X)
    model = sj.LearnedCovariance(rank=2)
    params, state = model.init((3,), key=KEY)
    for scale in SCALES.values():
        if jnp.ndim(scale) != 1:
            traces(lambda p, s=scale: model.diagnostics(model.noise(p, state, s), (3,)), params)
    traces(lambda f: sj.LowRankGaussianNoise(0.5, f).with_entropy(5.0).factor, FACTOR)
