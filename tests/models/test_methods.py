"""Every method and noise: finite and resumable, right gradients, what encoders see, what is refused."""

import dataclasses
import functools
import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import GaussianNoise, spread_importance_bound
from spread_jax.models import (
    METHODS,
    NOISES,
    PRESETS,
    DeltaVae,
    DensityRatio,
    SettingError,
    SpreadGan,
    Vae,
    WaeMmd,
    with_preset,
)
from spread_jax.models._saved import method_from_json, to_json
from spread_jax.models.vae import Unspread
from spread_jax.nn import Denoiser
from spread_jax.training import Checkpointer, make_train_step
from tests.models.conftest import IMAGE, NETWORKS, images

SETTINGS = {
    "latent_dim": 3, "rank": 3, "transform_features": 2, "descent_steps": 1, "warmup_steps": 0, "noise_decay_every": 1,
    "importance_samples": 2,
}  # fmt: skip


def make(objective, noise="gaussian", **changes):
    method = METHODS[objective](image_shape=IMAGE)
    denoiser = Denoiser(width=1)
    own = {**NETWORKS, "data_denoiser": denoiser, "sample_denoiser": denoiser}
    method = dataclasses.replace(method, networks={part: own[part] for part in method.parts})
    if hasattr(method, "noise"):
        method = dataclasses.replace(method, noise=NOISES[noise])
    return with_preset(method, {**SETTINGS, **changes})


# The pairs with a code path of their own; spread_elbo trains under all noises in the experiment with digits.
FEW = [
    ("elbo", "laplace", {"learned_scale": True}),
    ("importance", "low_rank", {}),
    ("spread_elbo", "low_rank", {"num_spread_samples": 2, "through_encoder": True}),
    ("wae_mmd", "gaussian", {}),
    ("spread_gan", "low_rank", {"critic_steps": 2, "gan_divergence": "kl"}),
    ("density_ratio", "gaussian", {"mirrored": True, "generator_loss": "reverse_kl", "critic_steps": 2}),
    ("density_ratio_vae", "gaussian", {"bound_weight": 0.5}),
    ("score_difference", "gaussian", {"mirrored": True}),
]
ALL = [(o, n, {}) for o in METHODS for n in NOISES if getattr(METHODS[o], "learns_noise", False) or n == "gaussian"]
PAIRS = ALL if os.environ.get("SPREAD_JAX_ALL_PAIRS") else FEW

EVALUATED = {
    "spread_elbo": {"elbo_nats", "spread_kl_bound_nats", "bits_per_dim", "kl_nats", "reconstruction_mse"},
    "elbo": {"elbo_nats", "bits_per_dim", "kl_nats", "reconstruction_mse"},
    "importance": {
        "importance_bound_nats", "elbo_nats", "spread_kl_bound_nats", "bits_per_dim", "kl_nats", "reconstruction_mse",
    },
    "wae_mmd": {"loss", "mmd", "reconstruction_mse"},
    "spread_gan": {"divergence_bound_nats"},
    "density_ratio": {"divergence_bound_nats", "critic_accuracy", "coverage"},
    "density_ratio_vae": {
        "divergence_bound_nats", "critic_accuracy", "elbo_nats", "kl_nats", "reconstruction_mse",
    },
    "score_difference": {"score_difference", "data_denoising_error"},
}  # fmt: skip


def leaves_of(state):
    data = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(data)]


