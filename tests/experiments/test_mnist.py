"""Digits under four noises: what a run leaves, exact resume, what its numbers mean, and the guards."""

import dataclasses
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from experiments import _generator, _launch, _noise, mnist
from spread_jax.training import NoiseCollapseError, TrainingInterrupted

TINY = {
    "steps": 8,
    "width": 2,
    "latent_dim": 3,
    "transform_features": 2,
    "rank": 4,
    "batch_size": 8,
    "descent_steps": 3,
    "ascent_steps": 4,
    "max_examples": 24,
    "held_out_examples": 20,
    "record_every": 2,
    "sample_every": 6,
    "save_every": 6,
    "noise_decay_every": 3,
}


pytestmark = pytest.mark.usefixtures("small_networks")

HOOK = """import json, pathlib

def log(step, metrics):
    with pathlib.Path(__file__).with_name("sent.jsonl").open("a") as file:
        file.write(json.dumps([step, sorted(metrics)]) + "\\n")
"""


def run(workdir, **changes):
    settings = {"workdir": workdir, **TINY, **changes}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return mnist.main([*flags, "--quiet"])


def result(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def unbroken(small_networks, tmp_path_factory):
    """All four noises from start to end."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert run(workdir) == 0
    return workdir


def recorded(folder):
    """metrics.jsonl of a noise, less what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second", "waiting_share")} for line in lines
    ]


def test_a_run_leaves_everything_it_promises(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert set(results["noises"]) == set(_noise.NOISES)
    for kind, numbers in results["noises"].items():
        assert numbers == json.loads((unbroken / kind / "results.json").read_text())
        assert math.isfinite(numbers["held_out_elbo_nats"])
        assert numbers["held_out_elbo_standard_error"] > 0
        # 8 steps of the model in periods of 3: two ascents of 4 lie between them.
        assert numbers["steps_of_both_players"] == (16 if kind in mnist.LEARNED else 8)
        assert numbers["noise_scale"] == pytest.approx(0.5 * 0.9**2)
        turns = {line["step"]: line["ascending"] for line in recorded(unbroken / kind) if "ascending" in line}
        if kind in mnist.LEARNED:
            assert turns == {2: 0, 4: 1, 6: 1, 8: 0, 10: 0, 12: 1, 14: 1, 16: 0}
            assert math.isfinite(numbers["last_divergence_rise_nats"])
    # KL <= -ELBO - H(noise), H in closed form.
    scale = 0.5 * 0.9**2
    entropies = {"gaussian": 0.5 * math.log(2 * math.pi * math.e) + math.log(scale)}
    entropies["laplace"] = 1 + math.log(2 * scale / math.sqrt(2))
    for kind, entropy in entropies.items():
        numbers = results["noises"][kind]
        expected = -numbers["held_out_elbo_nats"] - 784 * entropy
        assert numbers["held_out_spread_kl_bound_nats"] == pytest.approx(expected, abs=0.01)
    low_rank, transformed = results["noises"]["low_rank"], results["noises"]["transformed"]
    values = low_rank["smallest_singular_value"], low_rank["largest_singular_value"]
    assert values[0] <= 1 <= values[1]  # their geometric mean is fixed at 1
    assert low_rank["share_in_tangent_space_isotropic"] == pytest.approx(3 / 784)
    assert 0 < low_rank["share_in_tangent_space"] < 1
    assert transformed["lipschitz_bound"] < 1
    for name in ("error_stretch", "image_stretch"):
        assert abs(transformed[name] - 1) <= transformed["lipschitz_bound"]
    for name in ("samples.png", "covariance.png", "curves.png", "low_rank/samples.png"):
        with Image.open(unbroken / name) as image:
            assert min(image.size) > 200


def test_a_finished_run_says_so_and_one_noise_may_be_asked_of_it(unbroken, capsys):
    before = json.loads((unbroken / "results.json").read_text())
    for noise in ("all", "laplace"):
        assert run(unbroken, noise=noise) == 0
        assert result(capsys) == before


def test_interrupted_in_the_middle_of_an_ascent_it_ends_as_if_unbroken(unbroken, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    record = _noise.NoiseFamily.check

    def interrupt(self, step, metrics):
        record(self, step, metrics)
        if step == 4:  # the ascent is steps 4 to 7
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(_noise.NoiseFamily, "check", interrupt)
        with pytest.raises(TrainingInterrupted, match="after step 4"):
            run(workdir, noise="low_rank")
    assert "repeat the command to go on" in capsys.readouterr().err
    assert not (workdir / "results.json").exists()
    (tmp_path / "hook.py").write_text(HOOK)
    assert run(workdir, noise="low_rank", on_log=f"{tmp_path}/hook.py:log") == 0
    sent = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    mine, theirs = (json.loads((w / "low_rank/results.json").read_text()) for w in (workdir, unbroken))
    clock = ("seconds", "images_per_second")
    assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}
    assert recorded(workdir / "low_rank") == recorded(unbroken / "low_rank")
    assert [step for step, names in sent if "low_rank/elbo" in names] == [6, 8, 10, 12, 14, 16]
    assert all(name.startswith("low_rank/") for _, names in sent for name in names)


def test_noise_that_leaves_its_range_stops_the_run_before_it_is_saved(tmp_path):
    settings = {"noise": "low_rank", "noise_learning_rate": 1e3, "max_noise_entropy_ratio": 1.0001, "save_every": 100}
    with pytest.raises(NoiseCollapseError, match="The learned noise blew up: noise_entropy_ratio is"):
        run(tmp_path / "run", **settings)
    assert not list((tmp_path / "run/low_rank/checkpoints").glob("[0-9]*"))


def test_a_transform_that_may_not_be_injective_stops_the_run(tmp_path):
    def refuse(module, variables):
        raise ValueError("block_0/conv_1 has an operator norm of up to 3")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_noise, "check_invertible", refuse)
        with pytest.raises(_launch.UsageError, match="After step 6: block_0/conv_1 has an operator norm"):
            run(tmp_path / "run", noise="transformed")


