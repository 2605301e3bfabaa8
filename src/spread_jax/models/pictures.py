"""The pictures of a run: samples, reconstructions, interpolations."""

from __future__ import annotations

import numpy as np

from spread_jax.evaluation import image_grid, save_image
from spread_jax.models.run import Trained, in_batches
from spread_jax.training import RunDirectory

__all__ = ["draw_fitted", "draw_pictures", "spherical_interpolation"]


def draw_pictures(run: Trained, folder: RunDirectory, images: np.ndarray, latents: np.ndarray, key) -> None:
    """Samples, reconstructions and interpolations as PNG files in a run's folder.

    Args:
      run: the generator.
      folder: the run's open folder.
      images: uint8 [n, height, width, channels], of which up to twelve are reconstructed.
      latents: [64, Z] of the samples, the same throughout a run.
      key: of the noise on the images.
    """
    path = spherical_interpolation(latents[:6], latents[6:12], num=10)
    both = np.concatenate([latents, path.reshape(-1, path.shape[-1])])
    # In batches as `sample` and `reconstruct` have them: one shape to compile for all.
    drawn = in_batches(lambda z: (run.programs.generate(run.state.ema, z),), both)[0]
    samples, between = np.split(drawn, [len(latents)])
    scale = max(1, 56 // run.method.image_shape[0])
    grid = image_grid(samples, columns=8, scale=scale)
    (folder.path / "samples").mkdir(exist_ok=True)
    save_image(grid, folder.path / "samples" / f"step_{int(run.state.step):06d}.png")
    density = "a mixture fitted to the aggregate posterior" if run.method.mixture_latents else "the prior"
    path = folder.save_figure_path(
        "samples.png", caption=f"Samples x = g(z), z from {density}; none is selected.", section="Samples", grid=True
    )
    save_image(grid, path)
    path = folder.save_figure_path(
        "interpolations.png",
        caption="Each row: along the arc from one latent to another.",
        section="Interpolations",
        grid=True,
    )
    save_image(image_grid(between, columns=10, scale=scale), path)
    if run.has_encoder:
        images = images[:12]

        def seen_and_decoded(batch):
            found, again = run.programs.encode(run.state, batch, key)
            return found.seen, again

        rows = np.concatenate([images / 255.0, *in_batches(seen_and_decoded, images)])
        path = folder.save_figure_path(
            "reconstructions.png",
            caption="Held-out images, what the encoder sees of them, and g of its mean.",
            section="Reconstructions",
            grid=True,
            real_images=True,
        )
        save_image(image_grid(rows, columns=len(images), scale=scale), path)


def draw_fitted(run: Trained, folder: RunDirectory, latents: np.ndarray) -> None:
    """A second grid of samples x = g(z), of latents from a density fitted to the aggregate posterior.

      z ~ q(z) = mean over images of q(z|y).

    Args:
      run: the generator.
      folder: the run's open folder.
      latents: [n, Z].
    """
    samples = in_batches(lambda z: (run.programs.generate(run.state.ema, z),), latents)[0]
    path = folder.save_figure_path(
        "samples_mixture.png",
        caption="Samples x = g(z), z from a mixture of Gaussians fitted to the aggregate posterior; none is selected.",
        section="Samples",
        grid=True,
    )
    save_image(image_grid(samples, columns=8, scale=max(1, 56 // run.method.image_shape[0])), path)


def spherical_interpolation(start: np.ndarray, end: np.ndarray, *, num: int) -> np.ndarray:
    """Points on the arcs between latents; their norms stay typical of N(0, I).

    Args:
      start: [n, Z].
      end: [n, Z].
      num: points on each arc, both ends among them.

    Returns:
      [n, num, Z].

    Example:
      >>> import numpy as np
      >>> spherical_interpolation(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), num=3)[0, 1].round(3).tolist()
      [0.707, 0.707]
    """
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    angle = np.arccos(np.clip((unit(start) * unit(end)).sum(axis=1), -0.9999, 0.9999))[:, None, None]
    t = np.linspace(0.0, 1.0, num, dtype=start.dtype)[None, :, None]
    arc = np.sin((1 - t) * angle) * start[:, None] + np.sin(t * angle) * end[:, None]
    return arc / np.sin(angle)
