"""Trains a deterministic generator x = g(z) of 64x64 images by minimising the spread KL.

Data and model are spread by the same Gaussian noise, and the evidence lower bound on the spread likelihood is
maximised: a delta-VAE.

  python -m experiments.celeba --preset demo                      synthetic faces, needs no download
  python -m experiments.celeba --preset small --data PATH         CelebA (or any folder or zip of images)
  python -m experiments.celeba --preset published --data PATH     the paper's networks and settings

The same command again resumes an interrupted run, or says that it is finished.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _launch, _train
from spread_jax import GaussianNoise, spread_elbo
from spread_jax.data import Dataset, Loader, open_dataset
from spread_jax.evaluation import image_grid, save_curves, save_image, write_report
from spread_jax.nn import Encoder64, Generator64
from spread_jax.training import (
    Checkpointer,
    LossOutput,
    RunDirectory,
    create_train_state,
    learning_rate_schedule,
    make_train_step,
    noise_scale_schedule,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Images have values in [0, 1]; noise scales are in those units."""

    preset: Literal["demo", "small", "published"] = "demo"
    """Whose values the other flags start from."""
    data: str = "faces"
    """`faces` (synthetic), `celeb_a`, or the path of a folder or zip of images or a prepared TFDS folder."""
    workdir: str | None = None
    """The run's folder; runs/celeba/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data order, the initial parameters and the noise."""
    steps: int = 2400
    """Optimiser steps in all; a finished run continues if this is raised."""
    batch_size: int = 32
    """Images in a batch, over all devices."""

    latent_dim: int = 16
    """Z, dimensions of z."""
    width: int = 16
    """Channels of the encoder's first convolution (published: 128)."""
    start: Literal[4, 8] = 4
    """Height and width of the generator's first layer."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions; parameters, statistics and the bound stay float32."""

    noise_scale: float = 0.5
    """Sigma of the Gaussian spread noise at the start."""
    final_noise_scale: float = 0.25
    """Sigma is annealed down to this."""
    noise_decay: float = 0.9
    """Factor of each reduction of sigma."""
    noise_decay_every: int = 160
    """Steps between reductions of sigma."""
    num_spread_samples: int = 1
    """S_y, noisy copies of each image."""
    num_latent_samples: int = 1
    """S_z, latent draws for each noisy copy."""
    low_variance: bool = False
    """Evaluate the likelihood at the noise-free image."""

    learning_rate: float = 2e-3
    """Adam's learning rate after the warm-up."""
    final_learning_rate_fraction: float = 0.1
    """Cosine decay to this fraction of the learning rate; 1 for none."""
    warmup_steps: int = 50
    """Steps of linear warm-up, at most half of all steps."""
    beta1: float = 0.5
    """Adam's first decay."""
    ema_decay: float = 0.995
    """Decay of the generator's moving average, which draws the samples."""

    crop: int | None = None
    """Side of the centre square cut out before resizing to 64x64; 140 for CelebA if not given."""
    max_examples: int | None = None
    """Use only the first so many images of each split."""
    cache_dir: str | None = None
    """Folder of decoded images; ~/.cache/spread_jax if not given."""

    record_every: int = 20
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 400
    """Steps between sample grids and held-out evaluations."""
    save_every: int = 400
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, besides the best."""
    held_out_examples: int = 500
    """Images of the test split in the final evaluation, of the validation split in the ones before."""
    report_real_images: bool = True
    """Show images of the data set in report.html, as the reconstructions do."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


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
        record_every=100,
        sample_every=2000,
        save_every=2000,
        held_out_examples=10_000,
    ),
}

# What may differ when a run is resumed: these change what is recorded and kept, not what is computed.
RESUMABLE = (
    "steps",
    "workdir",
    "data",  # may have moved; its pixels are compared by their fingerprint
    "cache_dir",
    "record_every",
    "sample_every",
    "save_every",
    "keep",
    "held_out_examples",
    "report_real_images",
    "quiet",
)

