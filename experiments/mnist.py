"""Trains generators of 28x28 digits with fixed and learned spread noise, and compares what they learn.

The same networks, batches and latents under four noises: Gaussian and Laplace of one standard deviation, a
Gaussian with a learned low-rank covariance of fixed volume, and a Gaussian around a learned invertible map. The
learned ones are trained by min over the model, max over the noise, in short turns: the encoder has to follow. `small`
trains what gives the best digits in its time unless a noise is named, a delta-VAE sharpened by a critic.

  python -m experiments.mnist --preset demo                      scikit-learn's digits, needs no download
  python -m experiments.mnist --preset small --data PATH         MNIST in its idx format, the best digits
  python -m experiments.mnist --preset small --noise all ...     the four noises on it, or one by its name
  python -m experiments.mnist --preset published --data PATH     the paper's networks and settings

`demo` and `small` are sized for two CPU cores and minutes, `published` for a GPU. Expect of `small` on 17,100 images
a held-out ELBO of -226 nats with Laplace and -270 with Gaussian noise (docs/results/mnist.md). The same command again
resumes an interrupted run, or says that it is finished.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax import runtime
from spread_jax.cli import flags, launch
from spread_jax.data import Dataset
from spread_jax.evaluation import image_grid, save_curves, save_figure, write_report
from spread_jax.models import (
    NOISES,
    RESUMABLE,
    FitSettings,
    InvertibleLocation,
    Method,
    Trained,
    fit,
    open_splits,
    sample,
    shown_latents,
)
from spread_jax.nn import lipschitz_bound
from spread_jax.noise import LearnedCovariance, NoiseModel
from spread_jax.training import RunDirectory

TITLES = {
    "gaussian": "Gaussian",
    "laplace": "Laplace",
    "low_rank": "Gaussian, learned covariance",
    "transformed": "Gaussian, learned location",
}

# Settings as of `spread_jax.models.PRESETS`. Images have values in [0, 1]; noise scales are in those units.
DEMO: dict[str, Any] = {
    "data": "digits",
    "image_size": 28,
    "channels": 1,
    "steps": 300,
    "batch_size": 64,
    "latent_dim": 10,
    "width": 8,
    "final_noise_scale": 0.3,
    "noise_decay_every": 25,
    "mmd_weight": 10.0,
    "critic_learning_rate": 2e-3,
    "generator_learning_rate": 1e-3,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "ema_decay": 0.98,
    "record_every": 10,
    "sample_every": 140,
    "save_every": 140,
    "keep": 2,
    "held_out_examples": 180,
}
PRESETS = {
    "demo": DEMO,
    "small": {
        **DEMO,
        "objective": "density_ratio_vae",
        "data": "mnist",
        "steps": 900,
        "batch_size": 100,
        "width": 16,
        "noise_decay_every": 80,
        "descent_steps": 4,
        "noise_learning_rate": 1e-3,
        "learning_rate": 1e-3,
        "encoder_learning_rate": 2e-3,
        "critic_learning_rate": 4e-3,
        "generator_learning_rate": 2e-3,
        "ema_decay": 0.99,
        "record_every": 15,
        "sample_every": 270,
        "save_every": 270,
        "held_out_examples": 2000,
    },
    "published": {
        **DEMO,
        "data": "mnist",
        "steps": 54_000,  # 100 epochs of the 54,000 images left for training by a validation split of a tenth
        "batch_size": 100,
        "width": 64,
        "final_noise_scale": 0.5,
        "transform_features": 32,
        "transform_coefficient": 0.1,
        "descent_steps": 5400,  # 10 epochs
        "ascent_steps": 1000,
        "noise_learning_rate": 1e-5,
        "learning_rate": 1e-4,
        "critic_learning_rate": 2e-4,  # of DCGAN, both
        "generator_learning_rate": 2e-4,
        "final_learning_rate_fraction": 1.0,
        "ema_decay": 0.999,
        "record_every": 100,
        "sample_every": 3000,
        "save_every": 3000,
        "held_out_examples": 10_000,
    },
}

PCA_IMAGES = 5000
PCA_VARIANCE = 0.9
# Of a noise's results, what all noises share.
SHARED = (
    "experiment", "preset", "seed", "objective", "data", "train_images", "held_out_images", "batch_size", "device",
    "devices", "processes", "versions",
)  # fmt: skip


def tangents(method: Method, generator_variables: Mapping, z: jax.Array) -> np.ndarray:
    """Orthonormal bases [n, pixels, Z] of the tangent spaces of the generator's manifold at g(z)."""
    native = method.modules["generator"].clone(native_gradients=True)  # forward mode
    method = dataclasses.replace(method, networks={**method.networks, "generator": native})
    image = lambda z: method.generate(generator_variables, z[None]).reshape(-1)
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


def flat_factor(run: Trained, state: Any) -> np.ndarray:
    """L [pixels, R] as the noise uses it."""
    factor = jax.jit(lambda state: run.method.noise_of(state).factor)(state)
    return np.asarray(factor, np.float64).reshape(run.method.pixels, -1)


