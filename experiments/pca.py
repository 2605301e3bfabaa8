"""Deterministic PCA: what spreading buys EM, and what noise on one side costs.

Data x = F z + gamma epsilon lie close to a subspace, z ~ N(0, I), and the noise gamma is known. Four ways to F:

  closed form   the maximum of the spread likelihood, by an eigendecomposition
  ordinary EM   the model has the noise of the data, gamma: unbiased, but it stalls as gamma -> 0
  spread EM     noise sigma is added to data and model: unbiased for any sigma, so sigma may be large
  one-sided EM  noise sigma is added to the model only: the variances it finds are too small by sigma^2

Everything is exact: EM sees second moments, to which noise adds its variance on the diagonal, and draws none. With t
the eigenvalues of the data's second moment, s the model's noise and l = t - s^2, EM's errors contract in each step by

  t_j / t_i                            out of the subspace (i in it, j not)
  1 - s^2 (l_i + l_k) / (t_i t_k)      within it

So for small s the subspace is found in a step or two; what stalls is the size and shape of F F^T within it, whose
error falls by 2 s^2 / l in a step. For large s both are slow. Between, where s^2 is about the variance l, EM takes tens
of steps. Spreading data and model lets s be chosen there without changing the optimum; it is no faster than noise of
that size on the model alone, which is biased, and no sigma suits variances that differ by orders of magnitude. (That
a closed form makes EM unnecessary is special to Gaussian latents.)

  python -m experiments.pca                  about 15 s on 2 cores
  python -m experiments.pca --preset paper   more noise scales, starts and steps

Writes pca.png, table.md, curves.csv and results.json. Expect measured contractions within 1e-3 of theory, ordinary EM's
steps to grow as 1 / gamma^2, and spread EM's not to grow.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _launch
from spread_jax.cli import launch
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_csv, save_figure
from spread_jax.linear import pca


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Scales are in units of x; variances along the subspace go from 1 to --smallest-variance."""

    preset: Literal["small", "paper"] = "small"
    """The settings that the other flags start from."""
    workdir: str | None = None
    """The run's folder; runs/pca/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data and of EM's starts."""
    num_examples: int = 5000
    """Examples in the data set."""
    dimensions: int = 20
    """Dimensions of x."""
    components: int = 3
    """Dimensions of z."""
    smallest_variance: float = 0.4
    """Variance along the last axis of the subspace; that along the first is 1."""
    min_scale: float = 0.01
    """Smallest gamma, and smallest sigma of the contractions."""
    max_scale: float = 3.0
    """Largest sigma of the contractions."""
    scales: int = 8
    """Noise scales between smallest and largest, evenly spaced in the logarithm."""
    spread_scale: float = 0.5
    """sigma of spread and one-sided EM in the comparison over gamma; also the largest gamma."""
    tolerance: float = 0.01
    """Relative error of F F^T at which EM's steps are counted."""
    starts: int = 5
    """Random starts of EM."""
    max_steps: int = 200_000
    """EM steps at most."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {
    "small": Config(),
    "paper": Config(preset="paper", min_scale=0.003, scales=15, starts=20, max_steps=2_000_000),
}

LABELS = {
    "ordinary": "ordinary EM: noise γ",
    "spread": "spread EM: σ on both sides",
    "one-sided": "σ on the model only",
}
COLOURS = {"ordinary": "C3", "spread": "C0", "one-sided": "C1"}
# Where the error's last ratio is its contraction: the slower modes have died out and rounding is far.
_DEEP = 1e-8


def draw_covariance(config: Config) -> np.ndarray:
    """Covariance [X, X] of noise-free examples F z, for F of random orthogonal columns."""
    rng = np.random.default_rng(config.seed)
    axes = np.linalg.qr(rng.normal(size=(config.dimensions, config.components)))[0]
    deviations = np.sqrt(np.linspace(1, config.smallest_variance, config.components))
    z = rng.normal(size=(config.num_examples, config.components))
    return np.asarray(pca.second_moments(z * deviations @ axes.T).covariance)


def moments_and_noise(method: str, covariance: jax.Array, gamma: float, sigma: float) -> tuple[jax.Array, jax.Array]:
    """What each EM is given: second moment of its data, and the standard deviation of its model's noise."""
    added = gamma**2 + (sigma**2 if method == "spread" else 0)
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    return covariance + added * eye, jnp.sqrt(gamma**2 + (0 if method == "ordinary" else sigma**2))