def test_shares_are_those_of_the_subspace():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    inside, outside = directions[:, :6], directions[:, 6:]
    assert mnist.variance_share(inside @ rng.normal(size=(6, 4)), inside) == pytest.approx(1)
    assert mnist.variance_share(outside @ rng.normal(size=(24, 4)), inside) == pytest.approx(0, abs=1e-12)
    assert mnist.variance_share(np.eye(30), inside) == pytest.approx(6 / 30)
    mixed = np.stack([inside, outside[:, :6]])
    assert mnist.variance_share(inside @ rng.normal(size=(6, 4)), mixed) == pytest.approx(0.5)


def test_principal_directions_are_scikit_learns():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 16)) * 30 + 128, 0, 255).astype(np.uint8)
    images = images.reshape(200, 4, 4, 1)
    peer = PCA(0.9, svd_solver="full").fit(images.reshape(200, -1) / 255.0).components_
    mine = mnist.principal_directions(images, 0.9)
    assert mine.shape == peer.T.shape
    np.testing.assert_allclose(mine @ mine.T, peer.T @ peer, atol=1e-9)


def test_tangents_span_the_differences_of_nearby_images(unbroken):
    config = dataclasses.replace(mnist.PRESETS["demo"], **TINY)
    model = mnist.Model(dataclasses.replace(config, noise="gaussian"), mnist.IMAGE)
    variables = model.initial_state().ema
    z = jax.random.normal(jax.random.key(0), (2, 3))
    bases = model.tangents(variables, z)
    for basis, point in zip(bases, z, strict=True):
        near = point + 1e-2 * jnp.eye(3)
        images = np.asarray(model.generate(variables, jnp.concatenate([near, point[None]])), float).reshape(4, -1)
        moves = images[:3] - images[3]
        outside = moves - moves @ basis @ basis.T
        assert np.linalg.norm(outside) < 0.05 * np.linalg.norm(moves)


@pytest.mark.parametrize("kind", _noise.NOISES)
def test_the_published_preset_is_the_papers_and_traces(kind, monkeypatch):
    from spread_jax.nn import Encoder28, Generator28

    monkeypatch.setattr(_generator, "Encoder28", Encoder28)
    monkeypatch.setattr(_generator, "Generator28", Generator28)
    config = mnist.PRESETS["published"]
    assert (config.width, config.batch_size, config.learning_rate, config.beta1) == (64, 100, 1e-4, 0.5)
    assert (config.rank, config.noise_learning_rate, config.ascent_steps) == (20, 1e-5, 1000)
    assert (config.transform_features, config.transform_coefficient) == (32, 0.1)
    model = mnist.Model(dataclasses.replace(config, noise=kind), mnist.IMAGE)
    state = jax.eval_shape(model.initial_state)
    batch = jax.ShapeDtypeStruct((100, 28, 28, 1), np.uint8)
    parts = (state.params, state.noise_params, state.model_state, state.noise_state, batch)
    for objective in (model.loss, model.divergence) if kind in mnist.LEARNED else (model.loss,):
        trace = lambda key, step, *parts, objective=objective: objective(*parts, key=key, step=step)
        value, _ = jax.eval_shape(trace, state.key, state.step, *parts)
        assert value.shape == ()


def test_the_noise_cannot_learn_to_mislead_the_encoder():
    """The gradient of its objective is that for an encoder that returns the same whatever it sees."""
    config = dataclasses.replace(mnist.PRESETS["demo"], noise="low_rank", **TINY)
    model = mnist.Model(config, mnist.IMAGE)
    state, encoder = model.initial_state(), model.encoder
    batch = np.random.default_rng(0).integers(0, 256, size=(4, 28, 28, 1), dtype=np.uint8)
    seen = []

    class Recorded:
        def apply(self, *arguments, **options):
            seen.append(encoder.apply(*arguments, **options))
            return seen[-1]

    class Fixed:
        def apply(self, *arguments, **options):
            return returned

    def value(noise_params, key):
        parts = (state.params, noise_params, state.model_state, state.noise_state, batch)
        return model.divergence(*parts, key=key, step=state.step)[0]

    def gradient():
        return jax.jit(jax.grad(value))(state.noise_params, key)["factor"]

    key = jax.random.key(1)
    model.encoder = Recorded()
    returned = jax.jit(lambda noise_params: (value(noise_params, key), seen[-1])[1])(state.noise_params)
    model.encoder = Fixed()
    expected = gradient()
    model.encoder = encoder
    got = gradient()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    model.config = dataclasses.replace(model.config, through_encoder=True)
    assert np.abs(gradient() - expected).max() > 0.01 * np.abs(expected).max()


BAD = {
    "zero steps": ({"steps": 0}, "--steps must be at least 1, got 0"),
    "rising noise": ({"final_noise_scale": 0.9}, "--final-noise-scale must be positive and at most --noise-scale"),
    "no contraction": ({"transform_coefficient": 1.0}, "--transform-coefficient must be between 0 and 1, got 1.0"),
    "rank above pixels": ({"rank": 785}, "--rank must be at most 784"),
    "negative ascent": ({"ascent_steps": -1}, "--ascent-steps must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(_launch.UsageError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