def covariance_numbers(run: Trained, splits: Mapping[str, Dataset], settings: FitSettings) -> dict[str, float]:
    """How orthogonal the learned covariance L L^T is to the data and to the model's manifold.

    Each is a `variance_share` of L: in the principal directions of the data that hold 90 % of its variance (from
    the first 5,000 training images), in the leading ones of them, as many as there are latents, and in the tangent
    space of the generator, averaged over latents; beside each, the same for isotropic noise, and for the L that
    learning began with.
    """
    method, latents = run.method, shown_latents(settings.seed, run.method.latent_dim)
    start = run.programs.initial_state(jax.random.key(settings.seed), settings.steps)
    factor, initial = flat_factor(run, run.state), flat_factor(run, start)
    directions = principal_directions(np.asarray(splits["train"].images[:PCA_IMAGES]), PCA_VARIANCE)
    bases = {
        "data_directions": directions,
        "leading_directions": directions[:, : method.latent_dim],
        "tangent_space": tangents(method, run.state.ema, latents),
    }
    shares = {}
    for name, basis in bases.items():
        shares[f"share_in_{name}"] = variance_share(factor, basis)
        shares[f"share_in_{name}_initial"] = variance_share(initial, basis)
        shares[f"share_in_{name}_isotropic"] = basis.shape[-1] / method.pixels
    values = np.linalg.svd(factor, compute_uv=False)
    return {
        **shares,
        "data_directions": directions.shape[1],
        "largest_singular_value": float(values[0]),
        "smallest_singular_value": float(values[-1]),
    }


def transform_numbers(run: Trained, splits: Mapping[str, Dataset], settings: FitSettings) -> dict[str, float]:
    """What the learned location f does: the bound on Lip(g), and by how much it stretches the model's errors.

    `error_stretch` is the mean of |f(x) - f(x')| / |x - x'| over images x and their reconstructions x' (none of a
    GAN), and `image_stretch` the same over pairs of images.
    """
    method, state = run.method, run.state
    variables = {"params": state.params["noise"], "spectral_stats": state.variables["noise"]}
    bounds = jax.device_get(jax.jit(lipschitz_bound, static_argnums=0)(method.noise.transform(), variables))

    @jax.jit
    def stretches(state, x):
        f = method.noise_of(state).location
        norm = lambda difference: jnp.sqrt(jnp.square(difference).sum(axis=(1, 2, 3)))
        stretch = lambda other: (norm(f(x) - f(other)) / norm(x - other)).mean()
        found = {"image_stretch": stretch(jnp.roll(x, 1, axis=0))}
        if run.has_encoder:
            encode, decode = (
                method.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
            )
            found["error_stretch"] = stretch(decode(encode(f(x))[0]))
        return found

    found = stretches(state, jnp.asarray(splits["test"].images[:64], jnp.float32) / 255.0)
    return {
        "lipschitz_bound": max(float(layers["g"]) for layers in bounds.values()),
        **{name: float(value) for name, value in found.items()},
    }


# What is told of a learned noise, by its class.
NUMBERS: dict[type[NoiseModel], Callable[[Trained, Mapping[str, Dataset], FitSettings], dict[str, float]]] = {
    LearnedCovariance: covariance_numbers,
    InvertibleLocation: transform_numbers,
}


def noise_numbers(settings: FitSettings, run: Trained, splits: Mapping[str, Dataset]) -> dict[str, float]:
    """What is told of a run's noise; {} of most."""
    noise, found = getattr(run.method, "noise", None), {}
    for kind, numbers in NUMBERS.items():
        if isinstance(noise, kind):
            found |= numbers(run, splits, settings)
    return found


