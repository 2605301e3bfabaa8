"""The critic as a judge: a known ratio, the best of several, rejection towards the density that it stands for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.models import DeltaVae, DensityRatio, Trained, best_of, log_ratios, rejection_sample, sample
from spread_jax.models.verify import _cut

IMAGE = (1, 1, 1)


class Line(nn.Module):
    """x = z, which "images" may be here."""

    @nn.compact
    def __call__(self, z):
        return self.param("one", nn.initializers.ones_init(), ()) * z.reshape(-1, *IMAGE)


class Slope(nn.Module):
    """v = slope x, whatever sigma is."""

    @nn.compact
    def __call__(self, y, sigma):
        return self.param("slope", nn.initializers.constant(0.5), ()) * y.reshape(-1)


@pytest.fixture(scope="module")
def run():
    networks = {"generator": Line(), "critic": Slope()}
    method = DensityRatio(
        image_shape=IMAGE, latent_dim=1, networks=networks, lowest_noise_scale=1e-4, highest_noise_scale=1e-3
    )
    return Trained(method, method.initial_state(jax.random.key(0), 1))


def test_the_log_ratio_is_the_critics(run):
    x = np.linspace(-1, 1, 5, dtype=np.float32).reshape(-1, *IMAGE)
    np.testing.assert_allclose(log_ratios(run, x), 0.5 * x.ravel(), atol=1e-3)
    bytes_ = np.array([0, 255], np.uint8).reshape(-1, *IMAGE)
    np.testing.assert_allclose(log_ratios(run, bytes_), [0, 0.5], atol=1e-3)


def test_the_log_ratio_is_a_mean_over_quantiles_of_the_law(run):
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, y, sigma):
            return jnp.log(sigma)

    method = dataclasses.replace(run.method, networks={**run.method.networks, "critic": Scale()})
    state = dataclasses.replace(run.state, params={**run.state.params, "critic": {}})
    found = log_ratios(Trained(method, state), np.zeros((2, *IMAGE), np.float32), draws=5)
    np.testing.assert_allclose(found, np.log(1e-3 * 1e-4) / 2, rtol=1e-5)


def test_the_best_of_several_is_the_largest(run):
    candidates = sample(run, 30, seed=3).reshape(10, 3)
    np.testing.assert_array_equal(best_of(run, 10, candidates=3, seed=3).ravel(), candidates.max(axis=1))


def test_rejection_draws_from_the_tilted_density(run):
    """q = N(0, 1) tilted by e^(x / 2) is N(1/2, 1); cut at a rate of 0.3, compared with quadrature."""
    num, rate = 4000, 0.3
    found = rejection_sample(run, num, rate=rate, seed=1).ravel()
    assert found.shape == (num,)
    x = np.linspace(-9, 9, 20001)
    q = np.exp(-np.square(x) / 2)
    accept = lambda c: np.minimum(1, np.exp(x / 2 - c))
    low, high = -5.0, 9.0
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (q * accept(c)).sum() / q.sum() > rate else (low, c)
    density = q * accept(c) / (q * accept(c)).sum()
    mean = (density * x).sum()
    spread = np.sqrt((density * np.square(x - mean)).sum())
    np.testing.assert_allclose(found.mean(), mean, atol=4 * spread / np.sqrt(num))
    assert mean > 0.4  # what would not be were nothing rejected


def test_the_cut_has_the_rate():
    told = np.random.default_rng(0).normal(size=1000)
    for rate in (0.05, 0.5, 1.0):
        np.testing.assert_allclose(np.minimum(1, np.exp(told - _cut(told, rate))).mean(), rate, rtol=1e-6)


def test_a_critic_without_numbers_ends_in_a_sentence(run):
    broken = dataclasses.replace(run.state, params={**run.state.params, "critic": {"slope": jnp.nan}})
    with pytest.raises(ValueError, match="critic that gives no finite number at step 0"):
        rejection_sample(Trained(run.method, broken), 3)


def test_what_cannot_judge_is_refused(run):
    other = DeltaVae(image_shape=(16, 16, 1), latent_dim=2, width=2)
    with pytest.raises(ValueError, match="run must have a critic of log-ratios, as density_ratio has, got delta-VAE"):
        log_ratios(Trained(other, None), np.zeros((1, 16, 16, 1)))
    for call, message in (
        (
            lambda: log_ratios(run, np.zeros((1, 2, 1, 1))),
            r"images must have shape \(n, \*\(1, 1, 1\)\), got \(1, 2, 1, 1\)",
        ),
        (lambda: log_ratios(run, np.zeros((1, *IMAGE)), draws=0), "draws must be at least 1, got 0"),
        (lambda: best_of(run, 1, candidates=0), "candidates must be at least 1, got 0"),
        (lambda: rejection_sample(run, 1, rate=0), r"rate must be in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
