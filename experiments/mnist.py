"""Trains generators of 28x28 digits with fixed and learned spread noise, and compares what they learn.

The same networks, batches and latents under four noises: Laplace and Gaussian of one standard deviation, a
Gaussian with a learned low-rank covariance of fixed volume, and a Gaussian around a learned invertible map. The
learned ones are trained by min over the model, max over the noise, in short turns: the encoder has to follow.

  python -m experiments.mnist --preset demo                      scikit-learn's digits, needs no download
  python -m experiments.mnist --preset small --data PATH         MNIST in its idx format
  python -m experiments.mnist --preset published --data PATH     the paper's networks and settings
  python -m experiments.mnist --noise low_rank ...               one of the noises

`demo` and `small` are sized for two CPU cores and minutes, `published` for a GPU. Expect of `small` on 17,100 images
a held-out ELBO of -226 nats with Laplace and -270 with Gaussian noise (docs/results/mnist.md). The same command again
resumes an interrupted run, or says that it is finished.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _launch, _train
from experiments._noise import LEARNED, NOISES, NoiseFamily, check_noise_config
from spread_jax import spread_elbo
from spread_jax.data import Loader, open_dataset
from spread_jax.evaluation import image_grid, save_curves, save_image, write_report
from spread_jax.nn import Encoder28, Generator28, lipschitz_bound
from spread_jax.training import (
    Checkpointer,
    LossOutput,
    RunDirectory,
    create_alternating_state,
    learning_rate_schedule,
    make_alternating_step,
)

TITLES = {
    "laplace": "Laplace",
    "gaussian": "Gaussian",
    "low_rank": "Gaussian, learned covariance",
    "transformed": "Gaussian, learned location",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Images have values in [0, 1]; noise scales are in those units."""

    preset: Literal["demo", "small", "published"] = "demo"
    """Whose values the other flags start from."""
    noise: Literal["all", "laplace", "gaussian", "low_rank", "transformed"] = "all"
    """The spread noise; `all` trains the four one after another, each on the same batches and latents."""
    data: str = "digits"
    """`digits` (scikit-learn's), `mnist`, `faces`, or the path of idx files, of a folder or zip of images."""
    workdir: str | None = None
    """The run's folder, with one for each noise inside; runs/mnist/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data order, the initial parameters and the noise."""
    steps: int = 300
    """Optimiser steps of the model; a learned noise takes its own between them."""
    batch_size: int = 64
    """Images in a batch."""

    latent_dim: int = 10
    """Z, dimensions of z."""
    width: int = 8
    """Channels of the encoder's first convolution (published: 64)."""

    noise_scale: float = 0.5
    """Standard deviation of the noise added to each pixel, at the start."""
    final_noise_scale: float = 0.3
    """It is annealed down to this."""
    noise_decay: float = 0.9
    """Factor of each reduction."""
    noise_decay_every: int = 25
    """Steps of the model between reductions."""
    low_variance: bool = False
    """Evaluate the likelihood at the noise-free image."""

    rank: int = 20
    """R, columns of the learned factor of the covariance (published: 20)."""
    factor_scale: float = 1.0
    """Geometric mean of the factor's singular values, fixed: its volume is this to the power R."""
    max_noise_entropy_ratio: float = 2.0
    """The learned covariance may add this many times the entropy it adds with equal singular values."""
    transform_features: int = 8
    """Channels inside the invertible residual block (published: 32)."""
    transform_coefficient: float = 0.9
    """Operator norm of each of its convolutions, below 1 (published: 0.1)."""
    descent_steps: int = 3
    """Steps of the model between ascents of the noise."""
    ascent_steps: int = 1
    """Steps of the noise in each ascent (published: 1000)."""
    through_encoder: bool = False
    """Let the noise follow the gradient through the encoder's input too: it then learns to mislead the encoder."""
    noise_learning_rate: float = 2e-3
    """Adam's learning rate for the noise."""

    learning_rate: float = 5e-3
    """Adam's learning rate for the model."""
    final_learning_rate_fraction: float = 0.1
    """Cosine decay to this fraction of the learning rate; 1 for none."""
    beta1: float = 0.5
    """Adam's first decay, of both players."""
    ema_decay: float = 0.98
    """Decay of the generator's moving average, which draws the samples."""

    max_examples: int | None = None
    """Use only the first so many images of each split."""
    cache_dir: str | None = None
    """Folder of decoded images; ~/.cache/spread_jax if not given."""

    record_every: int = 10
    """Steps of both players between lines of metrics.jsonl."""
    sample_every: int = 140
    """Steps of both players between sample grids and held-out evaluations."""
    save_every: int = 140
    """Steps of both players between checkpoints."""
    keep: int = 2
    """Checkpoints to keep of each noise, besides the best."""
    held_out_examples: int = 180
    """Images of the test split in the final evaluation, of the validation split in the ones before."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {
    "demo": Config(),
    "small": Config(
        preset="small",
        data="mnist",
        steps=900,
        batch_size=100,
        width=16,
        final_noise_scale=0.3,
        noise_decay_every=80,
        descent_steps=4,
        noise_learning_rate=1e-3,
        learning_rate=1e-3,
        ema_decay=0.99,
        record_every=15,
        sample_every=270,
        save_every=270,
        held_out_examples=2000,
    ),
    "published": Config(
        preset="published",
        data="mnist",
        steps=54_000,  # 100 epochs of the 54,000 images left for training by a validation split of a tenth
        batch_size=100,
        width=64,
        final_noise_scale=0.5,
        transform_features=32,
        transform_coefficient=0.1,
        descent_steps=5400,  # 10 epochs
        ascent_steps=1000,
        noise_learning_rate=1e-5,
        learning_rate=1e-4,
        final_learning_rate_fraction=1.0,
        ema_decay=0.999,
        record_every=100,
        sample_every=3000,
        save_every=3000,
        held_out_examples=10_000,
    ),
}

# What may differ when a run is resumed: these change what is recorded and kept, not what is computed.
RESUMABLE = (
    "noise",  # each has a folder of its own
    "steps",
    "workdir",
    "data",  # may have moved; its pixels are compared by their fingerprint
    "cache_dir",
    "record_every",
    "sample_every",
    "save_every",
    "keep",
    "held_out_examples",
    "quiet",
)

IMAGE = (28, 28, 1)
PIXELS = math.prod(IMAGE)
PCA_IMAGES = 5000
PCA_VARIANCE = 0.9


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(
        config, 1, "steps", "batch_size", "latent_dim", "width", "record_every", "sample_every", "save_every", "keep",
        "held_out_examples",
    )  # fmt: skip
    _launch.require_at_least(config, 0, "seed")
    _launch.require_positive(config, "learning_rate")
    check_noise_config(config, PIXELS)


class Model:
    """The networks and one spread noise of a config, and every compiled function of them; holds no state."""

    def __init__(self, config: Config, kind: str):
        self.config, self.kind = config, kind
        self.encoder = Encoder28(config.latent_dim, width=config.width)
        self.generator = Generator28(width=config.width)
        self.noises = NoiseFamily(kind, config, IMAGE)
        rate = learning_rate_schedule(
            config.learning_rate, num_steps=config.steps, final_fraction=config.final_learning_rate_fraction
        )
        self.optimizer = optax.adam(rate, b1=config.beta1)
        self.train_step = make_alternating_step(
            self.loss,
            self.divergence,
            self.optimizer,
            self.noises.optimizer,
            self.noises.schedule,
            ema_decay=config.ema_decay,
            averaged=_train.generator_variables,
        )

    def initial_state(self) -> Any:
        """The state at step 0; the networks start alike under every noise."""
        return self._create(jax.random.key(self.config.seed))

    @functools.cached_property
    def _create(self) -> Callable:
        def create(key):
            init_key, noise_key, run_key = jax.random.split(key, 3)
            image, latent = jnp.zeros((1, *IMAGE)), jnp.zeros((1, self.config.latent_dim))
            params, batch_stats = _train.initial_variables(self.encoder, self.generator, init_key, image, latent)
            noise_params, noise_state = self.noises.initial(noise_key)
            return create_alternating_state(
                params,
                batch_stats,
                self.optimizer,
                noise_params,
                noise_state,
                self.noises.optimizer,
                key=run_key,
                averaged=_train.generator_variables,
            )

        return jax.jit(create)

    def loss(self, params, noise_params, batch_stats, noise_state, batch, *, key, step):
        """Minus the mean spread ELBO of a uint8 batch, in nats per example."""
        noise = self.noises.at(noise_params, noise_state, step)
        elbo, metrics, new_stats = self._bound(params, batch_stats, noise, batch, key, step)
        return -elbo, LossOutput(new_stats, metrics)

    def divergence(self, params, noise_params, batch_stats, noise_state, batch, *, key, step):
        """The mean upper bound on KL(p~ || p~_theta) of a uint8 batch, in nats: see `NoiseFamily.metrics`.

        No gradient reaches the noise through the encoder's input unless `through_encoder` is set. Where q(z|y) is
        the posterior that gradient is zero, and where it is not it is that of the slack KL(q(z|y) || p(z|y)) alone:
        noise that follows it learns to mislead the encoder instead of telling data and model apart.
        """
        noise_state = self.noises.updated(noise_params, noise_state)
        noise = self.noises.at(noise_params, noise_state, step)
        see = (lambda y: y) if self.config.through_encoder else jax.lax.stop_gradient
        _, metrics, _ = self._bound(params, batch_stats, noise, batch, key, step, see=see)
        return metrics["spread_kl_bound"], LossOutput(noise_state, metrics)

    def _bound(self, params, batch_stats, noise, batch, key, step, see=lambda y: y):
        x = _train.to_unit(batch)
        encode = _train.network(self.encoder, "encoder", params, batch_stats, train=True)
        terms, auxiliary = spread_elbo(
            x,
            lambda y: encode(see(y)),
            _train.network(self.generator, "generator", params, batch_stats, train=True),
            noise,
            key=key,
            low_variance=self.config.low_variance,
            has_aux=True,
        )
        new_stats = {name: a["batch_stats"] for name, a in zip(("encoder", "generator"), auxiliary, strict=True)}
        elbo = terms.elbo.mean()
        metrics = {"elbo": elbo, "kl": terms.kl.mean(), **self.noises.metrics(noise, elbo, step)}
        return elbo, metrics, new_stats

    def noise_of(self, state: Any) -> tuple[Any, jax.Array]:
        """The spread noise of a state, and its entropy in nats."""
        return self._noise_and_entropy(state.noise_params, state.noise_state, state.step)

    @functools.cached_property
    def _noise_and_entropy(self) -> Callable:
        def create(*parts):
            noise = self.noises.at(*parts)
            return noise, noise.entropy(jnp.zeros((1, *IMAGE)))[0]

        return jax.jit(create)

    @functools.cached_property
    def evaluate_batch(self) -> Callable:
        """(params, batch_stats, noise, uint8 batch, key) -> (elbo, kl, squared error per pixel), each [batch]."""

        def evaluate(params, batch_stats, noise, batch, key):
            encode = _train.network(self.encoder, "encoder", params, batch_stats, train=False)
            decode = _train.network(self.generator, "generator", params, batch_stats, train=False)
            x = _train.to_unit(batch)
            terms = spread_elbo(x, encode, decode, noise, key=key)
            reconstruction = decode(encode(noise.sample(x, key=key))[0])
            return terms.elbo, terms.kl, jnp.square(reconstruction - x).mean(axis=(1, 2, 3))

        return jax.jit(evaluate)

    def held_out(self, state: Any, dataset: Any, key: jax.Array) -> dict[str, float]:
        """Means over a split's first images, of the ELBO with its standard error and of what derives from it."""
        noise, entropy = self.noise_of(state)
        numbers = _train.held_out(
            lambda batch, key: self.evaluate_batch(state.params, state.model_state, noise, batch, key),
            dataset,
            count=self.config.held_out_examples,
            batch_size=self.config.batch_size,
            key=key,
        )
        return {**numbers, "spread_kl_bound_nats": -numbers["elbo_nats"] - float(entropy)}

    @functools.cached_property
    def generate(self) -> Callable:
        """(averaged generator variables, z) -> images x = g(z)."""
        return jax.jit(lambda variables, z: self.generator.apply(variables, z, train=False))

    def tangents(self, variables: Any, z: jax.Array) -> np.ndarray:
        """Orthonormal bases [n, pixels, Z] of the tangent spaces of the generator's manifold at g(z)."""
        native = Generator28(width=self.config.width, native_gradients=True)  # forward mode
        image = lambda z: native.apply(variables, z[None], train=False).reshape(-1)
        jacobian = jax.jit(jax.vmap(jax.jacfwd(image)))(z)
        return np.linalg.qr(np.asarray(jacobian, np.float64))[0]