IMAGE_SIZE = 64
CURVES = {
    "nats per example": {"elbo": "ELBO, training batch", "validation_elbo_nats": "ELBO, validation"},
    "KL, nats per example": {"kl": "KL(q(z|y) || p(z))"},
    "squared error per pixel": {"validation_reconstruction_mse": "reconstruction, validation"},
    "noise scale": {"noise_scale": "sigma"},
}


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(
        config, 1, "steps", "batch_size", "latent_dim", "record_every", "sample_every", "save_every", "keep",
        "held_out_examples", "num_spread_samples", "num_latent_samples", "noise_decay_every",
    )  # fmt: skip
    if config.width < 2 or config.width % 2:
        raise _launch.UsageError(f"--width must be an even number of at least 2, got {config.width}.")
    if config.seed < 0:
        raise _launch.UsageError(f"--seed must not be negative, got {config.seed}.")
    if not 0 < config.final_noise_scale <= config.noise_scale:
        raise _launch.UsageError(
            f"--final-noise-scale must be positive and at most --noise-scale, "
            f"got {config.final_noise_scale} and {config.noise_scale}."
        )
    if not 0 < config.noise_decay < 1:
        raise _launch.UsageError(f"--noise-decay must be between 0 and 1, got {config.noise_decay}.")
    if config.warmup_steps < 0:
        raise _launch.UsageError(f"--warmup-steps must not be negative, got {config.warmup_steps}.")


class Model:
    """The networks of a config and every compiled function of them; holds no state."""

    def __init__(self, config: Config, channels: int):

        dtype = jnp.dtype(config.compute_dtype)
        self.config, self.channels = config, channels
        self.encoder = Encoder64(config.latent_dim, width=config.width, dtype=dtype)
        self.generator = Generator64(width=config.width, channels=channels, start=config.start, dtype=dtype)
        self.noise_scale = noise_scale_schedule(
            config.noise_scale,
            config.final_noise_scale,
            decay=config.noise_decay,
            every=config.noise_decay_every,
        )
        self.optimizer = optax.adam(
            learning_rate_schedule(
                config.learning_rate,
                num_steps=config.steps,
                warmup=min(config.warmup_steps, config.steps // 2),
                final_fraction=config.final_learning_rate_fraction,
            ),
            b1=config.beta1,
        )
        self.train_step = make_train_step(
            self.loss, self.optimizer, ema_decay=config.ema_decay, averaged=_train.generator_variables
        )

    def initial_state(self) -> Any:
        """The state at step 0."""

        @jax.jit
        def create(key):
            init_key, run_key = jax.random.split(key)
            image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, self.channels))
            latent = jnp.zeros((1, self.config.latent_dim))
            params, batch_stats = _train.initial_variables(self.encoder, self.generator, init_key, image, latent)
            return create_train_state(
                params, batch_stats, self.optimizer, key=run_key, averaged=_train.generator_variables
            )

        return create(jax.random.key(self.config.seed))

    def loss(self, params, batch_stats, batch, *, key, step):
        """Minus the mean spread ELBO of a uint8 batch, in nats per example."""

        x = _train.to_unit(batch)
        scale = self.noise_scale(step)
        terms, auxiliary = spread_elbo(
            x,
            _train.network(self.encoder, "encoder", params, batch_stats, train=True),
            _train.network(self.generator, "generator", params, batch_stats, train=True),
            GaussianNoise(scale),
            key=key,
            num_spread_samples=self.config.num_spread_samples,
            num_latent_samples=self.config.num_latent_samples,
            low_variance=self.config.low_variance,
            has_aux=True,
        )
        new_stats = {name: a["batch_stats"] for name, a in zip(("encoder", "generator"), auxiliary, strict=True)}
        metrics = {
            "elbo": terms.elbo.mean(),
            "log_likelihood": terms.log_likelihood.mean(),
            "kl": terms.kl.mean(),
            "noise_scale": scale,
        }
        return -terms.elbo.mean(), LossOutput(new_stats, metrics)

    @functools.cached_property
    def evaluate_batch(self) -> Callable:
        """(params, batch_stats, uint8 batch, key, sigma) -> (elbo, kl, squared error per pixel), each [batch]."""

        def evaluate(params, batch_stats, batch, key, scale):
            encode, decode = self._fixed(params, batch_stats)
            x, noise = _train.to_unit(batch), GaussianNoise(scale)
            terms = spread_elbo(x, encode, decode, noise, key=key)
            reconstruction = decode(encode(noise.sample(x, key=key))[0])
            error = jnp.square(reconstruction - x).reshape(x.shape[0], -1).mean(axis=1)
            return terms.elbo, terms.kl, error

        return jax.jit(evaluate)

    @functools.cached_property
    def reconstruct(self) -> Callable:
        """(params, batch_stats, uint8 batch, key, sigma) -> (noisy images y, reconstructions g(mean))."""

        def reconstruct(params, batch_stats, batch, key, scale):
            encode, decode = self._fixed(params, batch_stats)
            y = GaussianNoise(scale).sample(_train.to_unit(batch), key=key)
            return y, decode(encode(y)[0])

        return jax.jit(reconstruct)

    @functools.cached_property
    def generate(self) -> Callable:
        """(averaged generator variables, z) -> images x = g(z)."""

        return jax.jit(lambda variables, z: self.generator.apply(variables, z, train=False))

    def _fixed(self, params, batch_stats):
        return (
            _train.network(self.encoder, "encoder", params, batch_stats, train=False),
            _train.network(self.generator, "generator", params, batch_stats, train=False),
        )


