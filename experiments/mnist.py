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

from experiments import _generator, _launch, _train
from experiments._noise import LEARNED
from spread_jax.evaluation import image_grid, save_curves, write_report
from spread_jax.nn import lipschitz_bound
from spread_jax.training import RunDirectory

TITLES = {
    "laplace": "Laplace",
    "gaussian": "Gaussian",
    "low_rank": "Gaussian, learned covariance",
    "transformed": "Gaussian, learned location",
}


@dataclasses.dataclass(frozen=True)
class Config(_generator.GeneratorConfig):
    """Settings of a run. Images have values in [0, 1]; noise scales are in those units."""

    preset: Literal["demo", "small", "published"] = "demo"
    noise: Literal["all", "laplace", "gaussian", "low_rank", "transformed"] = "all"
    """The spread noise; `all` trains those that the objective admits one after another, each on the same batches and
    latents."""
    data: str = "digits"
    """`digits` (scikit-learn's), `mnist`, `faces`, or the path of idx files, of a folder or zip of images."""
    workdir: str | None = None
    """The run's folder, with one for each noise inside; runs/mnist/<preset>-<seed> if not given, and the objective if
    it is not the usual."""
    steps: int = 300
    batch_size: int = 64
    latent_dim: int = 10
    width: int = 8
    """Channels of the encoder's first convolution (published: 64)."""
    final_noise_scale: float = 0.3
    noise_decay_every: int = 25
    mmd_weight: float = 10.0
    """Weight of the Wasserstein autoencoder's penalty on the latents (published for MNIST: 10)."""
    discriminator_learning_rate: float = 2e-3
    generator_learning_rate: float = 1e-3
    learning_rate: float = 5e-3
    warmup_steps: int = 0
    ema_decay: float = 0.98
    record_every: int = 10
    sample_every: int = 140
    save_every: int = 140
    keep: int = 2
    """Checkpoints to keep of each noise, besides the best."""
    held_out_examples: int = 180


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
        discriminator_learning_rate=2e-4,  # of DCGAN, both
        generator_learning_rate=2e-4,
        final_learning_rate_fraction=1.0,
        ema_decay=0.999,
        record_every=100,
        sample_every=3000,
        save_every=3000,
        held_out_examples=10_000,
    ),
}

RESUMABLE = (*_generator.RESUMABLE, "noise")  # each noise has a folder of its own
IMAGE = (28, 28, 1)
PIXELS = math.prod(IMAGE)
PCA_IMAGES = 5000
PCA_VARIANCE = 0.9


