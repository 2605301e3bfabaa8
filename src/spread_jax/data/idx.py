"""The idx format of MNIST and its relatives, gzipped or not."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spread_jax.data.errors import DatasetError
from spread_jax.data.images import Transform, refuse_bomb, transform_array
from spread_jax.data.source import Block, Source, digest, stamp
from spread_jax.data.stall import reading

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_AXES = 32
_MAX_DEFLATE = 1040  # times, the most that gzip can shrink
_CHUNK = 16 * 1024 * 1024
_FILE_SPLITS = {"train": "train", "validation": "train", "test": "t10k"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read one idx file.

    The file holds two zero bytes, a type code, the number of axes, each axis as a big-endian
    32-bit integer, and the values.

    Args:
        path: an idx file; gzip is recognised by its first bytes, whatever the name.

    Returns:
        array of the file's shape, in the machine's byte order.

    Raises:
        DatasetError: not an idx file, or its length is not what its header says.

    Example:
        >>> import pathlib, tempfile
        >>> from spread_jax.data import read_idx
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        >>> read_idx(path).tolist()
        [7, 9]
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DatasetError(f"{path} is not a file.")
        packed = path.stat().st_size
        with open(path, "rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if zipped else contextlib.nullcontext(file) as stream:
                return _read_idx(path, stream, packed, zipped=zipped)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again.") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}).") from error


def _read_idx(path: Path, stream: BinaryIO, packed: int, *, zipped: bool) -> np.ndarray:
    """The header first: no more is read, or made room for, than it promises and the file can hold."""
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES or not 0 < start[3] <= _MAX_AXES:
        raise DatasetError(
            f"{path} is not an idx file: it begins with the bytes {start.hex(' ')!r} where 00 00, a type code and the "
            f"number of axes, at most {_MAX_AXES}, are expected."
        )
    dtype, axes = np.dtype(_TYPES[start[2]]), start[3]
    header = stream.read(4 * axes)
    offset = 4 + 4 * axes
    if len(header) < 4 * axes:
        raise DatasetError(f"{path} ends inside its header of {offset} bytes: fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
    expected = offset + dtype.itemsize * math.prod(shape)
    data = bytearray()
    if expected - offset <= (_MAX_DEFLATE * packed if zipped else packed):
        if zipped:
            refuse_bomb(path, packed, expected)
        while len(data) <= expected - offset:  # one byte more would show that there is more
            reading(path)
            chunk = stream.read(min(_CHUNK, expected - offset + 1 - len(data)))
            if not chunk:
                break
            data += chunk
    if offset + len(data) != expected:
        more = len(data) > expected - offset
        held = "more" if zipped and more else "fewer bytes" if zipped else f"{packed:,} bytes"
        raise DatasetError(
            f"{path} holds {held}, but its header, with shape {shape}, promises {expected:,}: the file is truncated or "
            "damaged; fetch it again."
        )
    try:
        values = np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # sizes beyond what an array can have, beside a size of 0
        raise DatasetError(f"{path} has a header with the impossible shape {shape}: fetch it again.") from error
    return values.astype(dtype.newbyteorder("="), copy=False)


def is_idx_path(path: Path) -> bool:
    """Whether a path is an idx images file or a folder with one."""
    if path.is_file():
        return "idx3-ubyte" in path.name or _begins_as_images(path)
    return any(_find(path, prefix, "images") for prefix in ("train", "t10k"))


def _begins_as_images(path: Path) -> bool:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            return file.read(4) == b"\0\0\x08\x03"
    except (OSError, EOFError, zlib.error):
        return False


def _find(folder: Path, prefix: str, what: str) -> Path | None:
    rank = "idx3" if what == "images" else "idx1"
    for dot in "-.":  # Both spellings are in circulation.
        for end in ("", ".gz"):
            path = folder / f"{prefix}-{what}{dot}{rank}-ubyte{end}"
            if path.is_file():
                return path
    return None


def idx_source(path: Path, split: str, image_size: int | None, crop: int | None, channels: int | None) -> Source:
    """A split of an idx folder, or of a single images file.

    In a folder, `test` is the t10k file; `train` is the first 90 % of the train file and
    `validation` the last 10 %. A single file named train-* or t10k-* means its folder's files of
    that name; any other images file is split 90/5/5 in its own order.
    """
    folder, images_path = (path.parent, path) if path.is_file() else (path, None)
    if images_path is None or images_path.name.startswith(("train-", "t10k-")):
        prefix = _FILE_SPLITS[split]
        found = _find(folder, prefix, "images")
        if found is None or (images_path is not None and not images_path.name.startswith(prefix)):
            raise DatasetError(
                f"{path} has no {split} split: that needs the file {prefix}-images-idx3-ubyte "
                "(.gz or not) in the folder."
            )
        images_path, labels_path = found, _find(folder, prefix, "labels")
        fractions = {"train": (0.0, 0.9), "validation": (0.9, 1.0), "test": (0.0, 1.0)}
    else:
        labels_path = None
        fractions = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}

    images = read_idx(images_path)
    if images.ndim != 3 or images.dtype != np.uint8 or 0 in images.shape[1:]:
        raise DatasetError(
            f"{images_path} holds {images.dtype} values of shape {images.shape}; images are "
            "unsigned bytes of shape [count, height, width]."
        )
    labels = read_idx(labels_path).astype(np.int64) if labels_path else None
    if labels is not None and labels.shape != images.shape[:1]:
        raise DatasetError(
            f"{labels_path} holds labels of shape {labels.shape} for the {len(images):,} images "
            f"of {images_path.name}: the two files are not of the same set."
        )
    start, stop = (round(len(images) * fraction) for fraction in fractions[split])
    height, width = images.shape[1:]
    size = image_size or crop or min(height, width)
    # Without a size the images stay as they are, square or not.
    native = image_size is None and crop is None
    transform = Transform(size, crop, channels or 1)

    def read(first: int, last: int) -> Block:
        rows = slice(start + first, start + last)
        block = images[rows, :, :, None]
        if native:
            block = np.repeat(block, transform.channels, axis=-1)
        else:
            block = transform_array(block, transform, images_path.name)
        return Block(block, None if labels is None else labels[rows])

    stamps = [f"{file.name} {stamp(file.stat())}" for file in (images_path, labels_path) if file is not None]
    return Source(
        name=path.name.split(".")[0] or "idx",
        location=str(path.resolve()),
        description=f"idx file {images_path}",
        fingerprint=digest(stamps),
        num_examples=stop - start,
        image_shape=(height, width, transform.channels) if native else (size, size, channels or 1),
        settings="native" if native else str(transform),
        read=read,
    )
