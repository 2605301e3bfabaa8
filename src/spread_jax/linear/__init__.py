"""Deterministic linear models x = F z: PCA, and the distances between mixing matrices."""

from spread_jax.linear import pca
from spread_jax.linear.metrics import amari_distance, match_columns, mixing_error
from spread_jax.linear.pca import PcaResult

__all__ = ["PcaResult", "amari_distance", "match_columns", "mixing_error", "pca"]
