"""A deterministic generator of two latents recovers a surface in space, by minimising the spread KL.

The data lie exactly on an S-shaped sheet, so the model x = g(z), z in R^2, has no likelihood: its samples lie on a
sheet of their own. Both are spread with Gaussian noise, whose scale is annealed, and the evidence lower bound on the
spread likelihood is maximised (`spread_elbo`, then `spread_importance_bound`). Distances go both ways: from samples
to the true sheet (is what is made right?) and from the sheet to the samples (is anything missing?); the second has a
floor, what as many true samples would have.

  python -m experiments.manifold                  about 25 s on 2 cores
  python -m experiments.manifold --preset paper   wider networks, more steps

Writes manifold.png, curves.png, metrics.jsonl and results.json. Expect samples within 0.006 of the true sheet on
average, 0.54 before training (seed 0). A sheet whose ends curl back towards its middle is harder: under large noise
the openings are filled, and annealing from there keeps a wall in them (mean distance 0.068 for an S of two
three-quarter circles in place of arcs of 216 degrees).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _launch
from spread_jax import GaussianNoise, spread_elbo, spread_importance_bound
from spread_jax.cli import launch
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_curves, save_figure
from spread_jax.training import (
    LossOutput,
    Player,
    StepRecord,
    create_train_state,
    learning_rate_schedule,
    make_train_step,
    noise_scale_schedule,
    train,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. The sheet is 2 wide and deep and 4 high; noise scales and distances are in those units."""

    preset: Literal["small", "paper"] = "small"
    """The settings that the other flags start from."""
    workdir: str | None = None
    """The run's folder; runs/manifold/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data, the initial parameters and the noise."""
    num_examples: int = 5000
    """Data points on the sheet."""
    steps: int = 4000
    """Adam steps in all."""
    bound_steps: int = 1500
    """Of these, the last so many on the importance bound instead of the ELBO."""
    num_importance_samples: int = 8
    """K, latent draws of the importance bound."""
    batch_size: int = 256
    """Data points in a batch."""
    width: int = 64
    """Units in each of the two hidden layers of either network."""
    learning_rate: float = 3e-3
    """Adam's learning rate at the start; a cosine takes it to a hundredth."""
    noise_scale: float = 0.5
    """Sigma of the Gaussian spread noise at the start."""
    final_noise_scale: float = 0.08
    """Sigma is annealed down to this, in steps of a tenth, over the first half."""
    num_samples: int = 10_000
    """Model samples that the distances are measured with."""
    record_every: int = 100
    """Steps between lines of metrics.jsonl."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {
    "small": Config(),
    "paper": Config(preset="paper", num_examples=20_000, steps=20_000, bound_steps=8000, width=128),
}

HALF_LENGTH = 1.2 * math.pi  # of the S, along its arc
CURVES = {
    "nats per example": {"bound": "bound on the spread likelihood"},
    "noise scale (units of x)": {"noise_scale": "sigma"},
}


def sheet(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Points [..., 3] of the true surface at parameters in [-1, 1]: an S along the first, straight across."""
    t = HALF_LENGTH * np.asarray(along)
    return np.stack([np.sin(t), np.asarray(across) + 0 * t, np.sign(t) * (np.cos(t) - 1)], axis=-1)


def draw_data(num: int, seed: int) -> np.ndarray:
    """[num, 3], uniform on the sheet: its parametrisation keeps areas."""
    parameters = np.random.default_rng(seed).uniform(-1, 1, (2, num))
    return sheet(*parameters).astype(np.float32)


