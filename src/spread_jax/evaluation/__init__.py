"""Evaluation: pictures of a run."""

from spread_jax.evaluation.plots import image_grid, save_curves, save_image

__all__ = ["image_grid", "save_curves", "save_image"]
