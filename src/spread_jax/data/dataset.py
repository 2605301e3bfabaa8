"""`open_dataset`: from a name or a path to memory-mapped images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import numbers
import os
from pathlib import Path

import numpy as np

from spread_jax._progress import Progress
from spread_jax.data.cache import Report, cached_arrays
from spread_jax.data.errors import DatasetError
from spread_jax.data.files import SPLITS, assign_splits, files_source, listed, split_folders
from spread_jax.data.images import Transform
from spread_jax.data.source import Source
from spread_jax.data.stall import watched

NAMES = ("faces", "digits", "celeb_a", "mnist")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, decoded.

    Args:
        name: the name or path's last part it was opened by.
        split: "train", "validation" or "test".
        images: read-only uint8 array [N, H, W, C], memory-mapped from the cache.
        labels: integer array [N], or None.
        source: where the images come from, for people.
        fingerprint: hexadecimal digest of the images' bytes; the same pixels have the same one wherever
            they came from.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray | None
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    @classmethod
    def from_array(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "array",
        split: str = "train",
    ) -> Dataset:
        """Wrap uint8 images [N, H, W, C] that are already in memory.

        Raises:
            DatasetError: the images are not uint8 of rank 4, or the labels do not match them.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DatasetError(
                f"images has dtype {images.dtype} and shape {images.shape}; "
                "uint8 values of shape [N, H, W, C] are needed."
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise DatasetError(f"labels has shape {labels.shape}, but images is {images.shape}.")
        view = images.view()
        view.flags.writeable = False
        fingerprint = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:16]
        return cls(name, split, view, labels, "an array in memory", fingerprint)


def open_dataset(
    name_or_path: str | os.PathLike,
    split: str = "train",
    *,
    image_size: int | None = None,
    crop: int | None = None,
    channels: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    max_examples: int | None = None,
    progress: Report | None = None,
) -> Dataset:
    """Open a split of a data set as uint8 images, decoding it into the cache on the first call.

    Names: `faces` (synthetic, 64x64x3), `digits` (scikit-learn's, 28x28x1), `celeb_a` (a prepared
    TFDS folder, the official archive in TFDS's manual folder, or a download), `mnist` (a prepared
    TFDS folder). Paths: a folder of images or a zip of them, searched to the bottom; a folder or
    file in the idx format; a prepared TFDS folder; a folder with CelebA's `img_align_celeba.zip`
    (or the extracted `img_align_celeba/`) and `list_eval_partition.txt` (or Kaggle's `.csv`), or one above it.

    Official splits are used where there are any. Without an official validation split, it is the
    last tenth of train (of a `train` folder: a tenth by hash). Without any splits, each file's name
    decides by its hash, 90/5/5.

    Args:
        name_or_path: one of the names above or a path.
        split: "train", "validation" or "test".
        image_size: height and width in pixels. Default: 64; idx files stay as they are; digits 28.
        crop: side of the centre square that is cut out before resizing. Default: 140 for CelebA,
            else the largest that fits.
        channels: 1 or 3. Default: 1 for idx and digits, 3 for image files, as stored for TFDS.
        cache_dir: folder for the decoded images. Default: $SPREAD_JAX_CACHE, else
            $XDG_CACHE_HOME/spread_jax, else ~/.cache/spread_jax.
        max_examples: open only this many of the split, the first ones.
        progress: called as `progress(message_or_None, done, total)` while decoding. Default: a bar
            on a terminal, else lines on stderr.

    Returns:
        The data set, with `images` a read-only memory map.

    Raises:
        DatasetError: anything about the arguments, the files or the disk that keeps it from being
            opened; the message says what to do. A read that takes longer than
            $SPREAD_JAX_READ_TIMEOUT seconds (300) is one, with the file's name.

    Example:
        >>> import tempfile
        >>> from spread_jax.data import open_dataset
        >>> faces = open_dataset("faces", "test", max_examples=16, cache_dir=tempfile.mkdtemp())
        >>> len(faces), faces.image_shape
        (16, (64, 64, 3))
    """
    _check_arguments(split, image_size=image_size, crop=crop, channels=channels, most=max_examples)
    name = os.fspath(name_or_path)
    try:
        source = watched(name, _find_source, name, split, image_size, crop, channels)
    except OSError as error:
        where = error.filename or repr(name)
        raise DatasetError(f"{where} cannot be read ({error.strerror or error}).") from error
    try:
        if source.num_examples == 0:
            raise DatasetError(
                f"The {split} split of {source.description} is empty: choose another split, or a larger set."
            )
        reporting = Progress(f"{source.name} {split}") if progress is None else contextlib.nullcontext(progress)
        with reporting as report:
            images, labels, pixels = cached_arrays(
                source, split, cache_dir=cache_dir, max_examples=max_examples, progress=report
            )
    finally:
        source.close()
    return Dataset(source.name, split, images, labels, source.description, pixels[:16])