@pytest.mark.parametrize(("objective", "noise", "changes"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_method_trains_and_resumes_bit_exact(objective, noise, changes, tmp_path):
    method = make(objective, noise, **changes)
    method.validate()
    create = functools.partial(method.initial_state, jax.random.key(0), 4)
    state = jax.jit(create)()
    step = make_train_step(method.players(4), averaged=method.generator_variables)
    start = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    rows = []
    for number in range(4):
        state, metrics = step(state, images(number))
        rows.append({name: float(value) for name, value in metrics.items()})
        if number == 1:
            with Checkpointer(tmp_path) as saver:
                saver.save(2, state, metrics={})
                saver.wait()
                again = saver.restore(jax.eval_shape(create)).state
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for number in (2, 3):
        again, metrics = step(again, images(number))
        assert {name: float(value) for name, value in metrics.items()} == rows[number]
    for mine, theirs in zip(leaves_of(state), leaves_of(again), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    moved = [np.abs(a - b).max() > 0 for a, b in zip(start, jax.tree.leaves(state.params), strict=True)]
    # Only the scale's head of the Wasserstein autoencoder's encoder has nothing to learn from.
    assert moved.count(False) == (2 if objective == "wae_mmd" else 0)
    turns = [[name for name in row if name.endswith("_loss")] for row in rows]
    names = [player.name for player in method.players(4)]
    assert turns == [[f"{names[int(method.turns.player(number))]}_loss"] for number in range(4)]
    method.check(4, {name: value for row in rows for name, value in row.items()})
    method.check_state(4, state)

    x = images(9, 6) / np.float32(255)
    numbers = jax.jit(method.evaluate)(state, x, key=jax.random.key(0))
    assert set(numbers) == EVALUATED[objective]
    assert all(value.shape == (6,) and np.isfinite(value).all() for value in numbers.values())
    if "spread_kl_bound_nats" in numbers:
        bound = numbers.get("importance_bound_nats", numbers["elbo_nats"])
        want = -bound - float(method.entropy(method.noise_of(state)))
        np.testing.assert_allclose(numbers["spread_kl_bound_nats"], want, rtol=1e-5)
    if "bits_per_dim" in numbers:
        np.testing.assert_allclose(
            numbers["bits_per_dim"] * math.prod(IMAGE), -numbers["elbo_nats"] / math.log(2), rtol=1e-5
        )
    assert method.best_metric is None or method.best_metric[0] in numbers
    assert set(method.bounds) <= set(numbers)
    assert method.summary({name: float(value.mean()) for name, value in numbers.items()})
    assert method.headline(rows[0] | rows[1])
    recorded = set(rows[0] | rows[1]) | {f"validation_{name}" for name in numbers} | {"noise_gain", "critic_gain"}
    assert set().union(*method.curves.values()) <= recorded


@pytest.mark.parametrize(("objective", "noise"), [("spread_gan", "low_rank"), ("importance", "low_rank")])
def test_gradients_of_all_players_are_finite_differences(objective, noise):
    with jax.enable_x64(True):
        method = make(objective, noise, through_encoder=True)
        double = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        state = method.initial_state(jax.random.key(0), 4)
        params, variables = double(state.params), double(state.variables)
        rng, x = np.random.default_rng(0), images(0) / 255.0
        for player in method.players(4):
            value_and_grad = jax.jit(
                jax.value_and_grad(
                    lambda moved, player=player: player.loss(
                        {**params, **moved}, variables, x, key=jax.random.key(1), step=0
                    )[0]
                )
            )
            at = {part: params[part] for part in player.moves}
            gradient = value_and_grad(at)[1]
            assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float64"}
            for part in player.moves:  # each network and the noise alone, so that none hides behind another
                direction = {
                    name: jax.tree.map(lambda v, on=name == part: on * rng.normal(size=v.shape), tree)
                    for name, tree in at.items()
                }
                there, back = (
                    value_and_grad(jax.tree.map(lambda v, d, t=t: v + t * d, at, direction))[0] for t in (1e-6, -1e-6)
                )
                want = (there - back) / 2e-6
                got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7, err_msg=part)
                assert abs(want) > 1e-4


def test_a_noise_follows_the_encoder_only_if_it_is_told_to():
    """With the path through the encoder cut, its gradient is another, and the loss the same."""
    found = {}
    for through in (True, False):
        method = make("spread_elbo", "low_rank", through_encoder=through)
        state = method.initial_state(jax.random.key(0), 4)
        loss = lambda noise, method=method, state=state: method.players(4)[1].loss(
            {**state.params, "noise": noise}, state.variables, images(0), key=jax.random.key(1), step=0
        )[0]
        found[through] = jax.jit(jax.value_and_grad(loss))(state.params["noise"])
        # It ascends on the bound of the spread KL, -ELBO - H(p(y|x)).
        metrics = jax.jit(method.players(4)[0].loss)(
            state.params, state.variables, images(0), key=jax.random.key(1), step=0
        )[1].metrics
        factor = np.asarray(method.noise_of(state).factor, np.float64).reshape(64, -1)
        covariance = method.noise_scale**2 * np.eye(64) + factor @ factor.T
        entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * covariance)[1]
        np.testing.assert_allclose(found[through][0], metrics["elbo"] + entropy, rtol=1e-4)
        np.testing.assert_allclose(metrics["spread_kl_bound"], -metrics["elbo"] - entropy, rtol=1e-4)
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=1e-6)
    difference = np.abs(found[True][1]["factor"] - found[False][1]["factor"]).max()
    assert difference > 1e-3 * np.abs(found[True][1]["factor"]).max()


