"""The list of runs: every run once, with what it has."""

import json
import os

import pytest

from spread_jax.cli import runs
from spread_jax.cli.launch import run_program


@pytest.fixture
def folder(tmp_path):
    """A finished run, an unfinished one whose last line is torn, and things that are no runs."""
    done, begun = tmp_path / "celeba/demo-0", tmp_path / "celeba/[bold]-1"
    (done / "checkpoints/10").mkdir(parents=True)
    begun.mkdir(parents=True)
    (done / "config.json").write_text(json.dumps({"preset": "demo", "seed": 0}))
    (done / "checkpoints/10/config.json").write_text("{}")
    evaluation = {"frechet_distance": 12.345, "importance_bound_nats": None}
    results = {"steps": 2400, "held_out_elbo_nats": -800.51, "evaluation": evaluation}
    (done / "results.json").write_text(json.dumps(results))
    (begun / "config.json").write_text(json.dumps({"seed": 1}))
    (begun / "metrics.jsonl").write_text('{"step": 20}\n{"step": 40}\n{"ste')
    (tmp_path / "notes.txt").write_text("no run")
    for path, time in ((begun / "config.json", 1e9), (begun / "metrics.jsonl", 1e9)):
        os.utime(path, (time, time))
    return tmp_path


def listed(capsys, *arguments):
    assert runs.main([str(a) for a in arguments]) == 0
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_every_run_once_newest_last(folder, capsys):
    first, second = listed(capsys, folder)
    assert (first["run"], first["state"], first["step"]) == ("celeba/[bold]-1", "unfinished", "40")
    assert first["started from"] == "no preset, seed 1"
    assert first["last written"].startswith("2001-09-")
    assert (second["run"], second["state"], second["step"]) == ("celeba/demo-0", "finished", "2400")
    assert second["numbers"] == "Fréchet distance 12.35, held-out ELBO, nats -800.5"
    assert listed(capsys, folder / "celeba/demo-0")[0]["run"] == "demo-0"


def test_a_terminal_gets_a_table_with_names_as_they_are(folder, capsys, monkeypatch):
    monkeypatch.setattr(runs.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "180")
    monkeypatch.setenv("NO_COLOR", "1")
    runs.main([str(folder)])
    out = capsys.readouterr().out
    assert "celeba/[bold]-1" in out
    assert "\t" not in out
    assert "\x1b[3" not in out


def test_where_nobody_listens_nothing_is_printed(folder, monkeypatch):
    monkeypatch.setattr(runs.sys, "stdout", None)  # as under `>&-`
    assert runs.main([str(folder)]) == 0


def test_no_folder_is_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_program(lambda: runs.main([str(tmp_path / "none")]))
    assert "is not a folder: name one that holds runs" in capsys.readouterr().err