def distance_to_sheet(points: np.ndarray) -> np.ndarray:
    """[n], the distance of each point to the nearest of the sheet; exact but for 4,001 steps along the arc."""
    curve = sheet(np.linspace(-1, 1, 4001), np.zeros(4001))[:, [0, 2]]
    in_plane = nearest(points[:, [0, 2]], curve)
    beyond = np.maximum(np.abs(points[:, 1]) - 1, 0)
    return np.hypot(in_plane, beyond)


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n], the distance of each point to the nearest of the others."""
    squares = []
    for block in np.array_split(np.asarray(points, np.float64), max(1, len(points) // 250)):
        difference = block[:, None] - np.asarray(others, np.float64)
        squares.append(np.square(difference).sum(axis=-1).min(axis=1))
    return np.sqrt(np.concatenate(squares))


class Perceptron(nn.Module):
    """Two hidden layers with tanh, between which all is smooth: a surface without kinks."""

    features: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(self.width)(x))
        x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(self.features)(x)


class Model:
    """The networks of a config and their compiled functions; holds no state."""

    def __init__(self, config: Config):
        self.config = config
        self.encoder, self.generator = Perceptron(4, config.width), Perceptron(3, config.width)
        reductions = math.log(config.final_noise_scale / config.noise_scale) / math.log(0.9)
        self.noise_scale = noise_scale_schedule(
            config.noise_scale,
            config.final_noise_scale,
            decay=0.9,
            every=max(1, math.floor(config.steps / 2 / max(reductions, 1))),
        )
        self.optimizer = optax.adam(
            learning_rate_schedule(config.learning_rate, num_steps=config.steps, final_fraction=0.01)
        )
        averaged = lambda params, _: params["generator"]
        by_elbo, by_bound = (
            Player("model", ("encoder", "generator"), functools.partial(self.loss, importance), self.optimizer)
            for importance in (False, True)
        )
        self.elbo_step, self.bound_step = (
            make_train_step([player], ema_decay=0.99, averaged=averaged) for player in (by_elbo, by_bound)
        )
        encoder_key, generator_key, run_key = jax.random.split(jax.random.key(config.seed), 3)
        params = {
            "encoder": self.encoder.init(encoder_key, jnp.zeros((1, 3))),
            "generator": self.generator.init(generator_key, jnp.zeros((1, 2))),
        }
        self.initial_state = create_train_state(params, {}, [by_elbo], key=run_key, averaged=averaged)
        self.generate = jax.jit(self.generator.apply)

    def loss(self, importance: bool, params: Any, variables: Any, batch: jax.Array, *, key: jax.Array, step: int):
        """Minus the bound, at the step's noise scale."""
        scale = self.noise_scale(step)

        def encode(y):
            mean, log_std = jnp.split(self.encoder.apply(params["encoder"], y), 2, axis=1)
            return mean, log_std

        decode = functools.partial(self.generator.apply, params["generator"])
        if importance:
            terms = spread_importance_bound(
                batch, encode, decode, GaussianNoise(scale), key=key, num_samples=self.config.num_importance_samples
            )
            bound = terms.bound.mean()
        else:
            bound = spread_elbo(batch, encode, decode, GaussianNoise(scale), key=key).elbo.mean()
        return -bound, LossOutput({}, {"bound": bound, "noise_scale": scale})


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 0, "seed", "bound_steps")
    _launch.require_at_least(
        config, 1, "num_examples", "steps", "num_importance_samples", "batch_size", "width", "record_every"
    )
    _launch.require_at_least(config, 2, "num_samples")
    _launch.require_positive(config, "learning_rate", "noise_scale", "final_noise_scale")
    if config.final_noise_scale > config.noise_scale:
        raise UsageError(
            f"--final-noise-scale must be at most --noise-scale, "
            f"got {config.final_noise_scale} and {config.noise_scale}."
        )
    if config.bound_steps > config.steps:
        raise UsageError(f"--bound-steps must be at most --steps, got {config.bound_steps} and {config.steps}.")
    if config.batch_size > config.num_examples:
        raise UsageError(
            f"--batch-size must be at most --num-examples, got {config.batch_size} and {config.num_examples}."
        )


def batches(config: Config, data: np.ndarray) -> Iterator[np.ndarray]:
    """Random batches, a function of the seed."""
    chance = np.random.default_rng((config.seed, 1))
    while True:
        yield data[chance.integers(0, len(data), config.batch_size)]


def measure(config: Config, samples: np.ndarray) -> dict[str, float]:
    """Distances of samples to the sheet and of the sheet to samples: mean, and what 95 % stay below."""
    to_sheet = distance_to_sheet(samples)
    from_sheet = nearest(draw_data(2000, config.seed + 2), samples)
    return {
        "samples_to_surface": to_sheet.mean(),
        "samples_to_surface_95": np.quantile(to_sheet, 0.95),
        "surface_to_samples": from_sheet.mean(),
        "surface_to_samples_95": np.quantile(from_sheet, 0.95),
    }


