"""Untrusted files: nothing in them is run, followed, waited for or unpacked beyond its size."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.data import DatasetError, open_dataset, read_idx
from spread_jax.data.files import list_zip
from spread_jax.data.images import Transform, decode_image
from spread_jax.training import Checkpointer, CheckpointError, RunDirectory, RunDirectoryError, _seal, checkpoint

REPOSITORY = Path(__file__).parents[2]


def state_at(step):
    return {"w": jnp.arange(6.0) + step, "n": jnp.int32(step)}


@pytest.fixture
def steps(tmp_path):
    """A folder with the sealed steps 1 and 2."""
    with Checkpointer(tmp_path / "steps") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_at(step))
    return tmp_path / "steps"


def seal_again(folder):
    """As someone would who can write to the folder: the seal is no signature."""
    seal = _seal.read_seal(folder)
    os.remove(folder / _seal.SEAL)
    checkpoint.write_seal(folder, seal.step, seal.metrics, seal.leaves)


# --- code ---


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_planted_pickle_is_never_opened(steps, tmp_path, monkeypatch):
    proof = tmp_path / "it ran"
    code = pickle.dumps(Evil(proof))
    with open(tmp_path / "object.npy", "wb") as file:
        np.save(file, np.array([Evil(proof)], dtype=object), allow_pickle=True)
    for name in ("checkpoint.pkl", "d/state.pickle", "array_metadatas/0"):
        (steps / "2" / name).parent.mkdir(exist_ok=True)
        (steps / "2" / name).write_bytes(code)
    shutil.copy(tmp_path / "object.npy", steps / "2" / "w.npy")
    seal_again(steps / "2")

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with Checkpointer(steps) as checkpointer:
        restored = checkpointer.restore(state_at(0))
    assert restored.step == 2
    np.testing.assert_array_equal(restored.state["w"], state_at(2)["w"])
    (steps / "2" / "checkpoint").write_bytes(code)  # the one name that Orbax would read, as msgpack
    seal_again(steps / "2")
    with Checkpointer(steps) as checkpointer, pytest.raises(CheckpointError, match="Orbax cannot read it"):
        checkpointer.restore(state_at(0))

    cache = tmp_path / "cache"  # nor one in the place of cached images
    kept = np.array(open_dataset("faces", "test", max_examples=2, cache_dir=cache).images)
    images = next(cache.glob("*/images.npy"))
    size = images.stat().st_size
    images.write_bytes((tmp_path / "object.npy").read_bytes().ljust(size, b"\0"))
    again = open_dataset("faces", "test", max_examples=2, cache_dir=cache, progress=lambda *_: None)
    np.testing.assert_array_equal(again.images, kept)
    assert not proof.exists()
    monkeypatch.undo()
    pickle.loads(code).close()  # it would have run
    assert proof.exists()


def test_no_module_unpickles_or_evaluates():
    """Of the library and the experiments; inception weights are unpickled by torch-fidelity, once their hash fits."""
    forbidden = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in sorted([*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "experiments").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system"), path
                assert "shell=True" not in ast.unparse(node), path
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), path


FEATURES = "tensorflow_datasets.core.features"
EVIL = "evil_of_a_stranger.Feature"


def spellings():
    """features.json that names the stranger's class, in the forms that TFDS reads."""
    new = {"pythonClassName": EVIL, "tensor": {}}
    old = {"type": EVIL, "content": {}}
    of = lambda name, **content: {"pythonClassName": f"{FEATURES}.{name}", **content}
    as_text = json.dumps({"features": {"image": new}})
    images = of("features_dict.FeaturesDict", featuresDict={"features": {"image": new}})
    return {
        "itself": new,
        "snake case": {"python_class_name": EVIL, "tensor": {}},
        "in a dict": images,
        "in a dict in a sequence": of("sequence_feature.Sequence", sequence={"feature": images}),
        "in JSON in a string": of("features_dict.FeaturesDict", jsonFeature={"json": json.dumps({"image": old})}),
        "legacy": {"type": f"{FEATURES}.features_dict.FeaturesDict", "content": {"image": old}},
        "legacy, in a string": {
            "type": f"{FEATURES}.features_dict.FeaturesDict",
            "proto_cls": "tensorflow_datasets.FeaturesDict",
            "content": as_text,
        },
        "a name of TFDS's own": {"type": "tensorflow_datasets.scripts.cli.main.Feature", "content": {}},
    }


