"""Where data lies on this machine, kept in the user's own cache: a run's folder may be untrusted."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from spread_jax._files import read_regular, write_atomically
from spread_jax.data.cache import cache_root
from spread_jax.data.dataset import NAMES, Dataset
from spread_jax.data.errors import DatasetError


def remember(dataset: Dataset, place: str, *, cache_dir: str | os.PathLike | None = None) -> None:
    """Keeps the path that a user has opened a data set by, under its fingerprint.

    Args:
      dataset: what was opened.
      place: its name or path.
      cache_dir: as in `open_dataset`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> cache = tempfile.mkdtemp()
      >>> photos = Dataset.from_array(np.zeros((2, 4, 4, 3), np.uint8))
      >>> remember(photos, "/data/photos", cache_dir=cache)
      >>> recall(photos.fingerprint, cache_dir=cache), recall("0" * 16, cache_dir=cache)
      ('/data/photos', None)
    """
    if place in NAMES:
        return
    with contextlib.suppress(OSError, DatasetError, UnicodeEncodeError):  # it will be asked for, that is all
        folder = cache_root(cache_dir) / "places"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / dataset.fingerprint, os.path.abspath(os.path.expanduser(place)).encode())


def recall(fingerprint: object, *, cache_dir: str | os.PathLike | None = None) -> str | None:
    """The path that a data set of this fingerprint was opened by here, or None.

    Args:
      fingerprint: such as a run's folder names.
      cache_dir: as in `open_dataset`.
    """
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{16}", fingerprint):
        return None
    for root in dict.fromkeys((cache_dir, None)):
        with contextlib.suppress(OSError, DatasetError, UnicodeDecodeError):
            place = read_regular(Path(cache_root(root), "places", fingerprint), most=10_000).decode()
            if os.path.isabs(place):
                return place
    return None