def draw(config: Config, model: Model, start: Any, end: Any, measured: tuple[dict, dict], path) -> None:
    """Draws the figure: data on the true sheet; the learned sheet before and after; samples by distance."""
    from matplotlib.figure import Figure

    ticks = np.linspace(-1.9, 1.9, 39)
    lattice = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1)
    learned = lambda variables: np.asarray(model.generate(variables, lattice.reshape(-1, 2))).reshape(39, 39, 3)
    true = sheet(*np.meshgrid(np.linspace(-1, 1, 61), np.linspace(-1, 1, 15), indexing="ij"))
    z = np.random.default_rng((config.seed, 4)).standard_normal((1500, 2)).astype(np.float32)
    samples = np.asarray(model.generate(end, z))

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = [figure.add_subplot(1, 4, i + 1, projection="3d") for i in range(4)]
    titles = [
        "true surface and data",
        f"learned surface, before\nmean distance to the true one {measured[0]['samples_to_surface']:.2f}",
        f"learned surface, after\nmean distance to the true one {measured[1]['samples_to_surface']:.3f}",
        "samples on the true surface",
    ]
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_title(title, fontsize=10)
        if index in (0, 3):
            axes.plot_surface(*np.moveaxis(true, -1, 0), color="C0", alpha=0.25, linewidth=0, rstride=1, cstride=1)
            points = draw_data(1500, config.seed) if index == 0 else samples
            axes.scatter(*points.T, s=3, color="black" if index == 0 else "C3", linewidths=0, depthshade=False)
        else:
            surface = learned(start if index == 1 else end)
            axes.plot_surface(*np.moveaxis(surface, -1, 0), color="C1", alpha=0.7, rstride=1, cstride=1,
                              edgecolor="0.25", linewidth=0.2)  # fmt: skip
            outline = np.concatenate([true[:, 0], true[::-1, -1], true[:1, 0]])
            axes.plot(*outline.T, color="C0", linewidth=1.5, label="edge of the true surface")
            axes.legend(frameon=False, loc="upper left", fontsize=8)
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), zlim=(-2.2, 2.2), xlabel="x₁", ylabel="x₂", zlabel="x₃")
        axes.set_box_aspect((1, 1, 1.7))
        axes.view_init(elev=14, azim=-68)
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
        axes.set_zticks([-2, 0, 2])
        axes.tick_params(labelsize=8, pad=0)
    save_figure(figure, path)


def compute(config: Config, run, say) -> dict:
    """Trains, measures before and after, draws."""
    data = draw_data(config.num_examples, config.seed)
    model = Model(config)
    state = model.initial_state
    z = np.random.default_rng((config.seed, 3)).standard_normal((config.num_samples, 2)).astype(np.float32)
    start = jax.tree.map(np.asarray, state.ema)
    before = measure(config, np.asarray(model.generate(start, z)))

    def on_record(record: StepRecord) -> None:
        run.log_metrics(record.step, record.metrics)
        if record.step % (10 * config.record_every) == 0:
            bound, scale = record.metrics["bound"], record.metrics["noise_scale"]
            say(f"step {record.step}/{config.steps}: bound {bound:.3f} nats, sigma {scale:.3f}")

    stream, turn = batches(config, data), config.steps - config.bound_steps
    for step_function, first, last in ((model.elbo_step, 0, turn), (model.bound_step, turn, config.steps)):
        if first < last:
            state = train(
                state,
                step_function,
                stream,
                start_step=first,
                num_steps=last,
                on_record=on_record,
                record_every=config.record_every,
            )
    end = jax.tree.map(np.asarray, state.ema)
    samples = np.asarray(model.generate(end, z))
    after = measure(config, samples)
    floor = nearest(draw_data(2000, config.seed + 2), draw_data(config.num_samples, config.seed + 3))
    draw(config, model, start, end, (before, after), run.save_figure_path("manifold.png"))
    save_curves(run.read_metrics(), CURVES, run.save_figure_path("curves.png"))
    say(
        f"samples to surface {before['samples_to_surface']:.3f} before, {after['samples_to_surface']:.4f} after; "
        f"surface to samples {before['surface_to_samples']:.3f} before, {after['surface_to_samples']:.4f} after, "
        f"{floor.mean():.4f} for true samples"
    )
    return {
        "steps": config.steps,
        "final_noise_scale": float(model.noise_scale(config.steps)),
        "before": {name: float(value) for name, value in before.items()},
        "after": {name: float(value) for name, value in after.items()},
        "surface_to_true_samples": float(floor.mean()),
        "bound_nats": run.read_metrics()[-1]["bound"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)),
        "device": jax.devices()[0].device_kind,
    }


def main(argv: list[str] | None = None) -> int:
    """Trains, or says that the run is finished."""
    config = _launch.parse(Config, PRESETS, "small", argv)
    check_config(config)
    return _launch.run_once(config, functools.partial(compute, config))


if __name__ == "__main__":
    launch.run_program(main)
