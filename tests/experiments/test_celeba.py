"""The experiment as a user runs it: results, exact resume through kills, stopping, bad input."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import _launch, celeba, sample
from spread_jax.training import Checkpointer

REPOSITORY = Path(__file__).parents[2]
TINY = {
    "steps": 12,
    "width": 2,
    "latent_dim": 3,
    "batch_size": 8,
    "max_examples": 24,
    "held_out_examples": 20,
    "record_every": 2,
    "sample_every": 6,
    "save_every": 3,
    "warmup_steps": 2,
    "final_noise_scale": 0.3,
    "noise_decay_every": 3,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One cache of decoded faces and compiled programs for the module."""
    return tmp_path_factory.mktemp("shared")


def command(workdir, **changes):
    settings = {"workdir": workdir, **TINY, **changes}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "experiments.celeba", "--preset", "demo", *flags]


def environment(shared):
    return {**os.environ, "SPREAD_JAX_CACHE": str(shared), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def start(shared, workdir, **changes):
    return subprocess.Popen(
        command(workdir, **changes),
        cwd=REPOSITORY,
        env=environment(shared),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(shared, workdir, **changes):
    return finish(start(shared, workdir, **changes))


def final_leaves(workdir):
    """The last state of a run, as named arrays."""
    model = celeba.Model(dataclasses.replace(celeba.PRESETS["demo"], **TINY), (64, 64, 3))
    with Checkpointer(Path(workdir) / "checkpoints") as saver:
        restored = saver.restore(jax.eval_shape(model.initial_state))
    assert restored.step == TINY["steps"]
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.asdict(restored.state))
    to_array = lambda v: jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v
    return {jax.tree_util.keystr(path): np.asarray(to_array(value)) for path, value in leaves}


def recorded(workdir):
    """What metrics.jsonl holds, less what depends on the clock."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "images_per_second", "waiting_share")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def assert_same_run(workdir, reference):
    for (name, value), expected in zip(final_leaves(workdir).items(), final_leaves(reference).values(), strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert recorded(workdir) == recorded(reference)
    mine, theirs = (json.loads((Path(w) / "results.json").read_text()) for w in (workdir, reference))
    for name in ("held_out_elbo_nats", "held_out_reconstruction_mse", "noise_scale", "steps"):
        assert mine[name] == theirs[name]


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def unbroken(shared, tmp_path_factory):
    """A run from start to end, what the others must equal."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    code, out, err = run(shared, workdir)
    assert code == 0, err
    return workdir, out


def test_a_run_leaves_everything_it_promises(unbroken):
    workdir, out = unbroken
    last = out.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    results = json.loads(last.removeprefix("RESULT "))
    assert results == json.loads((workdir / "results.json").read_text())
    promised = {
        "steps",
        "images_per_second",
        "held_out_elbo_nats",
        "held_out_bits_per_dim",
        "held_out_reconstruction_mse",
        "seed",
        "versions",
    }
    assert promised <= set(results)
    bits = -results["held_out_elbo_nats"] / (64 * 64 * 3 * np.log(2))
    assert results["held_out_bits_per_dim"] == pytest.approx(bits)
    assert results["versions"]["jax"] == jax.__version__
    for name in ("samples.png", "reconstructions.png", "interpolations.png", "curves.png", "samples/step_000006.png"):
        assert size_of(workdir / name) > (60, 60)
    page = (workdir / "report.html").read_text()
    assert page.count("<img") == 2 + 3  # two grids of samples over time, curves, reconstructions, interpolations
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["latent_dim"] == 3
    steps = [line["step"] for line in recorded(workdir) if "elbo" in line]
    assert steps == [2, 4, 6, 8, 10, 12]
    scales = [line["noise_scale"] for line in recorded(workdir) if "elbo" in line]
    assert scales[0] == pytest.approx(0.5)
    assert scales[-1] == pytest.approx(0.5 * 0.9**3)


def test_a_finished_run_says_so_and_runs_longer_when_asked(unbroken, shared, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    code, out, err = run(shared, tmp_path / "run")
    assert code == 0
    assert "is finished (12 steps)" in err
    assert out == unbroken[1].splitlines()[-1] + "\n"
    (tmp_path / "down.py").write_text("def log(step, metrics): raise ConnectionError('no server')")
    code, out, err = run(shared, tmp_path / "run", steps=15, on_log=f"{tmp_path}/down.py:log")
    assert code == 0, err
    assert "resuming" in err
    assert err.count("metrics.jsonl goes on: ConnectionError: no server") == 1
    assert [line["step"] for line in recorded(tmp_path / "run")][-1] == 15
    assert json.loads(out.removeprefix("RESULT "))["steps"] == 15


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_as_if_unbroken(unbroken, shared, tmp_path):
    """kill -9 and a restart, as tests/faults do it many times with a small model."""
    chance = random.Random(0)
    workdir = tmp_path / "run"
    resumed = 0
    for _ in range(int(os.environ.get("SPREAD_JAX_KILLS", "1"))):
        process = start(shared, workdir, save_every=1)
        deadline = time.monotonic() + 120
        newest = lambda: max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)
        before = newest()
        while newest() < before + 2 and process.poll() is None:  # the step before the newest is sealed
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        resumed += "resuming" in finish(process)[2]
    code, _, err = run(shared, workdir, save_every=1)
    assert code == 0, err
    assert resumed or "resuming" in err or "is finished" in err
    assert_same_run(workdir, unbroken[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_resumes_bit_exact(number, unbroken, shared, tmp_path):
    workdir = tmp_path / "run"
    process = start(shared, workdir, save_every=1000)
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    code, out, err = finish(process)
    if code == 0:
        pytest.skip("the run ended before the signal came")
    assert code == 128 + number
    assert "repeat the command to go on" in err
    assert "RESULT" not in out
    assert list((workdir / "checkpoints").iterdir())
    assert run(shared, workdir, save_every=1000)[0] == 0
    assert_same_run(workdir, unbroken[0])


def test_a_damaged_checkpoint_is_set_aside_and_the_run_still_ends_the_same(unbroken, shared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    (workdir / "results.json").unlink()
    largest = max((workdir / "checkpoints/12").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    code, _, err = run(shared, workdir)
    assert code == 0, err
    assert "12" in err
    assert "resuming" in err
    assert "after step 9" in err
    assert_same_run(workdir, unbroken[0])


def test_a_loss_that_is_not_finite_stops_with_step_checkpoint_and_hint(shared, tmp_path):
    # A learning rate of 1e30 overflows float32 within a few steps.
    code, out, err = run(shared, tmp_path / "run", learning_rate=1e30, save_every=1, warmup_steps=2)
    assert code == 1
    assert "is not finite" in err or "not finite" in err
    assert "last good checkpoint is step" in err
    assert "--learning-rate" in err
    assert "RESULT" not in out
    assert not (tmp_path / "run/results.json").exists()


BAD = {
    "unknown flag": ({"batch_sizes": 3}, 2, "--batch-size"),
    "missing path": ({"data": "/no/such/folder"}, 1, "nor a path that exists"),
    "batch too large": ({"batch_size": 25}, 1, "24"),
    "zero steps": ({"steps": 0}, 1, "--steps must be at least 1, got 0"),
    "odd width": ({"width": 3}, 1, "--width must be an even number"),
    "rising noise": ({"final_noise_scale": 0.9}, 1, "--final-noise-scale must be positive and at most --noise-scale"),
    "workdir is a file": ({"workdir": __file__}, 1, "is a file"),
    "workdir is something else": ({"workdir": REPOSITORY / "tests"}, 1, "is not a run's folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, shared, tmp_path):
    changes, expected, message = BAD[name]
    settings = {"workdir": tmp_path / "run", **changes}
    code, _, err = run(shared, settings.pop("workdir"), **settings)
    assert code == expected
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_celeba(shared, tmp_path):
    start_time = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "experiments.celeba", "--preset", "small", "--workdir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env={
            **environment(shared),
            "HOME": str(tmp_path),
            "TFDS_DATA_DIR": str(tmp_path),
            "https_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1
    assert "img_align_celeba.zip" in process.stderr
    assert "CELEBA=path" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start_time < 15  # Python and jax start in some seconds, the check takes two


def test_a_changed_config_is_refused_with_the_keys(unbroken, shared):
    code, _, err = run(shared, unbroken[0], seed=4, latent_dim=5)
    assert code == 1
    assert "latent_dim: saved 3, now 5" in err
    assert "seed: saved 0, now 4" in err


def test_two_runs_cannot_share_a_folder(shared, tmp_path):
    first = start(shared, tmp_path / "run", steps=2000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/config.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _, err = run(shared, tmp_path / "run", steps=2000)
    first.kill()
    finish(first)
    assert code == 1
    assert f"is in use by process {first.pid}" in err


def test_samples_depend_on_seed_and_index_alone(unbroken, tmp_path):
    model, variables, step = sample.load_generator(unbroken[0])
    assert step == 12
    few, many = (sample.draw(model, variables, num=n, seed=1) for n in (3, 70))
    assert few.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(few, many[:3])
    assert np.abs(sample.draw(model, variables, num=3, seed=2) - few).max() > 0


def test_sample_command(unbroken, shared, tmp_path):
    program = [sys.executable, "-m", "experiments.sample"]
    options = {"cwd": REPOSITORY, "env": environment(shared), "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*program, str(unbroken[0]), "--num", "3", "--folder", str(tmp_path / "out")], **options)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert size_of(tmp_path / "out/000000.png") == (64, 64)
    missing = subprocess.run([*program, str(tmp_path)], **options)
    assert missing.returncode == 1
    assert "is not a run's folder" in missing.stderr


def test_the_published_preset_is_the_papers():
    published = celeba.PRESETS["published"]
    assert (published.width, published.batch_size, published.learning_rate, published.beta1) == (128, 100, 1e-4, 0.5)
    assert (published.noise_scale, published.final_noise_scale) == (0.5, 0.5)
    assert published.latent_dim in (64, 100)
    assert published.start == 4


def test_presets_are_read_with_flags_over_them():
    config = _launch.parse(celeba.Config, celeba.PRESETS, "demo", ["--preset", "published", "--width", "8"])
    assert config == dataclasses.replace(celeba.PRESETS["published"], width=8)


def test_training_improves_the_held_out_bound_on_a_tiny_set(unbroken):
    bounds = [line["validation_elbo_nats"] for line in recorded(unbroken[0]) if "validation_elbo_nats" in line]
    assert len(bounds) == 2
    # The noise scale falls between the two, so the later bound is far higher for a working model.
    assert bounds[1] > bounds[0]
