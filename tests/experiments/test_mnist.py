"""Digits under four noises: what a run leaves, exact resume, what its numbers mean, and the guards."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from sklearn.decomposition import PCA

from experiments import mnist
from spread_jax.cli.flags import parse_training
from spread_jax.errors import UsageError
from spread_jax.models import (
    NOISES,
    DeltaVae,
    DensityRatioVae,
    InvertibleLocation,
    LatentMixture,
    SettingError,
    open_run,
)
from spread_jax.noise import LearnedCovariance, NoiseCollapseError
from spread_jax.objectives import spread_elbo
from spread_jax.training import TrainingInterrupted

TINY = {
    "steps": 8,
    "latent_dim": 3,
    "batch_size": 8,
    "max_examples": 24,
    "held_out_examples": 20,
    "record_every": 2,
    "sample_every": 6,
    "save_every": 6,
    "noise_decay_every": 3,
}
TURNS = {"descent_steps": 3, "ascent_steps": 4}
LEARNED = {**TURNS, "transform_features": 2, "rank": 4}

pytestmark = pytest.mark.usefixtures("quick")

HOOKS = """import json, os, pathlib, signal

def stop(step, metrics):
    if step == 4:  # the noise's turn is steps 4 to 7
        os.kill(os.getpid(), signal.SIGTERM)

def log(step, metrics):
    with pathlib.Path(__file__).with_name("sent.jsonl").open("a") as file:
        file.write(json.dumps([step, sorted(metrics)]) + "\\n")
"""


def flags_of(settings):
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def run(networks):
    def run(workdir, *more, **changes):
        flags = [*flags_of({"workdir": workdir, **TINY, **changes}), "--quiet", *more]
        return mnist.main(flags, networks=networks)

    return run


def result(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def unbroken(quick, run, tmp_path_factory):
    """All four noises from start to end."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert run(workdir, "--no-pictures", **LEARNED) == 0
    return workdir


