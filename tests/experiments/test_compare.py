"""A tiny comparison: its tables against NumPy, its scores against the library, resumption, and what is added later."""

import csv
import dataclasses
import functools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.mixture import GaussianMixture

from experiments import _generator, _latents, _launch, _scores, compare
from spread_jax.data import open_dataset
from spread_jax.evaluation import (
    FeatureNetwork,
    Moments,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
    relative_sharpness,
)
from spread_jax.training import Checkpointer, RunDirectoryError, TrainingInterrupted

pytestmark = pytest.mark.usefixtures("small_networks")
TINY = {
    "preset": "digits",
    "steps": 6,
    "width": 2,
    "latent_dim": 3,
    "batch_size": 8,
    "max_examples": 40,
    "samples": 40,
    "held_out_examples": 16,
    "record_every": 2,
    "save_every": 4,
    "noise_decay_every": 2,
    "mixture_components": 2,
    "flow_steps": 10,
    "flow_couplings": 2,
}
METRICS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "sharpness")
CLOCK = ("images_per_second", "training_seconds")


@pytest.fixture(scope="module")
def network(small_networks, tmp_path_factory):
    """The path of features that nobody trained, for speed."""
    chance, sizes = np.random.default_rng(0), (1, 2, 4, 8, 16)
    params = {"mean": np.float32(0), "scale": np.float32(0.5)}
    for i in range(4):
        params[f"conv{i}"] = chance.normal(size=(3, 3, sizes[i], sizes[i + 1])).astype(np.float32) / 3
        params[f"conv{i}_bias"] = np.zeros(sizes[i + 1], np.float32)
    path = tmp_path_factory.mktemp("features") / "random.npz"
    FeatureNetwork(params, {"data": "digits", "image_shape": [28, 28, 1], "width": 2}).save(path)
    return path


@pytest.fixture(scope="module")
def run(network):
    def run(workdir, methods=("vae", "fixed"), **changes):
        settings = {**TINY, "workdir": workdir, "features": network, "seeds": 2, **changes}
        flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return compare.main([*flags, "--methods", *methods, "--quiet"])

    return run


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def without_clock(results):
    """The scores of a run, less what depends on the clock."""
    return {row: {k: v for k, v in scores.items() if k not in CLOCK} for row, scores in results["rows"].items()}


