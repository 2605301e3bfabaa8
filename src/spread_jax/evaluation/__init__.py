"""Evaluation: bounds with standard errors, distances between sets of features, pictures and reports."""

from spread_jax.evaluation._sharpness import relative_sharpness, sharpness
from spread_jax.evaluation.bounds import (
    AnnealedEstimate,
    HeldOutBound,
    annealed_importance_sampling,
    held_out_bound,
)
from spread_jax.evaluation.distances import (
    Moments,
    PrecisionRecall,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    nearest_neighbours,
    precision_recall_density_coverage,
)
from spread_jax.evaluation.features import (
    FeatureNetwork,
    FeaturesError,
    InceptionFeatures,
    inception_features,
    packaged_features,
    train_features,
)
from spread_jax.evaluation.plots import image_grid, save_csv, save_curves, save_figure, save_image
from spread_jax.evaluation.report import write_report

__all__ = [
    "AnnealedEstimate",
    "FeatureNetwork",
    "FeaturesError",
    "HeldOutBound",
    "InceptionFeatures",
    "Moments",
    "PrecisionRecall",
    "annealed_importance_sampling",
    "frechet_distance",
    "frechet_infinity",
    "held_out_bound",
    "image_grid",
    "inception_features",
    "kernel_distance",
    "nearest_neighbours",
    "packaged_features",
    "precision_recall_density_coverage",
    "relative_sharpness",
    "save_csv",
    "save_curves",
    "save_figure",
    "save_image",
    "sharpness",
    "train_features",
    "write_report",
]