def draw_samples(runs: Mapping[str, Trained], latents: np.ndarray, path: Path) -> None:
    """The same latents through the generator of every noise, side by side; of a mixture where a run has one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(runs), 3.5), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        z = run.latents.sample(len(latents), jax.random.key(0)) if run.method.mixture_latents else latents
        axes.imshow(image_grid(sample(run, len(z), latents=z), columns=8, padding=1))
        axes.set_title(textwrap.fill(TITLES.get(name, run.method.title), 40), fontsize=10)
        axes.axis("off")
    save_figure(figure, path)


def draw_covariance(run: Trained, latents: np.ndarray, path: Path) -> None:
    """The leading eigenvectors of L L^T, and where they and the samples vary.

    An eigenvector has no sign; each is drawn with its entry of largest size positive, before the mean too. The
    root mean square over the eigenvectors needs no such choice.
    """
    from matplotlib.figure import Figure

    vectors = np.linalg.svd(flat_factor(run, run.state), full_matrices=False)[0][:, :20]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    vectors = (vectors * np.sign(peaks)).T.reshape(-1, *run.method.image_shape).mean(axis=-1)
    images = sample(run, len(latents), latents=latents).mean(axis=-1)
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
    save_figure(figure, path)


def draw_curves(runs: Mapping[str, Trained], path: Path, title: str) -> None:
    """Held-out numbers of every noise, and the rise of the divergence in each turn of a learned one, by step."""
    wanted = {
        "validation_spread_kl_bound_nats": "bound on the spread KL, nats",
        "validation_elbo_nats": "ELBO, nats",
        "validation_divergence_bound_nats": "lower bound on the spread divergence, nats",
        "validation_mmd": "MMD of latents, squared",
        "validation_reconstruction_mse": "squared error per pixel",
        "noise_gain": "rise of the divergence in a turn, nats",
        "critic_gain": "rise of the divergence in a turn, nats",
    }
    if any("validation_spread_kl_bound_nats" in record for run in runs.values() for record in run.records):
        del wanted["validation_elbo_nats"]  # the same up to a constant
    records, panels = [], {}
    for metric, label in wanted.items():
        for name, run in runs.items():
            points = [{"step": r["step"], f"{name} {metric}": r[metric]} for r in run.records if metric in r]
            if points:
                records += points
                panels.setdefault(label, {})[f"{name} {metric}"] = TITLES.get(name, name)
    save_curves(records, panels, path, title=title)


def main(argv: list[str] | None = None, *, networks: Mapping[str, Any] | None = None) -> int:
    """Trains each noise, or resumes, or says that it is finished; then compares them.

    Args:
      argv: the arguments; those of the process if None.
      networks: Flax modules in place of the usual ones, by part.
    """
    typed = flags.parse_training(
        argv, prog="python -m experiments.mnist", description=__doc__, presets=PRESETS, default="demo", all_noises=True
    )
    settings, quiet = typed.fit, typed.run.quiet
    say, on_log = launch.talker(quiet=quiet), launch.load_hook(typed.run.on_log)
    runtime.configure()

    # Data and settings first: what is wrong with them is said before anything is written.
    settings.validate()
    splits = open_splits(typed.data, quiet=quiet)
    train = splits["train"]
    methods = {name: typed.build(typed.objective, name) for name in typed.noises} or {"none": typed.method}
    methods = {
        name: dataclasses.replace(method, image_shape=tuple(train.image_shape), networks=networks or {})
        for name, method in methods.items()
    }
    for method in methods.values():
        method.validate()
    say(f"data: {train.source}: " + ", ".join(f"{len(d):,} {s}" for s, d in splits.items()))

    unusual = [typed.objective] if typed.objective != "spread_elbo" else []
    workdir = Path(typed.run.workdir or Path("runs/mnist", "-".join([typed.preset, str(settings.seed), *unusual])))
    about = {"experiment": "mnist", "preset": typed.preset}
    of_noises = {field.name for noise in NOISES.values() for field in dataclasses.fields(noise)}
    config = {
        **about,
        "objective": typed.objective,
        # Each noise has a folder of its own, with its settings.
        "method": {name: value for name, value in typed.settings.items() if name not in of_noises},
        "fit": settings,
        "data": typed.data,
        "data_fingerprint": train.fingerprint,
    }
    with RunDirectory.open(workdir, config, resumable_keys=RESUMABLE, tensorboard=False) as folder:
        done = (folder.results or {}).get("noises", {})
        done = done if isinstance(done, dict) else {}  # damaged, or none of this library's
        steps_of = lambda name: done[name].get("steps", 0) if isinstance(done.get(name), dict) else 0
        if all(steps_of(name) >= settings.steps for name in methods):
            if not (folder.path / "report.html").exists():  # a crash has cost it
                write_report(folder.path, real_images=typed.run.report_real_images)
            say(f"{workdir} is finished ({', '.join(methods)}); raise --steps to continue.")
            launch.print_result(folder.results)
            return 0
        runs = {
            name: fit(
                method,
                splits,
                workdir / name,
                settings,
                data_settings=typed.data,
                about=about,
                extra_results=functools.partial(noise_numbers, settings),
                pictures=typed.run.pictures,
                real_images=typed.run.report_real_images,
                on_log=launch.prefixed(on_log, name),
                quiet=quiet,
            )
            for name, method in methods.items()
        }
        latents = shown_latents(settings.seed, typed.method.latent_dim)
        shown = "The same latents under every noise." if len(runs) > 1 else "Samples x = g(z); none is selected."
        draw_samples(runs, latents, folder.save_figure_path("samples.png", caption=shown))
        for run in runs.values():
            if isinstance(getattr(run.method, "noise", None), LearnedCovariance):
                draw_covariance(
                    run, latents, folder.save_figure_path("covariance.png", caption="What the learned covariance does.")
                )
        draw_curves(
            runs,
            folder.save_figure_path("curves.png", caption="Held-out numbers of every noise against the step."),
            f"{typed.preset}, seed {settings.seed}",
        )
        of_all = next(iter(runs.values())).results
        found = {name: {k: v for k, v in run.results.items() if k not in SHARED} for name, run in runs.items()}
        results = {**{name: of_all[name] for name in SHARED}, "noises": {**done, **found}}
        folder.write_results(results)
        write_report(folder.path, real_images=typed.run.report_real_images)
        figures = sorted(path.name for path in folder.path.glob("*.png"))
        say(f"figures and report: {folder.path}/{', '.join(figures)}, report.html")
        launch.print_result(results)
    return 0


if __name__ == "__main__":
    launch.run_program(main, in_all_processes=True)
