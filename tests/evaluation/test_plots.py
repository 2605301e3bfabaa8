"""Grids to the pixel; curves that open."""

import numpy as np
import pytest
from PIL import Image

from spread_jax.evaluation import image_grid, save_curves, save_image


def test_grid_places_every_pixel():
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 3, 3), np.uint8)
    grid = image_grid(images, columns=2, padding=1)
    assert grid.shape == (3 * 5 + 1, 2 * 4 + 1, 3)
    for index, image in enumerate(images):
        top, left = 1 + (index // 2) * 5, 1 + (index % 2) * 4
        np.testing.assert_array_equal(grid[top : top + 4, left : left + 3], image)
    assert (grid[11:, 5:] == 255).all()  # the empty sixth place


def test_grid_converts_floats_and_gray_and_scales():
    images = np.array([[[[0.5], [2.0]], [[-1.0], [1.0]]]])
    grid = image_grid(images, padding=0, scale=2)
    assert grid.shape == (4, 4, 3)
    np.testing.assert_array_equal(grid[::2, ::2, 0], [[128, 255], [0, 255]])
    np.testing.assert_array_equal(grid[..., 0], grid[..., 2])


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (4, 4, 3), (1, 4, 4, 2)])
def test_grid_refuses(shape):
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, 1 or 3\]"):
        image_grid(np.zeros(shape))


def test_saved_image_is_the_pixels(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (6, 5, 3), np.uint8)
    save_image(pixels, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_curves(tmp_path):
    records = [{"step": 1, "a": 2.0}, {"step": 2, "a": 1.0, "b": 3.0}, {"step": 3, "a": None}]
    save_curves(records, {"nats": {"a": "A", "b": "B"}, "empty": {"c": "C"}}, tmp_path / "c.png", title="t")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] > 500
