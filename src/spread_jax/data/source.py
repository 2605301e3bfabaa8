"""What every source of images offers to the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """Consecutive examples: uint8 images [n, H, W, C] and, where there are any, labels [n]."""

    images: np.ndarray
    labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, readable in blocks.

    Args:
        name: short name, used for the cache's folder.
        location: what stays the same between runs (an absolute path, or the name of a generator).
        description: where the images come from, for people.
        fingerprint: changes whenever the content might have changed.
        num_examples: how many examples `read` can deliver.
        image_shape: (height, width, channels) of what `read` delivers.
        settings: text that determines how the images were made from the source (crop and such).
        read: `read(start, stop)` returns the examples of that range as a `Block`.
        close: frees what `read` holds open.
        remark: what a user should know of the source before it is decoded, or nothing.
    """

    name: str
    location: str
    description: str
    fingerprint: str
    num_examples: int
    image_shape: tuple[int, int, int]
    settings: str
    read: Callable[[int, int], Block]
    close: Callable[[], None] = lambda: None
    remark: str = ""


def stamp(status: os.stat_result) -> str:
    """Text that changes when a file is written to, even where its size and its time are set back afterwards."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def digest(parts: Iterable[object]) -> str:
    """A short hexadecimal SHA-256 over the texts of `parts`, one per line."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(str(part).encode("utf-8", "surrogateescape") + b"\n")
    return sha.hexdigest()[:16]
