"""Each benchmark runs to its end on tiny sizes, and what it reports is what it measured."""

import doctest
import importlib
import importlib.util
import json
import os

import numpy as np
import pytest

from benchmarks import __main__ as bench
from benchmarks import _measure, _report, density, devices, gpu, loader, profile, program, start, step
from spread_jax import runtime


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch, cache):
    """New processes share what they compiled."""
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(cache))
    monkeypatch.setattr(runtime, "configure", lambda: None)  # it changes this process for good


@pytest.fixture
def in_this_process(monkeypatch):
    """What would run in new processes runs here: to start one costs more than tiny sizes do."""

    def call(function, *, environment=None, **arguments):
        assert set(environment or {}) <= {"SPREAD_JAX_CACHE", "TORCHINDUCTOR_CACHE_DIR", *step.KEPT_SETTINGS}
        module, name = function.split(":")
        found = getattr(importlib.import_module(module), name)(**json.loads(json.dumps(arguments)))
        return json.loads(json.dumps({**found, "peak_mib": _measure.peak_mib()}))

    monkeypatch.setattr(_measure, "in_new_process", call)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def test_a_part_prints_and_writes_its_tables(tmp_path, capsys):
    flags = ["--mmd.sizes", "20", "9", "--mmd.largest-differences", "10", "--mmd.repeats", "2"]
    bench.main(["--part", "mmd", *flags, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "mmd.json").read_text())
    (table,) = results["tables"]
    assert [(row["N"], row["side"]) for row in table["rows"]] == [
        (20, "mmd_squared"),
        (20, "matrix product"),
        (9, "mmd_squared"),
        (9, "matrix product"),
        (9, "differences"),
    ]
    for row in table["rows"]:
        assert 0 < row["lowest"] <= row["side / mmd_squared"] <= row["highest"]
        assert row["relative error"] < 1e-3
    assert results["command"] == "python -m benchmarks --part mmd " + " ".join(flags)
    assert results["machine"]["versions"]["jax"]
    assert results["machine"]["cores"] >= 1
    text = (tmp_path / "mmd.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert ("times mean nothing" in text) != results["machine"]["idle"]


def test_a_busy_machine_is_called_busy():
    quiet = _report.Machine("a processor", cores=2, load=0.1, versions={})
    busy = _report.Machine("a processor", cores=2, load=1.5, versions={})
    assert quiet.idle
    assert not busy.idle
    assert "busy" in busy.describe()
    assert "busy" not in quiet.describe()


def test_tables_hold_every_column():
    table = _report.Table("title", [{"a": 1, "b": 0.25}, {"a": 12345, "c": None}])
    lines = table.as_markdown().splitlines()
    assert lines == ["title", "", "| a | b | c |", "|---|---|---|", "| 1 | 0.25 | - |", "| 12,345 | - | - |"]


def test_processes_return_what_they_measured_or_the_reason():
    found = _measure.in_new_process("benchmarks._measure:ratio", ours=[1.0, 4.0, 3.0], theirs=[1.0, 2.0, 1.0])
    assert {name: found[name] for name in ("ratio", "lowest", "highest")} == {"ratio": 2, "lowest": 1, "highest": 3}
    assert found["peak_mib"] > 10
    with pytest.raises(_measure.SideFailed, match="nothing_here"):
        _measure.in_new_process("benchmarks._measure:nothing_here")


def test_sides_take_turns():
    called = []
    seconds = _measure.interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert "".join(called) == "abababab"
    assert [len(found) for found in seconds.values()] == [3, 3]


@pytest.mark.parametrize("module", [devices, gpu, profile, program], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_density():
    floors, peers = density.run(density.Config(size=40, small_size=30, dimensions=9, repeats=2))
    assert [row["side"] for row in floors.rows] == [density.OURS, density.GRADIENT, density.FLOOR]
    assert floors.rows[2][f"side / {density.FLOOR}"] == 1
    for row in peers.rows[:3]:
        assert row["largest error, nats"] < 1e-4
        assert row["MiB"] >= 0
    assert peers.rows[3]["side"] == density.KERNEL_DENSITY


@pytest.mark.filterwarnings("ignore")  # of the peers
def test_loader():
    (table,) = loader.run(loader.Config(images=12, batch_size=4, seconds=0.02))
    assert [row["loader"] for row in table.rows[:2]] == ["spread_jax", "spread_jax"]
    assert all(row["images / CPU s"] > 0 for row in table.rows)
    assert table.rows[1]["images / CPU s"] < table.rows[0]["images / CPU s"]
    installed = [name for name in ("grain", "torch") if importlib.util.find_spec(name)]
    assert len(table.rows) == 2 + 2 * len(installed)


def test_import_time():
    (table,) = start.run(start.Config(rounds=1, demo_rounds=0))
    alone, ours, difference = (row["s"] for row in table.rows)
    assert difference == pytest.approx(ours - alone)


def test_what_does_not_fit_the_budget_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu.main(["--budget", "0", "--no-torch", "--out", str(tmp_path)])
    peak, steps, *others = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert [row["precision"] for row in peak["rows"]] == ["float32", "tf32", "bfloat16"]
    assert all(row["TFLOP/s"] > 0 for row in peak["rows"])
    assert [row["batch"] for row in steps["rows"]] == [4] * 6 + [8] * 2  # those of a machine without accelerator
    assert {row["note"] for table in (steps, *others) for row in table["rows"]} == {"left out: no time"}


@pytest.mark.slow
def test_train_steps_on_an_accelerators_terms(tmp_path, in_this_process):
    flags = ["--width", "2", "--batch-sizes", "4", "--steps", "1", "--size", "32", "--matmul-size", "32", "--no-torch"]
    flags += ["--precisions", "bfloat16"]
    gpu.main([*flags, "--out", str(tmp_path)])
    tables = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    rows = [row for table in tables for row in table["rows"]]
    assert not [row for row in rows if "note" in row]
    for row in tables[1]["rows"]:
        assert row["images/s"] > 0
        assert row["share of peak"] > 0
    assert set(tables[3]["rows"][0]) >= {"plain ELBO", "spread ELBO", "spread ELBO, low variance"}


@pytest.mark.slow
def test_step(in_this_process):
    sides = ("spread_jax", "contiguous") if importlib.util.find_spec("torch") else ("spread_jax",)
    config = step.Config(widths=(2,), conditional_widths=(2,), batch_size=4, steps=1, rounds=1, sides=sides)
    tables = step.run(config)
    times, costs = tables[0].rows, tables[1].rows
    expected = [(network, side) for network in ("model", "scale_critic", "denoiser") for side in sides]
    assert [(row["network"], row["side"]) for row in times] == expected
    assert [(row["network"], row["side"]) for row in costs] == expected
    assert all(row["ms"] > 0 for row in times)
    assert all(row["peak MiB"] > 50 for row in costs)
    if len(sides) > 1:
        for ours, theirs in zip(times[::2], times[1::2], strict=True):
            assert theirs["spread_jax / side"] == pytest.approx(ours["ms"] / theirs["ms"])
        # The peer computes the same loss and gradient, or the ratio would compare two different things.
        for agreement in tables[2].rows:
            assert agreement["loss"] < 1e-6
            assert agreement["gradient"] < 1e-5


@pytest.mark.slow
def test_devices():
    tables = devices.run(
        devices.Config(counts=(1, 2), model_parallel=(2,), processes=(2,), width=2, batch_size=4, steps=2)
    )
    one, two, pair, processes = tables[0].rows
    assert one["MiB all-reduced"] == one["loss differs by"] == one["gradient differs by"] == 0
    for row in (two, pair, processes):
        assert row["loss differs by"] < 1e-5
        assert 0 < row["gradient differs by"] < 1e-4
        assert row["losses after SGD differ by"] < 1e-4
    # Each gradient is summed over the devices, and the batch statistics in both directions, which are small.
    assert 1 <= two["MiB all-reduced"] / two["gradient MiB"] < 1.5
    assert processes["MiB all-reduced"] == two["MiB all-reduced"]
    assert pair["MiB otherwise"] > 0


@pytest.mark.slow
def test_first_step_of_the_demo(tmp_path):
    flags = ("--width", "2", "--batch-size", "4", "--max-examples", "24", "--steps", "4")
    assert 0 < start.first_step(tmp_path / "cache", tmp_path / "run", flags) < 600
    with pytest.raises(_measure.SideFailed, match="width must be an even number"):
        start.first_step(tmp_path / "cache", tmp_path / "run", ("--width", "3"))


@pytest.mark.slow
def test_profile_names_the_costliest_operations(tmp_path, in_this_process, capsys):
    profile.main(["--width", "2", "--batch-size", "2", "--steps", "1", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    seconds, shares = (np.array([float(row[i].strip("| ")) for row in rows]) for i in (0, 1))
    assert (np.diff(seconds) <= 0).all()
    assert 0 < shares.sum() <= 1
    assert any("conv_general_dilated" in row[3] for row in rows)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_the_work_of_a_compiled_program():
    text = """\
HloModule step

%fused (p.1: bf16[8,4], p.2: bf16[4,2]) -> bf16[8,2] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %p.2 = bf16[4,2]{1,0} parameter(1)
  ROOT %dot = bf16[8,2]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[2,8,8,3], w: bf16[5,5,5,3], a: bf16[8,4], b: bf16[4,2]) -> bf16[8,2] {
  %x = bf16[2,8,8,3]{3,2,1,0} parameter(0)
  %w = bf16[5,5,5,3]{3,2,1,0} parameter(1)
  %a = bf16[8,4]{1,0} parameter(2)
  %b = bf16[4,2]{1,0} parameter(3)
  %y = (bf16[2,4,4,5]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=5x5 stride=2x2 pad=2_2x2_2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %value = bf16[2,4,4,5]{3,2,1,0} get-tuple-element(%y), index=0
  %gx = (bf16[2,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%value, %w), window={size=5x5 stride=2x2 pad=2_2x2_2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %gw = (bf16[5,5,5,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %value), window={size=5x5 stride=2x2 pad=2_2x2_2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %c = bf16[8,2]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %s = bf16[8,2]{1,0} add(%c, %c)
  ROOT %d = bf16[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused
}
"""
    found = program.operations(text)
    assert [operation.routine for operation in found] == ["forward", "input", "kernel", "product", "", "product"]
    work = 2 * 2 * 4 * 4 * 5 * 3 * 25
    assert [operation.flops for operation in found] == [work, work, work, 128, 0, 128]
    x, w, y = 2 * 8 * 8 * 3 * 2, 5 * 5 * 5 * 3 * 2, 2 * 4 * 4 * 5 * 2
    assert [operation.bytes for operation in found] == [x + w + y] * 3 + [
        2 * (32 + 8 + 16),
        2 * 3 * 16,
        2 * (32 + 8 + 16),
    ]
    summary = program.summary(found, 3 * work, "bfloat16")
    assert {name: summary[name] for name in ("forward", "input gradient", "kernel gradient", "products", "others")} == {
        "forward": 1, "input gradient": 1, "kernel gradient": 1, "products": 2, "others": 1,
    }  # fmt: skip
    assert summary["/ needed"] == (3 * work + 256) / (3 * work)
    # So small that each waits for memory.
    assert summary["least ms"] == pytest.approx(1e3 * summary["GB"] * 1e9 / program.BYTES_PER_SECOND)


@pytest.mark.parametrize(("target", "extra"), [("h200", "cuda12"), ("v5e", "tpu")])
def test_a_compiler_that_is_not_there_is_asked_for(monkeypatch, target, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"no compiler for {target} here: pip install 'jax\[{extra}\]'"):
        program.main(["--targets", target])
