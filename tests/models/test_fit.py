"""`fit` and what works on a run's folder: it trains, resumes and is read back; what is refused."""

import dataclasses
import json
import shutil
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from spread_jax.errors import UsageError
from spread_jax.models import (
    NOISES,
    DataSettings,
    DeltaVae,
    EvaluateSettings,
    FitSettings,
    Posteriors,
    SettingError,
    SpreadGan,
    Trained,
    WaeMmd,
    encode,
    evaluate,
    fit,
    fit_flow,
    fit_mixture,
    fitted_latents,
    open_run,
    posteriors,
    reconstruct,
    sample,
)
from spread_jax.models.run import prior_latents
from spread_jax.training import RunDirectoryError
from tests.models.conftest import IMAGE, NETWORKS, images, splits

AUTOENCODER = {part: NETWORKS[part] for part in ("encoder", "generator")}
ADVERSARIAL = {part: NETWORKS[part] for part in ("generator", "critic")}
METHOD = DeltaVae(latent_dim=3, networks=AUTOENCODER, warmup_steps=0, noise_decay_every=2)
SHORT = FitSettings(
    steps=4, batch_size=4, record_every=1, sample_every=2, save_every=3, held_out_examples=6
)  # fmt: skip
QUIET = {"quiet": True, "tensorboard": False}


