"""What density ratios tell of a run that goes wrong, what the bound's weight does, and scores against log-ratios."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.evaluation import precision_recall_density_coverage
from spread_jax.models import DensityRatio, DensityRatioVae, ScoreDifference, SpreadGan
from spread_jax.models.density_ratio import _coverage
from spread_jax.nn import Denoiser, ScaleCritic
from tests.models.conftest import IMAGE, NETWORKS, images

SOUND = {"divergence_bound_nats": 0.1, "critic_accuracy": 0.7, "coverage": 0.6}


@pytest.mark.parametrize(
    ("changes", "earlier", "said"),
    [
        ({}, [], None),
        ({}, [{"divergence_bound": 0.2}, {"validation_coverage": 0.8}], None),
        ({"critic_accuracy": 0.97}, [], "97% of held-out images.*raise lowest_noise_scale"),
        ({"critic_accuracy": 0.5}, [], "right 50% of the time.*raise critic_learning_rate"),
        ({}, [{"divergence_bound": 0.3}], "0.30 nats on training images and 0.10 on held-out.*use mirrored"),
        ({}, [{"divergence_bound": 0.9}] + [{"divergence_bound": 0.1}] * 5, None),  # long ago
        ({"coverage": 0.2}, [{"validation_coverage": 0.5}], "cover 20%.*have covered 50%.*density_ratio_vae"),
        ({"coverage": 0.1}, [{"validation_coverage": 0.25}], None),  # it never was good
    ],
)
def test_a_run_that_goes_wrong_is_told_what_to_do(changes, earlier, said):
    found = DensityRatio().advice({**SOUND, **changes}, earlier)
    assert len(found) == (said is not None)
    assert said is None or np.all([part in found[0] for part in said.split(".*")])


def test_reconstructions_that_become_worse_are_told_of():
    numbers = {**SOUND, "reconstruction_mse": 0.014}
    earlier = [{"divergence_bound": 0.9}, {"validation_reconstruction_mse": 0.01}]  # training images: known by heart
    assert DensityRatioVae().advice(numbers, earlier) == DensityRatioVae().advice(numbers, []) == ()
    (told,) = DensityRatioVae().advice({**numbers, "reconstruction_mse": 0.016}, earlier)
    assert told.startswith("the squared error of reconstructions is 0.0160, and has been 0.0100: raise bound_weight")
    (told,) = DensityRatioVae().advice({**numbers, "critic_accuracy": 0.97}, earlier)
    assert "raise lowest_noise_scale" in told


def test_coverage_is_that_of_the_evaluation():
    rng = np.random.default_rng(0)
    x, samples = rng.normal(size=(2, 40, 8, 8, 1)).astype(np.float32)
    samples[:20] = samples[:1]  # half of them alike
    flat = lambda a: a.reshape(len(a), -1)
    reference = precision_recall_density_coverage(flat(x), flat(samples), k=3).coverage
    np.testing.assert_allclose(jax.jit(_coverage)(x, samples), reference, atol=1e-6)
    assert 0.2 < reference < 0.9
    # Larger images are looked at in 8x8: doubling every pixel changes nothing.
    double = lambda a: a.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(_coverage(double(x), double(samples)), reference, atol=1e-6)
    assert _coverage(x[:2], x[:2]) == 1  # fewer images than neighbours


def test_critic_and_bound_judge_what_is_made_of_the_images_own_latents():
    networks = {**{part: NETWORKS[part] for part in ("encoder", "generator")}, "critic": ScaleCritic(width=1)}
    method = DensityRatioVae(image_shape=IMAGE, networks=networks, latent_dim=3)
    state = method.initial_state(jax.random.key(0), 4)
    params = {**state.params, "critic": jax.tree.map(lambda leaf: leaf + 0.1, state.params["critic"])}

    @jax.jit
    def model_loss(weight, generator, encoder):
        model, _ = dataclasses.replace(method, bound_weight=weight).players(4)
        moved = {**params, "generator": generator, "encoder": encoder}
        loss, output = model.loss(moved, state.variables, images(0), key=jax.random.key(1), step=0)
        return loss, output.metrics["elbo"]

    moved = params["generator"], params["encoder"]
    (one, bound), (three, _) = (model_loss(weight, *moved) for weight in (1.0, 3.0))
    np.testing.assert_allclose(three - one, -2 * bound / method.pixels, rtol=1e-4)
    # Without the bound what is left is the critic's, and it reaches the encoder too.
    gradient = jax.grad(lambda *moved: model_loss(1e-9, *moved)[0], argnums=(0, 1))(*moved)
    assert all(max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of)) > 1e-5 for of in gradient)
    # Each image is judged by what its own latents give, not by samples of the prior: others give other ones.
    x = jnp.asarray(images(0), jnp.float32) / 255
    judged = jax.jit(lambda x: method.compared(params, state.variables, x, jax.random.key(3), train=False))
    before, after = judged(x), judged(x.at[0].set(1 - x[0]))
    assert before.shape == x.shape
    np.testing.assert_allclose(before[1:], after[1:], atol=1e-6)
    assert float(jnp.abs(before[0] - after[0]).max()) > 1e-3


@pytest.mark.parametrize("kind", [DensityRatio, SpreadGan])
def test_rates_of_games_are_held_and_then_fall(kind):
    rates = kind(image_shape=(28, 28, 1)).schedule(2.0, 100, warmup=False)
    np.testing.assert_allclose([rates(0), rates(50), rates(75), rates(100)], [2.0, 2.0, 1.05, 0.1], rtol=1e-5)


def test_scale_and_mean_of_the_data_reach_the_networks():
    x = np.full((6, *IMAGE), 51, np.uint8)
    x[::2] = 153
    for kind, part in ((DensityRatio, "critic"), (ScoreDifference, "data_denoiser")):
        method = kind(image_shape=IMAGE, networks={"generator": NETWORKS["generator"]}).with_data(x)
        module = method.modules[part]
        assert (module.data_mean, module.data_scale) == (method.data_mean, method.data_scale) == (0.4, 0.2)
        assert kind(image_shape=IMAGE, data_mean=0.5, data_scale=0.1).with_data(x).data_scale == 0.1
    x[..., ::2, ::2, :] += 51  # 0.2: each of three differences is 0.1 in every block
    critic = DensityRatio(image_shape=IMAGE, networks={"generator": NETWORKS["generator"]}).with_data(x)
    assert critic.modules["critic"].detail_scale == critic.detail_scale == 0.1


def test_scores_of_exact_denoisers_move_samples_as_the_exact_log_ratio_does():
    # Data N(m, s^2), samples at one point: log p~ - log q~ has gradient (m - y) / (s^2 + sigma^2) + (y - x) / sigma^2.
    class Exact(Denoiser):
        spread: float = 0.0

        def __call__(self, y, sigma):
            share = self.spread**2 / (self.spread**2 + jnp.square(sigma)).reshape(-1, 1, 1, 1)
            return self.data_mean + share * (y - self.data_mean)

    denoisers = {"data_denoiser": Exact(data_mean=0.3, spread=0.2), "sample_denoiser": Exact(data_mean=0.8)}
    method = ScoreDifference(
        image_shape=IMAGE, networks={**denoisers, "generator": NETWORKS["generator"]}, latent_dim=3
    )
    none = {part: {} for part in method.parts}
    x = jnp.full((4096, *IMAGE), 0.8)
    terms = lambda x: method._compared(none, none, x, jax.random.key(0)).loss.mean()
    found = np.asarray(jax.grad(terms)(x).sum(axis=0)).ravel()
    # E sigma^2 (score of q~ - score of p~) = E sigma^2 (x - m) / (s^2 + sigma^2), at log-uniform sigma.
    low, high = method.lowest_noise_scale, method.highest_noise_scale
    exact = 0.5 * np.log((0.2**2 + high**2) / (0.2**2 + low**2)) / (2 * np.log(high / low))
    error = found.std(ddof=1) / np.sqrt(found.size)
    np.testing.assert_allclose(found.mean(), exact, atol=4 * max(error, 0.5 * 0.35 / np.sqrt(4096)))
