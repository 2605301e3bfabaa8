"""CelebA from its official files: find them and read their split."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from spread_jax.data import tfds_directory
from spread_jax.data.errors import DatasetError
from spread_jax.data.files import SPLITS, files_source, listed
from spread_jax.data.images import Transform
from spread_jax.data.source import Source

ARCHIVE = "img_align_celeba.zip"
FOLDER = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
_LISTS = (PARTITION, "list_eval_partition.csv")
CROP = tfds_directory.DEFAULT_CROPS["celeb_a"]


def is_official(path: Path) -> bool:
    """Whether a path is CelebA's official images, or a folder with them or with their list of splits."""
    return any(_parts(folder) != (None, None) for folder in _folders(path))


def official_files(path: Path) -> tuple[Path, Path]:
    """The images (zip, or else extracted folder) and the list of splits, as the authors or Kaggle lay them.

    Raises:
        DatasetError: one of them is missing.
    """
    found = [parts for folder in _folders(path) if (parts := _parts(folder)) != (None, None)]
    images, partition = next((parts for parts in found if None not in parts), found[0] if found else (None, None))
    if path.is_file() or path.name == FOLDER:
        images = path
    missing = [ARCHIVE] * (images is None) + [PARTITION] * (partition is None)
    if missing or images is None or partition is None:
        raise DatasetError(
            f"{path} looks like CelebA's official files, but {' and '.join(missing)} is not "
            f"there: put {ARCHIVE} (or the extracted {FOLDER}) and {PARTITION} in one folder."
        )
    return images, partition


def _folders(path: Path) -> list[Path]:
    """Where the files of a set may lie that is named by this path."""
    if path.is_file() or path.name == FOLDER:
        if path.name not in (ARCHIVE, FOLDER):
            return []
        above = [path.parent, path.parent.parent]  # Kaggle's folder lies in another of its name
        return [path, *above] if path.is_dir() else above
    with contextlib.suppress(OSError):
        return [path, *sorted(below for below in path.iterdir() if below.is_dir() and not below.is_symlink())]
    return [path]


def _parts(folder: Path) -> tuple[Path | None, Path | None]:
    """The images and the list of splits in a folder, or in the folders that the authors give them."""
    first = lambda paths, kind: next((path for path in paths if kind(path)), None)
    partition = first((folder / part / name for part in ("", "Eval", "Anno") for name in _LISTS), Path.is_file)
    images = first((folder / part / ARCHIVE for part in ("", "Img")), Path.is_file)
    images = images or first((folder / part / FOLDER for part in ("", "Img")), Path.is_dir)
    return images, partition


def refuse_to_guess(path: Path, names: Sequence[str]) -> None:
    """Refuses to split by hash what is named like CelebA: its official test images would be trained on.

    Raises:
        DatasetError: it is.
    """
    folders = {part.lower() for name in names for part in PurePosixPath(name).parts[:-1]}
    folders |= {part.lower() for part in path.resolve().parts[-2:]}
    numbered = sum(bool(re.fullmatch(r"\d{6}\.(jpg|png)", PurePosixPath(name).name)) for name in names)
    if any(FOLDER in folder or ("celeb" in folder and numbered > len(names) / 2) for folder in folders):
        lists = "Kaggle's zip has to be extracted; " if path.is_file() else ""
        raise DatasetError(
            f"{path} looks like CelebA without its official split: put {PARTITION} (or Kaggle's .csv) beside {ARCHIVE} "
            f"(or the extracted {FOLDER}) and pass the folder of both; {lists}if it is another set, rename it."
        )


def read_partition(path: Path) -> dict[str, str]:
    """The official split: lines `000001.jpg 0`, with 0 train, 1 validation, 2 test.

    Args:
        path: `list_eval_partition.txt`; a CSV with a header line, as Kaggle has it, is read too.

    Returns:
        from file name to split, in the file's order.

    Raises:
        DatasetError: a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}).") from error
    partition = {}
    for number, line in enumerate(lines, 1):
        fields = line.replace(",", " ").split()
        if not fields or (number == 1 and fields[-1:] == ["partition"]):
            continue
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise DatasetError(
                f"Line {number} of {path} is {line[:80]!r}, where a file name and 0, 1 or 2 are "
                "expected: fetch the list again."
            )
        partition[fields[0]] = SPLITS[int(fields[1])]
    if not partition:
        raise DatasetError(f"{path} names no files: fetch the list again.")
    return partition


def match_partition(names: Mapping[str, str], partition: Mapping[str, str], images: Path) -> dict[str, list[str]]:
    """The archive's members of each split, in the list's order.

    Raises:
        DatasetError: the list and the images do not cover each other.
    """
    members: dict[str, str] = {}
    for name in names:
        if members.setdefault(PurePosixPath(name).name, name) != name:
            raise DatasetError(f"{images} holds {PurePosixPath(name).name} twice: remove one.")
    for these, those, what in (
        (partition, members, f"in {PARTITION} and not among the images of {images}"),
        (members, partition, f"among the images of {images} and not in {PARTITION}"),
    ):
        missing = [name for name in these if name not in those]
        if missing:
            raise DatasetError(
                f"{len(missing):,} of {len(these):,} files are {what} ({missing[0]} is the first): "
                "fetch or extract the archive again."
            )
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, split in partition.items():
        splits[split].append(members[name])
    return splits


def official_source(path: Path, split: str, image_size: int | None, crop: int | None, channels: int | None) -> Source:
    """A split of CelebA from its official files."""
    images, partition_path = official_files(path)
    partition = read_partition(partition_path)
    with listed(images) as listing:
        names = match_partition(listing.stamps, partition, images)[split]
        transform = Transform(image_size or 64, crop or CROP, channels or 3)
        return files_source("celeb_a", listing, names, transform, f"CelebA ({images})")


def locate() -> Path:
    """A prepared TFDS folder of CelebA, or the folder of its official files, fetched if need be."""
    if (prepared := tfds_directory.find_prepared("celeb_a")) is not None:
        return prepared
    manual = tfds_directory.data_dir() / "downloads" / "manual"
    for folder in (manual, manual / "celeb_a"):
        if folder.is_dir() and is_official(folder):
            return folder
    from spread_jax.data.celeb_a_download import download

    download(manual)
    return manual
