"""One trainer for every noise and objective: finite and resumable, right gradients, what is refused."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _generator, _launch, _noise, _train, celeba, evaluate, mnist
from spread_jax import GaussianNoise, spread_importance_bound
from spread_jax.data import open_dataset
from spread_jax.training import Checkpointer, RunDirectory

pytestmark = pytest.mark.usefixtures("small_networks")

IMAGE = (28, 28, 1)
TINY = _generator.GeneratorConfig(
    steps=4, batch_size=4, width=2, latent_dim=3, importance_samples=2, rank=3, transform_features=2, descent_steps=1,
    noise_decay_every=1, warmup_steps=0, record_every=1, sample_every=100, save_every=2, held_out_examples=6,
    max_examples=24, data="digits", quiet=True,
)  # fmt: skip

# The pairs with a code path of their own; spread_elbo trains under all noises in test_mnist.
FEW = [
    ("elbo", "laplace", {"learned_scale": True}),
    ("importance", "low_rank", {}),
    ("wae_mmd", "gaussian", {}),
    ("spread_gan", "low_rank", {"discriminator_steps": 2, "gan_divergence": "kl"}),
]
ALL = [(o, n, {}) for o in _generator.OBJECTIVES for n in _generator.admitted_noises(o)]
PAIRS = ALL if os.environ.get("SPREAD_JAX_ALL_PAIRS") else FEW

HELD_OUT = {
    "spread_elbo": {"elbo_nats", "spread_kl_bound_nats", "bits_per_dim", "kl_nats", "reconstruction_mse"},
    "elbo": {"elbo_nats", "bits_per_dim", "kl_nats", "reconstruction_mse"},
    "importance": {"importance_bound_nats", "elbo_nats", "spread_kl_bound_nats", "kl_nats", "reconstruction_mse"},
    "wae_mmd": {"loss", "mmd", "reconstruction_mse"},
    "spread_gan": {"divergence_bound_nats"},
}


def batch(number, size=4):
    return np.random.default_rng(number).integers(0, 256, (size, *IMAGE), np.uint8)


class Images:
    """What of a data set held-out numbers and scales need."""

    source = "images"

    def __init__(self, images):
        self.images, self.image_shape = images, images.shape[1:]

    def __len__(self):
        return len(self.images)


def leaves_of(state):
    data = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(data)]


def the_same(state, other):
    for a, b in zip(leaves_of(state), leaves_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("objective", "noise", "changes"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_pair_trains_and_resumes_bit_exact(objective, noise, changes, tmp_path):
    config = dataclasses.replace(TINY, objective=objective, noise=noise, **changes)
    _generator.check_config(config, IMAGE)
    model = _generator.Model(config, IMAGE)
    state = model.initial_state()
    start = [np.array(leaf) for leaf in jax.tree.leaves((state.params, state.noise_params))]
    rows = []
    for step in range(4):
        state, metrics = model.train_step(state, batch(step))
        rows.append({name: float(value) for name, value in metrics.items()})
        if step == 1:
            with Checkpointer(tmp_path) as saver:
                saver.save(2, state, metrics={})
                saver.wait()
                again = saver.restore(jax.eval_shape(model.initial_state)).state
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for step in (2, 3):
        again, metrics = model.train_step(again, batch(step))
        assert {name: float(value) for name, value in metrics.items()} == rows[step]
    the_same(state, again)
    end = jax.tree.leaves((state.params, state.noise_params))
    moved = [np.abs(a - b).max() > 0 for a, b in zip(start, end, strict=True)]
    learned = noise in _noise.LEARNED
    ascents = config.discriminator_steps if objective == "spread_gan" else int(learned)
    assert [row["ascending"] for row in rows] == [int(step % (1 + ascents) > 0) for step in range(4)]
    # Only the scale's head of the Wasserstein autoencoder's encoder has nothing to learn from.
    assert moved.count(False) == (2 if objective == "wae_mmd" else 0)
    if learned:
        model.noises.check(4, rows[-1])

    numbers = model.held_out(state, Images(batch(9, 6)), jax.random.key(0))
    assert set(numbers) >= HELD_OUT[objective]
    assert all(math.isfinite(value) for value in numbers.values())
    assert not {name for name in numbers if "spread" in name and objective == "elbo"}
    assert model.best_metric[0] in (None, *(f"validation_{name}" for name in numbers))
    assert model.summary(numbers)
    assert model.headline(rows[-1])


@pytest.mark.parametrize(("objective", "noise"), [("spread_gan", "low_rank"), ("importance", "low_rank")])
def test_gradients_of_both_players_are_finite_differences(objective, noise, monkeypatch):
    with jax.enable_x64(True):
        monkeypatch.setattr(_train, "to_unit", lambda images: images.astype(jnp.float64) / 255)
        config = dataclasses.replace(TINY, objective=objective, noise=noise, through_encoder=objective == "importance")
        model = _generator.Model(config, IMAGE)
        double = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        state = model.initial_state()
        params, noise_params, stats = map(double, (state.params, state.noise_params, state.model_state))
        options = {"key": jax.random.key(1), "step": 0}

        def loss(params):
            return model.loss(params, noise_params, stats, state.noise_state, batch(0), **options)[0]

        def divergence(noise_params):
            return model.divergence(params, noise_params, stats, state.noise_state, batch(0), **options)[0]

        rng = np.random.default_rng(0)
        for function, at in ((loss, params), (divergence, noise_params)):
            value_and_grad = jax.jit(jax.value_and_grad(function))
            gradient = value_and_grad(at)[1]
            assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float64"}
            parts = gradient if isinstance(gradient, dict) else {"": gradient}
            for part in parts:  # each network and the noise alone, so that none hides behind another
                direction = {
                    name: jax.tree.map(lambda v, on=name == part: on * rng.normal(size=v.shape), tree)
                    for name, tree in at.items()
                }
                there, back = (
                    value_and_grad(jax.tree.map(lambda v, d, t=t: v + t * d, at, direction))[0] for t in (1e-6, -1e-6)
                )
                want = (there - back) / 2e-6
                products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
                got = sum(jax.tree.leaves(products))
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7, err_msg=part)
                assert abs(want) > 1e-4


def test_the_learned_scales_gradient_is_its_closed_form():
    """Of log N(x; g, sigma^2 I) to log sigma: |x - g|^2 / sigma^2 - X, whose root is the mean squared error."""
    model = _generator.Model(dataclasses.replace(TINY, objective="elbo", learned_scale=True), IMAGE)
    state = model.initial_state()
    gradient, output = jax.jit(jax.grad(model.loss, has_aux=True))(
        state.params, {}, state.model_state, None, batch(0), key=jax.random.key(0), step=0
    )
    scale, size = TINY.noise_scale, math.prod(IMAGE)
    squared = -2 * scale**2 * (output.metrics["log_likelihood"] + 0.5 * size * math.log(2 * math.pi * scale**2))
    np.testing.assert_allclose(gradient["log_scale"], size - squared / scale**2, rtol=1e-4)
    assert model.noise_scale(state) == pytest.approx(scale)


def test_the_models_steps_anneal_the_noise():
    changes = {"noise_decay": 0.5, "noise_decay_every": 2, "final_noise_scale": 0.01}
    gan = dataclasses.replace(TINY, objective="spread_gan", discriminator_steps=2, **changes)
    scales = [float(_generator.Model(gan, IMAGE).noises.scale(step)) for step in (0, 3, 6, 12)]
    np.testing.assert_allclose(scales, [0.5, 0.5, 0.25, 0.125])


def test_the_scale_may_come_from_the_data():
    images = batch(0, 50)
    config = _generator.with_scale_from_data(dataclasses.replace(TINY, noise_scale_from_data=0.8), Images(images))
    deviation = np.sqrt(np.mean([np.var(images[:, i, j, 0] / 255) for i in range(28) for j in range(28)]))
    assert config.noise_scale == pytest.approx(0.8 * deviation, abs=1e-6)
    assert config.final_noise_scale / config.noise_scale == pytest.approx(TINY.final_noise_scale / TINY.noise_scale)
    assert _generator.with_scale_from_data(TINY, Images(images)) is TINY
    with pytest.raises(_launch.UsageError, match="has no variance"):
        _generator.with_scale_from_data(dataclasses.replace(TINY, noise_scale_from_data=0.8), Images(images[:1]))


def test_networks_start_alike_and_settings_are_read_back():
    """The generator and its latents are the same under every objective, also after a round through a saved config."""
    states = {}
    for objective in ("spread_elbo", "spread_gan"):
        config = dataclasses.replace(TINY, objective=objective)
        saved = {**_launch.as_dict(config), "image_shape": list(IMAGE), "noises": {}}
        assert _generator.load_config(saved) == (config, IMAGE)
        model = _generator.Model(*_generator.load_config(saved))
        states[objective] = model.initial_state()
        images = model.generate(model.averaged(states[objective]), _generator.latents(config, 2))
        assert images.shape == (2, *IMAGE)
    assert jax.tree.all(jax.tree.map(np.array_equal, *(_generator.Model.current(s) for s in states.values())))
    assert model.encode(None, batch(0), jax.random.key(0)) is None
    assert model.reconstruct(None, batch(0), jax.random.key(0)) is None
    with pytest.raises(_launch.UsageError, match="64x64 and of 28x28 pixels, not of 32x32"):
        _generator.Model(TINY, (32, 32, 3))


def test_what_encoders_see():
    """Spread images of a spread objective, with its noise; images themselves of the others."""
    x, key = batch(0), jax.random.key(3)
    for objective in ("spread_elbo", "wae_mmd"):
        model = _generator.Model(dataclasses.replace(TINY, objective=objective), IMAGE)
        state = model.initial_state()
        seen, rebuilt = model.reconstruct(state, x, key)
        mean, std = model.encode(state, x, key)
        assert mean.shape == std.shape == (4, 3)
        np.testing.assert_allclose(rebuilt, model.generate(model.current(state), mean), rtol=1e-5)
        if objective == "wae_mmd":
            np.testing.assert_allclose(seen, x / 255.0, rtol=1e-6)
            assert not std.any()
            assert model.noise_of(state) is None
        else:
            np.testing.assert_allclose(seen, GaussianNoise(0.5).sample(x / jnp.float32(255), key=key), rtol=1e-5)
            assert (std > 0).all()
            _, entropy = model.noise_of(state)
            assert entropy == pytest.approx(784 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)), rel=1e-5)


def test_an_evaluation_has_what_its_objective_can_tell():
    """No bound without an encoder or a noise; of `elbo`, that of the images themselves."""
    config = evaluate.Config(run=".", quiet=True)
    for objective, expected in {"wae_mmd": set(), "spread_gan": {"noise_scale"}}.items():
        model = _generator.Model(dataclasses.replace(TINY, objective=objective), IMAGE)
        state = model.initial_state()
        assert set(evaluate.likelihoods(config, model, state, Images(batch(0)), print)) == expected
    # x = z + e with the exact posterior, of which one draw gives log p(x) = log N(x; 0, 1 + s^2).
    x, s = jnp.array([[0.3], [-1.2]]), 0.5
    encode = lambda x: (x / (1 + s**2), jnp.full_like(x, 0.5 * math.log(s**2 / (1 + s**2))))
    noise, key = evaluate._Unspread(GaussianNoise(s)), jax.random.key(0)
    found = spread_importance_bound(x, encode, lambda z: z, noise, key=key, num_samples=1).bound
    exact = -0.5 * x[:, 0] ** 2 / (1 + s**2) - 0.5 * math.log(2 * math.pi * (1 + s**2))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_a_run_trains_resumes_and_is_restored(tmp_path):
    """`train_run` as a comparison uses it."""
    config = dataclasses.replace(TINY, objective="wae_mmd", sample_every=2)
    datasets = {
        split: open_dataset("digits", split, max_examples=24, progress=_launch.silent)
        for split in ("train", "validation")
    }
    saved = _generator.saved_config(config, datasets["train"])
    say = _launch.talker(quiet=True)

    def train(workdir, steps, finish=False):
        longer = dataclasses.replace(config, steps=steps)
        with RunDirectory.open(workdir, {**saved, "steps": steps}, resumable_keys=_generator.RESUMABLE) as run:
            model, trained = _generator.train_run(longer, run, datasets, say=say)
            if finish:
                run.write_results({"steps": steps})
            return model, trained, run.read_metrics()

    _, trained, records = train(tmp_path / "run", 4, finish=True)
    assert {record["step"] for record in records} == {1, 2, 3, 4}
    assert (tmp_path / "run/samples.png").exists()
    assert set(_generator.curves(records)) == {"MMD of latents, squared", "squared error per pixel"}
    _, again, _ = train(tmp_path / "run", 4)
    assert again.seconds == 0
    the_same(trained.state, again.state)


BAD = {
    "a learned noise for the ELBO": ({"objective": "elbo", "noise": "low_rank"}, "--objective elbo spreads no images"),
    "noise for the WAE": ({"objective": "wae_mmd", "noise": "laplace"}, "--objective wae_mmd uses no noise"),
    "one image for the WAE": ({"objective": "wae_mmd", "batch_size": 1}, "--batch-size must be at least 2"),
    "a learned spread scale": ({"learned_scale": True}, "--learned-scale is for --objective elbo alone"),
    "low variance": (
        {"objective": "importance", "low_variance": True},
        "--low-variance is for --objective spread_elbo,",
    ),
    "spread samples": ({"objective": "elbo", "num_spread_samples": 2}, "--num-spread-samples is for"),
    "latent samples": ({"objective": "spread_gan", "num_latent_samples": 2}, "--num-latent-samples is for"),
    "through no encoder": ({"objective": "spread_gan", "through_encoder": True}, "--through-encoder is for"),
    "no discriminator step": ({"discriminator_steps": 0}, "--discriminator-steps must be at least 1, got 0"),
    "a negative weight": ({"mmd_weight": -1.0}, "--mmd-weight must be at least 0"),
    "no share": ({"noise_scale_from_data": 0.0}, "--noise-scale-from-data must be positive"),
    "no width": ({"discriminator_width": 0}, "--discriminator-width must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_meaning_is_refused_in_a_sentence(name):
    changes, message = BAD[name]
    with pytest.raises(_launch.UsageError) as refusal:
        _generator.check_config(dataclasses.replace(TINY, **changes), IMAGE)
    assert message in str(refusal.value)
    assert str(refusal.value).count("\n") == 0


def test_folders_tell_objective_and_noise():
    usual = celeba.Config()
    assert str(_generator.default_workdir(usual, "celeba")) == "runs/celeba/demo-0"
    other = dataclasses.replace(usual, objective="spread_gan", noise="laplace", seed=3)
    assert str(_generator.default_workdir(other, "celeba")) == "runs/celeba/demo-3-spread_gan-laplace"
    digits = dataclasses.replace(mnist.Config(), objective="elbo")
    assert str(_generator.default_workdir(digits, "mnist")) == "runs/mnist/demo-0-elbo"
