"""The PCA experiment with tiny settings: its claims, what it leaves behind, and bad input."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from experiments import pca
from spread_jax.cli import launch

SETTINGS = {"num_examples": 300, "dimensions": 6, "components": 2, "min_scale": 0.04, "scales": 4, "starts": 2}
SETTINGS |= {"max_steps": 20_000}


def run(workdir, capsys, **settings):
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert pca.main(["--workdir", str(workdir), *flags]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert results == json.loads((workdir / "results.json").read_text())
    return results, err


def test_spreading_unfreezes_em_without_bias(tmp_path, capsys):
    results, err = run(tmp_path / "run", capsys, **SETTINGS)
    # The error's last ratio still holds a little of the faster modes.
    assert results["largest_relative_gap_of_contraction"] < 0.02
    assert results["growth_exponent_of_ordinary_steps"] == pytest.approx(-2, abs=0.5)  # the start's error varies
    assert results["ordinary_steps_at_smallest_gamma"] > 20 * results["spread_steps_at_smallest_gamma"]
    assert results["spread_error"] < 1e-12
    assert results["one_sided_error"] == pytest.approx(results["one_sided_error_theory"], rel=1e-6)
    assert results["one_sided_error"] > 0.2
    for row in results["over_sigma"]:
        assert row["spread_variance"] == pytest.approx(1)
        assert row["one_sided_variance"] < 1
    with open(tmp_path / "run/curves.csv", encoding="utf-8") as file:
        curves = list(csv.DictReader(file))
    # The subspace is found at once by the very EM that freezes.
    frozen = [row for row in curves if row["method"] == "ordinary" and float(row["gamma"]) == pytest.approx(0.04)]
    after = {int(row["steps"]): row for row in frozen}
    assert float(after[3]["sine"]) < 1e-4
    assert float(after[3]["error"]) > 0.1
    text = (tmp_path / "run/table.md").read_text()
    assert text in err
    assert text.count("\n| ") == 4 + 4 + 1
    with Image.open(tmp_path / "run/pca.png") as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10  # not blank
    again, err = run(tmp_path / "run", capsys, **SETTINGS)
    assert again == results
    assert "is finished" in err


BAD = [
    ("seed", -1, "--seed must be at least 0, got -1"),
    ("scales", 1, "--scales must be at least 2, got 1"),
    ("components", 20, "--dimensions must be at least 21, got 20"),
    ("tolerance", 0, "--tolerance must be positive and finite, got 0.0"),
    ("min-scale", 0.5, "--min-scale must be below --max-scale and --spread-scale, got 0.5"),
]


@pytest.mark.parametrize(("flag", "value", "sentence"), BAD)
def test_bad_input_gets_a_sentence(flag, value, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.run_program(lambda: pca.main([f"--{flag}", str(value), "--workdir", str(tmp_path / "run")]))
    assert stopped.value.code == 1
    assert f"error: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
