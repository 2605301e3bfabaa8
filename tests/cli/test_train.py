"""Training as a user runs it: results, exact resume through kills, stopping, flags, bad input."""

import dataclasses
import importlib.metadata
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

from experiments import celeba
from spread_jax.cli import COMMANDS, train
from spread_jax.cli.flags import parse_training
from spread_jax.cli.launch import run_program
from spread_jax.errors import UsageError
from spread_jax.models import METHODS, NOISES, PRESETS, DeltaVae, SpreadGan, WaeMmd, open_run, with_preset

REPOSITORY = Path(__file__).parents[2]
PAPER = ("--objective", "spread_elbo")  # of which there is most to see: noise that decays, a bound
TINY = {
    "steps": 12,
    "image_size": 16,
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


def flags(workdir, **changes):
    settings = {"workdir": workdir, **TINY, **changes}
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def environment(shared):
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "src")))
    return {**os.environ, "SPREAD_JAX_CACHE": str(shared), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def start(shared, workdir, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.celeba", "--preset", "demo", *PAPER, *flags(workdir, **changes)],
        cwd=REPOSITORY,
        env=environment(shared),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def run(shared, monkeypatch, capsys):
    """The program in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(train, "configure", lambda: None)
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(shared))

    def call(workdir, *more, program=celeba.main, **changes):
        with pytest.raises(SystemExit) as end:
            run_program(lambda: program(["--preset", "demo", *PAPER, *flags(workdir, **changes), *more]))
        return (end.value.code, *capsys.readouterr())

    return call


def final_leaves(workdir):
    """The last state of a run, as named arrays."""
    state = open_run(workdir).state
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.asdict(state))
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


@pytest.fixture(scope="module")
def unbroken(shared, tmp_path_factory):
    """A run from start to end in a process of its own, what the others must equal."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    code, out, err = finish(start(shared, workdir))
    assert code == 0, err
    return workdir, out


def test_a_run_prints_what_it_leaves(unbroken):
    workdir, out = unbroken
    results = json.loads(out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert results == json.loads((workdir / "results.json").read_text())
    assert results["experiment"] == "celeba"
    assert results["preset"] == "demo"
    assert results["versions"]["jax"] == jax.__version__
    scales = [line["noise_scale"] for line in recorded(workdir) if "elbo" in line]
    assert scales[0] == pytest.approx(0.5)
    assert scales[-1] == pytest.approx(0.5 * 0.9**3)
    bounds = [line["validation_elbo_nats"] for line in recorded(workdir) if "validation_elbo_nats" in line]
    # The noise scale falls between the two, so the later bound is far higher for a working model.
    assert bounds[1] > bounds[0]


def test_a_finished_run_says_so_and_runs_longer_when_asked(unbroken, run, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    code, out, err = run(tmp_path / "run")
    assert code == 0
    assert "is finished (12 steps)" in err
    assert out == unbroken[1].splitlines()[-1] + "\n"
    (tmp_path / "down.py").write_text("def log(step, metrics): raise ConnectionError('no server')")
    code, out, err = run(tmp_path / "run", steps=15, on_log=f"{tmp_path}/down.py:log")
    assert code == 0, err
    assert "resuming" in err
    assert "the learning rate had decayed over 12 steps so far" in err
    assert err.count("metrics.jsonl continues: ConnectionError: no server") == 1
    assert "down.py" not in (tmp_path / "run/config.json").read_text()  # a folder from elsewhere must name no code
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
    code, _, err = finish(start(shared, workdir, save_every=1))
    assert code == 0, err
    assert resumed or "resuming" in err or "is finished" in err
    assert_same_run(workdir, unbroken[0])


def test_asked_to_stop_it_saves_and_resumes_bit_exact(unbroken, shared, tmp_path):
    """By SIGTERM; `tests/training/test_loop.py` sends both signals to the loop."""
    workdir = tmp_path / "run"
    process = start(shared, workdir, save_every=1000)
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    if code == 0:
        pytest.skip("the run ended before the signal came")
    assert code == 128 + signal.SIGTERM
    assert "repeat the command to continue" in err
    assert "RESULT" not in out
    assert list((workdir / "checkpoints").iterdir())
    code, _, err = finish(start(shared, workdir, save_every=1000))
    assert code == 0, err
    assert_same_run(workdir, unbroken[0])


def test_a_damaged_checkpoint_is_set_aside_and_the_run_still_ends_the_same(unbroken, shared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    (workdir / "results.json").unlink()
    largest = max((workdir / "checkpoints/12").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    code, _, err = finish(start(shared, workdir))
    assert code == 0, err
    assert "12" in err
    assert "resuming" in err
    assert "after step 9" in err
    assert_same_run(workdir, unbroken[0])


BAD = {
    "unknown flag": ({"batch_sizes": 3}, 2, "--batch-size"),
    "missing path": ({"data": "/no/such/folder"}, 1, "nor a path that exists"),
    "batch too large": ({"batch_size": 25}, 1, "24"),
    "zero steps": ({"steps": 0}, 1, "--steps must be at least 1, got 0"),
    "odd width": ({"width": 3}, 1, "--width must be an even number"),
    "image size": ({"image_size": 48}, 1, "--image-size = 48 has no usual networks"),
    "rising noise": ({"final_noise_scale": 0.9}, 1, "--final-noise-scale must be positive and at most"),
    "workdir is a file": ({"workdir": __file__}, 1, "is a file"),
    "workdir is something else": ({"workdir": REPOSITORY / "tests"}, 1, "is not a run's folder"),
    "a critic for a VAE": ({"objective": "elbo", "critic_steps": 2}, 2, "--critic-steps"),
    "a rank for fixed noise": ({"rank": 2}, 2, "--rank"),
    "a learned noise for a VAE": ({"objective": "elbo", "noise": "low_rank"}, 1, "--noise must be fixed, got low_rank"),
    "no objective": ({"objective": "elb"}, 2, "elbo"),
    "low variance": ({"objective": "importance", "low_variance": True}, 2, "--low-variance"),
    "one image for the WAE": ({"objective": "spread_gan", "num_latent_samples": 2}, 2, "--num-latent-samples"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, run, tmp_path):
    changes, expected, message = BAD[name]
    settings = {"workdir": tmp_path / "run", **changes}
    code, _, err = run(settings.pop("workdir"), **settings)
    assert code == expected
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_noise_for_a_method_without_any_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="--objective wae_mmd uses no noise: leave --noise laplace out"):
        parsed("--objective", "wae_mmd", "--noise", "laplace")


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
    assert time.monotonic() - start_time < 30  # Python and jax start in some seconds, the check takes two


def test_a_changed_config_is_refused_with_the_keys(unbroken, run):
    code, _, err = run(unbroken[0], seed=4, latent_dim=5)
    assert code == 1
    assert "method.latent_dim: saved 3, now 5" in err
    assert "seed: saved 0, now 4" in err


def test_two_runs_cannot_share_a_folder(shared, run, tmp_path):
    first = start(shared, tmp_path / "run", steps=2000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/config.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _, err = run(tmp_path / "run", steps=2000)
    first.kill()
    finish(first)
    assert code == 1
    assert f"is in use by process {first.pid}" in err


# --- flags


def parsed(*argv, **options):
    return parse_training(list(argv), prog="x", description="", presets=PRESETS, default="demo", **options)


def test_presets_are_read_with_flags_over_them():
    found = parsed("--preset", "published", "--width", "8", "--noise", "low_rank", "--rank", "3")
    want = with_preset(DeltaVae(noise=NOISES["low_rank"]), PRESETS["published"])
    assert found.method == dataclasses.replace(want, width=8, noise=dataclasses.replace(want.noise, rank=3))
    assert (found.fit.steps, found.fit.batch_size, found.data.data) == (81_400, 100, "celeb_a")
    assert want.noise.noise_learning_rate == 1e-5
    gan = parsed("--objective=spread_gan", "--critic-steps", "3")
    assert gan.method == SpreadGan(critic_steps=3)
    assert (parsed().objective, parsed("--noise", "laplace").objective) == ("density_ratio", "spread_elbo")
    assert parsed("--objective", "wae_mmd").method == WaeMmd()


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        parsed(*argv, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_settings_of_one_method_in_groups(capsys):
    usual = help_of(capsys, *PAPER)
    assert all(name in usual for name in METHODS)
    for flag in ("--low-variance", "--noise-scale", "--steps", "--image-size", "--workdir"):
        assert flag in usual
    for flag in ("--critic", "--rank", "--mmd-weight", "--networks", "--image-shape"):
        assert flag not in usual
    adversarial = help_of(capsys, "--objective", "spread_gan", "--noise", "low_rank")
    for flag in ("--critic-steps", "--rank", "--noise-learning-rate"):
        assert flag in adversarial
    assert "--low-variance" not in adversarial
    for group in ("method", "fit", "data", "run"):
        assert f"{group} options" in adversarial


def test_folders_tell_objective_and_noise():
    workdir = lambda *argv: str(train.default_workdir(parsed(*argv), "celeba", PRESETS))
    assert workdir() == "runs/celeba/demo-0"
    assert (
        workdir("--objective", "spread_gan", "--noise", "laplace", "--seed", "3")
        == "runs/celeba/demo-3-spread_gan-laplace"
    )
    assert workdir("--objective", "wae_mmd", "--preset", "small") == "runs/celeba/small-0-wae_mmd"
    assert workdir("--objective", "spread_elbo") == "runs/celeba/demo-0-spread_elbo"
    assert workdir("--noise", "low_rank") == "runs/celeba/demo-0-spread_elbo-low_rank"
    assert workdir("--preset", "published", "--noise", "low_rank") == "runs/celeba/published-0-low_rank"


def test_the_command_lists_its_commands():
    call = lambda *argv: subprocess.run(
        [sys.executable, "-m", "spread_jax.cli", *argv], capture_output=True, text=True, env=environment("/nowhere")
    )
    listed = call()
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in COMMANDS)
    assert call("--version").stdout.strip() == importlib.metadata.version("spread-jax")
    wrong = call("trian")
    assert wrong.returncode == 1
    assert "there is no command 'trian'; there are train, " in wrong.stderr
    assert "Did you mean train?" in wrong.stderr