def test_the_learned_scales_gradient_is_its_closed_form():
    """Of log N(x; g, sigma^2 I) to log sigma: |x - g|^2 / sigma^2 - X, whose root is the mean squared error."""
    method = make("elbo", learned_scale=True)
    state = method.initial_state(jax.random.key(0), 4)
    (player,) = method.players(4)
    gradient, output = jax.jit(jax.grad(player.loss, has_aux=True))(
        state.params, state.variables, images(0), key=jax.random.key(0), step=0
    )
    scale, size = method.noise_scale, math.prod(IMAGE)
    squared = -2 * scale**2 * (output.metrics["log_likelihood"] + 0.5 * size * math.log(2 * math.pi * scale**2))
    np.testing.assert_allclose(gradient["log_scale"], size - squared / scale**2, rtol=1e-4)
    assert float(method.noise_scale_of(state)) == pytest.approx(scale)


def test_the_models_steps_anneal_the_noise():
    gan = make("spread_gan", critic_steps=2, noise_decay=0.5, noise_decay_every=2, final_noise_scale=0.01)
    scales = [float(gan.scale_at(step)) for step in (0, 3, 6, 12)]
    np.testing.assert_allclose(scales, [0.5, 0.5, 0.25, 0.125])


def test_the_scale_may_come_from_the_data():
    data = images(0, 50)
    method = make("spread_elbo", noise_scale_from_data=0.8).with_data(data)
    deviation = np.sqrt(np.mean([np.var(data[:, i, j, 0] / 255) for i in range(8) for j in range(8)]))
    assert method.noise_scale == pytest.approx(0.8 * deviation, abs=1e-6)
    assert method.final_noise_scale / method.noise_scale == pytest.approx(0.5)
    usual = make("spread_elbo")
    assert usual.with_data(data) is usual
    with pytest.raises(SettingError, match="noise_scale_from_data needs images that vary"):
        make("spread_elbo", noise_scale_from_data=0.8).with_data(data[:1])


def test_networks_start_alike_and_settings_are_read_back():
    """The generator is the same under every objective, also after a round through a saved config."""
    states = {}
    for objective in ("spread_elbo", "spread_gan"):
        method = with_preset(METHODS[objective](image_shape=(16, 16, 1), noise=NOISES["low_rank"]), {"width": 2})
        saved = to_json(method)
        assert method_from_json(saved, METHODS, {}) == method
        states[objective] = jax.jit(lambda key, method=method: method.initial_state(key, 4))(jax.random.key(0))
        assert method.generate(states[objective].ema, jnp.zeros((2, 16))).shape == (2, 16, 16, 1)
    generators = [state.params["generator"] for state in states.values()]
    assert jax.tree.all(jax.tree.map(np.array_equal, *generators))
    assert method.encode(states["spread_gan"], jnp.zeros((1, 16, 16, 1)), key=jax.random.key(0)) is None