def variance_share(factor: np.ndarray, basis: np.ndarray) -> float:
    """How much of the noise L eta, eta ~ N(0, I), lies in a subspace: |V^T L|_F^2 / |L|_F^2.

    Isotropic noise has k / X of its variance in k of X dimensions, which is what to compare it with; noise
    orthogonal to the subspace has none.

    Args:
      factor: L [X, R].
      basis: V [..., X, k] with orthonormal columns; the share is averaged over the leading axes.
    """
    inside = np.square(np.swapaxes(basis, -1, -2) @ factor).sum(axis=(-2, -1))
    return float((inside / np.square(factor).sum()).mean())


def principal_directions(images: np.ndarray, variance: float) -> np.ndarray:
    """The fewest leading principal directions [X, k] of uint8 images that hold a share of their variance."""
    x = images.reshape(len(images), -1) / 255.0
    covariance = np.cov(x.T)
    values, vectors = np.linalg.eigh(covariance)
    held = np.cumsum(values[::-1]) / values.sum()
    return vectors[:, ::-1][:, : int(np.searchsorted(held, variance)) + 1]


def flat_factor(model: Model, state: Any) -> np.ndarray:
    """L [pixels, R] as the noise uses it."""
    return np.asarray(model.noise_of(state)[0].factor, np.float64).reshape(PIXELS, -1)


