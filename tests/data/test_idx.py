"""idx files against bytes written by hand, and the real MNIST where it is."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from spread_jax.data import DatasetError, Loader, open_dataset, read_idx


def idx_bytes(values: np.ndarray, code: int = 8) -> bytes:
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, code, values.ndim]) + shape + values.tobytes()


@pytest.fixture
def mnist_like(tmp_path):
    folder = tmp_path / "mini"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, n, end in (("train", 20, ".gz"), ("t10k", 6, "")):
        images = rng.integers(0, 256, (n, 5, 4), np.uint8)
        labels = np.arange(n, dtype=np.uint8)
        pack = gzip.compress if end else bytes
        (folder / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx_bytes(images)))
        (folder / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx_bytes(labels)))
    return folder


def test_hand_written_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]
    path.write_bytes(gzip.compress(bytes([0, 0, 11, 1, 0, 0, 0, 2, 1, 2, 255, 254])))
    assert read_idx(path).tolist() == [258, -2]
    path.write_bytes(idx_bytes(np.array([1.5, -2.0], ">f8"), 14))
    assert read_idx(path).tolist() == [1.5, -2.0]


def test_splits_and_labels(mnist_like):
    images = read_idx(mnist_like / "train-images-idx3-ubyte.gz")[..., None]
    train, validation, test = (open_dataset(mnist_like, s) for s in ("train", "validation", "test"))
    assert np.array_equal(train.images, images[:18])
    assert np.array_equal(validation.images, images[18:])
    assert validation.labels.tolist() == [18, 19]
    assert len(test) == 6
    assert test.image_shape == (5, 4, 1)
    loader = Loader(train, batch_size=4, seed=0)
    assert np.array_equal(loader.batch(3), images[loader.batch_labels(3)])
    by_file = open_dataset(mnist_like / "train-images-idx3-ubyte.gz", "validation")
    assert np.array_equal(by_file.images, validation.images)


def test_resized_and_in_colour(mnist_like):
    dataset = open_dataset(mnist_like, "test", image_size=8, channels=3)
    assert dataset.image_shape == (8, 8, 3)
    assert np.array_equal(dataset.images[..., 0], dataset.images[..., 2])
    assert open_dataset(mnist_like, "test", channels=3).image_shape == (5, 4, 3)
    assert open_dataset(mnist_like, "test", crop=3).image_shape == (3, 3, 1)


def test_any_idx_file(tmp_path):
    path = tmp_path / "letters.bin"
    path.write_bytes(idx_bytes(np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2)))
    sizes = [len(open_dataset(path, split)) for split in ("train", "validation", "test")]
    assert sizes == [36, 2, 2]
    assert open_dataset(path).labels is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an idx file"),
        (b"\x00\x00\x07\x01", "is not an idx file"),
        (bytes([0, 0, 8, 3, 0, 0]), "ends inside its header"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]), "holds 9 bytes.*promises 17"),
        (gzip.compress(idx_bytes(np.arange(99, dtype=np.uint8)), mtime=0)[:-9], "truncated gzip"),
        (gzip.compress(b"0" * 99, mtime=0), "is not an idx file"),
        (b"\x1f\x8b" + b"x" * 30, "gzip"),
    ],
    # The tests' names must be the same in every worker: bytes would be part of them.
    ids=["empty", "dtype", "header", "short", "truncated", "packed-text", "not-gzip"],
)
def test_damaged_files(tmp_path, data, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=f"{path}.*{message}"):
        open_dataset(path)


def test_files_that_do_not_belong_together(mnist_like):
    (mnist_like / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(DatasetError, match="not of the same set"):
        open_dataset(mnist_like, "test")
    (mnist_like / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DatasetError, match=r"no test split.*t10k-images-idx3-ubyte"):
        open_dataset(mnist_like, "test")


def test_real_mnist(mnist_folder):
    train, validation, test = (open_dataset(mnist_folder, s) for s in ("train", "validation", "test"))
    total = len(train) + len(validation)
    assert len(validation) == round(total * 0.1)
    assert len(test) == 10_000
    assert train.image_shape == (28, 28, 1)
    # The first labels of each file as everybody knows them, and the fraction of ink.
    assert train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert np.mean(test.images) / 255 == pytest.approx(0.1325, abs=5e-4)
    with gzip.open(mnist_folder / "t10k-images-idx3-ubyte.gz") as file:
        assert file.read()[16:] == test.images.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_one_byte_more_or_less_than_the_header_promises_is_refused(pack, tmp_path):
    sound = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))
    path = tmp_path / "images-idx2-ubyte"
    path.write_bytes(pack(sound))
    assert read_idx(path).shape == (3, 4)
    for content in (sound + b"\0", sound[:-1]):
        path.write_bytes(pack(content))
        with pytest.raises(DatasetError, match="truncated or damaged"):
            read_idx(path)