def test_what_is_read_may_come_from_anywhere():
    saved = to_json(DeltaVae(noise=NOISES["low_rank"]))
    bad = {
        "its method is": {"name": "no such"},
        "latent_dim is": {"latent_dim": "16"},
        "compute_dtype is": {"compute_dtype": "float8"},
        "image_shape is": {"image_shape": [64, 64]},
        "noise is": {"noise": {"name": "os.system"}},
        "rank is": {"noise": {**saved["noise"], "rank": 2.5}},
        "own networks for: generator": {"networks": {"generator": "Generator()"}},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            method_from_json({**saved, **change}, METHODS, {})
    with pytest.raises(KeyError, match="latent_dim"):
        method_from_json({k: v for k, v in saved.items() if k != "latent_dim"}, METHODS, {})
    with pytest.raises(ValueError, match="its method is null"):
        method_from_json([1], METHODS, {})


def test_what_encoders_see():
    """Spread images of a spread objective, with its noise; images themselves of the others."""
    x, key = images(0) / np.float32(255), jax.random.key(3)
    for objective in ("spread_elbo", "wae_mmd", "elbo"):
        method = make(objective)
        state = method.initial_state(jax.random.key(0), 4)
        found = method.encode(state, x, key=key)
        assert found.mean.shape == found.std.shape == (4, 3)
        if objective == "spread_elbo":
            np.testing.assert_allclose(found.seen, GaussianNoise(0.5).sample(x, key=key), rtol=1e-5)
            noise = method.scored_noise(state)
            entropy = 64 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
            assert float(method.entropy(noise)) == pytest.approx(entropy, rel=1e-5)
        else:
            np.testing.assert_array_equal(found.seen, x)
            assert (method.scored_noise(state) is None) == (objective == "wae_mmd")
        assert bool((found.std > 0).all()) == (objective != "wae_mmd")


def test_a_decoders_distribution_scores_images_as_they_are():
    """x = z + e with the exact posterior, of which one draw gives log p(x) = log N(x; 0, 1 + s^2)."""
    x, s = jnp.array([[0.3], [-1.2]]), 0.5
    encode = lambda x: (x / (1 + s**2), jnp.full_like(x, 0.5 * math.log(s**2 / (1 + s**2))))
    noise, key = Unspread(GaussianNoise(s)), jax.random.key(0)
    found = spread_importance_bound(x, encode, lambda z: z, noise, key=key, num_samples=1).bound
    exact = -0.5 * x[:, 0] ** 2 / (1 + s**2) - 0.5 * math.log(2 * math.pi * (1 + s**2))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


class Wide(nn.Module):
    """A generator of other images."""

    @nn.compact
    def __call__(self, z):
        return nn.Dense(9 * 9)(z).reshape(-1, 9, 9, 1)


class Broken(nn.Module):
    """A generator that fails."""

    @nn.compact
    def __call__(self, z):
        return z.reshape(-1, 7)


BAD = {
    "a learned noise for a VAE": (Vae, {"noise": NOISES["low_rank"]}, "noise must be fixed, got low_rank"),
    "no critic step": (SpreadGan, {"critic_steps": 0}, "critic_steps must be at least 1, got 0"),
    "a negative weight": (WaeMmd, {"mmd_weight": -1.0}, "mmd_weight must be at least 0"),
    "no share": (DeltaVae, {"noise_scale_from_data": 0.0}, "noise_scale_from_data must be positive"),
    "no mean": (DensityRatio, {"data_mean": float("nan")}, "data_mean must be finite, got nan"),
    "no scale": (DensityRatio, {"data_scale": 0.0}, "data_scale must be positive and finite, got 0.0"),
    "no details": (DensityRatio, {"detail_scale": -0.1}, "detail_scale must be positive and finite, got -0.1"),
    "no start of the decay": (DensityRatio, {"decay_start": 1.0}, r"decay_start must be in \[0, 1\), got 1.0"),
    "no range": (DensityRatio, {"highest_noise_scale": 0.01}, "highest_noise_scale must be above lowest_noise_scale"),
    "no critic": (SpreadGan, {"critic_width": 0}, "critic_width must be at least 1"),
    "rising noise": (DeltaVae, {"final_noise_scale": 0.9}, "final_noise_scale must be positive and at most"),
    "endless noise": (DeltaVae, {"noise_scale": math.inf}, "noise_scale must be positive and finite, got inf"),
    "no decay": (DeltaVae, {"noise_decay": 1.0}, "noise_decay must be between 0 and 1"),
    "rank": (DeltaVae, {"noise": dataclasses.replace(NOISES["low_rank"], rank=10**5)}, "rank must be at most 12288"),
    "no learning": (DeltaVae, {"learning_rate": math.nan}, "learning_rate must be positive and finite"),
    "odd width": (DeltaVae, {"width": 3}, "width must be an even number"),
    "image size": (DeltaVae, {"image_shape": (48, 48, 3)}, "image_size"),
    "average": (DeltaVae, {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    "unknown part": (
        DeltaVae,
        {"networks": {"critic": NETWORKS["critic"]}},
        "networks has 'critic', and this",
    ),
    "other images": (
        DeltaVae,
        {"networks": {"generator": Wide()}},
        r"networks\['generator'\] must return \(1, 64, 64, 3\) for \(1, 16\), got \(1, 9, 9, 1\)",
    ),
    "other latents": (
        DeltaVae,
        {"networks": {"encoder": NETWORKS["encoder"]}},
        r"must return \(1, 16\) and \(1, 16\) for .*, got \(1, 3\) and \(1, 3\)",
    ),
    "a failing network": (
        DeltaVae,
        {"networks": {"generator": Broken()}},
        r"networks\['generator'\] cannot be called with an array of shape \(1, 16\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_in_a_sentence(name):
    kind, changes, message = BAD[name]
    with pytest.raises(SettingError, match=message) as refusal:
        kind(**changes).validate()
    assert str(refusal.value).count("\n") == 0


def test_the_published_preset_is_the_papers():
    published = with_preset(DeltaVae(), PRESETS["published"])
    assert (published.width, published.learning_rate) == (128, 1e-4)
    assert (published.noise_scale, published.final_noise_scale) == (0.5, 0.5)
    assert published.latent_dim in (64, 100)
    assert (PRESETS["published"]["batch_size"], PRESETS["published"]["ascent_steps"]) == (100, 1000)


def test_every_setting_of_a_preset_is_one_of_something():
    from spread_jax.models import DataSettings, FitSettings

    kinds = (*METHODS.values(), *map(type, NOISES.values()), FitSettings, DataSettings)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert {name for preset in PRESETS.values() for name in preset} - {"objective"} <= known
