"""Several processes: what their environment says, and that two of them are one run."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from spread_jax.cli import sample, train
from spread_jax.models import open_run

ROOT = Path(__file__).parents[2]


# --- two processes, by the lines of the guide

FLAGS = {
    "width": 2,
    "latent_dim": 2,
    "batch_size": 8,
    "max_examples": 64,
    "held_out_examples": 8,
    "record_every": 1,
    "sample_every": 100_000,
    "save_every": 100_000,
    "objective": "density_ratio_vae",  # two players, an encoder, statistics of batches
    "final_learning_rate_fraction": 1.0,
    "encoder_learning_rate": 1e-5,
    "generator_learning_rate": 1e-5,
    "critic_learning_rate": 1e-5,
}


def flags(**more):
    pairs = {**FLAGS, **more}.items()
    return [str(part) for name, value in pairs for part in (f"--{name.replace('_', '-')}", value)]


def start_two(workdir, tmp_path, **more):
    """The guide's lines, with this address, folder and these flags."""
    page = (ROOT / "docs/guides/scaling.md").read_text(encoding="utf-8")
    lines = next(
        block for block in re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S) if "JAX_PROCESS_ID" in block
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for found, used in {
        "localhost:12345": f"localhost:{port}",
        "spread-jax train": f"{sys.executable} -m spread_jax.cli train",
        "--workdir runs/two": f"--workdir {workdir} {' '.join(flags(**more))}",
    }.items():
        assert found in lines
        lines = lines.replace(found, used)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "SPREAD_JAX_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))),
    }
    return subprocess.Popen(
        ["bash", "-c", lines], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def pid_of_the_first(workdir):
    return int(re.search(r"process (\d+)", (workdir / ".lock").read_text())[1])


def wait_for_steps(workdir, process, seconds=300):
    metrics = workdir / "metrics.jsonl"
    for _ in range(10 * seconds):
        if metrics.exists() and metrics.stat().st_size:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("no step")


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    names = ("model_loss", "critic_loss")
    return {
        (record["step"], name): record[name] for record in map(json.loads, lines) for name in names if name in record
    }


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "configure", lambda: None)
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(tmp_path / "cache"))
    arguments = ["--preset", "demo", "--data", "faces", "--image-size", "16", "--quiet"]
    return lambda workdir, steps: train.main([*arguments, *flags(steps=steps), "--workdir", str(workdir)])


@pytest.mark.slow
def test_two_processes_are_one_run_that_one_continues(tmp_path, in_this_process, monkeypatch, capsys):
    """A signal at one of them stops both after the same step; one goes on; all losses are those of one throughout."""
    workdir = tmp_path / "two"
    process = start_two(workdir, tmp_path, steps=100_000)
    try:
        wait_for_steps(workdir, process)
        os.kill(pid_of_the_first(workdir), signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    told = [int(step) for step in re.findall(r"Stopped by SIGTERM after step (\d+)\. The state is saved", err)]
    assert len(told) == 1, err  # the first process speaks for both
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [str(told[0])]

    steps = told[0] + 3
    assert in_this_process(workdir, steps) == in_this_process(tmp_path / "one", steps) == 0
    two, one = records(workdir), records(tmp_path / "one")
    assert set(two) == set(one)
    assert {step for step, _ in one} == set(range(1, 2 * steps))  # of the critic and the model in turn
    for place, loss in one.items():
        assert math.isclose(two[place], loss, rel_tol=1e-4), place
    assert jax.process_count() == 1

    # The run ends with the mixture that its samples are drawn from.
    run = open_run(workdir)
    assert run.latents.means.shape == (10, 2)
    np.testing.assert_allclose(run.latents.sample(500, jax.random.key(0)).std(axis=0), 1, atol=0.9)
    assert "z from a mixture" in json.loads((workdir / "figures.json").read_text())["samples.png"]["caption"]
    monkeypatch.setattr(sample, "configure", lambda: None)
    arguments = [str(workdir), "--num", "2", "--grid", str(tmp_path / "grid.png")]
    for told in (False, True):
        capsys.readouterr()
        assert sample.main(arguments) == 0
        assert ("--latents mixture fits one" in capsys.readouterr().err) == told
        (workdir / f"latents_{2 * steps - 1:06d}.npz").unlink(missing_ok=True)


@pytest.mark.skipif("SPREAD_JAX_KILLS" not in os.environ, reason="set SPREAD_JAX_KILLS to kill one of two processes")
def test_one_of_two_processes_is_killed(tmp_path):
    """The other ends within a minute and says why; the same lines resume from the last checkpoint."""
    workdir = tmp_path / "two"
    process = start_two(workdir, tmp_path, steps=100_000, save_every=20)
    try:
        checkpoints = workdir / "checkpoints"
        for _ in range(3000):
            if checkpoints.exists() and any(path.name.isdecimal() for path in checkpoints.iterdir()):
                break
            time.sleep(0.1)
        os.kill(pid_of_the_first(workdir), signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=90)
        assert time.monotonic() - began < 60
        assert "another process of the run has ended" in err or "distributed service" in err, err
        saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())

        process = start_two(workdir, tmp_path, steps=saved + 40, save_every=20)
        _, err = process.communicate(timeout=300)
        assert re.search(r"resuming .* after step \d+", err), err
        assert json.loads((workdir / "results.json").read_text())["processes"] == 2
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
