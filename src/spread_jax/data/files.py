"""Image files in a folder or in a zip, and which split each belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from spread_jax.data.errors import DatasetError
from spread_jax.data.images import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    Transform,
    decode_image,
    quiet_pillow,
    refuse_bomb,
    require_pillow,
)
from spread_jax.data.source import Block, Source, digest
from spread_jax.data.stall import reading

SPLITS = ("train", "validation", "test")
_SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


class Listing(NamedTuple):
    """The image files of a folder or zip.

    `stamps` maps each file's relative name to text that changes when the file does; `read` returns
    the bytes of one name.
    """

    path: Path
    stamps: Mapping[str, str]
    read: Callable[[str], bytes]
    close: Callable[[], None]


def list_folder(path: Path) -> Listing:
    """Find image files in a folder and all below it; other files are passed over by their name."""
    root = path.resolve()
    stamps = {}
    for name, file in _walk(root, root, "", frozenset()):
        reading(file)
        status = file.stat()
        stamps[name] = f"{status.st_size} {status.st_mtime_ns}"
        if status.st_size > MAX_BYTES:
            raise DatasetError(f"{file} holds {status.st_size:,} bytes: too large for an image.")
    if not stamps:
        raise DatasetError(_nothing_found(path, "folder"))

    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{root / name} cannot be read ({error.strerror or error}).") from error

    return Listing(path, dict(sorted(stamps.items())), read, lambda: None)


def _walk(root: Path, folder: Path, prefix: str, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
    reading(folder)
    above = above | {folder.resolve()}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed ({error.strerror or error}).") from error
    for entry in entries:
        name, path = prefix + entry.name, folder / entry.name
        if _hidden(entry.name):
            continue
        if entry.is_symlink():
            try:
                target = path.resolve()
            except (OSError, RuntimeError) as error:
                raise DatasetError(f"{path} is a symbolic link in a circle: remove it.") from error
            if not target.is_dir() and not _is_image(name):
                continue
            if not target.is_relative_to(root):
                raise DatasetError(
                    f"{path} is a symbolic link to {target}, outside of the folder {root}: links "
                    "are followed inside the folder only; copy the files there."
                )
            if not target.exists():
                raise DatasetError(f"{path} is a symbolic link to {target}, which does not exist.")
            if target in above:
                continue  # A link to a folder that contains it.
        if entry.is_dir():
            yield from _walk(root, path, name + "/", above)
        elif _is_image(name):
            if not entry.is_file():
                raise DatasetError(f"{path} is neither a file nor a folder: remove it.")
            yield name, path


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _nothing_found(path: Path, kind: str) -> str:
    known = " ".join(sorted(IMAGE_SUFFIXES))
    return f"The {kind} {path} holds no image files: names ending in {known} are looked for."


def list_zip(path: Path) -> Listing:
    """Find image files in a zip; members are read in place, never extracted."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise DatasetError(
            f"{path} is not a whole zip file ({error}): a download that broke off or an error "
            "page saved under this name looks like this; fetch it again."
        ) from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        stamps = _zip_members(path, archive)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    except BaseException:
        archive.close()
        raise

    def read(name: str) -> bytes:
        try:
            # At most what the member announces: `archive.read` first unpacks all there is, then looks.
            with archive.open(name) as member:
                return member.read(sizes[name])
        except (zipfile.BadZipFile, EOFError, ValueError, zlib.error, OSError, NotImplementedError) as error:
            raise DatasetError(
                f"The member {name} of {path} cannot be read ({error}): the zip is damaged; fetch it again."
            ) from error

    return Listing(path, stamps, read, archive.close)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, str]:
    stamps = {}
    unpacked = 0
    for info in archive.infolist():
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
            raise DatasetError(
                f"{path} has a member named {name!r}, which points outside of the archive: "
                "such a zip is not read; make it again with relative names."
            )
        if info.is_dir() or not _is_image(name) or any(_hidden(part) for part in parts):
            continue
        if info.flag_bits & 1:
            raise DatasetError(f"The member {name} of {path} is encrypted: make it again without.")
        if info.file_size > MAX_BYTES:
            raise DatasetError(
                f"The member {name} of {path} unpacks to {info.file_size:,} bytes: too large for an image."
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DatasetError(
                f"The member {name} of {path} is packed in a way that is not read here: make the zip again with the "
                "usual deflate."
            )
        unpacked += info.file_size
        if name in stamps:
            raise DatasetError(f"{path} has two members named {name}: make it again.")
        stamps[name] = f"{info.file_size} {info.CRC:08x}"
    if not stamps:
        raise DatasetError(_nothing_found(path, "zip"))
    refuse_bomb(path, path.stat().st_size, unpacked)
    return dict(sorted(stamps.items()))


def assign_splits(names: Sequence[str], path: Path) -> dict[str, list[str]]:
    """Which names belong to which split.

    Where the first folder below the common one is `train`, `validation` (or `valid`, `val`) or
    `test`, it decides; without a validation folder, a tenth of train is held out by hash. Otherwise
    each name's own hash decides, 90/5/5, so that adding files moves none. In a set so small that a
    split would be empty (of three files or more), the largest split gives it one.

    Args:
        names: relative names with forward slashes.
        path: the folder or zip, for errors.

    Returns:
        for each of train, validation and test a sorted list of names.
    """
    folders = _split_folders(names, path)
    if folders is not None:
        if not folders["validation"]:
            for name in list(folders["train"]):
                if _uniform(name) >= 0.9:
                    folders["validation"].append(name)
            if not folders["validation"] and len(folders["train"]) >= 2:
                folders["validation"].append(max(folders["train"], key=_uniform))
            held_out = set(folders["validation"])
            folders["train"] = [name for name in folders["train"] if name not in held_out]
        return folders
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names):
        u = _uniform(name)
        splits["train" if u < 0.9 else "validation" if u < 0.95 else "test"].append(name)
    if len(names) >= 3:
        for split in SPLITS:
            if not splits[split]:
                donor = max(splits.values(), key=len)
                moved = max(donor, key=_uniform)
                donor.remove(moved)
                splits[split].append(moved)
    return splits


