"""ICA by the sampling methods, on a mesh, and what cannot work; the closed form has a file of its own."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear import _iterative, ica
from spread_jax.linear.sources import BernoulliGaussSource, LaplaceSource, StudentTSource
from tests.linear._data import direction_error, laplace_data, on_device


def test_natural_gradient_agrees_with_the_closed_form_and_keeps_the_best_of_two_starts():
    x, truth = on_device(laplace_data(6, 2000, 5, 3))
    key = jax.random.key(0)
    exact = ica.fit(np.asarray(x), 3, source="laplace", key=key)
    sampled = ica.fit(x, 3, method="natural_gradient", num_restarts=2, key=key)
    assert bool(sampled.converged)
    assert direction_error(sampled.mixing, truth) < 1.15 * direction_error(exact.mixing, truth) + 0.002
    assert bool(jnp.isnan(sampled.leakage).all())


def test_a_plateau_is_not_called_converged():
    x, truth = on_device(laplace_data(7, 2000, 6, 3))
    x = x + 0.8 * jax.random.normal(jax.random.key(9), x.shape)
    turn = np.eye(3)
    turn[:2, :2] = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)  # two columns mixed alike: here the gradient is zero too
    settled = jax.jit(functools.partial(
        _iterative.residual_of, jnp.zeros((3, 3)), x=x, noise_scale=0.0, observation_scale=0.8, source=LaplaceSource(),
        key=jax.random.key(0), tolerance=0.25,
    ))  # fmt: skip
    assert float(settled(mixing=jnp.asarray(truth, jnp.float32))[0]) < 0.25
    assert float(settled(mixing=jnp.asarray(truth @ turn, jnp.float32))[0]) > 2


def test_standard_em_freezes_says_so_and_spreading_frees_it_also_from_plateaus():
    x, truth = on_device(laplace_data(1, 1000, 6, 3))
    x = x + 0.1 * jax.random.normal(jax.random.key(9), x.shape)
    options = {"num_samples": 64, "observation_scale": 0.1, "tolerance": 0.5, "max_iterations": 500}
    for seed in range(4):  # by the gradient alone, three of these stop after 50 sweeps with errors of 0.4 to 0.7
        result = ica.fit(x, 3, method="spread_em", key=jax.random.key(seed), **options)
        assert bool(result.converged)
        assert direction_error(result.mixing, truth) < 0.2
    options |= {"observation_scale": 0.01, "max_iterations": 100}
    frozen = ica.fit(x, 3, method="em", key=jax.random.key(1), **options)
    assert direction_error(frozen.mixing, truth) > 3 * direction_error(result.mixing, truth)
    assert not bool(frozen.converged)
    assert float(frozen.residual) > 2


@pytest.mark.slow
def test_derivatives_to_the_data_are_those_that_fit_promises():
    x, _ = on_device(laplace_data(3, 200, 2, 2))
    options = {"num_samples": 2, "max_iterations": 4, "key": jax.random.key(0)}
    size = lambda x, **options: jnp.square(ica.fit(x, 2, **options).mixing).sum()
    of_scale = lambda s, method: size(s * x, method=method, **options)
    for method in ("closed_form", "natural_gradient", "spread_em"):
        # A is as long as the data are, whatever the method has found so far; EM's noise follows A.
        value, slope = jax.jvp(lambda s, m=method: of_scale(s, m), (jnp.float32(1),), (jnp.float32(1),))
        np.testing.assert_allclose(slope, 2 * value, rtol=2e-3)
    value, slope = jax.value_and_grad(lambda s: of_scale(s, "natural_gradient"))(jnp.float32(1))
    np.testing.assert_allclose(slope, 2 * value, rtol=2e-3)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda s: of_scale(s, "closed_form"))(jnp.float32(1))


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_same_estimate():
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from spread_jax.linear import ica
assert jax.device_count() == 4
z = jax.random.laplace(jax.random.key(0), (4096, 3)) / 2**0.5
x = z @ jax.random.normal(jax.random.key(1), (5, 3)).T
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
for method in ("closed_form", "natural_gradient"):
    tolerance = 1e-3 if method == "closed_form" else None  # to the end, on one device and on four
    options = {"method": method, "max_iterations": 40, "tolerance": tolerance, "key": jax.random.key(2)}
    alone, together = ica.fit(x, 3, **options), ica.fit(shared, 3, **options)
    np.testing.assert_allclose(together.mixing, alone.mixing, atol=2e-4)
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What cannot work


X = np.asarray(laplace_data(0, 50, 4, 3)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: ica.fit(X.astype(int), 3, key=k), TypeError, "x must have a floating-point dtype"),
        (lambda k: ica.fit(X[:, 0], 1, key=k), ValueError, r"x must have shape \[N, X\]"),
        (lambda k: ica.fit(np.where(X > 1, np.nan, X), 3, key=k), ValueError, "x must be finite"),
        (lambda k: ica.fit(X, 4, key=k), ValueError, "rank of x, which is 3, got 4"),
        (lambda k: ica.fit(X[:3], 3, key=k), ValueError, "x must have more than 3 rows to fit 3 sources, got 3"),
        (lambda k: ica.fit(X, 5, method="closed_form", key=k), ValueError, "num_sources must be at most 4"),
        (lambda k: ica.fit(X, 3, method="fast", key=k), ValueError, "method must be one of 'auto'"),
        (lambda k: ica.fit(X, 3, method="em", key=k), ValueError, "observation_scale must be positive"),
        (lambda k: ica.fit(X, 3, noise_scale=-1.0, key=k), ValueError, "noise_scale must be positive"),
        (lambda k: ica.fit(X, 3, noise_scale=0.0, key=k), ValueError, "noise_scale must be positive"),
        (
            lambda k: ica.fit(X, 3, method="gibbs", noise_scale=-1.0, key=k),
            ValueError,
            "noise_scale must be at least 0",
        ),
        (lambda k: ica.fit(X, 3, method="natural_gradient", noise_scale=0.0, key=k), ValueError, "must not both be 0"),
        (
            lambda k: ica.fit(X, 3, observation_scale=np.nan, key=k),
            ValueError,
            "observation_scale must be at least 0",
        ),
        (
            lambda k: ica.fit(X, 3, observation_scale=jnp.float32(-1), key=k),
            ValueError,
            "at least 0 and finite, got -1.0",
        ),
        (lambda k: ica.fit(X, 3, method="em", observation_scale=jnp.float32(0), key=k), ValueError, "must be positive"),
        (
            lambda k: ica.em_step(jnp.ones((4, 2)), X, noise_scale=jnp.zeros(()), key=k),
            ValueError,
            "must not both be 0",
        ),
        (lambda _: StudentTSource(jnp.float32(2)), ValueError, "df must be finite and above 2"),
        (lambda _: BernoulliGaussSource(jnp.float32(1)), ValueError, "probability must lie between 0 and 1"),
        (lambda _: BernoulliGaussSource(0.1, jnp.float32(1)), ValueError, "spike_scale must be below 1"),
        (lambda _: ica.fit(X, 3, key=0), TypeError, "key must be a JAX random key, such as .*, got int"),
        (lambda k: ica.fit(X, 3, max_iterations=0, key=k), ValueError, "max_iterations must be at least 1, got 0"),
        (lambda k: ica.fit(X, 3, tolerance=-1.0, key=k), ValueError, "tolerance must be positive"),
        (lambda k: ica.em_step(jnp.ones((4, 2)), X, key=k), ValueError, "must not both be 0"),
        (
            lambda k: ica.gibbs_step(jnp.ones((4, 5)), jnp.ones((50, 5)), X, noise_scale=0.0, key=k),
            ValueError,
            "positive",
        ),
        (lambda k: ica.fit(X, 3, source="gauss", key=k), ValueError, "source must be one of 'auto', 'laplace'"),
        (lambda k: ica.fit(X, 0, key=k), ValueError, "num_sources must be at least 1"),
        (lambda k: ica.fit(X, 6, source="logistic", key=k), ValueError, "scale mixture of Gaussians"),
        (lambda k: ica.fit(X, 6, num_restarts=0, key=k), ValueError, "num_restarts must be"),
        (lambda k: ica.em_step(jnp.ones((3, 2)), X, noise_scale=0.1, key=k), ValueError, r"mixing \[X, Z\]"),
        (lambda k: ica.em_step(jnp.ones((4, 5)), X, noise_scale=0.1, key=k), ValueError, "use gibbs_step"),
        (lambda k: ica.gibbs_step(jnp.ones((4, 5)), X, X, noise_scale=0.1, key=k), ValueError, "one chain for each y"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, message, key):
    with pytest.raises(error, match=message):
        call(key)
