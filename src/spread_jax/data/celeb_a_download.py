"""Fetch CelebA's official files from the authors' Google Drive."""

from __future__ import annotations

import hashlib
import http.client
import urllib.parse
import urllib.request
from pathlib import Path

from spread_jax._files import replacing
from spread_jax._network import why_unreachable
from spread_jax.data import tfds_directory
from spread_jax.data.celeb_a import ARCHIVE, PARTITION
from spread_jax.data.errors import DatasetError
from spread_jax.data.stall import reading

_HOST = "drive.usercontent.google.com"
# The authors' files: id on Google Drive, MD5.
_FILES = {
    PARTITION: ("0B7EVK8r0v71pY0NSMzRuSXJEVkk", "d32c9cbf5e040fd4025c592c306e6668"),
    ARCHIVE: ("0B7EVK8r0v71pZjFTYXZWM3FlRnM", "00d2c5bc6d35e252742224ab0c1e8fcb"),
}
_READ_SECONDS = 20.0


def download(folder: Path) -> None:
    """Fetch the official archive (1.4 GB) and its split list from the authors' Google Drive.

    Args:
        folder: where they go; a file is under its name only when it is whole.

    Raises:
        DatasetError: no network, Drive refuses (it limits downloads per day), or a damaged file.
    """
    _preflight(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (drive_id, md5) in _FILES.items():
            if not (folder / name).is_file():
                _fetch(drive_id, md5, folder / name)
    except (http.client.HTTPException, OSError) as error:
        raise DatasetError(f"CelebA could not be fetched ({error}). {_by_hand(folder)}") from error


def _by_hand(folder: Path) -> str:
    return (
        f"Get {ARCHIVE} and {PARTITION} from the authors' page "
        "(mmlab.ie.cuhk.edu.hk/projects/CelebA.html) and put both into "
        f"{folder}, or into any folder that you pass as CELEBA=path to make, or as --data path to "
        "the experiment."
    )


def _preflight(folder: Path) -> None:
    """Fail within two seconds where there is no network."""
    if why := why_unreachable(_HOST):
        raise DatasetError(
            f"CelebA is neither prepared nor downloaded under {tfds_directory.data_dir()}, and "
            f"{_HOST} cannot be reached ({why}). {_by_hand(folder)}"
        )


def _fetch(drive_id: str, md5: str, target: Path) -> None:
    query = urllib.parse.urlencode({"id": drive_id, "export": "download", "confirm": "t"})
    digest = hashlib.md5(usedforsecurity=False)
    url = f"https://{_HOST}/download?{query}"
    with urllib.request.urlopen(url, timeout=_READ_SECONDS) as reply, replacing(target) as file:
        while chunk := reply.read(1 << 20):
            reading(target)
            if file.tell() == 0:
                _refuse_page(chunk, target)
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != md5:
            raise DatasetError(
                f"What Google Drive sent as {target.name} ({file.tell():,} bytes, MD5 {digest.hexdigest()}) is not the "
                f"official file (MD5 {md5}): the transfer broke off or the file has changed. {_by_hand(target.parent)}"
            )


def _refuse_page(first: bytes, target: Path) -> None:
    """Google Drive answers with a page, and status 200, when its daily quota is used up."""
    page = first.lstrip()[:1].startswith(b"<")
    if not page and (target.suffix != ".zip" or first.startswith(b"PK\x03\x04")):
        return
    quota = b"quota" in first.lower()
    what = "its page about too many downloads today" if quota else "a web page, not the file"
    raise DatasetError(
        f"Google Drive sent {what} in place of {target.name}. Try again in a day, or: {_by_hand(target.parent)}"
    )
