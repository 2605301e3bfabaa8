"""Evaluating a tiny run: what is added is what the library gives, twice the same; bad input gets a sentence."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from spread_jax.cli import evaluate, features
from spread_jax.cli import sample as sample_command
from spread_jax.cli.launch import run_program
from spread_jax.data import open_dataset
from spread_jax.evaluation import FeatureNetwork, Moments, frechet_distance
from spread_jax.models import DataSettings, DeltaVae, open_run, sample
from spread_jax.models._saved import to_json
from spread_jax.models.scores import features_path
from spread_jax.training import Checkpointer, RunDirectory

COUNT, SIDE = 70, 16


@pytest.fixture(autouse=True)
def no_global_settings(monkeypatch):
    """The compiler's flags and cache belong to a program, not to a test."""
    for command in (evaluate, features, sample_command):
        monkeypatch.setattr(command, "configure", lambda: None)


def random_state(method):
    """A state without the ten seconds that compiling its initialisation takes."""
    chance = np.random.default_rng(1)

    def fill(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        variance = "'var'" in jax.tree_util.keystr(path)
        values = np.ones(leaf.shape) if variance else 0.1 * chance.standard_normal(leaf.shape)
        return np.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: method.initial_state(jax.random.key(0), 1)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """The folder of a run whose networks hold random numbers, in the form training leaves them."""
    workdir = tmp_path_factory.mktemp("run") / "demo-0"
    train = dataset("train", cache)
    method = DeltaVae(image_shape=train.image_shape, width=2, latent_dim=3)
    saved = {
        "preset": "demo", "seed": 0, "method": to_json(method), "data_fingerprint": train.fingerprint,
        "data": to_json(DataSettings("faces", image_size=SIDE, max_examples=COUNT, cache_dir=str(workdir / "evil"))),
    }  # fmt: skip
    with RunDirectory.open(workdir, saved, tensorboard=False) as run:
        with Checkpointer(run.checkpoints_path) as saver:
            saver.save(0, random_state(method), metrics={})
        run.write_results({"experiment": "celeba", "steps": 0})
    return workdir


def run(workdir, cache, capsys, **settings):
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert evaluate.main([str(workdir), "--quiet", "--cache-dir", cache, *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("RESULT ")
    return json.loads(out.removeprefix("RESULT "))


def test_an_evaluation_is_what_the_library_gives(finished, cache, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    found = run(
        workdir, cache, capsys, feature_steps=3, mixture_components=2, importance_examples=12, importance_samples=2,
        annealed_examples=4, annealed_steps=2, annealed_chains=2,
    )  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    assert results["steps"] == 0
    assert {k: found[k] for k in results["evaluation"]} == results["evaluation"]
    assert found["samples"] == COUNT

    # The Fréchet distance once more, from what is on the disk.
    network = FeatureNetwork.load(features_path(dataset("train", cache), cache))
    assert found["features_fingerprint"] == network.fingerprint
    samples = np.round(sample(workdir, COUNT, seed=0) * 255).astype(np.uint8)
    fake, real = network(samples), network(dataset("test", cache).images)
    again = frechet_distance(Moments.of(fake), Moments.of(real))
    assert found["frechet_distance"] == pytest.approx(again, rel=1e-6)
    # An untrained generator is far off, and training images are near.
    assert found["frechet_distance"] > 5 * found["real_frechet_distance"]
    assert found["precision"] < 0.2 < 0.7 < found["real_precision"]
    assert abs(found["real_kernel_distance"]) < 5 * found["real_kernel_distance_standard_error"]
    assert found["sharpness"] < 0.5
    assert np.isfinite(found["frechet_infinity"])
    assert 1 <= found["importance_effective_sample_size"] <= 2
    # Both are about log p~(y) of nearly the same examples; a blank image is thousands of nats off.
    assert found["importance_bound_nats"] == pytest.approx(found["annealed_log_likelihood_nats"], rel=0.2)
    with Image.open(workdir / "neighbours.png") as picture:
        assert picture.size == (6 * (SIDE + 2) + 2, 8 * (SIDE + 2) + 2)
    page = (workdir / "report.html").read_text()
    assert 'id="evaluation"' in page
    assert page.count("<img") == 1

    # Again, without real images: the same numbers, and no picture of them.
    assert evaluate.main([
        str(workdir), "--quiet", "--no-real-images", "--cache-dir", cache, "--importance-examples", "0",
        "--mixture-components", "0",
    ]) == 0  # fmt: skip
    second = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert "importance_bound_nats" not in second
    for name in ("frechet_distance", "kernel_distance", "coverage", "memorised_share", "features_fingerprint"):
        assert second[name] == found[name]
    assert not (workdir / "neighbours.png").exists()
    assert "<img" not in (workdir / "report.html").read_text()
    assert not (workdir / "evil").exists()  # a run's folder does not say where to write


def dataset(split, cache):
    return open_dataset("faces", split, image_size=SIDE, max_examples=COUNT, cache_dir=cache, progress=lambda *_: None)


def stopped(capsys, *arguments):
    """What a program that ends with code 1 says."""
    with pytest.raises(SystemExit) as end:
        run_program(lambda: evaluate.main([*map(str, arguments), "--quiet"]))
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert "RESULT" not in out
    return err


def test_bad_input_gets_a_sentence(finished, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPREAD_JAX_CACHE", cache)
    before = (finished / "results.json").read_text()
    assert "is not a run's folder: it has no config.json" in stopped(capsys, tmp_path)
    assert "--samples must be at least 16, got 3" in stopped(capsys, finished, "--samples", 3)
    assert "There is no file of features at" in stopped(capsys, finished, "--features", tmp_path / "none.npz")
    sizes = (1, 2, 4, 8, 16)
    params = {"mean": np.float32(0), "scale": np.float32(1)}
    for i in range(4):
        params[f"conv{i}"] = np.ones((3, 3, sizes[i], sizes[i + 1]), np.float32)
        params[f"conv{i}_bias"] = np.zeros(sizes[i + 1], np.float32)
    FeatureNetwork(params, {"data": "digits", "image_shape": [28, 28, 1], "width": 2}).save(tmp_path / "digits.npz")
    other = stopped(capsys, finished, "--features", tmp_path / "digits.npz")
    assert "takes images (28, 28, 1), the run's are (16, 16, 3)" in other
    images = tmp_path / "images"
    images.mkdir()
    chance = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(chance.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(images / f"{i}.png")
    assert "is not what the run was trained on" in stopped(capsys, finished, "--data", images)
    with RunDirectory.reopen(finished):
        assert "is in use by process" in stopped(capsys, finished)
    assert (finished / "results.json").read_text() == before

    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    (unfinished / "results.json").unlink()
    assert "is not finished: it has no results yet" in stopped(capsys, unfinished)


def test_samples_are_drawn_by_their_command(finished, cache, tmp_path, capsys):
    arguments = [str(finished), "--num", "3"]
    assert sample_command.main([*arguments, "--folder", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    with Image.open(tmp_path / "out/000001.png") as picture:
        np.testing.assert_allclose(np.asarray(picture) / 255, sample(open_run(finished), 3)[1], atol=0.5 / 255 + 1e-6)
    mixture = [
        "--latents",
        "mixture",
        "--mixture-components",
        "2",
        "--cache-dir",
        cache,
        "--grid",
        str(tmp_path / "g.png"),
    ]
    assert sample_command.main([*arguments, *mixture]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert (found["latents"], found["written"]) == ("mixture", str(tmp_path / "g.png"))
    assert sample_command.main([*arguments, "--truncation", "0.5", "--grid", str(tmp_path / "t.png")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))["truncation"] == 0.5
    for wrong, message in (
        (["--num", "0"], "--num must be at least 1, got 0"),
        (["--step", "7"], "step 7"),
        (["--truncation", "1.5"], "--truncation must be in (0, 1], got 1.5"),
        (["--truncation", "0.5", "--best-of", "2"], "leave --truncation out"),
    ):
        with pytest.raises(SystemExit):
            run_program(lambda wrong=wrong: sample_command.main([str(finished), *wrong]))
        assert message in capsys.readouterr().err


def test_features_are_trained_by_their_command(tmp_path, capsys):
    arguments = ["--data", "digits", "--max-examples", "64", "--cache-dir", str(tmp_path), "--quiet"]
    assert features.main([*arguments, "--steps", "20", "--width", "4", "--output", str(tmp_path / "d.npz")]) == 0
    found = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    network = FeatureNetwork.load(tmp_path / "d.npz")
    assert found["fingerprint"] == network.fingerprint
    assert found["num_labels"] == 10
    assert network.config["data"] == "digits"
    assert set(found["frechet_distance_to_validation"]) == set(features.damage(np.zeros((8, 4, 4, 1), np.uint8), 0))
    assert found["versions"]["jax"] == jax.__version__
    with pytest.raises(SystemExit):
        run_program(lambda: features.main(["--steps", "0"]))
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
