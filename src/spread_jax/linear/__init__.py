"""Deterministic linear models x = A z with spread noise: PCA, ICA, and the distances between mixing matrices."""

from spread_jax.linear import eeg, ica, pca, sources
from spread_jax.linear.ica import IcaResult
from spread_jax.linear.metrics import amari_distance, match_columns, mixing_error
from spread_jax.linear.pca import PcaResult

__all__ = ["IcaResult", "PcaResult", "amari_distance", "eeg", "ica", "match_columns", "mixing_error", "pca", "sources"]
