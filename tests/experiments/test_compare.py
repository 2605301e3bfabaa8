"""A tiny comparison: its tables against NumPy, its scores against the library, resumption, and what is added later."""

import csv
import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from experiments import _table, compare
from spread_jax.cli import flags, launch
from spread_jax.data import open_dataset
from spread_jax.evaluation import (
    FeatureNetwork,
    Moments,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
    relative_sharpness,
)
from spread_jax.models import NOISES, evaluation_key, held_out, open_run, sample, scores, shown_latents
from spread_jax.training import RunDirectoryError, TrainingInterrupted

pytestmark = pytest.mark.usefixtures("quick")
TINY = {
    "preset": "digits",
    "steps": 6,
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
HOOK = """import os, pathlib, signal

def stop(step, metrics):
    folder = pathlib.Path(__file__).with_name("comparison")
    if "fixed-0/elbo" in metrics and step == 4 and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        os.kill(os.getpid(), signal.SIGTERM)
"""
METRICS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "sharpness")
CLOCK = ("images_per_second", "training_seconds")


@pytest.fixture(scope="module")
def features(quick, tmp_path_factory):
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
def run(features, networks):
    def run(workdir, methods=("vae", "fixed"), **changes):
        settings = {**TINY, "workdir": workdir, "features": features, "seeds": 2, **changes}
        typed = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return compare.main([*typed, "--methods", *methods, "--no-pictures", "--quiet"], networks=networks)

    return run


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def without_clock(results):
    """The scores of a run, less what depends on the clock."""
    return {row: {k: v for k, v in scores.items() if k not in CLOCK} for row, scores in results["rows"].items()}


