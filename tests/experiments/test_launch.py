"""What experiments without images share: a report that a crash has cost is made again."""

import dataclasses

import pytest

from experiments import _launch


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str
    preset: str = "small"
    seed: int = 0
    quiet: bool = True


@pytest.mark.parametrize("crash", ["before the report", "in the report"])
def test_a_finished_run_without_a_report_makes_it_again(crash, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_launch.runtime, "configure", lambda: None)
    calls = []
    config = Config(str(tmp_path / "run"))
    compute = lambda run, say: calls.append(run.path) or {"error": 0.5}
    if crash == "in the report":
        with monkeypatch.context() as patch:

            def full(path):
                raise OSError(28, "No space left on device", str(path))

            patch.setattr(_launch, "write_report", full)
            with pytest.raises(OSError, match="No space left"):
                _launch.run_once(config, compute)
    else:
        _launch.run_once(config, compute)
        (tmp_path / "run" / "report.html").unlink()
    assert _launch.run_once(config, compute) == 0
    assert "error" in (tmp_path / "run" / "report.html").read_text()
    assert len(calls) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith('RESULT {"experiment": "test_launch"')
