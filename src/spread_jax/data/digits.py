"""scikit-learn's 1,797 handwritten digits, enlarged to 28x28."""

from __future__ import annotations

import numpy as np

from spread_jax.data.errors import DatasetError
from spread_jax.data.images import Transform, transform_array
from spread_jax.data.source import Block, Source, digest

# A fixed shuffle, because the file groups writers: 1,437 train, 180 validation, 180 test.
_ENDS = {"train": (0, 1437), "validation": (1437, 1617), "test": (1617, 1797)}


def digits_source(split: str, image_size: int | None, crop: int | None, channels: int | None) -> Source:
    """A split of the digits: 8x8 with grey levels 0..16, scaled to 0..255 and enlarged (bicubic).

    Raises:
        DatasetError: scikit-learn is missing, or the crop exceeds 8.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError('The digits come with scikit-learn: pip install "spread-jax[data]".') from error
    values, labels = load_digits(return_X_y=True)
    order = np.argsort(np.random.Philox(key=0).random_raw(len(values)), kind="stable")
    start, stop = _ENDS[split]
    rows = order[start:stop]
    images = np.rint(values[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    targets = labels[rows].astype(np.int64)
    transform = Transform(image_size or 28, crop, channels or 1)

    def read(first: int, last: int) -> Block:
        block = transform_array(images[first:last], transform, "A digit")
        return Block(block, targets[first:last])

    return Source(
        name="digits",
        location="sklearn.datasets.load_digits",
        description="scikit-learn's handwritten digits",
        fingerprint=digest((images.tobytes().hex(), targets.tolist())),
        num_examples=len(rows),
        image_shape=(transform.image_size, transform.image_size, transform.channels),
        settings=str(transform),
        read=read,
    )
