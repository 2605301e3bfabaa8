"""experiments.ica with tiny settings: its claims, its files, resuming, and bad input."""

import csv
import json
import wave

import numpy as np
import pytest
from PIL import Image

from experiments import _ica_sounds, _launch, ica
from spread_jax.errors import UsageError


@pytest.fixture(autouse=True)
def no_global_settings(monkeypatch):
    """The compiler's flags and cache belong to a program, not to a test."""
    monkeypatch.setattr(_launch.runtime, "configure", lambda: None)


def run(workdir, capsys, *flags):
    assert ica.main(["--workdir", str(workdir), *map(str, flags)]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert results == json.loads((workdir / "results.json").read_text())
    return results, err


def assert_is_a_picture(path):
    with Image.open(path) as image:
        assert min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 10


SMALL = (
    # Both figures with programs of the same shapes.
    *("--dimensions", 5, "--sources", 3, "--num-examples", 1000, "--sweeps", 150, "--samples", 32, "--runs", 1),
    *("--gammas", 0.01, "--sizes", 1000, "--size-runs", 1, "--size-dimensions", 5, "--size-sources", 3),
    *("--size-sweeps", 150, "--size-samples", 32, "--size-gamma", 0.01),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ica") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch.runtime, "configure", lambda: None)
        assert ica.main(["--workdir", str(workdir), "--quiet", *map(str, SMALL)]) == 0
    return workdir


def test_standard_em_freezes_and_the_others_do_not(finished):
    with open(finished / "fits.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"] == "noise"]
    direction = {row["method"]: float(row["direction"]) for row in rows}
    bound = ica.cramer_rao(1000, 3, kind="direction")
    assert direction["em"] > 5 * bound
    assert direction["spread_em"] < 4 * bound
    for method in ("natural_gradient", "closed_form"):
        assert direction[method] < 2.5 * bound
    assert {"fastica", "picard"} <= set(direction)
    for name in ("errors.png", "time.png"):
        assert_is_a_picture(finished / name)
    assert "standard EM" in (finished / "table.md").read_text()


def test_a_stopped_run_continues(finished, tmp_path, capsys):
    # As a kill after the third fit leaves it.
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((finished / "config.json").read_bytes())
    records = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(records[:10]))
    results, err = run(workdir, capsys, *SMALL)
    assert "10 of 12 fits are done already" in err
    unbroken = json.loads((finished / "results.json").read_text())
    assert [row["raw"] for row in results["table"]] == [row["raw"] for row in unbroken["table"]]


def test_more_sources_than_dimensions(tmp_path, capsys):
    flags = ("--preset", "overcomplete", "--dimensions", 3, "--sources", 4, "--runs", 2, "--sweeps", 150)
    results, _ = run(tmp_path / "run", capsys, *flags, "--num-examples", 1000)
    assert results["median_direction_error"] < 0.35
    assert len(results["fits"]) == 2
    assert_is_a_picture(tmp_path / "run" / "overcomplete.png")


def test_filters_of_photographs_are_sparser_than_principal_components(tmp_path, capsys):
    flags = ("--preset", "images", "--patch", 6, "--sources", 16, "--num-examples", 4000)
    results, _ = run(tmp_path / "run", capsys, *flags)
    assert results["kurtosis_sources"] > results["kurtosis_principal_components"]
    assert_is_a_picture(tmp_path / "run" / "filters.png")


def test_sounds_are_unmixed(tmp_path, capsys):
    results, _ = run(tmp_path / "run", capsys, "--preset", "audio")
    assert min(results["decibels_unmixed"]) > 30 > max(results["decibels_of_the_best_microphone"])
    with wave.open(str(tmp_path / "run" / "unmixed_1.wav")) as file:
        assert file.getnframes() == 4 * _ica_sounds.RATE
    assert_is_a_picture(tmp_path / "run" / "sounds.png")


def test_given_sounds_are_mixed(tmp_path, capsys):
    names = [str(tmp_path / f"{name}.wav") for name in "ab"]
    rng = np.random.default_rng(0)
    for name in names:
        _ica_sounds.write_sound(name, rng.laplace(size=3000), 8000)
    results, _ = run(tmp_path / "run", capsys, "--preset", "audio", "--sounds", *names)
    assert min(results["decibels_unmixed"]) > 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gammas", "0"), "--gammas must be positive"),
        (("--sources", "30"), "--sources must be at most --dimensions"),
        (("--preset", "images", "--patch", "5"), "--sources must be at most 24"),
        (("--preset", "images", "--pictures", "no.png"), "no.png cannot be read as an image"),
        (("--preset", "audio", "--sounds", "no.wav", "no2.wav"), "no.wav cannot be read as a WAV file"),
        (("--preset", "audio", "--sounds", "no.wav"), "at least two files"),
        (("--runs", "0"), "--runs must be at least 1"),
    ],
)
def test_bad_flags_end_with_a_sentence(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        ica.main(["--workdir", str(tmp_path / "run"), "--quiet", *flags])