def covariance_numbers(model: Model, state: Any, latents: jax.Array, train_images: np.ndarray) -> dict[str, float]:
    """How orthogonal the learned covariance L L^T is to the data and to the model's manifold.

    Each is a `variance_share` of L: in the principal directions of the data that hold 90 % of its variance (from
    the first 5,000 training images), in the leading ones of them, as many as there are latents, and in the tangent
    space of the generator, averaged over latents; beside each, the same for isotropic noise, and for the L that
    learning began with.
    """
    factor, initial = flat_factor(model, state), flat_factor(model, model.initial_state())
    directions = principal_directions(np.asarray(train_images[:PCA_IMAGES]), PCA_VARIANCE)
    leading = directions[:, : latents.shape[1]]
    tangents = model.tangents(state.ema, latents)
    values = np.linalg.svd(factor, compute_uv=False)
    return {
        "share_in_data_directions": variance_share(factor, directions),
        "share_in_data_directions_initial": variance_share(initial, directions),
        "share_in_data_directions_isotropic": directions.shape[1] / PIXELS,
        "data_directions": directions.shape[1],
        "share_in_leading_directions": variance_share(factor, leading),
        "share_in_leading_directions_initial": variance_share(initial, leading),
        "share_in_leading_directions_isotropic": leading.shape[1] / PIXELS,
        "share_in_tangent_space": variance_share(factor, tangents),
        "share_in_tangent_space_initial": variance_share(initial, tangents),
        "share_in_tangent_space_isotropic": tangents.shape[2] / PIXELS,
        "largest_singular_value": float(values[0]),
        "smallest_singular_value": float(values[-1]),
    }