@pytest.fixture(scope="module")
def story(run, tmp_path_factory):
    """(folder, what was seen on the way) of a comparison that is stopped twice, finished, and given one more seed."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, seen = folder / "comparison", {}
    (folder / "hook.py").write_text(HOOK)

    def stop_before_scores(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="after step 4"):
        run(workdir, seeds=1, on_log=f"{folder}/hook.py:stop")
    seen["first table"] = (workdir / "table.md").read_text(encoding="utf-8")
    seen["vae-0"] = (workdir / "vae-0/results.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "score", stop_before_scores)
        with pytest.raises(KeyboardInterrupt):
            run(workdir, seeds=1)
    seen["after kills"] = {path.parent.name for path in workdir.glob("**/results.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_table, "draw_comparison", lambda *_: None)
        patch.setattr(_table, "draw_samples", lambda *_: None)
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
        numbers = [runs["vae" if row.startswith("vae") else "fixed", seed][row] for seed in (0, 1)]
        for metric in METRICS:
            values = [s[metric] for s in numbers]
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
    for name, size in (("comparison.png", 400), ("samples.png", 200)):
        with Image.open(finished / name) as image:
            assert min(image.size) > size
    assert 'id="tables"' in (finished / "report.html").read_text()


def test_scores_are_what_the_library_gives(finished, features, networks):
    found = results_of(finished / "fixed-1")["rows"]
    trained = open_run(finished / "fixed-1", networks=networks)
    test = open_dataset("digits", "test", image_size=28, channels=1, max_examples=40)
    extract, key = FeatureNetwork.load(features), evaluation_key(1)
    z = jax.random.normal(jax.random.fold_in(key, 0), (40, 3))
    for row in ("fixed", "last_step"):
        images = sample(trained, 40, latents=z, last_step=row == "last_step")
        samples = np.round(images * 255).astype(np.uint8)
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
    expected = held_out(trained, test, count=16, batch_size=8, key=key)
    assert found["fixed"]["held_out_reconstruction_mse"] == pytest.approx(expected["reconstruction_mse"], rel=1e-5)
    assert found["fixed"]["held_out_bound_nats"] == pytest.approx(expected["elbo_nats"], rel=1e-5)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert found["fixed"]["parameters"] == count(trained.state.params)
    seconds, rate = found["fixed"]["training_seconds"], found["fixed"]["images_per_second"]
    assert seconds * rate == pytest.approx(TINY["steps"] * TINY["batch_size"])
    # In the picture the prior and the flow see the same normal numbers.
    with np.load(finished / "fixed-1" / "shown.npz") as shown:
        assert set(shown) == {"fixed", "last_step", "fixed_mixture", "flow"}
        first = sample(trained, compare.SHOWN, latents=shown_latents(1, 3, compare.SHOWN))
        np.testing.assert_allclose(shown["fixed"] / 255, first, atol=0.003)


def test_it_resumes_within_a_run_and_between_runs(story, run, tmp_path, monkeypatch):
    workdir, seen = story
    assert seen["after kills"] == {"vae-0"}
    assert seen["first table"].count("| VAE |") == 2  # scores and cost
    assert "fixed" not in seen["first table"]
    assert (workdir / "vae-0/results.json").stat().st_mtime_ns == seen["vae-0"]
    for name in ("draw_comparison", "draw_samples"):
        monkeypatch.setattr(_table, name, lambda *_: None)
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
    recalls = {"vae": {0: 1.0, 1: 5.0}, "fixed": {1: 2.0, 2: 9.0, 3: None}, "flow": {2: 8.0}}
    rows = {row: {seed: {"recall": value} for seed, value in seeds.items()} for row, seeds in recalls.items()}
    found = {line["method"]: line for line in _table.differences(rows)}
    assert found["fixed"]["seeds"] == found["flow"]["seeds"] == 1
    assert (found["fixed"]["recall"], found["flow"]["recall"]) == (-3.0, -1.0)
    lines = {line["method"]: line for line in _table.table(rows)}
    assert (lines["vae"]["recall"], lines["vae"]["recall_standard_error"]) == (3.0, 2.0)
    assert lines["fixed"]["recall"] is None  # one of its seeds has none


def typed(*arguments):
    return flags.parse_training(
        [*arguments], prog="", description="", presets=compare.PRESETS, default="faces", extra=compare.Comparison(),
        all_methods=True,
    )  # fmt: skip


def test_methods_differ_in_what_they_say_alone():
    given = typed("--preset", "digits", "--width", "2", "--learned-scale")
    base = dataclasses.asdict(compare.TRAINED["fixed"](given))
    assert compare.TRAINED["fixed"](given).name == "spread_elbo"
    assert (base["width"], base["latent_dim"], base["learning_rate"]) == (2, 10, 5e-3)
    game = {"critic_learning_rate": 2e-3, "generator_learning_rate": 1e-3, **compare.GAME}
    expected = {
        "vae": ("elbo", "gaussian", {"learned_scale": False}),
        "fixed": ("spread_elbo", "gaussian", {}),
        "laplace": ("spread_elbo", "laplace", {}),
        "low_rank": ("spread_elbo", "low_rank", {}),
        "transformed": ("spread_elbo", "transformed", {}),
        "wae_mmd": ("wae_mmd", None, {"mmd_weight": 10.0}),
        "spread_gan": ("spread_gan", "gaussian", {**game, "final_noise_scale": 0.05}),
        "density_ratio": ("density_ratio", None, {**game, "mirrored": False}),
        "density_ratio_vae": ("density_ratio_vae", None, {**game, "noise_scale": 0.25}),
        "score_difference": ("score_difference", None, {name: game[name] for name in compare.GAME}),
        "learned_sigma": ("elbo", "gaussian", {"learned_scale": True}),
        "constant_sigma": ("spread_elbo", "gaussian", {"noise_scale": 0.3}),
        "importance": ("importance", "gaussian", {"importance_samples": 5}),
    }
    assert set(expected) == set(compare.TRAINED)
    for row, (objective, noise, changes) in expected.items():
        method = compare.TRAINED[row](given)
        mine = dataclasses.asdict(method)
        assert method.name == objective
        assert noise is None or type(method.noise) is type(NOISES[noise])
        assert {name: mine[name] for name in changes} == changes
        shared = (base.keys() & mine.keys()) - changes.keys() - {"noise"}
        assert {name: mine[name] for name in shared} == {name: base[name] for name in shared}


@pytest.mark.parametrize("preset", compare.PRESETS)
def test_presets_are_settings_that_there_are_and_work(preset):
    given = typed("--preset", preset)
    parts = (given.fit, given.data, given.extra)
    known = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    known |= given.settings
    assert {name: known[name] for name in compare.PRESETS[preset]} == compare.PRESETS[preset]
    given.extra.validate()
    given.fit.validate()
    side = given.data.image_size or 64
    for make in compare.TRAINED.values():
        dataclasses.replace(make(given), image_shape=(side, side, 3)).validate()


def test_a_noise_scale_from_the_data_is_one_for_all_methods():
    class Split:
        images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)
        image_shape = (28, 28, 1)

    given = typed("--preset", "digits", "--noise-scale-from-data", "0.8", "--methods", "fixed", "constant_sigma")
    methods = compare.methods_of(given, Split, {})
    scale = 0.8 * np.sqrt((Split.images / 255).var(axis=0).mean())
    assert methods["fixed"].noise_scale == pytest.approx(scale, rel=1e-4)
    assert methods["fixed"].final_noise_scale == pytest.approx(0.6 * scale, rel=1e-4)
    assert methods["constant_sigma"].noise_scale == methods["fixed"].final_noise_scale
    assert all(method.with_data(Split.images) is method for method in methods.values())


def test_means_and_errors():
    values = np.random.default_rng(0).normal(size=7)
    assert scores.mean_and_error(values) == pytest.approx((values.mean(), scipy.stats.sem(values)))
    assert scores.mean_and_error([2.0]) == (2.0, None)
    shown = _table.with_error
    assert shown(12.3456, 0.234) == "12.35 ± 0.23"
    assert shown(-0.00123, 0.0456, sign=True) == "-0.001 ± 0.046"
    assert shown(12345.6, 99.9) == "12,346 ± 100"
    assert shown(3.0, 0.0, sign=True) == "+3"
    assert (shown(54321, None), shown(0.123456, None), shown(None, None)) == ("54,321", "0.1235", "")
    assert math.isfinite(float(shown(1e-9, 1e-10).split()[0]))


def stopped(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        launch.run_program(lambda: compare.main([*arguments, "--quiet"]))
    assert end.value.code == 1
    return capsys.readouterr().err


def test_bad_input_gets_a_sentence(run, finished, tmp_path, features, capsys):
    plain = ["--preset", "digits", "--workdir", str(tmp_path / "new"), "--max-examples", "40", "--batch-size", "4"]
    assert "--seeds must be at least 1, got 0" in stopped(capsys, [*plain, "--seeds", "0"])
    assert "--samples must be at least 16, got 5" in stopped(capsys, [*plain, "--samples", "5"])
    assert "--rank must be at most 784" in stopped(capsys, [*plain, "--rank", "785", "--methods", "low_rank"])
    assert "There is no file of features at" in stopped(capsys, [*plain, "--features", str(tmp_path / "none.npz")])
    assert "--on-log none:log cannot be used" in stopped(capsys, [*plain, "--on-log", "none:log"])
    few = [*plain, "--max-examples", "12", "--features", str(features)]
    assert "has 12 training and 12 test images: 16 of each" in stopped(capsys, few)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunDirectoryError, match="steps"):
        run(finished, steps=9)
