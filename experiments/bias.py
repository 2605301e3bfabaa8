"""Noise on one side biases the estimate, the same noise on both sides does not.

The truth is known: data x = a z on a line through the plane, z ~ N(0, 1), |a| = 1, and the model is x = a z with a
to be estimated. Its likelihood is zero off the line, so it is trained by four bounds that put noise somewhere:

  both        `spread_elbo`: noise sigma on data and model
  model       `elbo` of the clean data: noise sigma on the model only, an ordinary VAE
  data        a denoising VAE: noise sigma on the encoder's input only, a small fixed noise s on the model
  dropped     `spread_elbo(low_variance=True)`: noise on both, less their covariance given z

The encoder is the model's exact posterior with a trained factor on its mean, which holds the optimum of all four, so
each bound has a known maximiser, with v = |a|^2:

  both v,   model max(v - sigma^2, 0),   data max(v^2 / (v + sigma^2) - s^2, 0),
  dropped max(v^2 / (v + sigma^2) - sigma^2, 0).

Each data set is scaled to variance 1 along the line, so what an estimate misses is the bound's own bias and the
Monte-Carlo error of its training, not the luck of the draw. The figure and the table hold the mean of |a|^2 over
many data sets, with standard errors, against those lines.

  python -m experiments.bias                  about 30 s on 2 cores
  python -m experiments.bias --preset paper   more data sets

Writes bias.png, table.md, estimates.csv and results.json.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _launch
from spread_jax import GaussianNoise, elbo, spread_elbo
from spread_jax.cli import launch
from spread_jax.evaluation import save_csv, save_figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Noise scales are in units of x, whose standard deviation along the line is 1."""

    preset: Literal["small", "paper"] = "small"
    """The settings that the other flags start from."""
    workdir: str | None = None
    """The run's folder; runs/bias/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data sets, the initial parameters and the noise."""
    datasets: int = 24
    """Independent data sets, each with estimates of its own."""
    num_examples: int = 250
    """Examples in a data set."""
    scales: int = 6
    """Noise scales sigma to try, evenly spaced up to the largest."""
    max_scale: float = 1.5
    """Largest sigma."""
    decoder_scale: float = 0.2
    """s, standard deviation of the denoising VAE's decoder."""
    steps: int = 800
    """Adam steps of each estimate; the second half is averaged."""
    learning_rate: float = 0.05
    """Adam's learning rate at the start; a cosine takes it to a tenth."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {"small": Config(), "paper": Config(preset="paper", datasets=200, scales=10, steps=2000)}

DIRECTION = np.array([0.6, 0.8], np.float32)  # a: of length 1
LABELS = {
    "both": "noise on both sides (spread_elbo)",
    "model": "on the model only (elbo: a VAE)",
    "data": "on the data only (a denoising VAE)",
    "dropped": "on both, covariance dropped (low_variance)",
}


def objective(method: str, params: dict, x: jax.Array, sigma: jax.Array, decoder_scale: float, key: jax.Array):
    """The bound that a method maximises, per example in nats [batch]."""
    noise, a = GaussianNoise(sigma), params["a"]
    decoder = GaussianNoise(decoder_scale) if method == "data" else noise
    precision = 1 + jnp.square(a).sum() / decoder.scale**2  # of the model's posterior of z

    def encode(y):
        mean = params["gain"] * (y @ a[:, None]) / (precision * decoder.scale**2)
        return mean, jnp.full_like(mean, -0.5 * jnp.log(precision))

    decode = lambda z: z * a
    if method == "both":
        return spread_elbo(x, encode, decode, noise, key=key).elbo
    if method == "dropped":
        return spread_elbo(x, encode, decode, noise, key=key, low_variance=True).elbo
    if method == "model":
        return elbo(x, encode, decode, noise, key=key).elbo
    y_key, key = jax.random.split(key)
    denoise = lambda x: encode(noise.sample(x, key=y_key))
    return elbo(x, denoise, decode, decoder, key=key).elbo


def expected(method: str, v: np.ndarray, sigma: np.ndarray, decoder_scale: float) -> np.ndarray:
    """|a|^2 at the maximum of the bound, for data of variance v along the line."""
    shrunk = v**2 / (v + sigma**2)
    return {
        "both": v + 0 * sigma,
        "model": np.maximum(v - sigma**2, 0),
        "data": np.maximum(shrunk - decoder_scale**2, 0),
        "dropped": np.maximum(shrunk - sigma**2, 0),
    }[method]


@functools.partial(jax.jit, static_argnames="config")
def datasets(config: Config) -> jax.Array:
    """[datasets, examples, 2], all on the line, each scaled to the true variance."""
    z = jax.random.normal(jax.random.key(config.seed), (config.datasets, config.num_examples, 1))
    return z / jnp.sqrt(jnp.square(z).mean(axis=1, keepdims=True)) * DIRECTION


@functools.partial(jax.jit, static_argnames=("method", "config"))
def estimate(method: str, config: Config, data: jax.Array, sigmas: jax.Array, key: jax.Array) -> jax.Array:
    """|a|^2 for every noise scale and data set [scales, datasets], by Adam on the bound."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.1))

    def fit(x, sigma, key):
        start_key, key = jax.random.split(key)
        params = {"a": jax.random.normal(start_key, (2,)), "gain": jnp.ones(())}

        def step(carry, t):
            params, opt_state, mean = carry
            loss = lambda p: -objective(method, p, x, sigma, config.decoder_scale, jax.random.fold_in(key, t)).mean()
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            params = optax.apply_updates(params, updates)
            count = jnp.maximum(t - config.steps // 2 + 1, 1)
            return (params, opt_state, mean + (params["a"] - mean) / count), None

        carry = (params, optimizer.init(params), jnp.zeros(2))
        (_, _, mean), _ = jax.lax.scan(step, carry, jnp.arange(config.steps))
        return jnp.square(mean).sum()

    keys = jax.random.split(key, (len(sigmas), len(data)))
    over_data = jax.vmap(fit, in_axes=(0, None, 0))
    return jax.lax.map(lambda pair: over_data(data, *pair), (sigmas, keys))


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 0, "seed")
    _launch.require_at_least(config, 1, "scales", "steps")
    _launch.require_at_least(config, 2, "datasets", "num_examples")
    _launch.require_positive(config, "max_scale", "decoder_scale", "learning_rate")