def transform_numbers(model: Model, state: Any, images: np.ndarray) -> dict[str, float]:
    """What the learned location f does: the bound on Lip(g), and by how much it stretches the model's errors.

    `error_stretch` is the mean of |f(x) - f(x')| / |x - x'| over images x and their reconstructions x', and
    `image_stretch` the same over pairs of images.
    """
    variables = {"params": state.noise_params, "spectral_stats": state.noise_state}
    bounds = jax.device_get(lipschitz_bound(model.noises.transform, variables))

    @jax.jit
    def stretches(variables, params, batch_stats, x):
        f = functools.partial(model.noises.transform.apply, variables)
        encode = _train.network(model.encoder, "encoder", params, batch_stats, train=False)
        decode = _train.network(model.generator, "generator", params, batch_stats, train=False)
        norm = lambda difference: jnp.sqrt(jnp.square(difference).sum(axis=(1, 2, 3)))
        stretch = lambda other: (norm(f(x) - f(other)) / norm(x - other)).mean()
        return stretch(decode(encode(f(x))[0])), stretch(jnp.roll(x, 1, axis=0))

    of_errors, of_images = stretches(variables, state.params, state.model_state, _train.to_unit(images))
    return {
        "lipschitz_bound": max(float(layers["g"]) for layers in bounds.values()),
        "error_stretch": float(of_errors),
        "image_stretch": float(of_images),
    }