@pytest.fixture(scope="module")
def story(run, tmp_path_factory):
    """(folder, what was seen on the way) of a comparison that is stopped twice, finished, and given one more seed."""
    workdir, seen = tmp_path_factory.mktemp("runs") / "comparison", {}
    check = _generator.NoiseFamily.check

    def stop_within(self, step, metrics):
        check(self, step, metrics)
        if step == 4 and (workdir / "vae-0/results.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_before_scores(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_generator.NoiseFamily, "check", stop_within)
        with pytest.raises(TrainingInterrupted, match="after step 4"):
            run(workdir, seeds=1)
    seen["first table"] = (workdir / "table.md").read_text(encoding="utf-8")
    seen["vae-0"] = (workdir / "vae-0/results.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "score", stop_before_scores)
        with pytest.raises(KeyboardInterrupt):
            run(workdir, seeds=1)
    seen["after kills"] = {path.parent.name for path in workdir.glob("**/results.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw_comparison", lambda *_: None)
        patch.setattr(compare, "draw_samples", lambda *_: None)
        assert run(workdir, seeds=1) == 0
    seen["one seed"] = results_of(workdir)
    assert run(workdir) == 0
    return workdir, seen


@pytest.fixture(scope="module")
def finished(story):
    return story[0]


def test_tables_are_numpys_means_and_errors_of_the_runs(finished):
    results = results_of(finished)
    assert results["runs"] == ["fixed-0", "fixed-1", "vae-0", "vae-1"]
    lines = {line["method"]: line for line in results["table"]}
    assert list(lines) == ["vae", "fixed", "last_step", "flow", "vae_mixture", "fixed_mixture"]
    runs = {(m, s): results_of(finished / f"{m}-{s}")["rows"] for m in ("vae", "fixed") for s in (0, 1)}
    for row, line in lines.items():
        scores = [runs["vae" if row.startswith("vae") else "fixed", seed][row] for seed in (0, 1)]
        for metric in METRICS:
            values = [s[metric] for s in scores]
            assert line[metric] == pytest.approx(np.mean(values))
            assert line[f"{metric}_standard_error"] == pytest.approx(scipy.stats.sem(values), abs=1e-12)
    # Seeds matter, and the rows of one run differ from each other.
    assert len({s[row]["frechet_distance"] for s in runs.values() for row in s}) == 12
    changes = {(line["method"], line["baseline"]): line for line in results["differences"]}
    assert set(changes) == {
        ("fixed", "vae"), ("vae_mixture", "vae"), ("fixed_mixture", "vae_mixture"),
        *((row, "fixed") for row in ("last_step", "flow", "fixed_mixture")),
    }  # fmt: skip
    for (row, baseline), line in changes.items():
        mine, theirs = (
            [runs["vae" if r.startswith("vae") else "fixed", s][r] for s in (0, 1)] for r in (row, baseline)
        )
        pairs = [a["sharpness"] - b["sharpness"] for a, b in zip(mine, theirs, strict=True)]
        assert line["sharpness"] == pytest.approx(np.mean(pairs))
        assert line["sharpness_standard_error"] == pytest.approx(scipy.stats.sem(pairs))
        assert "held_out_bound_nats" not in line  # of another noise, or none
    with open(finished / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == list(lines)
    assert float(table[1]["frechet_distance"]) == lines["fixed"]["frechet_distance"]
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert text.count("| fixed Gaussian |") == 2
    assert results["features_fingerprint"] in text
    assert "fixed Gaussian − VAE" in text
    for name, size in (("comparison.png", 400), ("samples.png", 200), ("vae-0/samples.png", 200)):
        with Image.open(finished / name) as image:
            assert min(image.size) > size
    assert 'id="tables"' in (finished / "report.html").read_text()


def test_scores_are_what_the_library_gives(finished, network):
    found = results_of(finished / "fixed-1")["rows"]
    config = compare.run_config(dataclasses.replace(compare.PRESETS["digits"], **TINY), "fixed", 1)
    model = _generator.Model(config, (28, 28, 1))
    with Checkpointer(finished / "fixed-1" / "checkpoints") as saver:
        state = saver.restore(jax.eval_shape(model.initial_state)).state
    test = open_dataset("digits", "test", image_size=28, channels=1, max_examples=40)
    extract, key = FeatureNetwork.load(network), jax.random.fold_in(jax.random.key(1), 0x5EED)
    z = jax.random.normal(jax.random.fold_in(key, 0), (40, 3))
    for row, variables in (("fixed", state.ema), ("last_step", model.current(state))):
        samples = np.round(np.asarray(model.generate(variables, z)) * 255).astype(np.uint8)
        fake, real = extract(samples), extract(test.images)
        kernel = kernel_distance(fake, real)
        expected = {
            "frechet_distance": frechet_distance(Moments.of(fake), Moments.of(real)),
            "kernel_distance": kernel.value,
            "kernel_distance_standard_error": kernel.standard_error,
            **precision_recall_density_coverage(real, fake)._asdict(),
            "sharpness": relative_sharpness(samples, test.images).value,
        }
        assert {k: found[row][k] for k in expected} == pytest.approx(expected, rel=1e-5)
    held_out = model.held_out(state, test, key)
    assert found["fixed"]["held_out_reconstruction_mse"] == pytest.approx(held_out["reconstruction_mse"], rel=1e-5)
    assert found["fixed"]["held_out_bound_nats"] == pytest.approx(held_out["elbo_nats"], rel=1e-5)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert found["fixed"]["parameters"] == count(state.params)
    seconds, rate = found["fixed"]["training_seconds"], found["fixed"]["images_per_second"]
    assert seconds * rate == pytest.approx(TINY["steps"] * TINY["batch_size"])
    # In the picture the prior and the flow see the same normal numbers.
    with np.load(finished / "fixed-1" / "shown.npz") as shown:
        assert set(shown) == {"own", "last_step", "mixture", "flow"}
        first = np.asarray(model.generate(state.ema, _generator.latents(config, compare.SHOWN)))
        np.testing.assert_allclose(shown["own"] / 255, first, atol=0.003)


def test_it_resumes_within_a_run_and_between_runs(story, run, tmp_path, monkeypatch):
    workdir, seen = story
    assert seen["after kills"] == {"vae-0"}
    assert seen["first table"].count("| VAE |") == 2  # scores and cost
    assert "fixed" not in seen["first table"]
    assert (workdir / "vae-0/results.json").stat().st_mtime_ns == seen["vae-0"]
    for name in ("draw_comparison", "draw_samples"):
        monkeypatch.setattr(compare, name, lambda *_: None)
    assert run(tmp_path / "unbroken", ("fixed",), seeds=1, mixture_components=0, flow_steps=0) == 0
    mine, theirs = (without_clock(results_of(w / "fixed-0")) for w in (workdir, tmp_path / "unbroken"))
    mine["fixed"].pop("latent_log_density_nats")
    assert {row: mine[row] for row in ("fixed", "last_step")} == theirs


def test_seeds_are_added_and_nothing_is_trained_twice(story, run, capsys, monkeypatch):
    workdir, seen = story
    assert seen["one seed"]["runs"] == ["fixed-0", "vae-0"]
    first = {line["method"]: line for line in seen["one seed"]["table"]}
    assert first["fixed"]["frechet_distance_standard_error"] is None
    assert first["fixed"]["frechet_distance"] == results_of(workdir / "fixed-0")["rows"]["fixed"]["frechet_distance"]
    assert results_of(workdir)["table"][0]["seeds"] == 2
    monkeypatch.setattr(compare, "train_and_score", functools.partial(pytest.fail, "a finished run was opened"))
    assert run(workdir) == run(workdir, ("vae",), seed=1, seeds=1) == 0
    told = capsys.readouterr().out.splitlines()
    assert [json.loads(line.removeprefix("RESULT ")) for line in told] == [results_of(workdir)] * 2


def test_differences_are_over_the_seeds_that_both_have():
    scores = {"vae": {0: 1.0, 1: 5.0}, "fixed": {1: 2.0, 2: 9.0, 3: None}, "flow": {2: 8.0}}
    rows = {row: {seed: {"recall": value} for seed, value in seeds.items()} for row, seeds in scores.items()}
    found = {line["method"]: line for line in compare.differences(rows)}
    assert found["fixed"]["seeds"] == found["flow"]["seeds"] == 1
    assert (found["fixed"]["recall"], found["flow"]["recall"]) == (-3.0, -1.0)
    lines = {line["method"]: line for line in compare.table(rows)}
    assert (lines["vae"]["recall"], lines["vae"]["recall_standard_error"]) == (3.0, 2.0)
    assert lines["fixed"]["recall"] is None  # one of its seeds has none


def test_methods_differ_in_what_they_say_alone():
    config = dataclasses.replace(compare.PRESETS["digits"], **TINY)
    base = dataclasses.asdict(compare.run_config(config, "fixed", 4))
    assert (base["objective"], base["noise"], base["seed"]) == ("spread_elbo", "gaussian", 4)
    expected = {
        "vae": {"objective": "elbo"},
        "laplace": {"noise": "laplace"},
        "low_rank": {"noise": "low_rank"},
        "transformed": {"noise": "transformed"},
        "wae_mmd": {"objective": "wae_mmd"},
        "spread_gan": {"objective": "spread_gan"},
        "learned_sigma": {"objective": "elbo", "learned_scale": True},
        "constant_sigma": {"noise_scale": 0.3},
        "importance": {"objective": "importance"},
    }
    assert set(expected) | {"fixed"} == set(compare.METHODS)
    for method, changes in expected.items():
        mine = dataclasses.asdict(compare.run_config(config, method, 4))
        assert {k: v for k, v in mine.items() if v != base[k]} == changes
    for name, preset in compare.PRESETS.items():
        compare.check_config(preset, (preset.image_size, preset.image_size, 3))
        assert preset.preset == name


@pytest.fixture(scope="module")
def curved():
    """Posteriors whose aggregate is a bent band, which no Gaussian fits: (train, validation)."""
    chance = np.random.default_rng(0)
    u = chance.normal(size=(1200, 2)).astype(np.float32)
    mean = np.stack([u[:, 0], 0.2 * u[:, 1] + np.square(u[:, 0]) - 1], axis=1)
    std = np.full_like(mean, 0.1)
    return _latents.Posteriors(mean[:900], std[:900]), _latents.Posteriors(mean[900:], std[900:])


def test_densities_of_latents_fit_better_than_the_prior_and_draw_what_they_say(curved):
    train, validation = curved
    z = validation.draw(jax.random.key(5))
    prior = _latents.standard_normal(2)
    mixture = _latents.fit_mixture(train, components=6, seed=0)
    flow = _latents.fit_flow(train, validation, seed=0, steps=200, couplings=2, width=16)
    one = _latents.fit_mixture(train, components=1, seed=0)
    score = {name: density.log_density(z).mean() for name, density in
             {"prior": prior, "one": one, "mixture": mixture, "flow": flow}.items()}  # fmt: skip
    assert score["prior"] < score["one"] < min(score["mixture"], score["flow"]) - 0.2
    np.testing.assert_allclose(prior.log_density(z), scipy.stats.multivariate_normal(np.zeros(2)).logpdf(z), rtol=1e-5)
    peer = GaussianMixture(6, reg_covar=1e-4, random_state=0, max_iter=200).fit(train.draw(jax.random.key(0)))
    np.testing.assert_allclose(mixture.log_density(z), peer.score_samples(z), atol=1e-2)
    for density in (mixture, flow):
        draws = density.sample(4000, jax.random.key(1))
        # E -log p of its own draws is its entropy; their mean log density must be that of held-out draws, nearly.
        assert density.log_density(draws).mean() == pytest.approx(density.log_density(z).mean(), abs=0.3)
        assert np.corrcoef(np.square(draws[:, 0]), draws[:, 1])[0, 1] > 0.8
        np.testing.assert_allclose(draws.mean(axis=0), train.mean.mean(axis=0), atol=0.15)


def test_latents_of_a_split_are_the_encoders():
    class Model:
        def encode(self, state, batch, key):
            mean = batch.reshape(len(batch), -1)[:, :2].astype(np.float32)
            return jnp.asarray(mean), jnp.full(mean.shape, state)

    images = np.random.default_rng(0).integers(0, 256, size=(11, 4, 4, 1), dtype=np.uint8)

    class Split:
        def __len__(self):
            return len(self.images)

    split = Split()
    split.images = images
    found = _latents.posteriors(Model(), 0.5, split, count=10, batch_size=4, key=jax.random.key(0))
    np.testing.assert_array_equal(found.mean, images.reshape(11, -1)[:10, :2])
    assert found.std.shape == (10, 2)
    draws = found._replace(mean=np.zeros((5000, 2)), std=np.full((5000, 2), 0.5)).draw(jax.random.key(0))
    assert draws.std() == pytest.approx(0.5, rel=0.05)


def test_means_and_errors():
    values = np.random.default_rng(0).normal(size=7)
    assert _scores.mean_and_error(values) == pytest.approx((values.mean(), scipy.stats.sem(values)))
    assert _scores.mean_and_error([2.0]) == (2.0, None)
    shown = compare.with_error
    assert shown(12.3456, 0.234) == "12.35 ± 0.23"
    assert shown(-0.00123, 0.0456, sign=True) == "-0.001 ± 0.046"
    assert shown(12345.6, 99.9) == "12,346 ± 100"
    assert shown(3.0, 0.0, sign=True) == "+3"
    assert (shown(54321, None), shown(0.123456, None), shown(None, None)) == ("54,321", "0.1235", "")
    assert math.isfinite(float(shown(1e-9, 1e-10).split()[0]))


def stopped(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        _launch.run(lambda: compare.main([*arguments, "--quiet"]))
    assert end.value.code == 1
    return capsys.readouterr().err


def test_bad_input_gets_a_sentence(run, finished, tmp_path, network, capsys):
    plain = ["--preset", "digits", "--workdir", str(tmp_path / "new"), "--max-examples", "40", "--batch-size", "4"]
    assert "--seeds must be at least 1, got 0" in stopped(capsys, [*plain, "--seeds", "0"])
    assert "--samples must be at least 16, got 5" in stopped(capsys, [*plain, "--samples", "5"])
    assert "--rank must be at most 784" in stopped(capsys, [*plain, "--rank", "785", "--methods", "low_rank"])
    assert "There is no file of features at" in stopped(capsys, [*plain, "--features", str(tmp_path / "none.npz")])
    assert "--on-log none:log cannot be used" in stopped(capsys, [*plain, "--on-log", "none:log"])
    few = [*plain, "--max-examples", "12", "--features", str(network)]
    assert "has 12 training and 12 test images: 16 of each" in stopped(capsys, few)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunDirectoryError, match="steps"):
        run(finished, steps=9)