def test_features_of_a_tfds_folder_import_no_foreign_code(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    proof = tmp_path / "it ran"
    (tmp_path / "evil_of_a_stranger.py").write_text(f"open({str(proof)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"name": "set", "version": "1.0.0", "fileFormat": "array_record"}')
    for how, features in spellings().items():
        (folder / "features.json").write_text(json.dumps(features))
        with pytest.raises(DatasetError, match=r"names the class .*, which is not one of"):
            open_dataset(folder)
        assert not proof.exists(), how
    with pytest.raises(ValueError, match="Unrecognized FeatureConnector"):  # by TFDS itself it runs
        tfds.features.FeatureConnector.from_config(folder.parent / "set")
    (folder / "features.json").write_text(json.dumps(spellings()["in JSON in a string"]))
    with pytest.raises(ValueError, match="Unrecognized FeatureConnector"):
        tfds.features.FeatureConnector.from_config(folder)
    assert proof.exists()


def test_no_program_is_started_for_a_picture():
    """Pillow hands EPS to Ghostscript; a file of that kind is none of the known ones, whatever its name."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DatasetError, match="in no known image format"):
        decode_image(eps, Transform(8, None, 3), "picture.png")


# --- links and pipes ---


def test_a_step_has_no_links_and_no_pipes(steps, tmp_path):
    def link_to_folder(step):
        (step / "more").symlink_to(tmp_path)

    def link_for_a_file(step):
        shutil.move(step / "_METADATA", tmp_path / "moved")
        (step / "_METADATA").symlink_to(tmp_path / "moved")

    def link_for_the_seal(step):
        shutil.copy(step / _seal.SEAL, tmp_path / "seal")
        os.remove(step / _seal.SEAL)
        (step / _seal.SEAL).symlink_to(tmp_path / "seal")

    def pipe(step):  # would be waited for
        os.mkfifo(step / "pipe")

    def link_for_the_step(step):
        shutil.move(step, tmp_path / "elsewhere" / step.name)
        step.symlink_to(tmp_path / "elsewhere" / step.name)

    (tmp_path / "elsewhere").mkdir()
    for number, plant in enumerate((link_to_folder, link_for_a_file, link_for_the_seal, pipe, link_for_the_step)):
        folder = tmp_path / str(number)
        shutil.copytree(steps, folder)
        plant(folder / "2")
        said = []
        with Checkpointer(folder, log=said.append) as checkpointer:
            assert checkpointer.restore(state_at(0)).step == 1, plant
        assert len(said) == 1
        assert "2.unsound" in said[0]
    assert _seal.verify(tmp_path / "elsewhere" / "2").step == 2  # the link was renamed, and nothing else


def test_a_step_that_is_not_what_its_seal_says_is_refused(steps, tmp_path):
    """The files of one model under the seal of another."""
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(2, {"w": jnp.arange(7.0), "n": jnp.int32(1)})
    seal = _seal.read_seal(steps / "2")
    shutil.rmtree(steps / "2")
    shutil.copytree(tmp_path / "other" / "2", steps / "2")
    os.remove(steps / "2" / _seal.SEAL)
    checkpoint.write_seal(steps / "2", 2, {}, seal.leaves)
    with Checkpointer(steps) as checkpointer, pytest.raises(CheckpointError, match="'w' is not what its seal says"):
        checkpointer.restore(state_at(0))


def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RunDirectoryError, match="neither a file nor a folder"):
        RunDirectory.reopen(tmp_path)
    with pytest.raises(RunDirectoryError, match="neither a file nor a folder"):
        RunDirectory.open(tmp_path, {})


# --- archives ---


def png(seed=0):
    image_module = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    image_module.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def announce(path, size):
    """Makes every member of a zip announce another size, in both of its headers."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset : at + offset + 4] = struct.pack("<I", size)
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def test_a_member_is_not_unpacked_beyond_the_size_it_announces(tmp_path):
    with zipfile.ZipFile(tmp_path / "lie.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(64 * 2**20))
    announce(tmp_path / "lie.zip", 1000)
    listing = list_zip(tmp_path / "lie.zip")
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=r"0\.png of .*lie\.zip cannot be read"):
            listing.read("0.png")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
        listing.close()


def test_archives_that_unpack_to_too_much_or_in_other_ways(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(8):
            archive.writestr(f"{number}.png", b"x")
    announce(tmp_path / "many.zip", 200 * 2**20)
    with pytest.raises(DatasetError, match=r"many\.zip holds .* bytes and unpacks to 1,677,721,600"):
        list_zip(tmp_path / "many.zip")
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # which unpack without a bound
        with zipfile.ZipFile(tmp_path / "other.zip", "w", kind) as archive:
            archive.writestr("0.png", png())
        with pytest.raises(DatasetError, match="packed in a way that is not read"):
            list_zip(tmp_path / "other.zip")


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        link = zipfile.ZipInfo("train/0.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
        archive.writestr("train/1.png", png())
    with pytest.raises(DatasetError, match=r"0\.png cannot be decoded as an image"):
        open_dataset(tmp_path / "link.zip", cache_dir=tmp_path / "cache")


def test_idx_files_that_promise_too_much(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"

    def refused(data, message):
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(DatasetError, match=message):
                read_idx(path)
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()

    header = lambda *shape: bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    refused(header(2**32 - 1, 2**32 - 1) + bytes(99), "promises")
    refused(gzip.compress(header(2**32 - 1, 2**32 - 1) + bytes(99)), "promises")
    refused(gzip.compress(header(10) + bytes(2**27)), "promises 18")  # the rest is not unpacked
    refused(header(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), "impossible shape")
    refused(bytes([0, 0, 8, 200]) + struct.pack(">200I", *[1] * 200) + b"x", "not an idx file")
    packed = gzip.compress(header(2**31) + bytes(4 * 2**20))
    refused(packed + b"\0" * (2**21), "decompression bomb")  # large enough to hold it, by deflate's utmost


# --- permissions ---


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_what_is_written_respects_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with RunDirectory.open(tmp_path / "run", {"seed": 0}, tensorboard=False) as run:
            run.log_metrics(1, {"a": 1.0})
            run.write_results({})
            with Checkpointer(run.checkpoints_path) as checkpointer:
                checkpointer.save(1, state_at(1))
        open_dataset("faces", "test", max_examples=2, cache_dir=tmp_path / "cache")
    finally:
        os.umask(before)
    written = [p for top in ("run", "cache") for p in (tmp_path / top, *(tmp_path / top).rglob("*"))]
    assert len(written) > 15
    for path in written:
        assert not path.stat().st_mode & mask, path


@contextlib.contextmanager
def nobody():
    """Runs a block without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody can enter; those of pytest are their owner's alone."""
    folder = Path(tempfile.mkdtemp(prefix="spread_jax-test-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_what_cannot_be_read_or_written_is_a_sentence(open_folder):
    f = open_folder
    for name in ("photos", "closed"):
        (f / name).mkdir()
        for number in range(4):
            (f / name / f"{number}.png").write_bytes(png(number))
    for path in (f / "photos").iterdir():
        path.chmod(0)
    with zipfile.ZipFile(f / "photos.zip", "w") as archive:
        archive.writestr("0.png", png())
    (f / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with RunDirectory.open(f / "run", {"seed": 0}, tensorboard=False) as run:
        run.log_metrics(1, {"a": 1.0})
        with Checkpointer(run.checkpoints_path) as checkpointer:
            checkpointer.save(1, state_at(1))
    for name in ("closed", "photos.zip", "train-images-idx3-ubyte", "run/config.json", "run/checkpoints/1/_METADATA"):
        (f / name).chmod(0)
    (f / "full").mkdir(mode=0o555)
    read = {
        f / "photos": "png cannot be read",
        f / "closed": "closed cannot be listed|cannot be read",
        f / "photos.zip": r"photos\.zip.* cannot be read",
        f / "train-images-idx3-ubyte": "ubyte.* cannot be read",
        f / "closed" / "0.png": "cannot be read",
        f / ("x" * 300): "cannot be read",
    }
    with nobody():
        for path, message in read.items():
            with pytest.raises(DatasetError, match=message):
                open_dataset(path, cache_dir=f / "cache")
        with pytest.raises(DatasetError, match="SPREAD_JAX_CACHE"):
            open_dataset("faces", "test", max_examples=1, cache_dir=f / "full" / "cache")
        for open_it in (lambda: RunDirectory.reopen(f / "run"), lambda: RunDirectory.open(f / "run", {"seed": 0})):
            with pytest.raises(RunDirectoryError, match="Permission denied"):
                open_it()
        with pytest.raises(RunDirectoryError, match=r"could not be written: Permission denied"):
            RunDirectory.open(f / "full" / "run", {})
        with Checkpointer(f / "run" / "checkpoints") as unreadable:
            for use in (lambda: unreadable.restore(state_at(0)), unreadable.sound_steps):
                with pytest.raises(CheckpointError, match=r"_METADATA cannot be read: Permission denied\. Nothing was"):
                    use()
        assert os.listdir(f / "run" / "checkpoints") == ["1"]  # what cannot be read at the moment is no damage
        unwritable = Checkpointer(f / "full" / "steps")
        with unwritable, pytest.raises(CheckpointError, match="Permission denied"):
            unwritable.save(1, state_at(1))
