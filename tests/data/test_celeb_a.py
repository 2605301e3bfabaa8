"""CelebA's official files, our TFDS builder, and a download that cannot happen."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from spread_jax.data import DatasetError, celeb_a_download, open_dataset, prepare_celeb_a
from spread_jax.data.celeb_a import read_partition, refuse_to_guess

Image = pytest.importorskip("PIL.Image")
COUNTS = {"train": 5, "validation": 3, "test": 2}


@pytest.fixture
def tiny(tmp_path):
    """Ten invented pictures in the form of the official files."""
    folder = tmp_path / "official"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for n in range(1, 11):
            file = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (11, 9, 3), np.uint8))
            small.resize((178, 218)).save(file, "JPEG")
            archive.writestr(f"img_align_celeba/{n:06d}.jpg", file.getvalue())
            lines.append(f"{n:06d}.jpg {0 if n <= 5 else 1 if n <= 8 else 2}\n")
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return folder


def extract(folder):
    with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
        archive.extractall(folder)
    (folder / "img_align_celeba.zip").unlink()


def test_splits_from_the_archive_and_from_the_extracted_folder(tiny):
    zipped = {split: np.array(open_dataset(tiny, split).images) for split in COUNTS}
    assert {split: len(images) for split, images in zipped.items()} == COUNTS
    by_archive = open_dataset(tiny / "img_align_celeba.zip", "test")
    assert np.array_equal(by_archive.images, zipped["test"])
    assert by_archive.name == "celeb_a"
    extract(tiny)
    for path in (tiny, tiny / "img_align_celeba"):
        assert np.array_equal(open_dataset(path, "validation").images, zipped["validation"])
    text = (tiny / "list_eval_partition.txt").read_text().replace(" ", ",")
    (tiny / "list_eval_partition.txt").write_text("image_id,partition\n" + text)
    assert np.array_equal(open_dataset(tiny, "test").images, zipped["test"])


def layouts(tiny, root):
    """The official files as people have them: (what to lay out, what is passed)."""
    csv = "image_id,partition\r\n" + (tiny / "list_eval_partition.txt").read_text().replace(" ", ",")
    archive = (tiny / "img_align_celeba.zip").read_bytes()

    def kaggle(folder):
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            zipped.extractall(folder / "img_align_celeba")
        (folder / "list_eval_partition.csv").write_text("\ufeff" + csv, encoding="utf-8")

    def torchvision(folder):
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            zipped.extractall(folder / "celeba")
        (folder / "celeba" / "list_eval_partition.txt").write_bytes((tiny / "list_eval_partition.txt").read_bytes())

    def authors(folder):
        for name, data in {
            "Img/img_align_celeba.zip": archive,
            "Eval/list_eval_partition.txt": (tiny / "list_eval_partition.txt").read_bytes(),
        }.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(data)

    for layout, inside in (
        (kaggle, ("", "img_align_celeba", "img_align_celeba/img_align_celeba")),
        (torchvision, ("", "celeba", "celeba/img_align_celeba")),
        (authors, ("", "Img/img_align_celeba.zip")),
    ):
        folder = root / layout.__name__
        layout(folder)
        for path in inside:
            yield folder / path


def test_the_files_as_people_have_them(tiny, tmp_path):
    expected = {split: np.array(open_dataset(tiny, split).images) for split in COUNTS}
    for path in layouts(tiny, tmp_path / "layouts"):
        for split, images in expected.items():
            assert np.array_equal(open_dataset(path, split).images, images), (path, split)


def test_the_official_images_are_never_split_by_hash(tiny, tmp_path):
    """Official test images would be trained on, at another crop."""
    archive = tiny / "img_align_celeba.zip"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(archive, alone)
    shutil.copy(archive, alone / "archive.zip")
    (alone / "img_align_celeba").mkdir()
    other = tmp_path / "CelebA-faces"
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(alone)
        zipped.extractall(tmp_path)
    (tmp_path / "img_align_celeba").rename(other)
    for path in (alone / "img_align_celeba.zip", alone / "img_align_celeba", alone, alone / "archive.zip", other):
        with pytest.raises(DatasetError, match=r"looks like CelebA.*list_eval_partition\.txt"):
            open_dataset(path)
    renamed = other.rename(tmp_path / "faces")
    assert len(open_dataset(renamed, image_size=4)) == 8
    hq = tmp_path / "celeba_hq"
    renamed.rename(hq)
    for path in sorted(hq.iterdir()):
        path.rename(hq / path.name[1:])  # five digits: another set
    assert len(open_dataset(hq, image_size=4)) > 5


def again(archive, name):
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr(name, zipped.read("img_align_celeba/000001.jpg"))


def test_a_link_below_a_folder_does_not_make_it_celeba(tiny, tmp_path):
    """A folder from elsewhere would turn into a set of the user's own."""
    given = tmp_path / "given"
    given.mkdir()
    Image.new("RGB", (9, 9)).save(given / "0.png")
    (given / "faces").symlink_to(tiny)
    with pytest.raises(DatasetError, match="outside of the folder"):
        open_dataset(given)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "list_eval_partition.txt").unlink(), "list_eval_partition.txt is not"),
        (lambda f: (f / "img_align_celeba.zip").unlink(), "img_align_celeba.zip is not"),
        (
            lambda f: (f / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 7\n"),
            "Line 2 of .*000002.jpg 7",
        ),
        (  # two lists of Kaggle's, one behind the other
            lambda f: (f / "list_eval_partition.txt").write_text("000001.jpg,0\nimage_id,partition\n"),
            "Line 2 of .*image_id,partition",
        ),
        (lambda f: again(f / "img_align_celeba.zip", "copy/000003.jpg"), "holds 000003.jpg twice: remove one"),
        (lambda f: (f / "list_eval_partition.txt").write_text(""), "names no files"),
        (
            lambda f: (f / "list_eval_partition.txt").write_text("000001.jpg 0\n"),
            "9 of 10 files are among the images .* and not in list",
        ),
        (
            lambda f: (f / "list_eval_partition.txt").open("a").write("000011.jpg 0\n") and None,
            "1 of 11 files are in list_eval_partition.txt and not.*000011.jpg",
        ),
        (
            lambda f: (f / "img_align_celeba.zip").write_bytes(b"<html>quota</html>"),
            "not a whole zip",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_incomplete_official_files(tiny, spoil, message):
    spoil(tiny)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tiny)


def test_real_celeba(celeba_folder):
    """The official counts, and the crop by a computation of its own."""
    partition = read_partition(celeba_folder / "list_eval_partition.txt")
    listed = {s: [n for n, t in partition.items() if t == s] for s in COUNTS}
    if len(partition) == 4046:
        assert {s: len(names) for s, names in listed.items()} == {
            "train": 3058,
            "validation": 531,
            "test": 457,
        }
    test = open_dataset(celeba_folder, "test")
    assert len(test) == len(listed["test"])
    assert test.image_shape == (64, 64, 3)
    # Rows of an antialiased bilinear reduction from 140 to 64 pixels.
    scale = 140 / 64
    centres = (np.arange(64) + 0.5) * scale - 0.5
    weights = np.clip(1 - np.abs(np.arange(140)[None] - centres[:, None]) / scale, 0, None)
    weights /= weights.sum(1, keepdims=True)
    with zipfile.ZipFile(celeba_folder / "img_align_celeba.zip") as archive:
        for i in (0, 17, len(test) - 1):
            data = archive.read("img_align_celeba/" + listed["test"][i])
            pixels = np.asarray(Image.open(io.BytesIO(data)), float)[39:179, 19:159]
            expected = np.einsum("ah,hwc,bw->abc", weights, pixels, weights)
            np.testing.assert_allclose(test.images[i], expected, atol=1.01)


# TFDS -----------------------------------------------------------------------------------------


@pytest.fixture
def tfds():
    pytest.importorskip("importlib_resources")
    return pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize("attributes", [False, True])
def test_builder_round_trip(tiny, tmp_path, tfds, attributes):
    if attributes:
        rows = [f"{n:06d}.jpg {1 if n % 2 else -1}  -1" for n in range(1, 11)]
        (tiny / "list_attr_celeba.txt").write_text("\n".join(["10", "Odd Never", *rows]))
    path = prepare_celeb_a(tiny, tmp_path / "tfds")
    assert "tensorflow" not in sys.modules

    raw = {"image": tfds.decode.SkipDecoding()}
    source = tfds.builder_from_directory(str(path)).as_data_source("train", decoders=raw)
    with zipfile.ZipFile(tiny / "img_align_celeba.zip") as archive:
        originals = {archive.read(f"img_align_celeba/{n:06d}.jpg"): n for n in range(1, 6)}
    stored = [source[i] for i in range(len(source))]
    assert sorted(originals[example["image"]] for example in stored) == [1, 2, 3, 4, 5]
    if attributes:
        for example in stored:
            assert example["attributes"]["Odd"] == originals[example["image"]] % 2
            assert not example["attributes"]["Never"]

    for split, count in COUNTS.items():
        # By its path, by its set's folder, and by its name, for which TFDS_DATA_DIR is searched.
        by_path, by_set, by_name, official = (open_dataset(p, split) for p in (path, path.parent, "celeb_a", tiny))
        assert len(by_path) == count
        assert by_path.image_shape == (64, 64, 3)
        assert np.array_equal(by_path.images, by_name.images)
        assert np.array_equal(by_path.images, by_set.images)
        rows = [{image.tobytes() for image in d.images} for d in (by_path, official)]
        assert rows[0] == rows[1]


def test_a_labelled_set_without_validation(tmp_path, tfds):
    """Any prepared set with a feature `image` will do; the last tenth of train is validation."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "mnist"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=20),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(20):
                file = io.BytesIO()
                Image.fromarray(pixels[n, :, :, 0]).save(file, "PNG")
                yield n, {"image": file.getvalue(), "label": n}

    Small(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    train, validation = open_dataset("mnist"), open_dataset("mnist", "validation")
    assert (len(train), len(validation)) == (18, 2)
    assert train.image_shape == (28, 28, 1)
    for dataset in (train, validation):
        assert np.array_equal(dataset.images, pixels[dataset.labels])
    assert sorted([*train.labels, *validation.labels]) == list(range(20))
    with pytest.raises(DatasetError, match="no split 'test'"):
        open_dataset("mnist", "test")


def test_a_format_that_needs_tensorflow(tiny, tmp_path, tfds):
    path = prepare_celeb_a(tiny, tmp_path / "tfds")
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DatasetError, match=r"without TensorFlow.*prepare_celeb_a"):
        open_dataset(path)
    info.write_text("{")
    with pytest.raises(DatasetError, match=r"metadata in .* cannot be read"):
        open_dataset(path)


def test_a_tfds_folder_leads_to_no_file_outside(tiny, tmp_path, tfds):
    """By a link, or by a name in its metadata: what lies there would be read as the stranger's images."""
    path = prepare_celeb_a(tiny, tmp_path / "tfds")
    (shard,) = path.glob("*-test.*")
    moved = shard.rename(tmp_path / shard.name)
    shard.symlink_to(moved)
    with pytest.raises(DatasetError, match=r"names the file .*, outside of the folder"):
        open_dataset(path, "test")
    shard.unlink()
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"{DATASET}', f'"{tmp_path}/{{DATASET}}'))
    with pytest.raises(DatasetError, match=rf"names the file {moved}, outside of the folder"):
        open_dataset(path, "test")


def test_tfds_not_installed(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetError, match=r'pip install "spread-jax\[data\]"'):
        prepare_celeb_a(tiny, tiny)


# The download ---------------------------------------------------------------------------------


def test_no_network(monkeypatch, tmp_path):
    """A host name that is never answered must not hang; the message is all one needs."""

    def never_answers(*_, **__):
        time.sleep(8)
        raise OSError("timed out")

    monkeypatch.setattr(socket, "create_connection", never_answers)
    start = time.monotonic()
    with pytest.raises(DatasetError) as caught:
        open_dataset("celeb_a")
    assert time.monotonic() - start < 4
    for part in (
        "img_align_celeba.zip",
        "list_eval_partition.txt",
        str(tmp_path / "tfds/downloads/manual"),
        "CELEBA=path",
        "--data path",
    ):
        assert part in str(caught.value)


def test_archives_in_the_manual_folder_are_found(tiny, tmp_path):
    (tmp_path / "tfds/downloads").mkdir(parents=True)
    tiny.rename(tmp_path / "tfds/downloads/manual")
    assert len(open_dataset("celeb_a", "validation")) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>", "too many downloads"),
        (b"<html>Sign in</html>", "a web page"),
        (b"PK\x03\x04 and then it broke off", "not the official file"),
        (None, "could not be fetched"),
    ],
)
def test_what_drive_may_send(monkeypatch, tmp_path, reply, message):
    def urlopen(url, timeout):
        assert "id=" in url
        assert timeout
        if reply is None:
            raise ConnectionResetError("reset by peer")
        return io.BytesIO(reply)

    monkeypatch.setattr(celeb_a_download, "_preflight", lambda folder: None)
    monkeypatch.setattr(celeb_a_download.urllib.request, "urlopen", urlopen)
    (tmp_path / "list_eval_partition.txt").write_text("")
    with pytest.raises(DatasetError, match=f"{message}.*img_align_celeba.zip and list_eval"):
        celeb_a_download.download(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["list_eval_partition.txt"]


def test_a_whole_download(monkeypatch, tmp_path, tiny):
    import hashlib

    names = ("list_eval_partition.txt", "img_align_celeba.zip")
    files = {name: (tiny / name).read_bytes() for name in names}
    table = {n: (n, hashlib.md5(data).hexdigest()) for n, data in files.items()}

    def urlopen(url, timeout):
        return io.BytesIO(next(data for name, data in files.items() if f"id={name}" in url))

    monkeypatch.setattr(celeb_a_download, "_FILES", table)
    monkeypatch.setattr(celeb_a_download, "_preflight", lambda folder: None)
    monkeypatch.setattr(celeb_a_download.urllib.request, "urlopen", urlopen)
    assert len(open_dataset("celeb_a", "train")) == 5
    assert sorted(p.name for p in (tmp_path / "tfds/downloads/manual").iterdir()) == sorted(names)


def test_importing_the_data_layer_is_light():
    """A stand-in for the parent package shows what this layer alone brings in."""
    script = (
        "import sys, types, os; before = dict(os.environ)\n"
        "import importlib.util\n"
        "parent = types.ModuleType('spread_jax')\n"
        "parent.__path__ = importlib.util.find_spec('spread_jax').submodule_search_locations\n"
        "sys.modules['spread_jax'] = parent\n"
        "import logging; handlers = list(logging.getLogger().handlers)\n"
        "import spread_jax.data\n"
        "heavy = {'jax', 'PIL', 'sklearn', 'scipy', 'tensorflow', 'tensorflow_datasets', 'rich',\n"
        "         'grain', 'absl'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert dict(os.environ) == before and logging.getLogger().handlers == handlers\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("folder", ["celeba/pictures", "pictures/CelebA"])
def test_numbered_files_in_or_below_a_folder_of_that_name_are_not_split_by_hash(folder, tmp_path):
    names = ["000001.jpg", "000002.jpg", "readme.jpg"]
    with pytest.raises(DatasetError, match="looks like CelebA without its official split"):
        refuse_to_guess(tmp_path / folder, names)
    refuse_to_guess(tmp_path / folder, ["000001.jpg", "beach.jpg"])
    refuse_to_guess(tmp_path / "celeba/of/mine", names)
