"""What a saved run may not bring with it; a report that a crash has cost is made again."""

import dataclasses

import pytest

from experiments import _generator, _launch
from spread_jax.data import Dataset


def test_a_saved_run_names_no_hook(monkeypatch):
    config = _generator.GeneratorConfig(on_log="tracking:log")
    images = Dataset.__new__(Dataset)
    monkeypatch.setattr(Dataset, "fingerprint", "f", raising=False)
    monkeypatch.setattr(Dataset, "image_shape", (28, 28, 1), raising=False)
    saved = _generator.saved_config(config, images)
    assert "on_log" not in saved
    for given in (saved, {**saved, "on_log": "os:abort"}):  # of a stranger
        assert _generator.load_config(given)[0] == dataclasses.replace(config, on_log=None)


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str
    preset: str = "small"
    seed: int = 0
    quiet: bool = True


@pytest.mark.parametrize("crash", ["before the report", "in the report"])
def test_a_finished_run_without_a_report_makes_it_again(crash, tmp_path, monkeypatch, capsys):
    calls = []
    config = Config(str(tmp_path / "run"))
    compute = lambda run, say: calls.append(run.path) or {"error": 0.5}
    if crash == "in the report":
        with monkeypatch.context() as patch:

            def full(path):
                raise OSError(28, "No space left on device", str(path))

            patch.setattr("spread_jax.evaluation.write_report", full)
            with pytest.raises(OSError, match="No space left"):
                _launch.run_once(config, compute)
    else:
        _launch.run_once(config, compute)
        (tmp_path / "run" / "report.html").unlink()
    assert _launch.run_once(config, compute) == 0
    assert "error" in (tmp_path / "run" / "report.html").read_text()
    assert len(calls) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith('RESULT {"experiment": "test_launch"')
