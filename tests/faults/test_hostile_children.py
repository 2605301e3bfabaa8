"""`spread-jax evaluate` on the run and on the data of a stranger, as programs: what lies elsewhere stays as it was."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from spread_jax.data import open_dataset
from spread_jax.evaluation import save_image
from spread_jax.models import DataSettings, DeltaVae
from spread_jax.models._saved import to_json
from spread_jax.training import Checkpointer, RunDirectory
from tests.faults.test_hostile_run import everything_in

SIDE, COUNT = 16, 40
EVIL = "evil_of_a_stranger"
PHOTO, SETTINGS = "photo.png", ".config/program/settings.json"
PLACES = ("cache_dir", "workdir", "output", "features", "data_dir", "tensorboard", "on_log")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The folder of a run whose settings name places of the user's, and its parent, with the user's own files."""
    root = tmp_path_factory.mktemp("machine")
    home, run = root / "home", root / "downloads/run"
    for name in (".profile", SETTINGS, "cache/old.building/data", "work/thesis.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("of the user")
    (home / SETTINGS).write_text('{"steps": 0, "owner": "of the user"}')  # what results may look like
    save_image(np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8), home / PHOTO)
    train = faces("train", root / "given")
    method = DeltaVae(image_shape=train.image_shape, width=2, latent_dim=3)
    config = {
        "preset": "demo", "seed": 0, "method": to_json(method), "data_fingerprint": train.fingerprint,
        "data": to_json(DataSettings("faces", image_size=SIDE, max_examples=COUNT, cache_dir=str(home / "cache"))),
        **{name: str(home / ".config") for name in PLACES},
    }  # fmt: skip
    with RunDirectory.open(run, config, tensorboard=False) as folder:
        with Checkpointer(folder.checkpoints_path) as saver:
            saver.save(0, random_state(method), metrics={})
        folder.write_results({"steps": 0})
    return root


def faces(split, cache):
    options = {"image_size": SIDE, "max_examples": COUNT, "cache_dir": str(cache), "progress": lambda *_: None}
    return open_dataset("faces", split, **options)


def random_state(method):
    """A state without the seconds that compiling its initialisation takes."""
    chance = np.random.default_rng(1)

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.asarray(0.1 * np.abs(chance.standard_normal(leaf.shape)), leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(lambda: method.initial_state(jax.random.key(0), 1)))


def evaluate(root, *arguments, place="home/work"):
    """Runs the command as the user would, from a folder of the user's or another; (exit code, what it said)."""
    temporary = root / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(root / "home"), "TMPDIR": str(temporary), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "SPREAD_JAX_CACHE": str(root / "given"),
        "PYTHONPATH": os.pathsep.join(p for p in map(os.path.abspath, sys.path) if p),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    settings = {"samples": 16, "feature-steps": 1, "mixture-components": 0, "importance-examples": 0}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    traced = os.environ.get("SPREAD_JAX_STRACE")  # a file: what is opened for writing, where strace is installed
    tracer = ["strace", "-f", "-qq", "-o", traced, "-e", "trace=%file"] if traced else []
    command = [*tracer, sys.executable, "-m", "spread_jax.cli", "evaluate", str(root / "downloads/run"), "--quiet"]
    done = subprocess.run(
        [*command, *flags, *arguments], env=environment, cwd=root / place, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


OTHERS = {"results.json": SETTINGS, "samples.png": PHOTO}  # what would be read as one of its own
LINKS = {
    "none, but places in the settings": (),
    "pictures": ("neighbours.png", "samples.png"),
    "report": ("report.html",),
    "results": ("results.json",),
    "lock": (".lock",),
}


@pytest.mark.parametrize("links", LINKS)
def test_a_strangers_run(links, stranger, chaos, tally, tmp_path):
    if not chaos:
        pytest.skip("a program of several seconds: part of make chaos")
    run = stranger / "downloads/run"
    shutil.copytree(run, tmp_path / "sound", symlinks=True)

    def check():
        for name in LINKS[links]:
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(stranger / "home" / OTHERS.get(name, ".profile"))
        before = everything_in(stranger / "home")
        code, said = evaluate(stranger)
        assert everything_in(stranger / "home") == before, said
        assert code in (0, 1), said
        if not LINKS[links]:  # what else the settings say does no harm
            assert code == 0, said
            assert (run / "report.html").is_file()
        shown = said + "".join(path.read_text() for path in run.glob("*.html") if not path.is_symlink())
        assert "of the user" not in shown
        assert base64.b64encode((stranger / "home" / PHOTO).read_bytes()).decode() not in shown

    try:
        tally("evaluate a stranger's run", check)
    finally:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "sound", run, symlinks=True)


@pytest.mark.parametrize("kind", ["pictures", "prepared by TFDS"])
def test_a_strangers_data(kind, stranger, chaos, tally):
    if not chaos:
        pytest.skip("a program of several seconds: part of make chaos")
    image_module = pytest.importorskip("PIL.Image")
    home, data = stranger / "home", stranger / "downloads" / kind.replace(" ", "_")
    data.mkdir()
    for name in (f"{EVIL}.py", "sitecustomize.py", "conftest.py"):
        (data / name).write_text(f"open({str(home / 'it_ran')!r}, 'w').close()")
    if kind == "pictures":
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            image_module.fromarray(pixels).save(data / f"{number}.png")
        (data / "secret.png").symlink_to(home / ".profile")
        (data / "home").symlink_to(home)
        (data / "around").symlink_to(data)
        os.mkfifo(data / "pipe.png")
        (data / "run.building").symlink_to(home / "cache/old.building")
    else:
        (data / "dataset_info.json").write_text('{"name": "set", "version": "1.0.0", "fileFormat": "array_record"}')
        inside = json.dumps({"image": {"type": f"{data.name}.{EVIL}.X", "content": {}}})
        name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        (data / "features.json").write_text(json.dumps({"pythonClassName": name, "jsonFeature": {"json": inside}}))

    def check():
        before = everything_in(home)
        # From the folder above the data, whose modules Python would find.
        options = ("--data", str(data), "--cache-dir", str(stranger / "given"))
        code, said = evaluate(stranger, *options, place="downloads")
        assert everything_in(home) == before, said
        # Refused for what it is, before its pixels are looked at, which are not what the run was trained on.
        assert code == 1, said
        assert ("outside of the folder" if kind == "pictures" else EVIL) in said, said
        assert "of the user" not in said

    tally("evaluate on a stranger's data", check)
