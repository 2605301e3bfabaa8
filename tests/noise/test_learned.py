"""Noises that can be trained: their start, their constraint, and the range that they must stay in."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from spread_jax import (
    FixedGaussian,
    FixedLaplace,
    LearnedCovariance,
    LearnedLocation,
    NoiseCollapseError,
    check_noise_range,
)

EVENT = (3, 2)
X = jnp.linspace(-1.0, 1.0, 24).reshape(4, *EVENT)


class Doubling:
    """f(x) = w x with a Flax module's methods; `train` counts, as a power iteration would move."""

    def init(self, key, x):
        return {"params": {"w": jnp.full((), 2.0)}, "spectral_stats": {"u": jnp.zeros_like(x)}}

    def apply(self, variables, x, *, train=False, mutable=()):
        y, state = variables["params"]["w"] * x, variables["spectral_stats"]
        return (y, {"spectral_stats": {"u": state["u"] + x + 1}}) if train and mutable == ["spectral_stats"] else y


@dataclasses.dataclass(frozen=True)
class Stretched(LearnedLocation):
    least: float = 1.0

    def transform(self):
        return Doubling()

    def check(self, params, state):
        if not params["w"] > self.least:
            raise ValueError(f"w must be above {self.least}, got {params['w']}.")


MODELS = [FixedGaussian(), FixedLaplace(), LearnedCovariance(rank=2, factor_scale=0.7), Stretched()]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_is_a_value_whose_noise_trains(model, key):
    assert model == dataclasses.replace(model)
    assert hash(model) == hash(dataclasses.replace(model))
    model.validate(EVENT)
    params, state = model.init(EVENT, key=key)
    assert model.learned == bool(jax.tree.leaves(params))

    @jax.jit
    def loss(params, state, scale):
        noise = model.noise(params, state, scale)
        return noise.log_prob(X, 0.3 * X).sum(), (model.advance(params, state), model.diagnostics(noise, EVENT))

    gradients, (after, named) = jax.grad(loss, argnums=(0, 2), has_aux=True)(params, state, jnp.float32(0.5))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(model.limits()) <= set(named)
    check_noise_range(0, named, model.limits())
    model.check(params, state)


@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.name)
def test_fixed_noises_have_the_standard_deviation_that_is_asked_for(model, key):
    x = jnp.zeros((50_000, 1))
    y = model.noise(*model.init((1,), key=key), 0.3).sample(x, key=key)
    fourth_moment = {"gaussian": 3, "laplace": 6}[model.name]
    np.testing.assert_allclose(y.var(), 0.09, atol=6 * 0.09 * math.sqrt((fourth_moment - 1) / len(x)))
    assert model.init((1,), key=key) == ({}, None)


def test_a_learned_covariance_has_its_volume_and_the_density_of_scipy(key):
    model = LearnedCovariance(rank=3, factor_scale=0.7)
    params, _ = model.init(EVENT, key=key)
    np.testing.assert_allclose(jnp.square(params["factor"]).sum(axis=(0, 1)), 1, atol=6 * math.sqrt(2 / 6))
    factor = np.asarray(model.noise(params, None, 0.5).factor, np.float64).reshape(6, 3)
    np.testing.assert_allclose(math.sqrt(np.linalg.det(factor.T @ factor)), 0.7**3, rtol=1e-5)
    # The direction is that of the parameters.
    free = np.asarray(params["factor"]).reshape(6, 3)
    np.testing.assert_allclose(factor / factor[0, 0], free / free[0, 0], rtol=1e-4)
    # The entropy that L adds, from the determinants of the whole matrices.
    noise = model.noise(params, None, 0.5)
    added = 0.5 * np.linalg.slogdet(np.eye(6) + factor @ factor.T / 0.25)[1]
    least = 0.5 * 3 * math.log(1 + 0.7**2 / 0.25)
    ratio = model.diagnostics(noise, EVENT)["noise_entropy_ratio"]
    np.testing.assert_allclose(ratio, added / least, rtol=1e-5)
    assert ratio > 1


def test_equal_singular_values_add_the_least_entropy():
    model = LearnedCovariance(rank=2, factor_scale=2.0)
    columns = jnp.asarray(scipy.linalg.hadamard(4)[:, :2], jnp.float32)
    ratio = lambda factor: model.diagnostics(model.noise({"factor": factor}, None, 0.5), (4,))["noise_entropy_ratio"]
    np.testing.assert_allclose(ratio(columns), 1, rtol=1e-5)
    assert ratio(columns * jnp.array([1.0, 30.0])) > 1.1


def test_a_learned_location_moves_the_noise_and_its_state(key):
    model = Stretched()
    params, state = model.init(EVENT, key=key)
    np.testing.assert_array_equal(model.noise(params, state, 0.5).location(X), 2 * X)
    np.testing.assert_array_equal(model.advance(params, state)["u"], jnp.ones((1, *EVENT)))
    with pytest.raises(ValueError, match=r"w must be above 1.0, got 1.0"):
        model.check({"w": 1.0}, state)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 7}, ValueError, "rank must be at most 6, the numbers in an event, got 7"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be a Python integer, got float"),
        ({"rank": 2, "factor_scale": 0.0}, ValueError, "factor_scale must be positive and finite, got 0.0"),
        ({"rank": 2, "max_entropy_ratio": 0.9}, ValueError, "max_entropy_ratio must be at least 1, got 0.9"),
        ({"rank": 2, "max_entropy_ratio": math.nan}, ValueError, "max_entropy_ratio must be at least 1, got nan"),
    ],
)
def test_settings_that_cannot_work(fields, error, message):
    with pytest.raises(error, match=message):
        LearnedCovariance(**fields).validate(EVENT)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-0.1, "collapsed: noise_entropy is -0.1 after step 40"), (9.0, "blew up"), (math.nan, "is not a number")],
)
def test_noise_out_of_its_range_stops_the_run(value, message):
    limits = {"noise_entropy": (0.0, 5.0)}
    check_noise_range(40, {"noise_entropy": 0.0, "elbo": -3.0}, limits)
    check_noise_range(40, {"noise_entropy": 5.0}, limits)
    with pytest.raises(NoiseCollapseError, match=message) as caught:
        check_noise_range(40, {"noise_entropy": value}, limits)
    assert (caught.value.step, caught.value.name) == (40, "noise_entropy")
    with pytest.raises(KeyError, match="noise_entropy"):
        check_noise_range(40, {}, limits)


def test_columns_start_with_about_unit_length(key):
    params, _ = LearnedCovariance(rank=3).init((20, 20), key=key)
    # |column|^2 is a chi-squared of 400 over 400.
    np.testing.assert_allclose(np.square(params["factor"]).sum(axis=(0, 1)), 1, atol=6 * math.sqrt(2 / 400))


def test_diagnostics_of_a_scale_for_each_example_are_their_mean(key):
    model = LearnedCovariance(rank=2)
    params, _ = model.init(EVENT, key=key)
    ratio = lambda scale: float(model.diagnostics(model.noise(params, None, scale), EVENT)["noise_entropy_ratio"])
    scales = [0.1, 0.5, 2.0]
    each = [ratio(scale) for scale in scales]
    assert np.ptp(each) > 0.01
    assert ratio(jnp.array(scales).reshape(3, 1, 1)) == pytest.approx(np.mean(each), rel=1e-5)
