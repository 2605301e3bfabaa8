"""CelebA from its official files: find them and read their split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from spread_jax.data import tfds_directory
from spread_jax.data.errors import DatasetError
from spread_jax.data.files import SPLITS, files_source, listed
from spread_jax.data.images import Transform
from spread_jax.data.source import Source

ARCHIVE = "img_align_celeba.zip"
FOLDER = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
CROP = tfds_directory.DEFAULT_CROPS["celeb_a"]


def is_official(path: Path) -> bool:
    """Whether a path is a folder of CelebA's official files (or the archive in one)."""
    if path.is_file() or path.name == FOLDER:
        return path.name in (ARCHIVE, FOLDER) and (path.parent / PARTITION).is_file()
    return (path / PARTITION).is_file() or (path / ARCHIVE).is_file()


def official_files(path: Path) -> tuple[Path, Path]:
    """The images (zip, or else extracted folder) and the partition list of a folder.

    Raises:
        DatasetError: one of them is missing.
    """
    folder = path.parent if path.is_file() or path.name == FOLDER else path
    wanted = (path,) if path != folder else (folder / ARCHIVE, folder / FOLDER)
    images = next((candidate for candidate in wanted if candidate.exists()), None)
    missing = [ARCHIVE] * (images is None) + [PARTITION] * (not (folder / PARTITION).is_file())
    if missing or images is None:
        raise DatasetError(
            f"{folder} looks like CelebA's official files, but {' and '.join(missing)} is not "
            f"there: put {ARCHIVE} (or the extracted {FOLDER}) and {PARTITION} in one folder."
        )
    return images, folder / PARTITION


def read_partition(path: Path) -> dict[str, str]:
    """The official split: lines `000001.jpg 0`, with 0 train, 1 validation, 2 test.

    Args:
        path: `list_eval_partition.txt`; a CSV with a header line is read too.

    Returns:
        from file name to split, in the file's order.

    Raises:
        DatasetError: a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
