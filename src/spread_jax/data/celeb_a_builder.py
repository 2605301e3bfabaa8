"""Prepare CelebA as a TFDS set without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from spread_jax.data.celeb_a import match_partition, official_files, read_partition
from spread_jax.data.errors import DatasetError
from spread_jax.data.files import SPLITS, Listing, listed
from spread_jax.data.tfds_directory import import_tfds

ATTRIBUTES = "list_attr_celeba.txt"


def prepare_celeb_a(archive_dir: str | os.PathLike, data_dir: str | os.PathLike) -> Path:
    """Write CelebA's official files as a TFDS set in the array_record format.

    The JPEG files are stored byte for byte. The set has the splits train, validation and test, the
    features `image` and, where `list_attr_celeba.txt` is there, `attributes` (40 booleans).

    Args:
        archive_dir: folder with `img_align_celeba.zip` (or the extracted folder) and
            `list_eval_partition.txt`.
        data_dir: TFDS's data folder; the set is written to `celeb_a/VERSION` in it.

    Returns:
        the prepared folder, which `open_dataset` and `tfds.builder_from_directory` read.

    Raises:
        DatasetError: a file is missing or damaged, or tensorflow_datasets is not installed.

    Example:
        >>> from spread_jax.data import open_dataset, prepare_celeb_a
        >>> def prepare_and_open(archives, target):
        ...     return open_dataset(prepare_celeb_a(archives, target), "validation")
    """
    tfds = import_tfds()
    images, partition_path = official_files(Path(archive_dir).expanduser())
    partition = read_partition(partition_path)
    beside = next((f for f in (images.parent, partition_path.parent) if (f / ATTRIBUTES).is_file()), images.parent)
    table = _read_attributes(beside / ATTRIBUTES)
    with listed(images) as listing:
        try:
            splits = match_partition(listing.stamps, partition, images)
            builder = _builder_class(tfds, listing, splits, table)(
                data_dir=os.fspath(data_dir), file_format="array_record"
            )
            builder.download_and_prepare()
        finally:
            listing.close()
    return Path(builder.data_dir)


def _builder_class(
    tfds, listing: Listing, splits: dict[str, list[str]], table: dict[str, dict[str, bool]] | None
) -> type:
    class CelebA(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """CelebA, aligned and cropped faces of 178x218 pixels."""

        name = "celeb_a"
        VERSION = tfds.core.Version("2.1.0")
        RELEASE_NOTES: ClassVar = {"2.1.0": "Written by spread_jax from the official files."}

        def _info(self):
            features = {"image": tfds.features.Image(shape=(218, 178, 3), encoding_format="jpeg")}
            if table is not None:
                names = next(iter(table.values()))
                features["attributes"] = dict.fromkeys(names, np.bool_)
            return tfds.core.DatasetInfo(
                builder=self,
                description="Aligned and cropped faces, with the official split.",
                features=tfds.features.FeaturesDict(features),
                homepage="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(splits[split]) for split in SPLITS}

        def _generate_examples(self, names) -> Iterator:
            for name in names:
                short = PurePosixPath(name).name
                example = {"image": listing.read(name)}
                if table is not None:
                    if short not in table:
                        raise DatasetError(f"{ATTRIBUTES} has no line for {short}: fetch it again.")
                    example["attributes"] = table[short]
                yield short, example

    return CelebA


def _read_attributes(path: Path) -> dict[str, dict[str, bool]] | None:
    """A count, a line of names, then per file its name and 1 or -1 for each attribute."""
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}).") from error
    if len(lines) < 3:
        raise DatasetError(f"{path} has only {len(lines)} lines: fetch it again.")
    names, table = lines[1].split(), {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != len(names) + 1 or not set(fields[1:]) <= {"1", "-1"}:
            raise DatasetError(
                f"Line {number} of {path} is not a file name and {len(names)} times 1 or -1: fetch the list again."
            )
        table[fields[0]] = {n: f == "1" for n, f in zip(names, fields[1:], strict=True)}
    if not table or not names:
        raise DatasetError(f"{path} names no attributes of any file: fetch it again.")
    return table
