"""What the fault tests share: training runs that are cheap to kill, and a tally of what they survived.

In the short form, that of `make test`, a few runs of each kind. In the long form, `make chaos`, SPREAD_JAX_KILLS runs
are killed, every file is damaged in every way, and SPREAD_JAX_CHAOS names the folder that the counts are written to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.faults.kinds import FAULTS

CHILD = Path(__file__).with_name("child.py")
PATIENCE = 120.0  # seconds that a run may take on a busy machine


@pytest.fixture(scope="session")
def child():
    """The module of the forked runs."""
    spec = importlib.util.spec_from_file_location("child", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chaos():
    """Whether this is the long form."""
    return bool(os.environ.get("SPREAD_JAX_CHAOS"))


class Runs:
    """Starts runs in the forking parent, one at a time."""

    def __init__(self, module, folder: Path, images: Path) -> None:
        self.child, self.folder, self.images = module, folder, images
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # a process with one thread can be forked
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        command = [sys.executable, str(CHILD)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._parent = subprocess.Popen(command, env=environment, **pipes)
        assert self._parent.stdout.readline() == "ready\n"
        assert len(os.listdir(f"/proc/{self._parent.pid}/task")) == 1 if os.path.isdir("/proc") else True

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.stdout.close()
        self._parent.wait(timeout=PATIENCE)

    def start(self, workdir: Path, **options) -> int:
        """Starts or resumes a run; its process id."""
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.log.write_text("")
        self.marks = self.child.Marks.create(self.folder / "marks")
        options = {
            "workdir": str(workdir),
            "images": str(self.images),
            "cache": str(self.folder / "cache"),
            "programs": str(self.folder / "programs"),
            "marks": str(self.folder / "marks"),
            "log": str(self.log),
            **options,
        }
        self._parent.stdin.write(json.dumps(options) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline().removeprefix("pid "))

    def wait(self) -> int:
        """The exit code of the run; minus the signal that ended it."""
        return int(self._parent.stdout.readline().removeprefix("code "))

    def run(self, workdir: Path, **options) -> int:
        """A whole run; its exit code."""
        self.start(workdir, **options)
        return self.wait()

    def wait_for(self, condition) -> bool:
        """Waits until a condition on the marks holds, or the run has finished."""
        deadline = time.monotonic() + PATIENCE
        while not condition(*self.marks.read()):
            if self.marks.read()[0] == self.child.STAGES.index("finished") or self.said():
                return False
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.0002)
        return True

    def said(self) -> str:
        return self.log.read_text()

    def stage(self) -> str:
        """What a dead run was doing: its save, if one was in flight."""
        main, save, _, _ = self.marks.read()
        return self.child.STAGES[save or main]


@pytest.fixture(scope="session")
def runs(child, tmp_path_factory):
    """The forking parent, with a data set of small pictures."""
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("faults")
    images = folder / "pictures"
    images.mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        image_module.fromarray(pixels).save(images / f"{number}.png")
    parent = Runs(child, folder, images)
    yield parent
    parent.close()


def contents(workdir: Path) -> tuple[dict, list[dict]]:
    """Results and records of a run, less the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return json.loads((workdir / "results.json").read_text()), lines


@pytest.fixture(scope="session")
def unbroken(runs):
    """A run from start to end, what the others must equal; its seconds and its folder."""
    assert runs.run(runs.folder / "first") == 0, runs.said()  # fills the caches
    workdir = runs.folder / "unbroken"
    began = time.monotonic()
    assert runs.run(workdir) == 0, runs.said()
    return workdir, time.monotonic() - began


@pytest.fixture
def assert_unbroken(runs, unbroken):
    """Checks that a run ended as the unbroken one, to the last bit, with every kept checkpoint sound."""
    from spread_jax.training import Checkpointer

    def check(workdir: Path, *, same_steps: bool = True) -> None:
        results, records = contents(workdir)
        expected_results, expected_records = contents(unbroken[0])
        assert results == expected_results
        assert records == expected_records
        kept = {p.name for p in (unbroken[0] / "checkpoints").iterdir()}
        left = {p.name for p in (workdir / "checkpoints").iterdir()}
        assert kept <= left or not same_steps
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            assert {str(step) for step in checkpointer.sound_steps()} == {n for n in left if n.isdecimal()}

    return check


class Tally:
    """Cases met and survived, by name."""

    def __init__(self) -> None:
        self.cases: Counter = Counter()
        self.survived: Counter = Counter()
        self.kills: Counter = Counter()
        self.kill_runs: list[bool] = []
        self.measured: dict[str, float] = {}

    def __call__(self, name: str, check, *arguments) -> None:
        """Counts a case, and counts it survived if the check does not raise."""
        if name not in FAULTS:
            raise ValueError(f"{name!r} is not among the FAULTS of tests/faults/kinds.py, the rows of the page.")
        self.cases[name] += 1
        check(*arguments)
        self.survived[name] += 1


@pytest.fixture(scope="session")
def tally(chaos):
    """Counts; the long form writes them."""
    from benchmarks import _report

    machine = _report.Machine.now()
    began = time.monotonic()
    counts = Tally()
    yield counts
    if not chaos:
        return
    of = lambda done, all_: f"{done} of {all_}"
    tables = []
    if counts.kill_runs:
        total = len(counts.kill_runs)
        rows = [{"what": "runs killed, resumed and ended", "count": total}]
        rows.append({"what": "equal to the unbroken run, bit for bit", "count": of(sum(counts.kill_runs), total)})
        rows.append({"what": "kill -9 in all", "count": sum(counts.kills.values())})
        rows += [{"what": f"  while {stage}", "count": counts.kills[stage]} for stage in sorted(counts.kills)]
        tables.append(_report.Table("kill -9 at random moments", rows))
    cases = [(name, counts.cases[name]) for name in sorted(FAULTS)]
    rows = [{"fault": name, "survived": of(counts.survived[name], n) if n else "not tried"} for name, n in cases]
    tables.append(_report.Table("Other faults", rows))
    if counts.measured:
        rows = [{"what": name, "value": value} for name, value in counts.measured.items()]
        tables.append(_report.Table("Times", rows))
    notes = (
        "A training run meets each fault, is resumed, and is compared with an unbroken one: every bit of the final "
        "state and every recorded metric must agree. A fuzzed or hostile file counts as survived if it is read or "
        "refused, nothing hangs, and nothing outside of its folder is written or run. Where there is something to "
        f"report, one sentence must report it. All of it took {time.monotonic() - began:.0f} s."
    )
    command = f"make chaos KILLS={os.environ.get('SPREAD_JAX_KILLS', '')}"
    folder = Path(os.environ["SPREAD_JAX_CHAOS"])
    _report.write(folder, "faults", "Faults", notes, tables, machine, command, show=False)


@pytest.fixture
def chance(request):
    """Reproducible in the short form, different each time in the long one."""
    seed = request.node.name if not os.environ.get("SPREAD_JAX_CHAOS") else random.SystemRandom().randrange(2**32)
    return random.Random(seed)