def train_noise(config: Config, kind: str, workdir: Path, saved: dict, datasets: dict, say: Callable) -> tuple:
    """Trains or resumes or reloads one noise in its own folder: (model, final state, results, records)."""
    model = Model(config, kind)
    key = jax.random.fold_in(jax.random.key(config.seed), 0x5EED)
    latents = jax.random.normal(key, (64, config.latent_dim))
    learned = kind in LEARNED

    def evaluate(step: int, state: Any) -> tuple[dict[str, float], str]:
        numbers = model.held_out(state, datasets["validation"], key)
        metrics = {f"validation_{name}": value for name, value in numbers.items()}
        model.noises.check_state(step, state.noise_params, state.noise_state)
        samples = np.asarray(model.generate(state.ema, latents))
        save_image(image_grid(samples, columns=8, scale=2), run.save_figure_path("samples.png"))
        rise = f", last ascent +{float(state.rise):.2f}" if learned else ""
        return metrics, (
            f"{kind}, step {step}: validation ELBO {numbers['elbo_nats']:.1f} nats, "
            f"KL at most {numbers['spread_kl_bound_nats']:.1f}{rise}; {run.path}/samples.png"
        )

    with (
        RunDirectory.open(workdir / kind, {**saved, "noise": kind}, resumable_keys=set(RESUMABLE) - {"noise"}) as run,
        Checkpointer(run.checkpoints_path, keep=config.keep, best_metric="validation_elbo_nats") as saver,
    ):
        if run.finished and run.results["steps"] >= config.steps:
            say(f"{run.path} is finished ({run.results['steps']} steps).")
            state = saver.restore(jax.eval_shape(model.initial_state)).state
            return model, state, run.results, run.read_metrics()
        loader = Loader(datasets["train"], batch_size=config.batch_size, seed=config.seed)
        trained = _train.fit(
            dataclasses.replace(config, steps=model.noises.num_steps),
            run,
            saver,
            loader,
            model.initial_state,
            model.train_step,
            evaluate,
            say=say,
            check=model.noises.check,
        )
        state = trained.state
        held_out = model.held_out(state, datasets["test"], key)
        results = {
            "noise": kind,
            "steps": config.steps,
            "steps_of_both_players": model.noises.num_steps,
            "noise_scale": float(model.noises.scale(model.noises.num_steps)),
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "images_per_second": trained.images_per_second,
            "seconds": trained.seconds,
        }
        if learned:
            results["last_divergence_rise_nats"] = float(state.rise)
        if kind == "low_rank":
            results |= covariance_numbers(model, state, latents, datasets["train"].images)
        if kind == "transformed":
            results |= transform_numbers(model, state, np.asarray(datasets["test"].images[:64]))
        run.write_results(results)
        return model, state, results, run.read_metrics()


