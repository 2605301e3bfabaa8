"""y = f(x) + noise: what belongs to the base, and where the parameters of f live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import GaussianNoise, StudentTNoise, TransformedNoise, spread_elbo


def affine(params, x):
    return x @ params["w"] + params["b"]


PARAMS = {"w": jnp.array([[2.0, 1.0], [0.0, 1.0]]), "b": jnp.array([0.5, -0.5])}


@pytest.fixture
def noise():
    return TransformedNoise(GaussianNoise(0.5), jax.tree_util.Partial(affine, PARAMS))


def test_every_method_is_the_base_at_f_of_x(noise, key):
    x, y = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    base = GaussianNoise(0.5)
    fx, fy = np.asarray(affine(PARAMS, x)), np.asarray(affine(PARAMS, y))
    np.testing.assert_allclose(noise.sample(x, key=key), base.sample(fx, key=key), rtol=1e-6)
    pairs = [
        (noise.location(x), base.location(fx)),
        (noise.log_prob(y, x), base.log_prob(y, fx)),
        (noise.entropy(x), base.entropy(fx)),
        (noise.kl(x, y), base.kl(fx, fy)),
        (noise.expected_log_prob(x, y), base.expected_log_prob(fx, fy)),
        (noise.mmd_kernel(x, y), base.mmd_kernel(fx, fy)),
        (noise.pairwise_log_prob(y, x), base.pairwise_log_prob(y, fx)),
    ]
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_parameters_are_leaves_and_a_plain_function_is_static(noise):
    assert len(jax.tree.leaves(noise)) == 3
    x = jnp.ones((3, 2))
    loss = jax.jit(lambda noise: noise.log_prob(jnp.zeros((3, 2)), x).sum())
    grads = jax.grad(loss)(noise)
    # d/db sum log N(0; f(x), 1/4) = -sum f(x) / (1/4).
    np.testing.assert_allclose(grads.transform.args[0]["b"], -4 * affine(PARAMS, x).sum(axis=0), rtol=1e-6)
    plain = TransformedNoise(GaussianNoise(0.5), jnp.tanh)
    assert jax.tree.leaves(plain) == [0.5]
    traces = []
    f = jax.jit(lambda noise: traces.append(1) or noise.log_prob(x, x).sum())
    for scale in (0.5, 0.6):
        f(TransformedNoise(GaussianNoise(scale), jnp.tanh))
    assert len(traces) == 1


def test_a_closed_form_exists_only_where_the_base_has_it(noise, key):
    heavy = TransformedNoise(StudentTNoise(1.0, 3.0), jnp.tanh)
    assert hasattr(noise, "expected_log_prob")
    assert not hasattr(heavy, "expected_log_prob")
    encode = lambda y: (y, jnp.zeros_like(y))
    with pytest.raises(TypeError, match="low_variance=True needs"):
        spread_elbo(jnp.ones((2, 2)), encode, jnp.tanh, heavy, key=key, low_variance=True)


def test_bad_transforms_are_refused():
    with pytest.raises(TypeError, match="transform must be callable"):
        TransformedNoise(GaussianNoise(1.0), 3.0)
    with pytest.raises(ValueError, match="must keep the batch axis"):
        TransformedNoise(GaussianNoise(1.0), lambda x: x[:1]).location(jnp.ones((3, 2)))