class Model(_generator.Model):
    """`_generator.Model` with the order of random keys that the published results were drawn in, and tangents."""

    @staticmethod
    def split_key(key: jax.Array) -> jax.Array:
        """The keys of the networks, of the steps, and of the ascending player's start."""
        return jax.random.split(key, 3)[jnp.array([0, 2, 1])]

    def tangents(self, variables: Any, z: jax.Array) -> np.ndarray:
        """Orthonormal bases [n, pixels, Z] of the tangent spaces of the generator's manifold at g(z)."""
        native = self.generator.clone(native_gradients=True)  # forward mode
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

    `error_stretch` is the mean of |f(x) - f(x')| / |x - x'| over images x and their reconstructions x' (none of a
    GAN), and `image_stretch` the same over pairs of images.
    """
    variables = {"params": model.noise_params_of(state.noise_params), "spectral_stats": state.noise_state}
    bounds = jax.device_get(lipschitz_bound(model.noises.transform, variables))

    @jax.jit
    def stretches(variables, params, batch_stats, x):
        f = functools.partial(model.noises.transform.apply, variables)
        norm = lambda difference: jnp.sqrt(jnp.square(difference).sum(axis=(1, 2, 3)))
        stretch = lambda other: (norm(f(x) - f(other)) / norm(x - other)).mean()
        found = {"image_stretch": stretch(jnp.roll(x, 1, axis=0))}
        if model.adversarial:
            return found
        encode = _train.network(model.encoder, "encoder", params, batch_stats, train=False)
        decode = _train.network(model.generator, "generator", params, batch_stats, train=False)
        return {"error_stretch": stretch(decode(encode(f(x))[0])), **found}

    found = stretches(variables, state.params, state.model_state, _train.to_unit(images))
    return {
        "lipschitz_bound": max(float(layers["g"]) for layers in bounds.values()),
        **{name: float(value) for name, value in found.items()},
    }


def train_noise(
    config: Config, workdir: Path, datasets: dict, say: Callable, on_log: _launch.Hook | None = None
) -> tuple:
    """Trains or resumes or reloads one noise in its own folder: (model, final state, results, records)."""
    saved = _generator.saved_config(config, datasets["train"])
    with RunDirectory.open(
        workdir / config.noise,
        saved,
        resumable_keys=set(RESUMABLE) - {"noise"},
        on_log=_launch.prefixed(on_log, config.noise),
    ) as run:
        model, trained = _generator.train_run(config, run, datasets, say=say, model_type=Model)
        state = trained.state
        if _launch.finished_steps(run) >= config.steps:
            say(f"{run.path} is finished ({run.results['steps']} steps).")
            return model, state, run.results, run.read_metrics()
        held_out = model.held_out(state, datasets["test"], _generator.evaluation_key(config))
        results = {
            "noise": config.noise,
            "steps": config.steps,
            "steps_of_both_players": model.num_steps,
            "noise_scale": model.noise_scale(state),
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "images_per_second": trained.images_per_second,
            "seconds": trained.seconds,
        }
        if model.learned_noise:
            results["last_divergence_rise_nats"] = float(state.rise)
        if config.noise == "low_rank":
            results |= covariance_numbers(model, state, _generator.latents(config), datasets["train"].images)
        if config.noise == "transformed":
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
    """Held-out numbers of every noise, and the rise of the divergence in each ascent, against the step."""
    wanted = {
        "bound on the spread KL, nats": "validation_spread_kl_bound_nats",
        "ELBO, nats": "validation_elbo_nats",
        "lower bound on the spread divergence, nats": "validation_divergence_bound_nats",
        "MMD of latents, squared": "validation_mmd",
        "squared error per pixel": "validation_reconstruction_mse",
        "rise of the divergence in an ascent, nats": "divergence_rise",
    }
    records, panels = [], {}
    recorded = {name for of_kind in trained.values() for record in of_kind[3] for name in record}
    if "validation_spread_kl_bound_nats" in recorded:  # the same up to a constant
        recorded.discard("validation_elbo_nats")
    for label, name in wanted.items():
        if name not in recorded:
            continue
        panels[label] = {f"{kind} {name}": TITLES[kind] for kind in trained}
        for kind in trained:
            if name == "divergence_rise" and kind not in LEARNED:
                continue
            records += [{"step": r["step"], f"{kind} {name}": r[name]} for r in trained[kind][3] if name in r]
    save_curves(records, panels, path, title=title)


def main(argv: list[str] | None = None) -> int:
    """Trains each noise, or resumes, or says that it is finished; then compares them."""
    config = _launch.parse(Config, PRESETS, "demo", argv)
    _generator.check_config(config, IMAGE)
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)
    on_log = _launch.load_hook(config.on_log)

    # Data first: what is wrong with it is said before anything is written.
    datasets = _generator.open_splits(config, IMAGE[0], IMAGE[2])
    config = _generator.with_scale_from_data(config, datasets["train"])
    say(f"data: {datasets['train'].source}: " + ", ".join(f"{len(d):,} {s}" for s, d in datasets.items()))

    kinds = _generator.admitted_noises(config.objective) if config.noise == "all" else (config.noise,)
    usual = dataclasses.replace(config, noise="all")  # whose folders are inside
    workdir = Path(config.workdir or _generator.default_workdir(usual, "mnist"))
    saved = _generator.saved_config(config, datasets["train"])
    with RunDirectory.open(workdir, saved, resumable_keys=RESUMABLE, tensorboard=False) as run:
        done = (run.results or {}).get("noises", {})
        done = done if isinstance(done, dict) else {}  # damaged, or none of this library's
        steps_of = lambda kind: done[kind].get("steps", 0) if isinstance(done.get(kind), dict) else 0
        if all(steps_of(kind) >= config.steps for kind in kinds):
            say(f"{workdir} is finished ({', '.join(kinds)}); raise --steps to go on.")
            _launch.print_result(run.results)
            return 0
        trained = {
            kind: train_noise(dataclasses.replace(config, noise=kind), workdir, datasets, say, on_log) for kind in kinds
        }
        latents = _generator.latents(config)
        draw_samples(trained, latents, run.save_figure_path("samples.png"))
        if "low_rank" in trained:
            draw_covariance(*trained["low_rank"][:2], latents, run.save_figure_path("covariance.png"))
        draw_curves(trained, run.save_figure_path("curves.png"), f"{config.preset}, seed {config.seed}")
        results = {
            "experiment": "mnist",
            "preset": config.preset,
            "seed": config.seed,
            "objective": config.objective,
            "data": datasets["train"].source,
            "train_images": len(datasets["train"]),
            "held_out_images": min(len(datasets["test"]), config.held_out_examples),
            "batch_size": config.batch_size,
            "noises": {**done, **{kind: of_kind[2] for kind, of_kind in trained.items()}},
            "device": jax.devices()[0].device_kind,
            "devices": config.devices or jax.device_count(),
            "processes": jax.process_count(),
            "versions": _launch.versions(),
        }
        run.write_results(results)
        write_report(run.path)
        figures = sorted(path.name for path in run.path.glob("*.png"))
        say(f"figures and report: {run.path}/{', '.join(figures)}, report.html")
        _launch.print_result(results)
    return 0


if __name__ == "__main__":
    _launch.run(main, in_all_processes=True)