def _split_folders(names: Sequence[str], path: Path) -> dict[str, list[str]] | None:
    common = PurePosixPath(os.path.commonpath(names))
    if len(names) == 1 or _is_image(str(common)):
        common = common.parent
    if common.name.lower() in _SPLIT_FOLDERS:
        common = common.parent
    depth = len(common.parts)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    outside = []
    for name in sorted(names):
        parts = PurePosixPath(name).parts[depth:]
        split = _SPLIT_FOLDERS.get(parts[0].lower()) if len(parts) > 1 else None
        (splits[split] if split else outside).append(name)
    if not splits["train"]:
        return None  # A class may well be called "test".
    if outside:
        raise DatasetError(
            f"{path} has a folder named train, but {len(outside):,} images lie outside of train, "
            f"validation and test ({outside[0]} is the first): move or remove them, or rename the "
            "folder train."
        )
    return splits


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, the same on every file system."""
    normal = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(normal).digest()[:7], "big") / 2.0**56


def files_source(
    name: str,
    listing: Listing,
    names: Sequence[str],
    transform: Transform,
    description: str,
) -> Source:
    """The source that decodes these files of a listing, in this order, in several threads."""
    require_pillow()
    pools: list[ThreadPool] = []  # made at the first read; its threads do not keep a process alive

    def decode(file: str) -> np.ndarray:
        return decode_image(listing.read(file), transform, f"{listing.path}/{file}")

    def read(start: int, stop: int) -> Block:
        if not pools:
            pools.append(ThreadPool(min(8, os.cpu_count() or 1)))
        images = []
        with quiet_pillow():
            decoded = pools[0].imap(decode, names[start:stop])
            for file in names[start:stop]:
                reading(f"{listing.path}/{file}")
                images.append(next(decoded))
        return Block(np.stack(images))

    def close() -> None:
        for pool in pools:
            pool.terminate()  # waits for no thread: one may be stalled
        listing.close()

    stamps = (f"{file} {listing.stamps[file]}" for file in names)
    return Source(
        name=name,
        location=str(listing.path.resolve()),
        description=description,
        fingerprint=digest(stamps),
        num_examples=len(names),
        image_shape=(transform.image_size, transform.image_size, transform.channels),
        settings=str(transform),
        read=read,
        close=close,
    )


@contextlib.contextmanager
def listed(path: Path) -> Iterator[Listing]:
    """The listing of a folder or zip, closed if the block fails."""
    listing = list_folder(path) if path.is_dir() else list_zip(path)
    try:
        yield listing
    except BaseException:
        listing.close()
        raise