class Evaluation:
    """Held-out numbers and pictures of a run, all functions of the state and the seed."""

    def __init__(self, config: Config, model: Model, run: RunDirectory):
        self.config, self.model, self.run = config, model, run
        self.key = jax.random.fold_in(jax.random.key(config.seed), 0x5EED)
        self.latents = jax.random.normal(self.key, (64, config.latent_dim))

    def held_out(self, state: Any, dataset: Dataset) -> dict[str, float]:
        """Mean spread ELBO, its standard error, KL and reconstruction error on the split's first images."""
        scale = self.model.noise_scale(state.step)
        return _train.held_out(
            lambda batch, key: self.model.evaluate_batch(state.params, state.model_state, batch, key, scale),
            dataset,
            count=self.config.held_out_examples,
            batch_size=self.config.batch_size,
            key=self.key,
        )

    def draw(self, state: Any, dataset: Dataset) -> None:
        """Samples, reconstructions and interpolations of the state, as PNG files in the run's folder."""
        scale = self.model.noise_scale(state.step)
        samples = np.asarray(self.model.generate(state.ema, self.latents))
        grid = image_grid(samples, columns=8)
        folder = self.run.path / "samples"
        folder.mkdir(exist_ok=True)
        save_image(grid, folder / f"step_{int(state.step):06d}.png")
        save_image(grid, self.run.save_figure_path("samples.png"))

        images = np.asarray(dataset.images[:12])
        noisy, rebuilt = self.model.reconstruct(state.params, state.model_state, images, self.key, scale)
        rows = np.concatenate([images / 255.0, noisy, rebuilt])
        save_image(image_grid(rows, columns=len(images)), self.run.save_figure_path("reconstructions.png"))

        path = spherical_interpolation(self.latents[:6], self.latents[6:12], num=10)
        images = np.asarray(self.model.generate(state.ema, path.reshape(-1, path.shape[-1])))
        save_image(image_grid(images, columns=10), self.run.save_figure_path("interpolations.png"))


