"""Evaluation: distances between sets of features, sharpness, pictures of a run."""

from spread_jax.evaluation.distances import (
    Moments,
    PrecisionRecall,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    nearest_neighbours,
    precision_recall_density_coverage,
    relative_sharpness,
    sharpness,
)
from spread_jax.evaluation.plots import image_grid, save_curves, save_image

__all__ = [
    "Moments",
    "PrecisionRecall",
    "frechet_distance",
    "frechet_infinity",
    "image_grid",
    "kernel_distance",
    "nearest_neighbours",
    "precision_recall_density_coverage",
    "relative_sharpness",
    "save_curves",
    "save_image",
    "sharpness",
]
