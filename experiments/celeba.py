"""Trains a deterministic generator x = g(z) of 64x64 images by minimising a spread divergence.

Data and model are spread by the same noise, and the evidence lower bound on the spread likelihood is maximised: a
delta-VAE. The noise may be learned, to discriminate, and the peers are one flag away.

  python -m experiments.celeba --preset demo                      synthetic faces, needs no download
  python -m experiments.celeba --preset small --data PATH         CelebA (or any folder or zip of images)
  python -m experiments.celeba --preset published --data PATH     the paper's networks and settings
  python -m experiments.celeba --noise low_rank ...               gaussian, laplace, low_rank, transformed
  python -m experiments.celeba --objective spread_gan ...         spread_elbo, elbo, importance, wae_mmd, spread_gan

The same command again resumes an interrupted run, or says that it is finished.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import _generator, _launch, _train
from experiments._generator import Model
from spread_jax.evaluation import image_grid, save_curves, save_image, write_report
from spread_jax.training import RunDirectory


@dataclasses.dataclass(frozen=True)
class Config(_generator.GeneratorConfig):
    """Settings of a run. Images have values in [0, 1]; noise scales are in those units."""

    preset: Literal["demo", "small", "published"] = "demo"
    data: str = "faces"
    """`faces` (synthetic), `celeb_a`, or the path of a folder or zip of images or a prepared TFDS folder."""
    workdir: str | None = None
    """The run's folder; runs/celeba/<preset>-<seed> if not given, and what of objective and noise is not the usual."""
    width: int = 16
    """Channels of the encoder's first convolution (published: 128)."""
    report_real_images: bool = True
    """Show images of the data set in report.html, as the reconstructions do."""


PRESETS = {
    "demo": Config(),
    "small": Config(
        preset="small",
        data="celeb_a",
        steps=2500,
        batch_size=64,
        latent_dim=64,
        width=32,
        final_noise_scale=0.4,
        learning_rate=1e-3,
        noise_decay_every=500,
        record_every=50,
        sample_every=250,
        save_every=250,
    ),
    "published": Config(
        preset="published",
        data="celeb_a",
        steps=81_400,  # 50 epochs of 162,770 images
        batch_size=100,
        latent_dim=64,
        width=128,
        noise_scale=0.5,
        final_noise_scale=0.5,
        learning_rate=1e-4,
        final_learning_rate_fraction=1.0,
        warmup_steps=0,
        ema_decay=0.999,
        transform_features=32,
        transform_coefficient=0.1,
        descent_steps=16_280,  # 10 epochs
        ascent_steps=1000,
        noise_learning_rate=1e-5,
        discriminator_learning_rate=2e-4,  # of DCGAN, both
        generator_learning_rate=2e-4,
        record_every=100,
        sample_every=2000,
        save_every=2000,
        held_out_examples=10_000,
    ),
}

RESUMABLE = (*_generator.RESUMABLE, "report_real_images")
IMAGE_SIZE = 64


def draw(model: Model, state: Any, run: RunDirectory, images: np.ndarray) -> None:
    """Samples, reconstructions and interpolations of the state, as PNG files in the run's folder."""
    variables, z = model.averaged(state), np.asarray(_generator.latents(model.config))
    path = spherical_interpolation(z[:6], z[6:12], num=10)
    both = np.concatenate([z, path.reshape(-1, path.shape[-1])])  # in one call: one shape to compile
    samples, between = np.split(np.asarray(model.generate(variables, both)), [len(z)])
    grid = image_grid(samples, columns=8)
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    save_image(grid, folder / f"step_{int(state.step):06d}.png")
    save_image(grid, run.save_figure_path("samples.png"))

    images = images[:12]
    pair = model.reconstruct(state, images, _generator.evaluation_key(model.config))
    if pair is not None:
        rows = np.concatenate([images / 255.0, *pair])
        save_image(image_grid(rows, columns=len(images)), run.save_figure_path("reconstructions.png"))

    save_image(image_grid(between, columns=10), run.save_figure_path("interpolations.png"))


def spherical_interpolation(start: np.ndarray, end: np.ndarray, *, num: int) -> np.ndarray:
    """Points [n, num, Z] on the arcs from `start` to `end` [n, Z]; their norms stay typical of N(0, I)."""
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    angle = np.arccos(np.clip((unit(start) * unit(end)).sum(axis=1), -0.9999, 0.9999))[:, None, None]
    t = np.linspace(0.0, 1.0, num, dtype=start.dtype)[None, :, None]
    arc = np.sin((1 - t) * angle) * start[:, None] + np.sin(t * angle) * end[:, None]
    return arc / np.sin(angle)


def main(argv: list[str] | None = None) -> int:
    """Trains, or resumes, or says that the run is finished."""
    config = _launch.parse(Config, PRESETS, "demo", argv)
    _generator.check_config(config, (IMAGE_SIZE, IMAGE_SIZE, 3))
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)
    on_log = _launch.load_hook(config.on_log)

    # Data first: what is wrong with it is said before anything is written.
    datasets = _generator.open_splits(config, IMAGE_SIZE)
    config = _generator.with_scale_from_data(config, datasets["train"])
    say(f"data: {datasets['train'].source}: " + ", ".join(f"{len(d):,} {s}" for s, d in datasets.items()))

    workdir = Path(config.workdir or _generator.default_workdir(config, "celeba"))
    saved = _generator.saved_config(config, datasets["train"])
    with RunDirectory.open(workdir, saved, resumable_keys=RESUMABLE, on_log=on_log) as run:
        if _launch.finished_steps(run) >= config.steps:
            say(f"{workdir} is finished ({run.results['steps']} steps); raise --steps to go on.")
            _launch.print_result(run.results)
            return 0
        return _train_and_report(config, run, datasets, say)


def _train_and_report(config, run, datasets, say) -> int:
    images = np.asarray(datasets["validation"].images[:12])
    model, trained = _generator.train_run(
        config, run, datasets, say=say, draw=lambda model, state, run: draw(model, state, run, images)
    )
    state = trained.state
    held_out = model.held_out(state, datasets["test"], _generator.evaluation_key(config))
    draw(model, state, run, images)
    records = run.read_metrics()
    title = f"{config.preset}, seed {config.seed}"
    save_curves(records, _generator.curves(records), run.save_figure_path("curves.png"), title=title)
    results = {
        "experiment": "celeba",
        "preset": config.preset,
        "seed": config.seed,
        "objective": config.objective,
        "noise": config.noise,
        "data": datasets["train"].source,
        "train_images": len(datasets["train"]),
        "held_out_images": min(len(datasets["test"]), config.held_out_examples),
        "steps": config.steps,
        "steps_of_all_players": model.num_steps,
        "batch_size": config.batch_size,
        "parameters": _train.parameters(state),
        "noise_scale": model.noise_scale(state),
        "images_per_second": trained.images_per_second,
        "waiting_share": trained.waiting_share,
        "step_share": trained.step_share,
        "seconds": trained.seconds,
        **{f"held_out_{name}": value for name, value in held_out.items()},
        "device": jax.devices()[0].device_kind,
        "devices": config.devices or jax.device_count(),
        "processes": jax.process_count(),
        "versions": _launch.versions(),
    }
    run.write_results(results)
    write_report(run.path, real_images=config.report_real_images)
    figures = sorted(path.name for path in run.path.glob("*.png"))
    say(f"figures: {run.path}/{', '.join(figures)}; all in report.html")
    _launch.print_result(results)
    return 0


if __name__ == "__main__":
    _launch.run(main, in_all_processes=True)
