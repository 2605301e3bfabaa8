"""How sharp images are, beside real ones; on the host, in NumPy float64."""

from __future__ import annotations

import math

import numpy as np

from spread_jax.divergences import Estimate

__all__ = ["relative_sharpness", "sharpness"]

_CHUNK = 2048


def sharpness(images: np.ndarray) -> np.ndarray:
    """Variance over pixels of the Laplacian of each image's grey levels: low for a blurred image.

    Grey is the mean of the channels, the Laplacian the five-point one on inner pixels, the range of values [0, 1].

    Args:
      images: [n, height, width, channels] of at least 3x3 pixels, uint8, or floating point in [0, 1].

    Returns:
      [n]. Compare with real images of the same size only: see `relative_sharpness`.

    Raises:
      ValueError: `images` has another shape.

    Source: Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, section 4 (sharpness).

    Example:
      >>> import numpy as np
      >>> checks = np.indices((8, 8)).sum(axis=0)[None, :, :, None] % 2
      >>> print(sharpness(np.concatenate([checks, checks * 0]).astype(np.float32)))
      [16.  0.]
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] == 0 or min(images.shape[1:3]) < 3 or images.shape[3] == 0:
        raise ValueError(f"images must be [n, height, width, channels] of at least 3x3 pixels, got {images.shape}.")
    unit = 255.0 if images.dtype == np.uint8 else 1.0
    values = []
    for start in range(0, len(images), _CHUNK):
        grey = images[start : start + _CHUNK].astype(np.float64).mean(axis=3) / unit
        around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
        values.append((around - 4 * grey[:, 1:-1, 1:-1]).var(axis=(1, 2)))
    return np.concatenate(values)


def relative_sharpness(images: np.ndarray, real: np.ndarray) -> Estimate:
    """Mean `sharpness` of images over that of real ones: 1 is as sharp as real.

    Args:
      images: as in `sharpness`, at least two.
      real: the same for real images of the same size, at least two.

    Returns:
      Estimate(value, standard_error), the error to first order in both means.

    Raises:
      ValueError: other shapes, one image only, or real images without any detail.

    Example:
      >>> import numpy as np
      >>> real = np.random.default_rng(0).random((10, 8, 8, 3))
      >>> print(round(relative_sharpness(0.5 * real, real).value, 6))
      0.25
    """
    if np.shape(images)[1:] != np.shape(real)[1:]:
        raise ValueError(f"images and real must share their size, got {np.shape(images)[1:]} and {np.shape(real)[1:]}.")
    mine, theirs = sharpness(images), sharpness(real)
    if min(len(mine), len(theirs)) < 2 or theirs.mean() == 0:
        raise ValueError(
            "images and real must hold at least 2 images each, the real ones with some detail, "
            f"got {len(mine)} and {len(theirs)} with mean sharpness {theirs.mean()}."
        )
    ratio = mine.mean() / theirs.mean()
    variance = mine.var(ddof=1) / len(mine) + ratio**2 * theirs.var(ddof=1) / len(theirs)
    return Estimate(float(ratio), float(math.sqrt(variance) / theirs.mean()))