def _check_arguments(split: str, *, most: int | None, channels: int | None, **sizes) -> None:
    if split not in SPLITS:
        raise DatasetError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}.")
    if channels not in (None, 1, 3):
        raise DatasetError(f"channels is {channels!r}: it must be 1 or 3.")
    for name, value in (*sizes.items(), ("max_examples", most)):
        if value is not None and (not isinstance(value, numbers.Integral) or value < 1):
            raise DatasetError(f"{name} is {value!r}: it must be a whole number of 1 or more.")


def _find_source(name: str, split: str, image_size: int | None, crop: int | None, channels: int | None) -> Source:
    # Imported here, so that importing this package stays light and one source needs no other's.
    from spread_jax.data import celeb_a, idx, tfds_directory

    arguments = (split, image_size, crop, channels)
    if name == "faces":
        from spread_jax.data.faces import faces_source

        return faces_source(*arguments)
    if name == "digits":
        from spread_jax.data.digits import digits_source

        return digits_source(*arguments)
    if name == "celeb_a":
        return _find_source(str(celeb_a.locate()), *arguments)
    if name == "mnist" and not Path(name).exists():
        return tfds_directory.tfds_source(tfds_directory.locate("mnist"), *arguments)

    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise DatasetError(f"{name!r} cannot be read ({error}).") from error
    if not name or not path.exists():
        raise DatasetError(
            f"{name!r} is neither a data set's name ({', '.join(NAMES)}) nor a path that exists "
            f"({path.absolute()}): pass one of the names, or the path of a folder or zip of images."
        )
    if path.is_dir():
        prepared = path if tfds_directory.is_prepared(path) else None
        if prepared := prepared or tfds_directory.newest_prepared(path):
            return tfds_directory.tfds_source(prepared, *arguments)
    if celeb_a.is_official(path):
        return celeb_a.official_source(path, *arguments)
    if idx.is_idx_path(path):
        return idx.idx_source(path, *arguments)
    if not path.is_dir() and not path.is_file():  # a pipe, say, which would be waited for
        raise DatasetError(f"{path} is neither a file nor a folder: pass a folder or zip of images.")
    if path.is_file() and not _looks_like_zip(path):
        raise DatasetError(
            f"{path} is a single file that is neither a zip nor in the idx format: pass a folder or zip of images."
        )
    with listed(path) as listing:
        names = list(listing.stamps)
        if split_folders(names, path) is None:
            celeb_a.refuse_to_guess(path, names)
        names = assign_splits(names, path)[split]
        kind = "folder" if path.is_dir() else "zip"
        transform = Transform(image_size or 64, crop, channels or 3)
        short = path.resolve().stem if kind == "zip" else path.resolve().name
        return files_source(short, listing, names, transform, f"{kind} {path}")


def _looks_like_zip(path: Path) -> bool:
    if path.suffix.lower() == ".zip":
        return True  # A damaged one gets the error that says so.
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
