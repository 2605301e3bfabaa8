"""Images from many sources as memory-mapped uint8 arrays, and batches by (seed, step)."""

from spread_jax.data.celeb_a_builder import prepare_celeb_a
from spread_jax.data.dataset import Dataset, open_dataset
from spread_jax.data.errors import DatasetError
from spread_jax.data.faces import FaceFactors, render_faces, sample_factors
from spread_jax.data.idx import read_idx
from spread_jax.data.loader import Loader

__all__ = [
    "Dataset",
    "DatasetError",
    "FaceFactors",
    "Loader",
    "open_dataset",
    "prepare_celeb_a",
    "read_idx",
    "render_faces",
    "sample_factors",
]
