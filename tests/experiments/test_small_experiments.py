"""The small experiments with tiny settings: their scientific claim, what they leave behind, and bad input."""

import csv
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import bias, deltas, manifold
from spread_jax.cli import launch
from spread_jax.training import RunDirectoryError


def run(module, workdir, capsys, **settings):
    """Runs an experiment in this process; its results, which are also the last line printed."""
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert module.main(["--workdir", str(workdir), *flags]) == 0
    out, err = capsys.readouterr()
    last = out.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    results = json.loads(last.removeprefix("RESULT "))
    assert results == json.loads((workdir / "results.json").read_text())
    assert json.loads((workdir / "config.json").read_text())["seed"] == results["seed"]
    assert results["versions"]["jax"] == jax.__version__
    assert 'id="figures"' in (workdir / "report.html").read_text()
    return results, err


def assert_is_a_picture(path):
    with Image.open(path) as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10  # not blank


def assert_finished_or_refused(module, workdir, capsys, results, settings):
    """The same command says that the run is finished, another configuration is refused."""
    again, err = run(module, workdir, capsys, **settings)
    assert again == results
    assert "is finished" in err
    with pytest.raises(RunDirectoryError, match="seed: saved"):
        run(module, workdir, capsys, **{**settings, "seed": 77})


def rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_deltas_estimates_agree_with_closed_forms(tmp_path, capsys):
    settings = {"points": 3, "num_samples": 500, "seed": 1}
    results, err = run(deltas, tmp_path / "run", capsys, **settings)
    # Of 70 standard normal numbers one exceeds 5 in 25,000 runs; the tails of the integrands add a little.
    assert 0 < results["largest_deviation"] < 5
    assert "largest deviation" in err
    assert results["quadrature_against_closed_form"] < 1e-4
    spread = results["spread_divergences_exact"]
    assert spread["Gaussian"]["KL"] == pytest.approx(0.5, rel=1e-6)
    assert spread["Laplace"]["KL"] == pytest.approx(math.exp(-1), rel=1e-6)
    points = rows(tmp_path / "run/points.csv")
    assert len(points) == results["estimates"]
    assert {r["divergence"] for r in points} == set(deltas.DIVERGENCES)
    # Finite everywhere, growing with the distance, falling with the noise.
    for swept, sign in (("distance", 1), ("scale", -1)):
        kl = [
            float(r["exact"]) for r in points if (r["noise"], r["divergence"], r["swept"]) == ("Laplace", "KL", swept)
        ]
        assert np.isfinite(kl).all()
        assert (sign * np.diff(kl) > 0).all()
    assert_is_a_picture(tmp_path / "run/deltas.png")
    assert_finished_or_refused(deltas, tmp_path / "run", capsys, results, settings)


def test_manifold_is_recovered(tmp_path, capsys):
    settings = {"num_examples": 1000, "steps": 1000, "bound_steps": 200, "batch_size": 128, "width": 32}
    results, _ = run(manifold, tmp_path / "run", capsys, num_samples=1000, **settings)
    before, after = results["before"], results["after"]
    # Seeds 0, 1, 2 give 0.57, 0.30, 0.18 -> 0.056, 0.045, 0.054 and 0.78, 0.97, 0.95 -> 0.079, 0.080, 0.081.
    assert before["samples_to_surface"] > 0.15
    assert after["samples_to_surface"] < 0.09
    assert before["surface_to_samples"] > 0.6
    assert 0.8 * results["surface_to_true_samples"] < after["surface_to_samples"] < 0.13
    assert_is_a_picture(tmp_path / "run/manifold.png")


def test_distance_to_the_sheet_is_zero_on_it_and_known_beside_it():
    data = manifold.draw_data(200, 0)
    assert manifold.distance_to_sheet(data).max() < 2e-3
    beside = data + np.float32([0, 3, 0])
    np.testing.assert_allclose(manifold.distance_to_sheet(beside), np.abs(beside[:, 1]) - 1, atol=2e-3)


def test_bias_of_one_side_and_none_of_both(tmp_path, capsys):
    settings = {"datasets": 12, "num_examples": 200, "scales": 2, "max_scale": 1.2, "steps": 500}
    settings |= {"learning_rate": 0.05, "seed": 2}
    results, err = run(bias, tmp_path / "run", capsys, **settings)
    table = {(row["method"], row["sigma"]): row for row in results["table"]}
    assert len(table) == 4 * 2
    for (method, _), row in table.items():
        # Five standard errors; the trained estimates besides stop within 0.03 of each bound's maximum.
        assert abs(row["mean"] - row["maximiser"]) < 0.03, row
        assert abs(row["mean"] - row["population"]) < 5 * row["standard_error"] + 0.03, row
        if method == "both":
            assert abs(row["bias"]) < 5 * row["standard_error"], row
        else:
            assert row["bias"] < -0.2, row
    assert results["bias_model"] == pytest.approx(-1, abs=0.05)  # sigma = 1.2 exceeds |a|: the model collapses
    assert len(rows(tmp_path / "run/estimates.csv")) == 4 * 2 * 12
    text = (tmp_path / "run/table.md").read_text()
    assert text.count("\n| ") == 2
    assert text in err
    assert_is_a_picture(tmp_path / "run/bias.png")


BAD = [
    (deltas, "num-samples", 99, "--num-samples must be at least 100, got 99"),
    (deltas, "points", 1, "--points must be at least 2"),
    (deltas, "seed", -1, "--seed must be at least 0, got -1"),
    (deltas, "scale", 0, "--scale must be positive and finite, got 0.0"),
    (deltas, "distance", "inf", "--distance must be positive and finite, got inf"),
    (deltas, "max-distance", "nan", "--max-distance must be positive and finite, got nan"),
    (bias, "datasets", 1, "--datasets must be at least 2, got 1"),
    (bias, "steps", 0, "--steps must be at least 1, got 0"),
    (bias, "max-scale", -1, "--max-scale must be positive and finite, got -1.0"),
    (bias, "decoder-scale", 0, "--decoder-scale must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(("module", "flag", "value", "sentence"), BAD)
def test_bad_input_gets_a_sentence(module, flag, value, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.run_program(lambda: module.main([f"--{flag}", str(value), "--workdir", str(tmp_path / "run")]))
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert f"error: {sentence}" in err
    assert "RESULT" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [bias, deltas, manifold])
def test_an_unknown_flag_suggests_the_nearest(module, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--worksdir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--workdir" in capsys.readouterr().err


def test_ctrl_c_gets_a_sentence(capsys):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        launch.run_program(stopped)
    assert end.value.code == 130
    assert "Repeat the command" in capsys.readouterr().err