def contraction(method: str, variances: np.ndarray, gamma: float, sigma: float, components: int) -> tuple[float, float]:
    """The slowest contraction of EM at its optimum, out of the subspace and within it.

    Args:
      variances: eigenvalues of the noise-free covariance, largest first.
    """
    t = variances + gamma**2 + (sigma**2 if method == "spread" else 0)
    noise = gamma**2 + (0 if method == "ordinary" else sigma**2)
    inside, outside = t[:components], t[components:]
    lengths = inside - noise
    rates = 1 - noise * np.add.outer(lengths, lengths) / np.multiply.outer(inside, inside)
    return float(outside.max() / inside.min()), float(rates.max())


def random_starts(config: Config, target: jax.Array) -> jax.Array:
    """Gaussian loadings [starts, X, Z] in all directions, so small that the first step leaves them of the data's size.

    That step regresses x on z = (F^T F)^-1 F^T x, and F of entries c makes z of about |x| / (c X).
    """
    shape = (config.starts, len(target), config.components)
    return jnp.sqrt(jnp.trace(target)) / len(target) * jax.random.normal(jax.random.key(config.seed), shape)


def relative_error(loadings: jax.Array, target: jax.Array) -> jax.Array:
    """|F F^T - target| / |target|: what EM can find, which is F up to a rotation of z."""
    return jnp.linalg.norm(loadings @ loadings.T - target) / jnp.linalg.norm(target)


def sine_of_angle(loadings: jax.Array, axes: jax.Array) -> jax.Array:
    """Sine of the largest principal angle between the span of F and the true subspace, of orthonormal `axes` [X, Z]."""
    found = jnp.linalg.qr(loadings)[0]
    return jnp.linalg.norm(found - axes @ (axes.T @ found), ord=2)


@jax.jit
def run_em(second_moment, noise_scale, target, starts, tolerance, max_steps):
    """EM from each start until F F^T is within the tolerance of the target.

    Returns:
      Steps taken, the error then, and its ratio to the error a step before, each [starts].
    """

    def one(start):
        def unfinished(carry):
            _, error, _, step = carry
            return (error > tolerance) & (step < max_steps)

        def advance(carry):
            loadings, before, _, step = carry
            loadings = pca.em_step(loadings, second_moment, noise_scale, spread=False)
            error = relative_error(loadings, target)
            return loadings, error, error / before, step + 1

        error = relative_error(start, target)
        _, error, ratio, step = jax.lax.while_loop(unfinished, advance, (start, error, jnp.ones_like(error), 0))
        return step, error, ratio

    return jax.vmap(one)(starts)


@jax.jit
def trace_em(second_moment, noise_scale, target, axes, start, checkpoints):
    """Error of F F^T and sine of the angle to the subspace, at the given numbers of steps [checkpoints]."""
    step = lambda _, loadings: pca.em_step(loadings, second_moment, noise_scale, spread=False)

    def advance(loadings, span):
        loadings = jax.lax.fori_loop(*span, step, loadings)
        return loadings, (relative_error(loadings, target), sine_of_angle(loadings, axes))

    spans = jnp.concatenate([jnp.zeros_like(checkpoints[:1]), checkpoints[:-1]]), checkpoints
    return jax.lax.scan(advance, start, spans)[1]


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 0, "seed")
    _launch.require_at_least(config, 1, "components", "starts", "max_steps")
    _launch.require_at_least(config, 2, "scales")
    _launch.require_at_least(config, config.components + 1, "dimensions", "num_examples")
    _launch.require_positive(config, "smallest_variance", "min_scale", "max_scale", "spread_scale", "tolerance")
    if not config.min_scale < min(config.max_scale, config.spread_scale):
        raise UsageError(f"--min-scale must be below --max-scale and --spread-scale, got {config.min_scale}.")


