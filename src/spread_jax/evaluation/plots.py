"""Pictures and tables of a run: grids of images, curves of metrics, figures, CSV."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spread_jax._files import replacing, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["image_grid", "save_csv", "save_curves", "save_figure", "save_image"]


def image_grid(images: np.ndarray, *, columns: int | None = None, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Tiles images into one picture on white.

    Args:
      images: [n, height, width, channels] with 1 or 3 channels, uint8, or floating point in [0, 1] (values
        outside are clipped).
      columns: images in a row; about the square root of n if None.
      padding: white pixels between images.
      scale: each pixel becomes scale x scale.

    Returns:
      uint8 [rows, columns, 3].

    Raises:
      ValueError: `images` is not [n, height, width, 1 or 3] with n > 0.

    Example:
      >>> import numpy as np
      >>> image_grid(np.zeros((6, 8, 8, 1)), columns=3).shape
      (22, 32, 3)
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be [n, height, width, 1 or 3] with n > 0, got {images.shape}.")
    if images.dtype != np.uint8:
        images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    count, height, width = images.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    grid = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top = padding + (index // columns) * (height + padding)
        left = padding + (index % columns) * (width + padding)
        grid[top : top + height, left : left + width] = image  # one channel broadcasts to three
    return grid


def save_image(pixels: np.ndarray, path: str | os.PathLike) -> None:
    """Writes uint8 pixels [height, width, 3] as PNG, atomically.

    Args:
      pixels: such as `image_grid` returns.
      path: where the PNG goes.

    Example:
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "black.png")
      >>> save_image(np.zeros((4, 4, 3), np.uint8), path)
      >>> os.listdir(os.path.dirname(path))
      ['black.png']
    """
    from PIL import Image

    with replacing(path) as file:
        # Level 4 takes a third to a sixth of the time of 9 or `optimize`, for files of generated faces as small.
        Image.fromarray(pixels).save(file, format="PNG", compress_level=4)


def save_curves(
    records: Sequence[Mapping[str, float]],
    panels: Mapping[str, Mapping[str, str]],
    path: str | os.PathLike,
    *,
    title: str = "",
) -> None:
    """Draws metrics against the step, one panel for each quantity.

    Args:
      records: dictionaries with `step` and metrics; a metric may be missing from some.
      panels: axis label (with its unit) -> {metric name: legend}.
      path: where the PNG goes.
      title: of the whole figure.

    Example:
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "curves.png")
      >>> save_curves([{"step": 1, "kl": 0.5}, {"step": 2, "kl": 1.5}], {"nats": {"kl": "KL"}}, path)
      >>> os.path.exists(path)
      True
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no backend choice

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    if title:
        figure.suptitle(title)
    for axes, (label, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, (name, legend) in enumerate(series.items()):
            points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
            if points:
                steps, values = zip(*points, strict=True)
                # One series, one colour, in every panel, whether the ones before it have points or not.
                style = {"color": f"C{index}", "marker": "o" if len(points) < 30 else None, "markersize": 3}
                axes.plot(steps, values, label=legend, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(series) > 1 and axes.lines:
            axes.legend(frameon=False)
    save_figure(figure, path, dpi=120)


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Writes a Matplotlib figure as PNG, atomically.

    Args:
      figure: of Matplotlib.
      path: where the PNG goes.
      dpi: pixels per inch of the figure's size.

    Example:
      >>> import os, tempfile
      >>> from matplotlib.figure import Figure
      >>> path = os.path.join(tempfile.mkdtemp(), "empty.png")
      >>> save_figure(Figure(), path)
      >>> os.listdir(os.path.dirname(path))
      ['empty.png']
    """
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def save_csv(rows: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Writes rows of the same columns as CSV, atomically.

    Args:
      rows: column -> value, at least one.
      path: where the table goes.

    Example:
      >>> import os, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "table.csv")
      >>> save_csv([{"sigma": 0.5, "kl": 2.0}], path)
      >>> path.read_text().split()
      ['sigma,kl', '0.5,2.0']
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue())