def recorded(folder):
    """metrics.jsonl of a noise, less what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second", "waiting_share")} for line in lines
    ]


def test_a_run_leaves_everything_it_promises(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert set(results["noises"]) == set(NOISES)
    for kind, numbers in results["noises"].items():
        own = json.loads((unbroken / kind / "results.json").read_text())
        assert own == {**numbers, **{name: results[name] for name in mnist.SHARED}}
        assert math.isfinite(numbers["held_out_elbo_nats"])
        assert numbers["held_out_elbo_standard_error"] > 0
        # 8 steps of the model in periods of 3: two turns of 4 lie between them.
        learned = NOISES[kind].learned
        assert numbers["steps_of_all_players"] == (16 if learned else 8)
        assert numbers["noise_scale"] == pytest.approx(0.5 * 0.9**2)
        # What each player told since the record before.
        told = {line["step"]: line for line in recorded(unbroken / kind) if "validation_kl_nats" not in line}
        if learned:
            assert [step for step, line in told.items() if "elbo" in line] == [2, 4, 8, 10, 16]
            assert [step for step, line in told.items() if "noise_gain" in line] == [4, 6, 8, 12, 14]
            assert math.isfinite(numbers["last_noise_gain_nats"])
        else:
            assert all("elbo" in line and "noise_gain" not in line for line in told.values())
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
    assert low_rank["share_in_tangent_space"] != low_rank["share_in_tangent_space_initial"]
    assert transformed["lipschitz_bound"] < 1
    for name in ("error_stretch", "image_stretch"):
        assert abs(transformed[name] - 1) <= transformed["lipschitz_bound"]
    for name in ("samples.png", "covariance.png", "curves.png"):
        with Image.open(unbroken / name) as image:
            assert min(image.size) > 200


def test_a_finished_run_says_so_and_one_noise_may_be_asked_of_it(unbroken, run, capsys):
    before = json.loads((unbroken / "results.json").read_text())
    assert run(unbroken, **LEARNED) == run(unbroken, noise="laplace") == 0
    told = [json.loads(line.removeprefix("RESULT ")) for line in capsys.readouterr().out.strip().splitlines()]
    assert told == [before, before]


def test_interrupted_in_the_middle_of_the_noises_turn_it_ends_as_if_unbroken(unbroken, run, tmp_path, capsys):
    workdir, settings = tmp_path / "run", {"noise": "low_rank", "rank": 4, **TURNS}
    (tmp_path / "hooks.py").write_text(HOOKS)
    with pytest.raises(TrainingInterrupted, match="after step 4"):
        run(workdir, **settings, on_log=f"{tmp_path}/hooks.py:stop")
    assert "repeat the command to continue" in capsys.readouterr().err
    assert not (workdir / "results.json").exists()
    assert run(workdir, **settings, on_log=f"{tmp_path}/hooks.py:log") == 0
    sent = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    mine, theirs = (json.loads((w / "low_rank/results.json").read_text()) for w in (workdir, unbroken))
    clock = ("seconds", "images_per_second", "waiting_share", "step_share")
    assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}
    assert recorded(workdir / "low_rank") == recorded(unbroken / "low_rank")
    assert [step for step, names in sent if "low_rank/noise_gain" in names] == [6, 8, 12, 14]
    assert all(name.startswith("low_rank/") for _, names in sent for name in names)
    assert (workdir / "low_rank/samples.png").exists()
    assert not (unbroken / "low_rank/samples.png").exists()  # without pictures


def test_noise_that_leaves_its_range_stops_the_run_before_it_is_saved(run, tmp_path):
    settings = {"noise": "low_rank", "noise_learning_rate": 1e3, "max_entropy_ratio": 1.0001, "save_every": 100}
    with pytest.raises(NoiseCollapseError, match="The learned noise blew up: noise_entropy_ratio is"):
        run(tmp_path / "run", "--no-pictures", **settings, rank=4, **TURNS)
    assert not list((tmp_path / "run/low_rank/checkpoints").glob("[0-9]*"))


def test_a_noise_that_breaks_its_constraint_stops_the_run(run, tmp_path, monkeypatch):
    def refuse(self, params, state):
        raise ValueError("the factor is too large")

    monkeypatch.setattr(LearnedCovariance, "check", refuse)
    with pytest.raises(UsageError, match="After step 6: the factor is too large"):
        run(tmp_path / "run", "--no-pictures", noise="low_rank", rank=4, **TURNS)
    assert not list((tmp_path / "run/low_rank/checkpoints").glob("[0-9]*"))


def test_a_transform_that_may_not_be_injective_is_refused(unbroken, networks):
    trained = open_run(unbroken / "transformed", networks=networks)
    method, state = trained.method, trained.state
    assert method.noise == InvertibleLocation(transform_features=2, **TURNS)
    method.check_state(6, state)
    unknown = jax.tree.map(np.zeros_like, state.variables["noise"])
    state = dataclasses.replace(state, variables={**state.variables, "noise": unknown})
    with pytest.raises(UsageError, match=r"After step 6: block_0/conv_. has an operator norm of up to"):
        method.check_state(6, state)


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


def test_tangents_span_the_differences_of_nearby_images(unbroken, networks):
    trained = open_run(unbroken / "gaussian", networks=networks)
    method, variables = trained.method, trained.state.ema
    z = jax.random.normal(jax.random.key(0), (2, 3))
    bases = mnist.tangents(method, variables, z)
    for basis, point in zip(bases, z, strict=True):
        near = point + 1e-2 * jnp.eye(3)
        images = np.asarray(method.generate(variables, jnp.concatenate([near, point[None]])), float).reshape(4, -1)
        moves = images[:3] - images[3]
        outside = moves - moves @ basis @ basis.T
        assert np.linalg.norm(outside) < 0.05 * np.linalg.norm(moves)


@pytest.mark.parametrize("kind", NOISES)
def test_the_published_preset_is_the_papers_and_traces(kind):
    typed = parse_training(
        ["--preset", "published", "--noise", kind], prog="", description="", presets=mnist.PRESETS, default="demo"
    )
    method = dataclasses.replace(typed.method, image_shape=(28, 28, 1))
    assert (method.width, typed.fit.batch_size, method.learning_rate) == (64, 100, 1e-4)
    expected = {"rank": 20, "noise_learning_rate": 1e-5, "ascent_steps": 1000}
    expected |= {"transform_features": 32, "transform_coefficient": 0.1}
    assert {k: v for k, v in dataclasses.asdict(method.noise).items() if k in expected}.items() <= expected.items()
    state = jax.eval_shape(lambda: method.initial_state(jax.random.key(0), 1))
    batch = jax.ShapeDtypeStruct((100, 28, 28, 1), np.uint8)
    players = method.players(typed.fit.steps)
    assert len(players) == 1 + method.noise.learned
    for player in players:
        value, _ = jax.eval_shape(
            lambda state, batch, player=player: player.loss(
                state.params, state.variables, batch, key=state.key, step=state.step
            ),
            state,
            batch,
        )
        assert value.shape == ()


def test_the_noise_cannot_learn_to_mislead_the_encoder(unbroken, networks):
    """The gradient of its objective is that for an encoder that returns the same whatever it sees."""
    trained = open_run(unbroken / "low_rank", networks=networks)
    method, state, key = trained.method, trained.state, jax.random.key(1)
    x = np.random.default_rng(0).integers(0, 256, size=(4, 28, 28, 1)).astype(np.float32) / 255

    def slope(method):
        loss = method.players(1)[1].loss
        moved = lambda noise: loss({**state.params, "noise": noise}, state.variables, x, key=key, step=0)[0]
        return jax.jit(jax.grad(moved))(state.params["noise"])["factor"]

    encode, decode = (method.network(part, state.params, state.variables, train=True) for part in networks)
    seen = []

    def recorded(y):
        seen.append(encode(y))
        return seen[-1]

    def minus_divergence(noise_params, encode):
        noise = method.noise_at({"noise": noise_params}, {}, 0)
        terms, _ = spread_elbo(x, encode, decode, noise, key=key, has_aux=True)
        return terms.elbo.mean() + noise.entropy(x[:1])[0]

    returned = jax.jit(lambda noise: (minus_divergence(noise, recorded), seen[-1])[1])(state.params["noise"])
    expected = jax.jit(jax.grad(lambda noise: minus_divergence(noise, lambda y: returned)))(state.params["noise"])
    expected = expected["factor"]
    np.testing.assert_allclose(slope(method), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    through = dataclasses.replace(method, noise=LearnedCovariance(rank=4, through_encoder=True))
    assert np.abs(slope(through) - expected).max() > 0.01 * np.abs(expected).max()


BAD = {
    "zero steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "rising noise": ({"final_noise_scale": 0.9}, "final_noise_scale must be positive and at most noise_scale"),
    "no contraction": ({"transform_coefficient": 1.0}, "transform_coefficient must be between 0 and 1, got 1.0"),
    "rank above pixels": ({"rank": 785}, "rank must be at most 784"),
    "negative ascent": ({"ascent_steps": -1}, "ascent_steps must be at least"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, run, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(SettingError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_samples_are_titled_by_noise_or_method_and_drawn_from_a_mixture_where_there_is_one(tmp_path, monkeypatch):
    titles, drawn = [], []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    monkeypatch.setattr(
        mnist, "sample", lambda run, num, latents: drawn.append(latents) or np.zeros((num, 28, 28, 1), np.float32)
    )
    z = np.zeros((4, 3), np.float32)
    far = LatentMixture(np.ones(1), np.full((1, 3), 9.0), 0.1 * np.eye(3)[None])
    runs = {
        "laplace": SimpleNamespace(method=DeltaVae(), latents=None),
        "none": SimpleNamespace(method=DensityRatioVae(), latents=far),
    }
    mnist.draw_samples(runs, z, tmp_path / "samples.png")
    assert titles == ["Laplace", "delta-VAE sharpened by density ratios\nover many scales of noise"]
    np.testing.assert_array_equal(drawn[0], z)
    assert drawn[1].min() > 8