def table(rows: list[dict]) -> str:
    """The rows as Markdown: a line for each noise scale, a column for each method."""
    lines = ["| sigma | " + " | ".join(LABELS.values()) + " |", "|---|" + "---|" * len(LABELS)]
    for sigma in dict.fromkeys(row["sigma"] for row in rows):
        cells = [
            f"{row['mean']:.3f} ± {row['standard_error']:.3f} ({row['population']:.3f})"
            for row in rows
            if row["sigma"] == sigma
        ]
        lines.append(f"| {sigma:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nMean of |a|^2 ± its standard error (what the bound's maximum is); the truth is 1.\n"


def draw(config: Config, rows: list[dict], path) -> None:
    """Draws the figure: estimates of each method over their lines, and those of spreading both, enlarged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    wide, zoom = figure.subplots(1, 2, width_ratios=(1.5, 1))
    fine = np.linspace(0, 1.05 * config.max_scale, 200)
    for (method, label), colour, marker in zip(LABELS.items(), ("C0", "C3", "C1", "C4"), "osD^", strict=True):
        wide.plot(fine, expected(method, np.ones(()), fine, config.decoder_scale), color=colour, linewidth=1.3)
        mine = [row for row in rows if row["method"] == method]
        points = [row["sigma"] for row in mine], [row["mean"] for row in mine]
        bars = [2 * row["standard_error"] for row in mine]
        style = {"color": colour, "linestyle": "", "marker": marker, "markersize": 5, "capsize": 3}
        wide.errorbar(*points, bars, label=label, **style)
        if method == "both":
            zoom.errorbar(points[0], np.subtract(points[1], 1), bars, **style)
            reach = 1.6 * max(abs(row["mean"] - 1) + bar for row, bar in zip(mine, bars, strict=True))
    wide.set_title(r"$x = a z$ with $|a|^2 = 1$: what each bound estimates", fontsize=11)
    wide.set_ylabel(r"estimate of $|a|^2$ (units of x, squared)")
    wide.set_ylim(-0.05, 1.6)
    wide.legend(frameon=False, loc="upper left", title="points: estimates ± 2 standard errors; lines: theory")
    zoom.set_title("noise on both sides: bias", fontsize=11)
    zoom.set_ylabel(r"estimate minus truth")
    zoom.axhline(0, color="C0", linewidth=1.3)
    zoom.set_ylim(-reach, reach)
    for axes in (wide, zoom):
        axes.set_xlabel("noise scale σ (units of x)")
        axes.set_xlim(0, 1.05 * config.max_scale)
        axes.grid(alpha=0.25)
    save_figure(figure, path)


def compute(config: Config, run, say) -> dict:
    """Estimates by each method, and compares them with the truth and with what each bound's maximum is."""
    data = datasets(config)
    variances = np.square(np.asarray(data, np.float64)).sum(axis=2).mean(axis=1)
    sigmas = config.max_scale * np.arange(1, config.scales + 1) / config.scales
    rows, estimates = [], []
    for index, method in enumerate(LABELS):
        key = jax.random.fold_in(jax.random.key(config.seed), index + 1)
        values = np.asarray(estimate(method, config, data, jnp.asarray(sigmas, jnp.float32), key), np.float64)
        for sigma, over_data in zip(sigmas, values, strict=True):
            best = expected(method, variances, sigma, config.decoder_scale)
            error = over_data.std(ddof=1) / np.sqrt(config.datasets)
            rows.append({
                "method": method,
                "sigma": float(sigma),
                "mean": over_data.mean(),
                "standard_error": error,
                "population": float(expected(method, np.ones(()), sigma, config.decoder_scale)),
                "maximiser": best.mean(),
                "bias": over_data.mean() - 1,
            })  # fmt: skip
            estimates += [
                {"method": method, "sigma": float(sigma), "dataset": i, "estimate": value, "maximiser": maximiser}
                for i, (value, maximiser) in enumerate(zip(over_data, best, strict=True))
            ]
        say(f"{LABELS[method]}: done")
    save_csv(estimates, run.path / "estimates.csv")
    draw(config, rows, run.save_figure_path("bias.png"))
    text = table(rows)
    (run.path / "table.md").write_text(text, encoding="utf-8")
    say(f"\n{text}")
    of = lambda method: [row for row in rows if row["method"] == method]
    return {
        "truth": 1.0,
        "bias_both_in_standard_errors": max(abs(row["bias"]) / row["standard_error"] for row in of("both")),
        "bias_both": max((row["bias"] for row in of("both")), key=abs),
        "bias_model": min(row["bias"] for row in of("model")),
        "bias_data": min(row["bias"] for row in of("data")),
        "bias_dropped": min(row["bias"] for row in of("dropped")),
        "largest_gap_to_maximiser": max(abs(row["mean"] - row["maximiser"]) for row in rows),
        "table": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison, or says that it is finished."""
    config = _launch.parse(Config, PRESETS, "small", argv)
    check_config(config)
    return _launch.run_once(config, functools.partial(compute, config))


if __name__ == "__main__":
    launch.run_program(main)