def over_gamma(config: Config, covariance: jax.Array, starts: jax.Array) -> list[dict]:
    """Steps that ordinary and spread EM take to the tolerance, for each noise gamma of the data."""
    rows = []
    for gamma in np.geomspace(config.spread_scale, config.min_scale, config.scales):
        row = {"gamma": float(gamma)}
        for method in ("ordinary", "spread"):
            second_moment, noise = moments_and_noise(method, covariance, gamma, config.spread_scale)
            steps, error, _ = run_em(second_moment, noise, covariance, starts, config.tolerance, config.max_steps)
            row[f"{method}_steps"] = float(steps.mean())
            row[f"{method}_reached"] = bool((error <= config.tolerance).all())
            row[f"{method}_contraction"] = max(
                contraction(method, spectrum(covariance), gamma, config.spread_scale, config.components)
            )
        rows.append(row)
    return rows


def over_sigma(config: Config, covariance: jax.Array, starts: jax.Array) -> list[dict]:
    """Spread EM's contraction on noise-free data against theory, and the variance found on the first axis."""
    rows, variances = [], spectrum(covariance)
    for sigma in np.geomspace(config.max_scale, config.min_scale, config.scales):
        second_moment, noise = moments_and_noise("spread", covariance, 0.0, sigma)
        _, error, ratio = run_em(second_moment, noise, covariance, starts, _DEEP, config.max_steps)
        outside, within = contraction("spread", variances, 0.0, sigma, config.components)
        found = lambda spread, sigma=sigma: float(pca.closed_form(covariance, 1, sigma, spread=spread)[1][0])
        rows.append({
            "sigma": float(sigma),
            "contraction": float(jnp.median(ratio)),
            "reached": bool((error <= _DEEP).all()),
            "theory_outside": outside,
            "theory_within": within,
            "spread_variance": found(True) / variances[0],
            "one_sided_variance": found(False) / variances[0],
        })  # fmt: skip
    return rows


def over_steps(config: Config, covariance: jax.Array, starts: jax.Array, gammas: list[float]) -> list[dict]:
    """Error and angle of each EM after given numbers of steps, from the first start."""
    rows = []
    axes = jnp.linalg.eigh(covariance)[1][:, -config.components :]
    last = min(config.max_steps, 100_000)
    checkpoints = np.unique(np.geomspace(1, last, 80).astype(np.int32))
    for method in LABELS:
        for gamma in gammas:
            second_moment, noise = moments_and_noise(method, covariance, gamma, config.spread_scale)
            curves = trace_em(second_moment, noise, covariance, axes, starts[0], jnp.asarray(checkpoints))
            rows += [
                {"method": method, "gamma": gamma, "steps": int(step), "error": float(error), "sine": float(sine)}
                for step, error, sine in zip(checkpoints, *curves, strict=True)
            ]
    return rows


def spectrum(covariance: jax.Array) -> np.ndarray:
    """Eigenvalues, largest first."""
    return np.linalg.eigvalsh(np.asarray(covariance))[::-1]