def draw_samples(trained: dict[str, tuple], latents: jax.Array, path: Path) -> None:
    """The same latents through the generator of every noise, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(trained), 3.5), layout="constrained")
    for axes, (kind, (model, state, *_)) in zip(
        figure.subplots(1, len(trained), squeeze=False)[0], trained.items(), strict=True
    ):
        images = np.asarray(model.generate(state.ema, latents))
        axes.imshow(image_grid(images, columns=8, padding=1))
        axes.set_title(TITLES[kind], fontsize=10)
        axes.axis("off")
    _launch.save_figure(figure, path)


def draw_covariance(model: Model, state: Any, latents: jax.Array, path: Path) -> None:
    """The leading eigenvectors of L L^T, and where they and the samples vary.

    An eigenvector has no sign; each is drawn with its entry of largest size positive, before the mean too. The
    root mean square over the eigenvectors needs no such choice.
    """
    from matplotlib.figure import Figure

    vectors = np.linalg.svd(flat_factor(model, state), full_matrices=False)[0][:, :20]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    vectors = (vectors * np.sign(peaks)).T.reshape(-1, 28, 28)
    images = np.asarray(model.generate(state.ema, latents))[..., 0]
    panels = {
        "|mean| of eigenvectors": np.abs(vectors.mean(axis=0)),
        "root mean square": np.sqrt(np.square(vectors).mean(axis=0)),
        "standard deviation of samples": images.std(axis=0),
    }
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.4])
    left.suptitle("leading eigenvectors of the learned covariance", fontsize=10)
    limit = np.abs(vectors).max()
    for axes in (grid := left.subplots(4, 5).ravel()):
        axes.axis("off")
    for axes, vector in zip(grid, vectors, strict=False):  # a rank below 20 leaves some empty
        axes.imshow(vector, cmap="RdBu", vmin=-limit, vmax=limit)
    for axes, (title, panel) in zip(right.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel, cmap="gray", vmin=0)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    _launch.save_figure(figure, path)


def draw_curves(trained: dict[str, tuple], path: Path, title: str) -> None:
    """Held-out bounds of every noise, and the rise of the divergence in each ascent, against the step."""
    wanted = {
        "bound on the spread KL, nats": "validation_spread_kl_bound_nats",
        "squared error per pixel": "validation_reconstruction_mse",
        "rise of the divergence in an ascent, nats": "divergence_rise",
    }
    records, panels = [], {}
    for label, name in wanted.items():
        panels[label] = {f"{kind} {name}": TITLES[kind] for kind in trained}
        for kind in trained:
            if name == "divergence_rise" and kind not in LEARNED:
                continue
            records += [{"step": r["step"], f"{kind} {name}": r[name]} for r in trained[kind][3] if name in r]
    save_curves(records, panels, path, title=title)


def main(argv: list[str] | None = None) -> int:
    """Trains each noise, or resumes, or says that it is finished; then compares them."""
    config = _launch.parse(Config, PRESETS, "demo", argv)
    check_config(config)
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)

    # Data first: what is wrong with it is said before anything is written.
    open_split = functools.partial(
        open_dataset,
        config.data,
        image_size=IMAGE[0],
        channels=IMAGE[2],
        max_examples=config.max_examples,
        cache_dir=config.cache_dir,
        **({"progress": _launch.silent} if config.quiet else {}),
    )
    datasets = {split: open_split(split) for split in ("train", "validation", "test")}
    Loader(datasets["train"], batch_size=config.batch_size, seed=config.seed)  # refuses a batch that does not fit
    say(f"data: {datasets['train'].source}: " + ", ".join(f"{len(d):,} {s}" for s, d in datasets.items()))

    kinds = NOISES if config.noise == "all" else (config.noise,)
    workdir = Path(config.workdir or f"runs/mnist/{config.preset}-{config.seed}")
    saved = {**_launch.as_dict(config), "data_fingerprint": datasets["train"].fingerprint}
    with RunDirectory.open(workdir, saved, resumable_keys=RESUMABLE, tensorboard=False) as run:
        done = run.results["noises"] if run.finished else {}
        if all(kind in done and done[kind]["steps"] >= config.steps for kind in kinds):
            say(f"{workdir} is finished ({', '.join(kinds)}); raise --steps to go on.")
            _launch.print_result(run.results)
            return 0
        trained = {kind: train_noise(config, kind, run.path, saved, datasets, say) for kind in kinds}
        key = jax.random.fold_in(jax.random.key(config.seed), 0x5EED)
        latents = jax.random.normal(key, (64, config.latent_dim))
        draw_samples(trained, latents, run.save_figure_path("samples.png"))
        if "low_rank" in trained:
            draw_covariance(*trained["low_rank"][:2], latents, run.save_figure_path("covariance.png"))
        draw_curves(trained, run.save_figure_path("curves.png"), f"{config.preset}, seed {config.seed}")
        results = {
            "experiment": "mnist",
            "preset": config.preset,
            "seed": config.seed,
            "data": datasets["train"].source,
            "train_images": len(datasets["train"]),
            "held_out_images": min(len(datasets["test"]), config.held_out_examples),
            "batch_size": config.batch_size,
            "noises": {**done, **{kind: of_kind[2] for kind, of_kind in trained.items()}},
            "device": jax.devices()[0].device_kind,
            "versions": _launch.versions(),
        }
        run.write_results(results)
        write_report(run.path)
        say(f"figures and report: {run.path}/samples.png, covariance.png, curves.png, report.html")
        _launch.print_result(results)
    return 0


if __name__ == "__main__":
    _launch.run(main)
