"""Filters learned from photographs: `python -m experiments.ica --preset images`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import numpy as np

from spread_jax.errors import UsageError
from spread_jax.evaluation import save_figure
from spread_jax.linear import ica

if TYPE_CHECKING:
    from experiments.ica import Config


def photographs(config: Config) -> list[np.ndarray]:
    """Grey images in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    if config.pictures:
        images = []
        for name in config.pictures:
            try:
                with Image.open(name) as image:
                    images.append(np.asarray(image.convert("L"), np.float32) / 255)
            except (OSError, UnidentifiedImageError) as error:
                raise UsageError(f"--pictures: {name} cannot be read as an image ({error}).") from error
        small = [name for name, image in zip(config.pictures, images, strict=True) if min(image.shape) < config.patch]
        if small:
            raise UsageError(f"--pictures: {small[0]} is smaller than a patch of {config.patch} pixels.")
        return images
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UsageError(
            'the photographs come with scikit-learn: pip install "spread-jax[data]", or name files with --pictures.'
        ) from None
    return [image.mean(axis=2).astype(np.float32) / 255 for image in load_sample_images().images]


def patches(config: Config) -> np.ndarray:
    """Logarithmic intensities of random patches, each less its mean: [N, patch^2]."""
    rng = np.random.default_rng(config.seed)
    images = photographs(config)
    sizes = np.array([image.size for image in images], float)
    found = np.empty((config.num_examples, config.patch**2), np.float32)
    for index, which in enumerate(rng.choice(len(images), config.num_examples, p=sizes / sizes.sum())):
        image = images[which]
        row = rng.integers(image.shape[0] - config.patch + 1)
        column = rng.integers(image.shape[1] - config.patch + 1)
        found[index] = np.log1p(image[row : row + config.patch, column : column + config.patch] * 255).ravel()
    return found - found.mean(axis=1, keepdims=True)


def images(config: Config, run, say) -> dict:
    """Features and filters of image patches."""
    x = patches(config)
    # Patches are no mixture of independent sources: the last steps, short as they are, never settle.
    result = ica.fit(x, config.sources, key=jax.random.key(config.seed))
    principal = np.linalg.eigh(np.cov(x.T))[1][:, ::-1][:, : config.sources]
    z = (x - np.asarray(result.mean)) @ np.asarray(result.unmixing).T
    along = x @ principal
    kurtosis = lambda u: float(np.mean(np.mean(u**4, axis=0) / np.mean(u**2, axis=0) ** 2 - 3))
    order = np.argsort(-np.linalg.norm(np.asarray(result.mixing), axis=0))
    draw_filters(config, principal, np.asarray(result.mixing)[:, order], np.asarray(result.unmixing)[order].T, run)
    say(f"mean excess kurtosis: {kurtosis(z):.1f} of the sources, {kurtosis(along):.1f} of principal components")
    return {
        "converged": bool(result.converged),
        "iterations": int(result.num_iterations),
        "kurtosis_sources": kurtosis(z),
        "kurtosis_principal_components": kurtosis(along),
    }


def draw_filters(config: Config, principal: np.ndarray, features: np.ndarray, filters: np.ndarray, run) -> None:
    """Principal components, the columns of A and the rows of its inverse, as patches."""
    from matplotlib.figure import Figure

    edge = math.ceil(math.sqrt(config.sources))
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    names = ("principal components", "features: columns of A", "filters: rows of its inverse")
    for axes, name, columns in zip(figure.subplots(1, 3), names, (principal, features, filters), strict=True):
        canvas = np.full((edge * (config.patch + 1) - 1,) * 2, np.nan)
        for index, column in enumerate(columns.T):
            row, place = divmod(index, edge)
            tile = column.reshape(config.patch, config.patch) / np.abs(column).max()
            top, left = row * (config.patch + 1), place * (config.patch + 1)
            canvas[top : top + config.patch, left : left + config.patch] = tile
        axes.imshow(canvas, cmap="gray", vmin=-1, vmax=1)
        axes.set_title(name, fontsize=11)
        axes.axis("off")
    save_figure(figure, run.save_figure_path("filters.png"))