def spherical_interpolation(start: jax.Array, end: jax.Array, *, num: int) -> jax.Array:
    """Points [n, num, Z] on the arcs from `start` to `end` [n, Z]; their norms stay typical of N(0, I)."""
    unit = lambda z: z / jnp.linalg.norm(z, axis=1, keepdims=True)
    angle = jnp.arccos(jnp.clip((unit(start) * unit(end)).sum(axis=1), -0.9999, 0.9999))[:, None, None]
    t = jnp.linspace(0.0, 1.0, num)[None, :, None]
    arc = jnp.sin((1 - t) * angle) * start[:, None] + jnp.sin(t * angle) * end[:, None]
    return arc / jnp.sin(angle)


def main(argv: list[str] | None = None) -> int:
    """Trains, or resumes, or says that the run is finished."""
    config = _launch.parse(Config, PRESETS, "demo", argv)
    check_config(config)
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)

    # Data first: what is wrong with it is said before anything is written.
    open_split = functools.partial(
        open_dataset,
        config.data,
        image_size=IMAGE_SIZE,
        crop=config.crop,
        max_examples=config.max_examples,
        cache_dir=config.cache_dir,
        **({"progress": _launch.silent} if config.quiet else {}),
    )
    datasets = {split: open_split(split) for split in ("train", "validation", "test")}
    loader = Loader(datasets["train"], batch_size=config.batch_size, seed=config.seed)
    say(f"data: {datasets['train'].source}: " + ", ".join(f"{len(d):,} {s}" for s, d in datasets.items()))

    workdir = Path(config.workdir or f"runs/celeba/{config.preset}-{config.seed}")
    saved = {
        **_launch.as_dict(config),
        "data_fingerprint": datasets["train"].fingerprint,
        "image_channels": datasets["train"].image_shape[2],
    }
    with RunDirectory.open(workdir, saved, resumable_keys=RESUMABLE) as run:
        if run.finished and run.results["steps"] >= config.steps:
            say(f"{workdir} is finished ({run.results['steps']} steps); raise --steps to go on.")
            _launch.print_result(run.results)
            return 0
        with Checkpointer(run.checkpoints_path, keep=config.keep, best_metric="validation_elbo_nats") as saver:
            return _train_and_report(config, run, saver, datasets, loader, say)


def _train_and_report(config, run, saver, datasets, loader, say) -> int:
    model = Model(config, channels=datasets["train"].image_shape[2])
    evaluation = Evaluation(config, model, run)

    def evaluate(step: int, state: Any) -> tuple[dict[str, float], str]:
        numbers = evaluation.held_out(state, datasets["validation"])
        evaluation.draw(state, datasets["validation"])
        sentence = (
            f"step {step}: validation ELBO {numbers['elbo_nats']:.1f} nats, "
            f"reconstruction error {numbers['reconstruction_mse']:.5f}; {run.path}/samples.png"
        )
        return {f"validation_{name}": value for name, value in numbers.items()}, sentence

    trained = _train.fit(config, run, saver, loader, model.initial_state, model.train_step, evaluate, say=say)
    state = trained.state

    held_out = evaluation.held_out(state, datasets["test"])
    evaluation.draw(state, datasets["validation"])
    records = run.read_metrics()
    save_curves(records, CURVES, run.save_figure_path("curves.png"), title=f"{config.preset}, seed {config.seed}")
    results = {
        "experiment": "celeba",
        "preset": config.preset,
        "seed": config.seed,
        "data": datasets["train"].source,
        "train_images": len(datasets["train"]),
        "held_out_images": min(len(datasets["test"]), config.held_out_examples),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "parameters": _train.parameters(state),
        "noise_scale": float(model.noise_scale(config.steps)),
        "images_per_second": trained.images_per_second,
        "waiting_share": trained.waiting_share,
        "seconds": trained.seconds,
        **{f"held_out_{name}": value for name, value in held_out.items()},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": _launch.versions(),
    }
    run.write_results(results)
    write_report(run.path, real_images=config.report_real_images)
    say(f"figures: {run.path}/samples.png, reconstructions.png, interpolations.png, curves.png; all in report.html")
    _launch.print_result(results)
    return 0


if __name__ == "__main__":
    _launch.run(main)