def leaves_of(run):
    state = dataclasses.replace(run.state, key=jax.random.key_data(run.state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def records_of(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second", "waiting_share")} for line in lines
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    seen = []
    run = fit(
        METHOD, splits(), path, dataclasses.replace(SHORT, mixture_samples=True), about={"experiment": "mine"},
        quiet=True,
        on_log=lambda step, metrics: seen.append(step), extra_results=lambda run, data: {"mine": len(data["train"])},
    )  # fmt: skip
    assert seen == [1, 2, 2, 3, 4, 4]
    return run


def test_a_run_leaves_what_it_promises(finished):
    path, results = finished.path, json.loads((finished.path / "results.json").read_text())
    assert results == json.loads(json.dumps(finished.results))
    bits = -results["held_out_elbo_nats"] / (64 * np.log(2))
    assert results["held_out_bits_per_dim"] == pytest.approx(bits, rel=1e-5)
    assert results["held_out_elbo_standard_error"] > 0
    expected = {
        "experiment": "mine", "objective": "spread_elbo", "noise": "gaussian", "steps": 4, "steps_of_all_players": 4,
        "batch_size": 4, "mine": 24, "train_images": 24, "held_out_images": 6,
    }  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    assert results["noise_scale"] == pytest.approx(0.5 * 0.9**2)
    for name in ("samples", "reconstructions", "interpolations", "curves", "samples/step_000002", "samples_mixture"):
        with Image.open(path / f"{name}.png") as picture:
            assert min(picture.size) > 60
    assert (path / "report.html").read_text().count("<img") == 2 + 4
    assert list((path / "tensorboard").iterdir())
    config = json.loads((path / "config.json").read_text())
    assert config["method"]["latent_dim"] == 3
    assert config["method"]["networks"]["generator"].startswith("Generator(")
    records = records_of(path)
    assert [line["step"] for line in records if "elbo" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in records if "validation_elbo_nats" in line] == [2, 4]


def test_samples_are_drawn_from_the_mixture_that_the_run_ended_with(finished, tmp_path):
    again = open_run(finished.path, networks=AUTOENCODER)
    for mine, theirs in zip(again.latents, finished.latents, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    drawn = sample(again, 5, seed=3)
    np.testing.assert_array_equal(drawn, sample(again, 5, seed=3, latents=finished.latents.sample))
    of_prior = sample(again, 5, seed=3, latents="prior")
    assert np.abs(drawn - of_prior).max() > 1e-4
    np.testing.assert_array_equal(of_prior, sample(Trained(again.method, again.state), 5, seed=3))
    narrow = finished.latents.narrowed(0.25).sample
    np.testing.assert_array_equal(sample(again, 5, seed=3, truncation=0.25), sample(again, 5, seed=3, latents=narrow))
    drawn = sample(again, 5, seed=3, latents="prior", truncation=0.25)
    np.testing.assert_array_equal(drawn, sample(again, 5, latents=0.25 * prior_latents(3, 5, 3)))
    with pytest.raises(ValueError, match=r"truncation must be in \(0, 1\], got 0"):
        sample(again, 5, truncation=0)
    with pytest.raises(ValueError, match=r"truncation must be 1 for latents of your own, got 0.5"):
        sample(again, 5, latents=np.zeros((5, 3)), truncation=0.5)
    with pytest.raises(ValueError, match=r"factor must be in \(0, 1\], got 2"):
        finished.latents.narrowed(2)
    with pytest.raises(ValueError, match="latents must be \"prior\", an array or a sampler, got 'posterior'"):
        sample(again, 5, latents="posterior")
    # Of another step there is none; what cannot be read is refused and not passed over.
    assert open_run(finished.path, networks=AUTOENCODER, step=3).latents is None
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    (copy / "latents_000004.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"latents_000004.npz cannot be used: .*Remove it"):
        open_run(copy, networks=AUTOENCODER)
    wider = fit_mixture(Posteriors(np.zeros((9, 5)), np.ones((9, 5))), components=1, seed=0)
    (copy / "latents_000004.npz").write_bytes(wider.to_bytes())
    with pytest.raises(UsageError, match=r"of another run: its latents have 5 dimensions, and this run's have 3"):
        open_run(copy, networks=AUTOENCODER)


def test_a_finished_run_is_read_back_by_its_own_networks(finished, tmp_path):
    (finished.path / "report.html").unlink()  # as a crash after results.json leaves it
    again = fit(METHOD, splits(), finished.path, SHORT, about={"experiment": "mine"}, **QUIET)
    assert "<img" in (finished.path / "report.html").read_text()
    opened = open_run(finished.path, networks=AUTOENCODER)
    assert again.results == opened.results == json.loads((finished.path / "results.json").read_text())
    for run in (again, opened):
        for mine, theirs in zip(leaves_of(run), leaves_of(finished), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert opened.method == finished.method
    assert repr(opened).startswith("Trained(spread_elbo, step 4")
    message = "own networks for: encoder, generator; pass these as networks"
    with pytest.raises(UsageError, match=message):
        open_run(finished.path)
    with pytest.raises(UsageError, match="it trained 'spread_elbo', and the method given is 'wae_mmd'"):
        open_run(finished.path, method=WaeMmd())
    with pytest.raises(UsageError, match=r"is not a run's folder: it has no config\.json"):
        open_run(tmp_path)
    other = dataclasses.replace(METHOD, latent_dim=2, networks={})
    with pytest.raises(RunDirectoryError, match=r"method\.latent_dim: saved 3, now 2"):
        fit(dataclasses.replace(other, image_shape=(16, 16, 1)), splits(shape=(16, 16, 1)), finished.path, SHORT,
            about={"experiment": "mine"}, **QUIET)  # fmt: skip


def test_it_resumes_in_the_middle_of_a_critics_turn_to_the_same_bits(tmp_path):
    """A round of 1 + 3: 3 steps of the model are 9 of all; it is stopped after 6, in the second turn of the critic."""
    gan = SpreadGan(latent_dim=3, networks=ADVERSARIAL, critic_steps=3, noise=NOISES["low_rank"], warmup_steps=0,
                    final_learning_rate_fraction=1.0)  # fmt: skip
    gan = dataclasses.replace(gan, noise=dataclasses.replace(gan.noise, rank=2))
    settings = dataclasses.replace(SHORT, steps=3, save_every=6, sample_every=6)

    class Stop(Exception):
        pass

    def stop(step, metrics):
        if step == 7:
            raise KeyboardInterrupt

    unbroken = fit(gan, splits(), tmp_path / "unbroken", settings, pictures=False, **QUIET)
    assert int(unbroken.state.step) == 9
    assert gan.turns.begins_turn(1, 5)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it everything in its frames
        fit(gan, splits(), tmp_path / "run", settings, pictures=False, on_log=stop, **QUIET)
    assert "spread_jax-loader" not in {thread.name for thread in threading.enumerate()}
    del kept
    run = fit(gan, splits(), tmp_path / "run", settings, pictures=False, **QUIET)
    for mine, theirs in zip(leaves_of(run), leaves_of(unbroken), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert records_of(run.path) == records_of(unbroken.path)
    assert not run.has_encoder
    for function in (encode, reconstruct):
        with pytest.raises(ValueError, match="has no encoder"):
            function(run, images(0))


def test_more_steps_than_it_was_to_have_are_told_of(tmp_path, capsys):
    wae = WaeMmd(latent_dim=3, networks=AUTOENCODER)
    short, long = (dataclasses.replace(SHORT, steps=steps) for steps in (3, 5))
    fit(wae, splits(), tmp_path / "run", short, pictures=False, tensorboard=False)
    assert fit(wae, splits(), tmp_path / "run", long, pictures=False, tensorboard=False).results["steps"] == 5
    err = capsys.readouterr().err
    assert "the learning rate had decayed over 3 steps so far: from step 3 on it follows the decay of 5 steps" in err
    assert "finished" not in err
    (tmp_path / "run/results.json").unlink()
    with pytest.raises(SettingError, match="steps must be at least 5, where the run is, got 4"):
        fit(wae, splits(), tmp_path / "run", dataclasses.replace(SHORT, steps=4), pictures=False, **QUIET)
    assert json.loads((tmp_path / "run/config.json").read_text())["fit"]["steps"] == 5  # as before the refusal
    (tmp_path / "run/results.json").write_text('{"steps": "many"}')
    with pytest.raises(RunDirectoryError, match=r"results\.json is damaged: its steps are"):
        fit(wae, splits(), tmp_path / "run", long, pictures=False, **QUIET)


def test_a_loss_that_is_no_number_stops_with_checkpoint_and_hint(tmp_path):
    wild = dataclasses.replace(METHOD, learning_rate=1e30)
    settings = dataclasses.replace(SHORT, steps=30, save_every=1)
    with pytest.raises(UsageError) as refusal:
        fit(wild, splits(), tmp_path / "run", settings, pictures=False, **QUIET)
    message = str(refusal.value)
    assert "not finite" in message
    assert "last good checkpoint is step" in message
    assert "--learning-rate (now 1e+30)" in message
    assert not (tmp_path / "run/results.json").exists()


def test_samples_depend_on_seed_and_index_alone(finished):
    few, many = (sample(finished, num, seed=1) for num in (3, 70))
    assert few.shape == (3, *IMAGE)
    np.testing.assert_array_equal(few, many[:3])
    assert np.abs(sample(finished, 3, seed=2) - few).max() > 0
    assert np.abs(sample(finished, 3, seed=1, last_step=True) - few).max() > 0
    z = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(sample(finished, 2, latents=z), sample(finished, 2, latents=lambda num, key: z))
    for arguments, message in (
        ({"num": 0}, "num must be at least 1"),
        ({"num": 3, "latents": z}, r"latents must have shape \(3, 3\), got \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(finished, **arguments)


def test_images_are_encoded_and_reconstructed(finished):
    found = encode(finished, images(7, 70), seed=2)
    seen, rebuilt = reconstruct(finished, images(7, 70) / np.float32(255), seed=2)
    assert found.mean.shape == found.std.shape == (70, 3)
    np.testing.assert_allclose(found.seen, seen, atol=1e-6)
    np.testing.assert_allclose(rebuilt, sample(finished, 70, latents=found.mean, last_step=True), atol=1e-6)
    with pytest.raises(ValueError, match=r"images must have shape \(n, \*\(8, 8, 1\)\)"):
        encode(finished, images(0, shape=(9, 9, 1)))


def test_densities_of_latents(finished):
    """Against NumPy: a mixture of one Gaussian has the moments of its draws; a flow starts from those of q(z)."""
    found = posteriors(finished, splits(size=200)["train"], count=200, seed=1)
    draws = found.draw(jax.random.key(0)).astype(np.float64)
    one = fit_mixture(found, components=1, seed=0)
    mean, covariance = draws.mean(axis=0), np.cov(draws.T, ddof=0) + 1e-4 * np.eye(3)
    z = np.random.default_rng(0).normal(size=(5, 3))
    solved = np.linalg.solve(covariance, (z - mean).T).T
    want = -0.5 * (((z - mean) * solved).sum(axis=1) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(one.log_density(z), want, rtol=1e-4)
    drawn = one.sample(20_000, jax.random.key(1))
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=6 * np.sqrt(np.diag(covariance) / 20_000).max())
    flow = fit_flow(found, found, seed=0, steps=20, couplings=2, width=4, evaluations=2)
    assert flow.sample(7, jax.random.key(0)).shape == (7, 3)
    # A density integrates to 1: its expectation under draws of the mixture, weighed.
    wide = fit_mixture(found._replace(std=4 * found.std), components=1, seed=0)
    u = wide.sample(20_000, jax.random.key(2))
    weights = np.exp(flow.log_density(u) - wide.log_density(u))
    assert abs(weights.mean() - 1) < 6 * weights.std() / np.sqrt(len(weights))
    with pytest.raises(ValueError, match="components must be from 1 to 200, the number of images, got 201"):
        fit_mixture(found, components=201, seed=0)
    assert fitted_latents(finished, splits()["train"], components=2).sample(4, jax.random.key(0)).shape == (4, 3)


def test_an_evaluation_has_what_its_method_can_tell(finished, tmp_path):
    data = splits(size=32)
    settings = EvaluateSettings(feature_steps=2, latent_examples=20, importance_examples=4, importance_samples=2,
                                mixture_components=2,
                                annealed_examples=4, annealed_steps=2, annealed_chains=2)  # fmt: skip
    said = []
    numbers, rows = evaluate(finished, data, settings, cache_dir=str(tmp_path), say=said.append)
    assert rows.shape == (8, 6, *IMAGE)
    expected = {
        "frechet_distance", "real_frechet_distance", "prior_frechet_distance", "coverage", "sharpness",
        "importance_bound_nats", "annealed_log_likelihood_nats", "memorised_share", "noise_scale",
    }  # fmt: skip
    assert expected <= set(numbers)
    assert numbers["step"] == 4
    assert numbers["samples"] == 32
    assert any("latents from a mixture, against 32" in sentence for sentence in said)
    # Without a mixture of its own the samples are the prior's, and those of a fitted mixture stand beside them.
    others, _ = evaluate(
        Trained(finished.method, finished.state), data,
        dataclasses.replace(settings, importance_examples=0, annealed_examples=0), cache_dir=str(tmp_path),
        say=said.append,
    )  # fmt: skip
    assert others["frechet_distance"] == numbers["prior_frechet_distance"] != others["mixture_frechet_distance"]
    assert any("latents from a fitted mixture" in sentence for sentence in said)
    wae = fit(WaeMmd(latent_dim=3, networks=AUTOENCODER), data, tmp_path / "wae",
              dataclasses.replace(SHORT, steps=1), pictures=False, **QUIET)  # fmt: skip
    numbers, _ = evaluate(wae, data, dataclasses.replace(settings, mixture_components=0), cache_dir=str(tmp_path))
    assert not {name for name in numbers if "nats" in name or "mixture" in name or name == "noise_scale"}
    with pytest.raises(SettingError, match="samples must be at least 16, got 3"):
        evaluate(wae, data, EvaluateSettings(samples=3))
    with pytest.raises(UsageError, match="16 of each are needed"):
        evaluate(wae, splits(size=8), settings)


class Grey(nn.Module):
    """A generator of the caller's, for photographs of 16 pixels."""

    @nn.compact
    def __call__(self, z):
        return nn.sigmoid(nn.Dense(16 * 16 * 3)(z)).reshape(-1, 16, 16, 3)


def test_a_folder_of_photographs_and_a_generator_of_the_callers_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(images(0, 60, (20, 24, 3))):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    data = DataSettings(str(tmp_path / "photos"), image_size=16)
    method = WaeMmd(latent_dim=3, width=2, networks={"generator": Grey()})
    settings = dataclasses.replace(SHORT, steps=1, batch_size=2, held_out_examples=1)
    run = fit(method, data, tmp_path / "run", settings, pictures=False, **QUIET)
    assert run.method.image_shape == (16, 16, 3)
    assert sample(open_run(tmp_path / "run", networks={"generator": Grey()}), 2).shape == (2, 16, 16, 3)


BAD = {
    "zero steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "seed": ({"seed": -1}, "seed must be at least 0, got -1"),
    "devices": ({"devices": 64}, "devices = 64 .* at most .* To make devices of a CPU, set XLA_FLAGS"),
    "model parallel": ({"model_parallel": 3}, "devices = all with model_parallel = 3: model_parallel must divide"),
    "parts": ({"batch_size": 8, "accumulate": 3}, "batch_size must be a multiple of 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(SettingError, match=message):
        fit(METHOD, splits(), tmp_path / "run", dataclasses.replace(SHORT, **changes), **QUIET)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_work_is_refused_before_anything_is_written(tmp_path):
    some = splits()
    del some["test"]
    cases = [
        (METHOD, some, "data must have the splits train, validation, test; test is missing"),
        (METHOD, splits(shape=(48, 48, 1)), r"networks\['generator'\] must return"),
        (WaeMmd(latent_dim=3, networks=AUTOENCODER), splits(), "batch_size must be at least 2 for Wasserstein"),
        (DeltaVae(), splits(shape=(48, 48, 1)), "image_size = 48 has no usual networks"),
    ]  # fmt: skip
    for method, data, message in cases:
        with pytest.raises(SettingError, match=message):
            fit(method, data, tmp_path / "run", dataclasses.replace(SHORT, batch_size=1), **QUIET)
    with pytest.raises(Exception, match="24"):
        fit(METHOD, splits(), tmp_path / "run", dataclasses.replace(SHORT, batch_size=25), **QUIET)
    assert not (tmp_path / "run").exists()
