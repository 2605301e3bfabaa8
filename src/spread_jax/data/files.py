"""Image files in a folder or in a zip, and which split each belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from spread_jax.data.errors import DatasetError
from spread_jax.data.images import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    OTHER_PICTURES,
    Transform,
    decode_image,
    quiet_pillow,
    refuse_bomb,
    require_pillow,
)
from spread_jax.data.source import Block, Source, digest, stamp
from spread_jax.data.stall import reading

SPLITS = ("train", "validation", "test")
_SPLIT_FOLDER = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:at(?:e|ion))?)?|dev)|(?P<test>test(?:ing|s)?))"
    r"(?:[_ -]?(?:set|data|images?|imgs?|\d{4}|[ab]))?"
)
_LARGE_FILE = 16 * 1024 * 1024
_one_large_file = threading.Lock()


class Listing(NamedTuple):
    """The image files of a folder or zip.

    `stamps` maps each file's relative name to text that changes when the file does; `read` returns
    the bytes of one name; `passed_over` counts pictures that cannot be read, by the end of their name.
    """

    path: Path
    stamps: Mapping[str, str]
    read: Callable[[str], bytes]
    close: Callable[[], None]
    passed_over: Counter


def list_folder(path: Path) -> Listing:
    """Find image files in a folder and all below it; other files are skipped by their name."""
    root = path.resolve()
    stamps: dict[str, str] = {}
    passed_over: Counter = Counter()
    for name, file in _walk(root, passed_over):
        reading(file)
        status = file.stat()
        stamps[name] = stamp(status)
        if status.st_size > MAX_BYTES:
            raise DatasetError(f"{file} holds {status.st_size:,} bytes: too large for an image.")
    if not stamps:
        zips = "".join(f" Pass its {zipped.name}, or extract it." for zipped in sorted(root.glob("*.zip"))[:1])
        raise DatasetError(_nothing_found(path, "folder", passed_over) + zips)

    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{root / name} cannot be read ({error.strerror or error}).") from error

    return Listing(path, dict(sorted(stamps.items())), read, lambda: None, passed_over)


def _walk(root: Path, passed_over: Counter) -> Iterator[tuple[str, Path]]:
    """The image files below a folder; each folder once, under its own name if it has one that is not hidden."""
    waiting, linked, seen = [(root, "")], [], set()
    while waiting or linked:
        folder, prefix = (waiting or linked).pop()
        reading(folder)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DatasetError(f"{folder} cannot be listed ({error.strerror or error}).") from error
        for entry in entries:
            name, path = prefix + entry.name, folder / entry.name
            if _hidden(entry.name):
                continue
            if entry.is_symlink() and not _leads_inside(path, root):
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else waiting).append((path, name + "/"))
            elif _is_image(name):
                if not entry.is_file():
                    raise DatasetError(f"{path} is neither a file nor a folder: remove it.")
                yield name, path
            else:
                _pass_over(name, passed_over)


def _leads_inside(path: Path, root: Path) -> bool:
    """Whether a link leads to a folder or an image inside of the root; one to anything else is passed over."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"{path} is a symbolic link in a circle: remove it.") from error
    if not target.is_dir() and not _is_image(path.name):
        return False
    if not target.is_relative_to(root):
        raise DatasetError(
            f"{path} is a symbolic link to {target}, outside of the folder {root}: links "
            "are followed inside the folder only; copy the files there."
        )
    if not target.exists():
        raise DatasetError(f"{path} is a symbolic link to {target}, which does not exist.")
    return True


def _pass_over(name: str, passed_over: Counter) -> None:
    if (suffix := PurePosixPath(name).suffix.lower()) in OTHER_PICTURES:
        passed_over[suffix] += 1


def told_of(passed_over: Counter) -> str:
    """Which pictures are not read, as a sentence; empty where there are none."""
    counts = " and ".join(f"{count:,} {suffix}" for suffix, count in sorted(passed_over.items()))
    return f"{counts} files are skipped: convert them to JPEG or PNG to use them" if counts else ""


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _nothing_found(path: Path, kind: str, passed_over: Counter) -> str:
    known = " ".join(sorted(IMAGE_SUFFIXES))
    more = f" {told_of(passed_over)}." if passed_over else ""
    return f"The {kind} {path} holds no image files: names ending in {known} are looked for.{more}"


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
        stamps, passed_over = _zip_members(path, archive)
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

    return Listing(path, stamps, read, archive.close, passed_over)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> tuple[dict[str, str], Counter]:
    stamps, passed_over = {}, Counter()
    unpacked = 0
    for info in archive.infolist():
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
            raise DatasetError(
                f"{path} has a member named {name!r}, which points outside of the archive: "
                "such a zip is not read; make it again with relative names."
            )
        if info.is_dir() or any(_hidden(part) for part in parts):
            continue
        if not _is_image(name):
            _pass_over(name, passed_over)
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
        raise DatasetError(_nothing_found(path, "zip", passed_over))
    refuse_bomb(path, path.stat().st_size, unpacked)
    return dict(sorted(stamps.items())), passed_over


def assign_splits(names: Sequence[str], path: Path) -> dict[str, list[str]]:
    """Which names belong to which split.

    Where the first folder below the common one is `train`, `validation` or `test`, or the like (`training`, `val`,
    `test_images`, `train2017`, `trainA`), it decides, or else a deeper one (`cats/train`, `dogs/train`); without a
    validation folder, a tenth of train is held out by hash. Otherwise each name's own hash decides, 90/5/5, so that
    adding files moves none. In a set so small that a split would be empty (of three files or more), the largest split
    gives it one.

    Args:
        names: relative names with forward slashes.
        path: the folder or zip, for errors.

    Returns:
        for each of train, validation and test a sorted list of names.
    """
    folders = split_folders(names, path)
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


def split_folders(names: Sequence[str], path: Path) -> dict[str, list[str]] | None:
    """What folders named after splits say of the names; None where there are none.

    Raises:
        DatasetError: images lie beside such folders.
    """
    common = PurePosixPath(os.path.commonpath(names))
    if len(names) == 1 or _is_image(str(common)):
        common = common.parent
    if _split_of(common.name):
        common = common.parent
    depth = len(common.parts)
    splits, outside = _by_folder(names, depth)
    if not splits["train"]:  # A class may well be called "test".
        deepest = max(name.count("/") for name in names)
        deeper = (_by_folder(names, deep) for deep in range(depth + 1, min(deepest, depth + 4)))
        splits, outside = next((found for found in deeper if found[0]["train"] and found[0]["test"]), ({}, []))
    if not splits:
        return None
    if outside:
        raise DatasetError(
            f"{path} has a folder named train, but {len(outside):,} images lie outside of train, "
            f"validation and test ({outside[0]} is the first): move or remove them, or rename the "
            "folder train."
        )
    return splits


def _by_folder(names: Sequence[str], depth: int) -> tuple[dict[str, list[str]], list[str]]:
    """The names by what the folder at a depth says of their split, and those of which it says nothing."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    outside = []
    for name in sorted(names):
        parts = PurePosixPath(name).parts[depth:]
        split = _split_of(parts[0]) if len(parts) > 1 else None
        (splits[split] if split else outside).append(name)
    return splits, outside


def _split_of(folder: str) -> str | None:
    """The split that a folder's name means."""
    found = _SPLIT_FOLDER.fullmatch(folder.lower())
    return None if found is None else found.lastgroup


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
        large = int(listing.stamps[file].split()[0]) > _LARGE_FILE
        with _one_large_file if large else contextlib.nullcontext():
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
        remark=told_of(listing.passed_over),
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
