"""Decode once: a source's examples as a uint8 array on disk, memory-mapped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spread_jax._files import flush_folder, replacing, write_atomically
from spread_jax.data.errors import DatasetError
from spread_jax.data.source import Source, digest
from spread_jax.data.stall import watched
from spread_jax.errors import UsageError
from spread_jax.runtime import default_cache_dir

try:
    import fcntl
except ImportError:  # Not a POSIX system: one process at a time must build.
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 2
BLOCK_BYTES = 16 * 1024 * 1024

Report = Callable[[str | None, int, int], None]


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
    disk and renamed, under a file lock that ends with the process that holds it.

    Args:
        source: what to decode.
        split: the split's name, part of the key.
        cache_dir: folder of the cache; None for `default_cache_dir()`.
        max_examples: only the first so many.
        progress: told how far a build is.

    Returns:
        The arrays and the digest of the pixels.

    Raises:
        DatasetError: the cache's folder cannot be written, or the disk is full.
    """
    root = _root(cache_dir)
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
                _remove_leftovers(root)
                stale = entry.stale()
                if stale:
                    progress(f"{source.description} has changed: decoding it again", 0, count)
                elif entry.path.exists():
                    progress(f"the cache {entry.path} is damaged: decoding it again", 0, count)
                _check_space(root, needed)
                entry.build(progress)
                for old in stale:
                    shutil.rmtree(old, ignore_errors=True)
                found = entry.load()
    if found is None:
        raise DatasetError(
            f"The cache {entry.path} was written and cannot be read back: check the disk, or pass another cache_dir."
        )
    return found


def _root(cache_dir: str | os.PathLike | None) -> Path:
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
            meta = json.loads((self.path / "meta.json").read_text())
            if meta.get("format") != FORMAT_VERSION or tuple(meta["shape"]) != self._shape:
                return None
            if meta["fingerprint"] != self._source.fingerprint:
                return None
            for name, size in meta["files"].items():
                if (self.path / name).stat().st_size != size:
                    return None
            pixels = str(meta["pixels"])
            images = np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)
            labels = None
            if "labels.npy" in meta["files"]:
                labels = np.load(self.path / "labels.npy", allow_pickle=False)
                labels.flags.writeable = False
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, OverflowError):
            return None
        if not isinstance(images, np.ndarray) or images.shape != self._shape or images.dtype != np.uint8:
            return None
        if labels is not None and labels.shape != self._shape[:1]:
            return None
        return Cached(images, labels, pixels)

    def build(self, progress: Report) -> None:
        """Decode block by block into a temporary sibling and rename it."""
        temporary = self.path.parent / f"{self._stem}.building"
        shutil.rmtree(temporary, ignore_errors=True)
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
                "files": {path.name: path.stat().st_size for path in sorted(temporary.iterdir())},
            }
            write_atomically(temporary / "meta.json", json.dumps(meta, indent=1))
            if self.path.exists():
                shutil.rmtree(self.path)
            os.rename(temporary, self.path)
            flush_folder(self.path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
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
                        f"where {(stop - start, *self._shape[1:])} was announced."
                    )
                images = np.ascontiguousarray(block.images, np.uint8)
                file.write(images.data)
                pixels.update(images)
                if block.labels is not None:
                    labels.append(np.asarray(block.labels))
                progress(None, stop, count)
        return np.concatenate(labels) if labels else None, pixels.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, progress: Report) -> Iterator[None]:
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that is building the same cache", 0, 0)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(root: Path) -> None:
    """Delete the temporary folders of builds whose process is gone (their lock is free)."""
    for folder in root.glob("*.building"):
        try:
            with open(folder.with_suffix(".lock"), "ab") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # Its builder is alive, or it is this one's own, which build() clears.


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
