"""A cache of its own for every test, image writers, and the folders of real data."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache or TFDS folder."""
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache"


@pytest.fixture
def picture():
    """Encodes a small random picture: picture(number, size=(w, h), kind="PNG") -> bytes."""
    image_module = pytest.importorskip("PIL.Image")

    def encode(number: int = 0, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        file = io.BytesIO()
        image_module.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return encode


@pytest.fixture
def photos(tmp_path, picture):
    """A folder with ten pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def _folder_of(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder with the real data")
    return Path(os.environ[variable])


@pytest.fixture
def celeba_folder():
    return _folder_of("SPREAD_JAX_CELEBA")


@pytest.fixture
def mnist_folder():
    return _folder_of("SPREAD_JAX_MNIST")
