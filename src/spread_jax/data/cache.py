"""Decode once: a source's examples as a uint8 array on disk, memory-mapped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spread_jax._files import LEFTOVER, flush_folder, is_lasting, open_regular, read_json, replacing, write_atomically
from spread_jax.data.errors import DatasetError
from spread_jax.data.source import Source, digest
from spread_jax.data.stall import watched
from spread_jax.errors import UsageError
from spread_jax.runtime import default_cache_dir

try:
    import fcntl
except ImportError:  # Not a POSIX system: one process at a time must build.
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 3
BLOCK_BYTES = 16 * 1024 * 1024

Report = Callable[[str | None, int, int], None]

# What the cache puts into its folder, and what it names there while it builds: nothing else is ever removed.
_FILES = ("images.npy", "labels.npy", "meta.json")
_BUILDING = re.compile(r"(.+-(?:train|validation|test)-[0-9a-f]{10}(?:-first\d+)?)\.[0-9a-f]{16}\.building")
_told: set[tuple[str, str]] = set()  # remarks on sources
_verified: set[tuple] = set()  # files whose pixels this process has found to be those that were decoded


class Cached(NamedTuple):
    """What the cache holds of a split.

    Args:
        images: read-only uint8 memmap [N, H, W, C].
        labels: [N], or None.
        pixels: hexadecimal SHA-256 of the images' bytes.
    """

    images: np.memmap
    labels: np.ndarray | None
    pixels: str


def cached_arrays(
    source: Source,
    split: str,
    *,
    cache_dir: str | os.PathLike | None,
    max_examples: int | None,
    progress: Report,
) -> Cached:
    """The images and labels of a source, decoded into the cache on the first call.

    Each entry is a folder `NAME-SPLIT-KEY-FINGERPRINT` with `images.npy`, `labels.npy` where there
    are labels, and `meta.json`. It is written under another name in the same folder, flushed to
    disk and renamed, under a file lock that ends with the process that holds it. The first time a
    process opens it, pixels and labels are hashed and compared with what was decoded.

    Args:
        source: what to decode.
        split: the split's name, part of the key.
        cache_dir: folder of the cache; None for `default_cache_dir()`.
        max_examples: only this many, the first ones.
        progress: told how far a build is.

    Returns:
        The arrays and the digest of the pixels.

    Raises:
        DatasetError: the cache's folder cannot be written, or the disk is full.
    """
    root = cache_root(cache_dir)
    count = min(source.num_examples, max_examples or source.num_examples)
    full = _Entry(root, source, split, source.num_examples)
    entry = _Entry(root, source, split, count)
    for candidate in dict.fromkeys((full, entry)):
        if (found := candidate.load()) is not None:
            return found if len(found.images) == count else _head(found, count)

    needed = count * int(np.prod(source.image_shape))
    with _storage_errors(root, needed):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(entry.lock_path, progress):
            found = entry.load()  # Another process may have built it while this one waited.
            if found is None:
                _remove_leftovers(root, entry.lock_path)
                stale = entry.stale()
                if stale:
                    progress(f"{source.description} has changed: decoding it again", 0, count)
                elif entry.path.exists():
                    progress(f"the cache {entry.path} is damaged: decoding it again", 0, count)
                if source.remark and (source.location, source.remark) not in _told:
                    _told.add((source.location, source.remark))
                    progress(source.remark, 0, count)
                _check_space(root, needed)
                entry.build(progress)
                for old in stale:
                    with contextlib.suppress(OSError):
                        _remove_entry(old)
                found = entry.load()
    if found is None:
        raise DatasetError(
            f"The cache {entry.path} was written and cannot be read back: check the disk, or pass another cache_dir."
        )
    return found


def cache_root(cache_dir: str | os.PathLike | None) -> Path:
    """The cache's folder: the one given, else `default_cache_dir()`.

    Raises:
        DatasetError: there is none.
    """
    try:
        return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    except (RuntimeError, UsageError) as error:
        raise DatasetError(str(error)) from error


def _head(found: Cached, count: int) -> Cached:
    images = found.images[:count]
    labels = found.labels if found.labels is None else found.labels[:count]
    return Cached(images, labels, hashlib.sha256(images).hexdigest())


class _Entry:
    """One folder of the cache."""

    def __init__(self, root: Path, source: Source, split: str, count: int):
        self._source = source
        self._split = split
        self._shape = (count, *source.image_shape)
        key = digest((source.location, split, source.settings, self._shape[1:]))[:10]
        name = re.sub(r"[^A-Za-z0-9_.]+", "_", source.name)[:40]
        part = "" if count == source.num_examples else f"-first{count}"
        self._stem = f"{name}-{split}-{key}{part}"
        self.path = root / f"{self._stem}-{source.fingerprint[:12]}"
        self.lock_path = root / f"{self._stem}.lock"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Entry) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def stale(self) -> list[Path]:
        """Entries of the same source, split and settings with another fingerprint."""
        pattern = re.compile(re.escape(self._stem) + r"-[0-9a-f]{12}")
        return [path for path in self.path.parent.iterdir() if pattern.fullmatch(path.name) and path != self.path]

    def load(self) -> Cached | None:
        """The arrays, or None where the entry is missing or not what it should be."""
        try:
            meta = read_json(self.path / "meta.json")
            if meta.get("format") != FORMAT_VERSION or tuple(meta["shape"]) != self._shape:
                return None
            if meta["fingerprint"] != self._source.fingerprint:
                return None
            for name, size in meta["files"].items():
                status = (self.path / name).lstat()
                if status.st_size != size or not stat.S_ISREG(status.st_mode):
                    return None
            pixels = str(meta["pixels"])
            images = np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)
            labels = None
            if "labels.npy" in meta["files"]:
                labels = np.load(self.path / "labels.npy", allow_pickle=False)
                labels.flags.writeable = False
        except OSError as error:
            if is_lasting(error):
                return None
            raise DatasetError(
                f"The cache {self.path} cannot be read ({error.strerror or error}): repeat the command once it can be, "
                "or name another folder with cache_dir or the variable SPREAD_JAX_CACHE."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, OverflowError):
            return None
        if not isinstance(images, np.ndarray) or images.shape != self._shape or images.dtype != np.uint8:
            return None
        if labels is not None and (labels.shape != self._shape[:1] or _digest_of(labels) != meta.get("labels")):
            return None
        status = (self.path / "images.npy").stat()
        key = (self.path, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if key not in _verified:
            if _digest_of(images) != pixels:
                return None
            _verified.add(key)
        return Cached(images, labels, pixels)

    def build(self, progress: Report) -> None:
        """Decode block by block into a temporary sibling and rename it."""
        temporary = self.path.parent / f"{self._stem}.{secrets.token_hex(8)}.building"
        temporary.mkdir()
        try:
            labels, pixels = self._write_images(temporary / "images.npy", progress)
            if labels is not None:
                with replacing(temporary / "labels.npy") as file:
                    np.lib.format.write_array(file, labels, allow_pickle=False)
            meta = {
                "format": FORMAT_VERSION,
                "source": self._source.description,
                "location": self._source.location,
                "split": self._split,
                "settings": self._source.settings,
                "fingerprint": self._source.fingerprint,
                "shape": self._shape,
                "dtype": "uint8",
                "pixels": pixels,
                "labels": None if labels is None else _digest_of(labels),
                "files": {path.name: path.stat().st_size for path in sorted(temporary.iterdir())},
            }
            write_atomically(temporary / "meta.json", json.dumps(meta, indent=1))
            if os.path.lexists(self.path):
                _remove_entry(self.path)
            os.rename(temporary, self.path)
            flush_folder(self.path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove_entry(temporary)
            raise

    def _write_images(self, path: Path, progress: Report) -> tuple[np.ndarray | None, str]:
        count = self._shape[0]
        step = max(1, min(256, BLOCK_BYTES // int(np.prod(self._shape[1:]))))
        labels, pixels = [], hashlib.sha256()
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
        progress(None, 0, count)
        with replacing(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, step):
                stop = min(start + step, count)
                block = watched(self._source.description, self._source.read, start, stop)
                if block.images.shape != (stop - start, *self._shape[1:]):
                    raise DatasetError(
                        f"{self._source.description} gave images of shape {block.images.shape} "
                        f"where {(stop - start, *self._shape[1:])} was expected."
                    )
                images = np.ascontiguousarray(block.images, np.uint8)
                file.write(images.data)
                pixels.update(images)
                if block.labels is not None:
                    labels.append(np.asarray(block.labels))
                progress(None, stop, count)
        return np.concatenate(labels) if labels else None, pixels.hexdigest()


def _digest_of(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes, in parts: another thread may run meanwhile."""
    sha = hashlib.sha256()
    for start in range(0, len(array), step := max(1, BLOCK_BYTES // max(array[:1].nbytes, 1))):
        sha.update(np.ascontiguousarray(array[start : start + step]))
    return sha.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, progress: Report) -> Iterator[None]:
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that is building the same cache", 0, 0)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_entry(folder: Path) -> None:
    """Removes a folder of the cache, if there is nothing in it but what the cache puts there."""
    names = os.listdir(folder)
    foreign = [name for name in names if name not in _FILES and not LEFTOVER.fullmatch(name)]
    if folder.is_symlink() or foreign:
        raise OSError(errno.EEXIST, f"{folder} is a link or holds other things than decoded images")
    for name in names:
        os.unlink(folder / name)
    os.rmdir(folder)


def _remove_leftovers(root: Path, held: Path) -> None:
    """Delete the temporary folders of builds whose process is gone: their lock is free, or held here."""
    for folder in root.iterdir():
        if (name := _BUILDING.fullmatch(folder.name)) is None:
            continue
        with contextlib.suppress(OSError), open_regular(lock := root / f"{name[1]}.lock", os.O_RDWR) as file:
            if fcntl is not None and lock != held:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its builder is alive
            _remove_entry(folder)


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free")


@contextlib.contextmanager
def _storage_errors(root: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # Sources turn their own into DatasetError; this is the cache's.
        raise DatasetError(
            f"The cache folder {root} cannot take the {needed:,} bytes of the decoded images "
            f"({error.strerror or error}): free the space, or name another folder with cache_dir "
            "or the variable SPREAD_JAX_CACHE."
        ) from error
