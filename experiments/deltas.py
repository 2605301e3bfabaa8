"""Two point masses, spread: every divergence exactly and as estimated, where KL without noise is infinite.

p is all at 0 and q all at d, so without noise they never share a point: KL, reverse KL and chi-squared are
infinite, Jensen-Shannon, Hellinger and total variation stuck at their maximum whatever d is. With the same noise
on both all six are finite and grow with d. The figure holds the exact values (closed forms; quadrature for
Jensen-Shannon), the Monte-Carlo estimates of `spread_divergence` with their error bars, and how many standard
errors lie between the two.

  python -m experiments.deltas                  about 15 s on 2 cores
  python -m experiments.deltas --preset paper   more draws and points

Writes deltas.png, points.csv and results.json. Expect `largest_deviation`, the worst of some 300 points in standard
errors, between 2 and 4, as of that many standard normal numbers; seed 0 gives 3.40. Chi-squared under Gaussian noise
is estimated only up to d = 1.25 sigma: farther apart its integrand has too heavy a tail for a standard error.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _launch
from spread_jax import (
    GaussianNoise,
    LaplaceNoise,
    chi_squared,
    jensen_shannon,
    kl,
    reverse_kl,
    spread_chi_squared_deltas,
    spread_divergence,
    spread_hellinger_deltas,
    spread_kl_deltas,
    spread_total_variation_deltas,
    squared_hellinger,
    total_variation,
)
from spread_jax.cli import launch
from spread_jax.evaluation import save_csv, save_figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Distances and noise scales are in the units of x."""

    preset: Literal["small", "paper"] = "small"
    """The settings that the other flags start from."""
    workdir: str | None = None
    """The run's folder; runs/deltas/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the noise draws."""
    num_samples: int = 1000
    """Draws of y from each side for one estimate."""
    points: int = 13
    """Distances, and noise scales, at which to estimate."""
    distance: float = 1.0
    """Distance d of the point masses while the noise scale varies."""
    scale: float = 1.0
    """Noise scale (sigma or b) while the distance varies."""
    max_distance: float = 4.0
    """Largest distance, in noise scales."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {"small": Config(), "paper": Config(preset="paper", num_samples=20_000, points=21)}

NOISES = {"Gaussian": GaussianNoise, "Laplace": LaplaceNoise}
SYMBOLS = {"Gaussian": "σ", "Laplace": "b"}
DIVERGENCES = {
    "KL": kl,
    "reverse KL": reverse_kl,
    "chi-squared": chi_squared,
    "Jensen-Shannon": jensen_shannon,
    "squared Hellinger": squared_hellinger,
    "total variation": total_variation,
}
# Distance in noise scales. The integrand of chi-squared is log-normal under Gaussian noise: farther apart a few
# huge values decide, and neither the mean of some thousand draws nor their standard error can be relied on.
CHI_SQUARED_LIMIT = 1.25


CLOSED_FORMS = {
    "KL": spread_kl_deltas,
    "reverse KL": lambda p, q, noise: spread_kl_deltas(q, p, noise),
    "chi-squared": spread_chi_squared_deltas,
    "squared Hellinger": spread_hellinger_deltas,
    "total variation": spread_total_variation_deltas,
}


@functools.partial(jax.jit, static_argnames="noise_name")
def exact(noise_name: str, distances: jax.Array, scales: jax.Array) -> dict[str, jax.Array]:
    """Divergences of point masses at 0 and `distances` [n]: closed forms, or quadrature where there is none."""

    def one(distance, scale):
        zero, shifted = jnp.zeros((1, 1)), jnp.full((1, 1), distance)
        return {name: function(zero, shifted, NOISES[noise_name](scale))[0] for name, function in CLOSED_FORMS.items()}

    integrals = quadrature(noise_name, distances, scales)
    return {**integrals, **jax.vmap(one)(distances, scales)}


@functools.partial(jax.jit, static_argnames="noise_name")
def quadrature(noise_name: str, distances: jax.Array, scales: jax.Array) -> dict[str, jax.Array]:
    """All of them by the trapezoid rule, out to 30 noise scales on either side."""

    def one(distance, scale):
        noise = NOISES[noise_name](scale)
        # Laplace densities have a kink at either mass, total variation has one between them: ends of intervals.
        ends = jnp.stack([-30 * scale, 0 * distance, distance / 2, distance, distance + 30 * scale])
        y = jnp.linspace(ends[:-1], ends[1:], 6001)  # [points, intervals]
        flat = y.reshape(-1, 1)
        log_p, log_q = (noise.log_prob(flat, jnp.full_like(flat, x)).reshape(y.shape) for x in (0.0, distance))
        mixture = 0.5 * (jnp.exp(log_p) + jnp.exp(log_q))
        integrate = lambda values: (jnp.trapezoid(values, axis=0) * (ends[1:] - ends[:-1]) / 6000).sum()
        return {name: integrate(mixture * f.from_mixture(log_p - log_q)) for name, f in DIVERGENCES.items()}

    return jax.lax.map(lambda point: one(*point), (distances, scales))


@functools.partial(jax.jit, static_argnames=("noise_name", "num_samples"))
def estimate(distances, scales, keys, *, noise_name: str, num_samples: int):
    """Estimates at paired distances and scales [n]: name -> Estimate of arrays [n], draws independent for each."""

    def one(distance, scale, key):
        zero, shifted = jnp.zeros((1, 1)), jnp.full((1, 1), distance)
        return {
            name: spread_divergence(
                zero,
                shifted,
                NOISES[noise_name](scale),
                divergence=divergence,
                num_samples=num_samples,
                key=jax.random.fold_in(key, index),
            )
            for index, (name, divergence) in enumerate(DIVERGENCES.items())
        }

    return jax.vmap(one)(distances, scales, keys)


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 100, "num_samples")
    _launch.require_at_least(config, 2, "points")
    _launch.require_at_least(config, 0, "seed")
    _launch.require_positive(config, "distance", "scale", "max_distance")


def sweep(config: Config) -> list[dict]:
    """One record for each noise, swept quantity, divergence and point."""
    distances = config.scale * config.max_distance * np.arange(1, config.points + 1) / config.points
    scales = config.distance * np.geomspace(0.25, 8.0, config.points)
    records = []
    key = jax.random.key(config.seed)
    for noise_index, noise_name in enumerate(NOISES):
        for sweep_index, swept in enumerate(("distance", "scale")):
            d = distances if swept == "distance" else np.full(config.points, config.distance)
            s = np.full(config.points, config.scale) if swept == "distance" else scales
            keys = jax.random.split(jax.random.fold_in(key, 2 * noise_index + sweep_index), config.points)
            d, s = jnp.asarray(d, jnp.float32), jnp.asarray(s, jnp.float32)
            estimates = estimate(d, s, keys, noise_name=noise_name, num_samples=config.num_samples)
            exacts, integrals = jax.device_get((exact(noise_name, d, s), quadrature(noise_name, d, s)))
            for name, (values, errors) in jax.device_get(estimates).items():
                truth, check = exacts[name].astype(float), integrals[name].astype(float)
                for i in range(config.points):
                    if (name, noise_name) == ("chi-squared", "Gaussian") and d[i] > CHI_SQUARED_LIMIT * s[i]:
                        continue
                    if errors[i] == 0:  # Laplace noise, and no draw between the masses: all terms alike
                        continue
                    records.append({
                        "noise": noise_name,
                        "swept": swept,
                        "divergence": name,
                        "distance": float(d[i]),
                        "scale": float(s[i]),
                        "exact": truth[i],
                        "quadrature": check[i],
                        "estimate": float(values[i]),
                        "standard_error": float(errors[i]),
                        "deviation": float((values[i] - truth[i]) / errors[i]),
                    })  # fmt: skip
    return records


def draw(config: Config, records: list[dict], path) -> None:
    """Draws the figure: a row for each noise; against distance, against scale, deviations in standard errors."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(len(NOISES), 3, width_ratios=(1, 1, 0.72))
    colours = dict(zip(DIVERGENCES, ("C0", "black", "C3", "C2", "C4", "C1"), strict=True))
    fine = 60
    for row, noise_name in zip(panels, NOISES, strict=True):
        symbol = SYMBOLS[noise_name]
        top = config.scale * config.max_distance
        lines = {
            "distance": (np.linspace(0.01 * top, top, fine, dtype=np.float32), np.full(fine, config.scale, np.float32)),
            "scale": (
                np.full(fine, config.distance, np.float32),
                config.distance * np.geomspace(0.25, 8, fine, dtype=np.float32),
            ),
        }
        for axes, swept in zip(row[:2], ("distance", "scale"), strict=True):
            d, s = lines[swept]
            exacts = exact(noise_name, d, s)
            for name in DIVERGENCES:
                dashes = (0, (3, 4)) if name == "reverse KL" else "-"
                width = 2 if name == "reverse KL" else 1.4
                x = d if swept == "distance" else s
                axes.plot(x, exacts[name], color=colours[name], linestyle=dashes, linewidth=width)
                mine = [r for r in records if (r["noise"], r["swept"], r["divergence"]) == (noise_name, swept, name)]
                if mine and name != "reverse KL":  # equal to KL here; its points would hide those of KL
                    axes.errorbar(
                        [r[swept] for r in mine],
                        [r["estimate"] for r in mine],
                        [2 * r["standard_error"] for r in mine],
                        fmt="o", color=colours[name], markersize=3.2, linewidth=1, capsize=2,
                    )  # fmt: skip
            axes.grid(alpha=0.25)
            axes.set_ylabel("spread divergence (KL and JS in nats)")
        row[0].set_ylim(0, 2.5)
        row[0].set_xlim(0, 1.02 * top)
        row[0].set_title(f"{noise_name} noise, {symbol} = {config.scale:g}", fontsize=11)
        row[0].set_xlabel("distance d of the point masses (units of x)")
        row[1].set_xscale("log")
        row[1].set_yscale("log")
        row[1].set_ylim(8e-4, 60)
        ticks = [config.distance * t for t in (0.25, 0.5, 1, 2, 4, 8)]
        row[1].set_xticks(ticks, [f"{t:g}" for t in ticks])
        row[1].minorticks_off()
        row[1].set_title(f"{noise_name} noise, d = {config.distance:g}", fontsize=11)
        row[1].set_xlabel(f"noise scale {symbol} (units of x)")
        row[2].axvspan(-2, 2, color="0.93")
        row[2].axvline(0, color="0.4", linewidth=1)
        for height, name in enumerate(reversed(DIVERGENCES)):
            values = [r["deviation"] for r in records if (r["noise"], r["divergence"]) == (noise_name, name)]
            offsets = height + np.linspace(-0.25, 0.25, len(values))
            row[2].plot(values, offsets, "o", color=colours[name], markersize=3)
        row[2].set_yticks(range(len(DIVERGENCES)), list(reversed(DIVERGENCES)))
        row[2].set_xlim(-4.5, 4.5)
        row[2].set_title("estimate minus exact", fontsize=11)
        row[2].set_xlabel("standard errors")
    handles = [
        Line2D([], [], color=colours[n], linestyle="--" if n == "reverse KL" else "-", label=n) for n in DIVERGENCES
    ]
    handles.append(
        Line2D([], [], color="0.3", marker="o", linestyle="", markersize=4, label="estimate ± 2 standard errors")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(
        "Two point masses at distance d: KL, reverse KL and chi-squared are infinite without noise, finite when spread"
    )
    save_figure(figure, path)


def compute(config: Config, run, say) -> dict:
    """Sweeps, draws, and compares estimates with exact values."""
    records = sweep(config)
    save_csv(records, run.path / "points.csv")
    draw(config, records, run.save_figure_path("deltas.png"))
    deviations = np.array([r["deviation"] for r in records])
    # Below 0.01 float32 leaves the quadrature too few digits.
    disagreement = max(abs(r["quadrature"] / r["exact"] - 1) for r in records if r["exact"] > 0.01)
    point = np.array([config.distance], np.float32), np.array([config.scale], np.float32)
    at_point = {
        noise: {name: float(value[0]) for name, value in exact(noise, *point).items()} for noise in NOISES
    }  # fmt: skip
    worst = records[int(np.abs(deviations).argmax())]
    say(
        f"{len(records)} estimates: largest deviation {np.abs(deviations).max():.2f} standard errors "
        f"({worst['divergence']}, {worst['noise']} noise), root mean square {np.sqrt((deviations**2).mean()):.2f}"
    )
    return {
        "estimates": len(records),
        "largest_deviation": float(np.abs(deviations).max()),
        "root_mean_square_deviation": float(np.sqrt((deviations**2).mean())),
        "mean_deviation": float(deviations.mean()),
        "largest_deviation_at": worst,
        "quadrature_against_closed_form": disagreement,
        "spread_divergences_exact": {"distance": config.distance, "scale": config.scale, **at_point},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison, or says that it is finished."""
    config = _launch.parse(Config, PRESETS, "small", argv)
    check_config(config)
    return _launch.run_once(config, functools.partial(compute, config))


if __name__ == "__main__":
    launch.run_program(main)
