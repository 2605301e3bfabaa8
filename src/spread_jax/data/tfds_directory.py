"""Prepared TFDS folders, read by TFDS's random-access readers without TensorFlow."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spread_jax.data.errors import DatasetError
from spread_jax.data.images import Transform, decode_image, quiet_pillow, require_pillow
from spread_jax.data.source import Block, Source, digest, stamp

DEFAULT_CROPS = {"celeb_a": 140}
DEFAULT_SIZES = {"mnist": 28}
_one_reader = threading.Lock()
INSTALL = 'pip install "spread-jax[data]"'


def import_tfds():
    """tensorflow_datasets, or the error that says how to install it."""
    try:
        import importlib_resources  # noqa: F401  (TFDS needs it and does not declare it.)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"Reading TFDS folders needs tensorflow_datasets ({error}): {INSTALL}. TensorFlow itself is not needed."
        ) from error
    return tfds


def data_dir() -> Path:
    """Where TFDS keeps prepared sets: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    try:
        return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    except RuntimeError as error:
        raise DatasetError("This user has no home folder: set the variable TFDS_DATA_DIR to that of TFDS.") from error


def is_prepared(path: Path) -> bool:
    """Whether a folder is one version of a set prepared by TFDS."""
    return (path / "dataset_info.json").is_file() and (path / "features.json").is_file()


def find_prepared(name: str) -> Path | None:
    """The newest prepared version (of any config) of a set in the data folder, or None."""
    return newest_prepared(data_dir() / name)


def newest_prepared(root: Path) -> Path | None:
    """The newest prepared version in a set's folder (`celeb_a`, above `celeb_a/2.1.0`), or None."""
    found = [
        info.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for info in (root.glob(pattern) if root.is_dir() else ())
        if is_prepared(info.parent)
    ]
    return max(found, key=lambda path: _version(path.name), default=None)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))


def locate(name: str) -> Path:
    """As `find_prepared`, raising where there is none."""
    found = find_prepared(name)
    if found is None:
        raise DatasetError(
            f"No prepared TFDS set {name!r} under {data_dir()} (TFDS_DATA_DIR moves that): prepare "
            "it there with file_format='array_record', or pass a path, such as a folder with "
            "train-images-idx3-ubyte.gz and its companions."
        )
    return found


@contextlib.contextmanager
def _known_features_only(tfds, path: Path) -> Iterator[None]:
    """TFDS imports whatever module a set's features name, at any depth: here it finds those it has, and no more.

    Raises:
        DatasetError: another is named.
    """
    connector = tfds.features.FeatureConnector
    known, found = connector._registered_features, connector.__dict__["cls_from_name"]

    def look_up(cls, name: str) -> type:
        if name not in known:
            raise DatasetError(
                f"{path / 'features.json'} names the class {name}, which is not one of tensorflow_datasets: "
                "reading it would import that code; prepare the set again with features of tensorflow_datasets."
            )
        return known[name]

    with _one_reader:
        connector.cls_from_name = classmethod(look_up)
        try:
            yield
        finally:
            connector.cls_from_name = found


def tfds_source(path: Path, split: str, image_size: int | None, crop: int | None, channels: int | None) -> Source:
    """A split of a prepared TFDS folder whose examples have a feature `image`.

    Without a validation split, it is the last tenth of train.

    Raises:
        DatasetError: a format that needs TensorFlow, no such split, or no feature `image`.
    """
    require_pillow()
    tfds = import_tfds()
    try:
        with _known_features_only(tfds, path):
            builder = tfds.builder_from_directory(os.fspath(path))
            features, splits = builder.info.features, builder.info.splits
    except DatasetError:
        raise
    except Exception as error:  # TFDS raises many types on damaged metadata.
        raise DatasetError(
            f"The metadata in {path} cannot be read ({type(error).__name__}: {error}): prepare the set again."
        ) from error
    if "image" not in features:
        raise DatasetError(f"The examples in {path} have the features {sorted(features)}: one named 'image' is needed.")
    stored = split
    held_out = "validation" not in splits and split != "test"
    if held_out:
        stored = "train"
    if stored not in splits:
        raise DatasetError(f"{path} has no split {split!r}: it has {', '.join(sorted(splits))}.")
    total = splits[stored].num_examples
    start, stop = 0, total
    if held_out:
        border = round(total * 0.9)
        start, stop = (0, border) if split == "train" else (border, total)

    name = builder.name
    stored_channels = features["image"].shape[-1]
    transform = Transform(
        image_size or DEFAULT_SIZES.get(name, 64),
        crop or DEFAULT_CROPS.get(name),
        channels or (stored_channels if stored_channels in (1, 3) else 3),
    )
    has_labels = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        names = [Path(file) for file in splits[stored].filepaths]
        for file in names:
            if not file.resolve().is_relative_to(path.resolve()):
                raise DatasetError(f"{path} names the file {file}, outside of the folder: prepare the set again.")
        data = builder.as_data_source(stored, decoders=decoders)
        stamps = [f"{file.name} {stamp(file.stat())}" for file in names]
    except DatasetError:
        raise
    except (NotImplementedError, ValueError, ImportError) as error:
        raise DatasetError(
            f"{path} is in the format {builder.info.file_format}, which cannot be read without "
            "TensorFlow: prepare it again with file_format='array_record' (for CelebA, "
            "spread_jax.data.prepare_celeb_a does so from the official archive)."
        ) from error
    except OSError as error:
        raise DatasetError(f"{path} is not complete ({error}): prepare the set again.") from error

    def read(first: int, last: int) -> Block:
        rows = range(start + first, start + last)
        try:
            examples = data.__getitems__(list(rows))
        except Exception as error:
            raise DatasetError(
                f"Examples {rows[0]} to {rows[-1]} of {path} ({stored}) cannot be read "
                f"({type(error).__name__}: {error}): prepare the set again."
            ) from error
        with quiet_pillow():
            images = [
                decode_image(example["image"], transform, f"Example {row} of {path} ({stored})")
                for row, example in zip(rows, examples, strict=True)
            ]
        labels = None
        if has_labels:
            labels = np.array([example["label"] for example in examples], np.int64)
        return Block(np.stack(images), labels)

    return Source(
        name=name,
        location=str(path.resolve()),
        description=f"TFDS folder {path}",
        fingerprint=digest((*stamps, start, stop)),
        num_examples=stop - start,
        image_shape=(transform.image_size, transform.image_size, transform.channels),
        settings=str(transform),
        read=read,
    )