def table(config: Config, gammas: list[dict], sigmas: list[dict]) -> str:
    """Both comparisons as Markdown."""
    steps = lambda row, method: f"{row[f'{method}_steps']:.0f}" + ("" if row[f"{method}_reached"] else " (not reached)")
    lines = [f"| gamma | ordinary EM | spread EM, sigma = {config.spread_scale:g} |", "|---|---|---|"]
    lines += [f"| {row['gamma']:.3g} | {steps(row, 'ordinary')} | {steps(row, 'spread')} |" for row in gammas]
    lines += ["", f"Steps until F F^T is within {config.tolerance:g} of the truth, mean of {config.starts} starts.", ""]
    lines += ["| sigma | contraction | theory | variance found, spread | on the model only |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['sigma']:.3g} | {row['contraction']:.5f} | {max(row['theory_outside'], row['theory_within']):.5f} "
        f"| {row['spread_variance']:.3f} | {row['one_sided_variance']:.3f} |"
        for row in sigmas
    ]
    return "\n".join(lines) + "\n\nSpread EM on noise-free data; variance of the first axis in units of the true one.\n"


def draw(
    config: Config, variances: np.ndarray, curves: list[dict], gammas: list[dict], sigmas: list[dict], path
) -> None:
    """Draws the figure: errors and angles against steps; steps, contraction and variance against the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.8), layout="constrained")
    (errors, angles, counts), (pace, scale, legend) = figure.subplots(2, 3)
    shown = sorted({row["gamma"] for row in curves})
    for method in LABELS:
        for gamma, style in zip(shown, ("-", "--", ":"), strict=False):
            mine = [row for row in curves if (row["method"], row["gamma"]) == (method, gamma)]
            for axes, name in ((errors, "error"), (angles, "sine")):
                # Below this it is rounding.
                points = [(row["steps"], max(row[name], 1e-13)) for row in mine]
                # Broad below the others: its angles are those of ordinary EM.
                width = {"linewidth": 3.5, "zorder": 1, "alpha": 0.5} if method == "one-sided" else {"linewidth": 1.4}
                axes.loglog(*zip(*points, strict=True), color=COLOURS[method], linestyle=style, **width)
    errors.set(title="variances within the subspace", ylabel=r"relative error of $FF^\top$", ylim=(1e-9, 300))
    angles.set(title="the subspace itself", ylabel="sine of the largest principal angle", ylim=(1e-9, 3))
    for axes in (errors, angles):
        axes.set_xlabel("EM steps")
    angles.set_xlim(0.9, 110)

    for method, marker in (("ordinary", "s"), ("spread", "o")):
        points = [(row["gamma"], row[f"{method}_steps"]) for row in gammas if row[f"{method}_reached"]]
        if points:
            counts.loglog(*zip(*points, strict=True), color=COLOURS[method], marker=marker, linestyle="", markersize=5)
        # The slowest mode's time, from an error of one.
        lines = [(row["gamma"], np.log(config.tolerance) / np.log(row[f"{method}_contraction"])) for row in gammas]
        counts.loglog(*zip(*lines, strict=True), color=COLOURS[method], linewidth=1.2)
    counts.set(
        title=f"steps to a relative error of {config.tolerance:g}", xlabel="noise γ of the data", ylabel="EM steps"
    )

    sigma = [row["sigma"] for row in sigmas]
    pace.loglog(sigma, [1 - row["contraction"] for row in sigmas], "o", color=COLOURS["spread"], markersize=5)
    grid = np.geomspace(sigma[-1], sigma[0], 200)
    outside, within = zip(*(contraction("spread", variances, 0.0, s, config.components) for s in grid), strict=True)
    pace.loglog(grid, 1 - np.array(within), color="0.35", label="theory, within the subspace")
    pace.loglog(grid, 1 - np.array(outside), color="0.35", linestyle="--", label="theory, out of it")
    pace.set(
        title="error removed in a step of spread EM", xlabel="noise scale σ", ylabel="1 - contraction", ylim=(None, 1.6)
    )
    pace.legend(frameon=False)

    fine = np.linspace(0, 1.3, 100)
    scale.plot(fine, np.ones(100), color=COLOURS["spread"])
    scale.plot(fine, np.maximum(1 - fine**2, 0), color=COLOURS["one-sided"])
    for name, colour, marker in (("spread_variance", "spread", "o"), ("one_sided_variance", "one-sided", "D")):
        points = [(row["sigma"], row[name]) for row in sigmas if row["sigma"] <= 1.3]
        scale.plot(*zip(*points, strict=True), color=COLOURS[colour], marker=marker, linestyle="", markersize=5)
    scale.set(
        title="variance found, first axis (truth 1)", xlabel="noise scale σ", ylabel="variance", ylim=(-0.05, 1.2)
    )
    for axes in (errors, angles, counts, pace, scale):
        axes.grid(alpha=0.25)

    legend.axis("off")
    handles = [
        *(legend.plot([], [], color=COLOURS[method], label=label)[0] for method, label in LABELS.items()),
        *(
            legend.plot([], [], color="0.35", linestyle=style, label=f"noise of the data γ = {gamma:.3g}")[0]
            for gamma, style in zip(shown, ("-", "--", ":"), strict=False)
        ),
        legend.plot([], [], color="0.35", marker="o", linestyle="", label="points: measured; lines there: theory")[0],
    ]
    legend.legend(handles=handles, frameon=False, loc="center", fontsize=11)
    save_figure(figure, path)


def compute(config: Config, run, say) -> dict:
    """Runs EM over both noises and compares its pace with theory."""
    with jax.enable_x64(True):  # contractions of 1 - 1e-4 and errors of 1e-8 need double precision
        covariance = jnp.asarray(draw_covariance(config))
        starts = random_starts(config, covariance)
        gammas = over_gamma(config, covariance, starts)
        say("steps against the noise of the data: done")
        sigmas = over_sigma(config, covariance, starts)
        say("contraction against the spread noise: done")
        shown = [gammas[index]["gamma"] for index in sorted({0, len(gammas) // 2, len(gammas) - 1}, reverse=True)]
        curves = over_steps(config, covariance, starts, shown)
    save_csv(curves, run.path / "curves.csv")
    draw(config, spectrum(covariance), curves, gammas, sigmas, run.save_figure_path("pca.png"))
    text = table(config, gammas, sigmas)
    (run.path / "table.md").write_text(text, encoding="utf-8")
    say(f"\n{text}")
    slow = [row for row in gammas if row["ordinary_reached"]][-2:]
    growth = np.diff(np.log([row["ordinary_steps"] for row in slow])) / np.diff(np.log([row["gamma"] for row in slow]))
    gaps = [
        (1 - row["contraction"]) / (1 - max(row["theory_outside"], row["theory_within"])) - 1
        for row in sigmas
        if row["reached"]
    ]
    last = lambda method, name: min(
        (row for row in curves if (row["method"], row["gamma"]) == (method, shown[0])), key=lambda row: -row["steps"]
    )[name]
    return {
        "ordinary_steps_at_smallest_gamma": gammas[-1]["ordinary_steps"],
        "ordinary_reached_at_smallest_gamma": gammas[-1]["ordinary_reached"],
        "spread_steps_at_smallest_gamma": gammas[-1]["spread_steps"],
        "growth_exponent_of_ordinary_steps": float(growth[0]) if len(growth) else None,
        "largest_relative_gap_of_contraction": float(np.abs(gaps).max()) if gaps else None,
        "one_sided_error": last("one-sided", "error"),
        "one_sided_error_theory": one_sided_error(config, spectrum(covariance)),
        "spread_error": last("spread", "error"),
        "over_gamma": gammas,
        "over_sigma": sigmas,
    }


def one_sided_error(config: Config, variances: np.ndarray) -> float:
    """Relative error of F F^T at the one-sided optimum: each variance less sigma^2, or zero."""
    variances = variances[: config.components]
    missing = variances - np.maximum(variances - config.spread_scale**2, 0)
    return float(np.linalg.norm(missing) / np.linalg.norm(variances))


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison, or says that it is finished."""
    config = _launch.parse(Config, PRESETS, "small", argv)
    check_config(config)
    return _launch.run_once(config, functools.partial(compute, config))


if __name__ == "__main__":
    launch.run_program(main)
