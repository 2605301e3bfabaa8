"""Deterministic ICA: why EM stalls, what spreading the data buys, and what beats both.

Data x = A z + gamma epsilon with independent Laplace sources z of unit variance, entries of A +-1, and observation
noise gamma -> 0, where the likelihood of the model x = A z is zero. Compared, by the mean of |A_est - A| / |A| after
matching signs and order ("raw"), and after giving columns the right lengths ("direction"):

  standard EM        noise gamma on the model, known
  spread EM          the paper's: noise sigma added to the data, gamma^2 + sigma^2 on the model
  natural gradient   the same E-step, with a preconditioned gradient step
  closed form        the score of one spread source; a fixed point, then relative Newton
  FastICA, Picard    the usual tools, where they are installed

To first order both EMs make the same step, A s^2 (A^T A)^-1 (E[psi(u) u^T] - I) C^-1, with s their noise. So standard
EM stalls as gamma -> 0, and spread EM with an equally small sigma would too: what spreading the data buys is a sigma
that is large without biasing the scale of A. The other two methods stall at no sigma. FastICA works on non-square A
once the data are whitened, which the paper's remark on it leaves out; it is near the best here, and the closed form is
nearer: the gap to the Cramer-Rao line is what knowing the law of the sources is worth.

  python -m experiments.ica                        under 2 minutes on 2 cores
  python -m experiments.ica --preset overcomplete  more sources than dimensions, about 3 minutes
  python -m experiments.ica --preset images        filters learned from photographs, half a minute
  python -m experiments.ica --preset audio         three sounds, mixed and unmixed, as WAV files, seconds
  python -m experiments.ica --preset published     Figure 1 of the paper in full: hours on 2 cores

A stopped run continues where it was. Writes figures, table.md and results.json.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _launch
from experiments._ica_images import images
from experiments._ica_sounds import audio
from spread_jax.cli import launch
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_csv, save_figure
from spread_jax.linear import ica, match_columns, mixing_error


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    preset: Literal["small", "published", "overcomplete", "images", "audio"] = "small"
    """The settings that the other flags start from."""
    workdir: str | None = None
    """The run's folder; runs/ica/<preset>-<seed> if not given."""
    seed: int = 0
    """Seed of the data and of every method's start."""
    runs: int = 2
    """Data sets for each setting, each with a matrix of its own."""
    num_examples: int = 5000
    """Examples in a data set."""
    dimensions: int = 20
    """X, dimensions of x."""
    sources: int = 10
    """Z, number of sources."""
    gammas: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Standard deviations of the observation noise, in units of the entries of A; empty for no such figure."""
    sweeps: int = 800
    """EM steps."""
    samples: int = 64
    """Samples of z for each example in an EM step."""
    spread_scale: float | None = 1.0
    """sigma of spread EM; the paper's rule from the current A if None."""
    sizes: tuple[int, ...] = (250, 1000, 4000)
    """Numbers of examples for the figure of error against size; empty for none."""
    size_runs: int = 3
    """Data sets for each size."""
    size_dimensions: int = 10
    """X of that figure."""
    size_sources: int = 5
    """Z of that figure."""
    size_gamma: float = 0.2
    """Observation noise of that figure."""
    size_sweeps: int = 500
    """EM steps of that figure."""
    size_samples: int = 64
    """Samples of z in an EM step of that figure."""
    patch: int = 12
    """Edge of an image patch, pixels (preset images)."""
    pictures: tuple[str, ...] = ()
    """Image files to take patches from; two photographs that come with scikit-learn if empty."""
    sounds: tuple[str, ...] = ()
    """Mono or stereo 16-bit WAV files of one rate to mix (preset audio); three synthesised ones if empty."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


PRESETS = {
    "small": Config(),
    "published": Config(
        preset="published",
        runs=10,
        num_examples=20_000,
        gammas=(0.001, 0.01, 0.03, 0.1, 0.3, 1.0),
        sweeps=2000,
        samples=1000,
        spread_scale=None,
        sizes=(50, 100, 200, 500, 1000, 2000),
        size_runs=50,
        size_sweeps=500,
        size_samples=1000,
    ),
    "overcomplete": Config(preset="overcomplete", runs=10, dimensions=10, sources=15, sweeps=1100),
    "images": Config(preset="images", num_examples=50_000, sources=64),
    "audio": Config(preset="audio"),
}

METHODS = {  # label, colour, marker
    "em": ("standard EM, known γ", "C3", "s"),
    "spread_em": ("spread EM", "C1", "o"),
    "natural_gradient": ("natural gradient", "C2", "^"),
    "closed_form": ("closed form", "C0", "D"),
    "fastica": ("FastICA", "C7", "v"),
    "picard": ("Picard, tanh", "C8", "P"),
}


def signs_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Entries +-1 at random, of full rank, no column a repetition of another: [rows, columns]."""
    while True:
        mixing = rng.choice([-1.0, 1.0], (rows, columns))
        overlap = np.abs(mixing.T @ mixing - rows * np.eye(columns)).max()
        if np.linalg.matrix_rank(mixing) == min(rows, columns) and overlap < rows:
            return mixing


def data_set(seed: tuple[int, ...], count: int, rows: int, columns: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """x [N, X] and A [X, Z]. The same seed gives the same A and the same z and epsilon for every gamma."""
    rng = np.random.default_rng(seed)
    mixing = signs_matrix(rng, rows, columns)
    z = rng.laplace(scale=math.sqrt(0.5), size=(count, columns))
    return (z @ mixing.T + gamma * rng.normal(size=(count, rows))).astype(np.float32), mixing


def installed_methods() -> list[str]:
    """The methods that can run here."""
    found = list(METHODS)
    for name, module in (("fastica", "sklearn"), ("picard", "picard")):
        try:
            __import__(module)
        except ImportError:
            found.remove(name)
    return found


def estimate(
    method: str,
    x: np.ndarray,
    sources: int,
    gamma: float,
    seed: int,
    sweeps: int,
    samples: int,
    sigma,
) -> tuple[np.ndarray, bool]:
    """A [X, Z] and whether the method says that it converged."""
    if method == "fastica":
        from sklearn.decomposition import FastICA

        with _quiet_warnings():
            model = FastICA(sources, whiten="unit-variance", random_state=seed, max_iter=500).fit(x)
        return model.mixing_, model.n_iter_ < 500
    if method == "picard":
        from picard import picard

        with _quiet_warnings():
            whitening, rotation, _ = picard(
                x.T.astype(np.float64),
                n_components=sources,
                ortho=False,
                extended=False,
                random_state=seed,
                max_iter=500,
            )
        unmixing = rotation @ whitening
        return np.linalg.pinv(unmixing) * ((x - x.mean(axis=0)) @ unmixing.T).std(axis=0), True
    options = {"observation_scale": gamma, "source": "laplace", "key": jax.random.key(seed)}
    if method in ("em", "spread_em"):
        # Every sweep is made, as in the paper.
        options |= {"max_iterations": sweeps, "num_samples": samples, "tolerance": 1e-9}
        if method == "spread_em":
            options["noise_scale"] = sigma
    elif method == "natural_gradient":
        options["num_samples"] = 32 if gamma > 0.2 else 8  # few samples bias the scale where the posterior is wide
    result = ica.fit(x, sources, method=method, **options)
    # That tolerance only keeps EM going; whether it has converged is told by the library's own.
    converged = result.residual <= 0.25 if method in ("em", "spread_em") else result.converged
    return np.asarray(result.mixing, np.float64), bool(converged)


def _quiet_warnings():
    import contextlib
    import warnings

    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


# --- error against noise, size and time -------------------------------------------------------


def settings(config: Config) -> Iterator[dict]:
    """Every fit of a run, in the order in which they are made and logged."""
    methods = installed_methods()
    for run in range(config.runs):
        for gamma in config.gammas:
            for method in methods:
                yield {"figure": "noise", "method": method, "run": run, "gamma": gamma, "count": config.num_examples}
    for count in config.sizes:
        for run in range(config.size_runs):
            for method in methods:
                yield {"figure": "size", "method": method, "run": run, "gamma": config.size_gamma, "count": count}


def fit_one(config: Config, setting: dict) -> dict:
    """The errors of one fit."""
    wide = setting["figure"] == "noise"
    rows = config.dimensions if wide else config.size_dimensions
    columns = config.sources if wide else config.size_sources
    seed = (config.seed, int(wide), setting["run"])
    x, truth = data_set(seed, setting["count"], rows, columns, setting["gamma"])
    began = time.perf_counter()
    mixing, converged = estimate(
        setting["method"],
        x,
        columns,
        setting["gamma"],
        config.seed + setting["run"],
        config.sweeps if wide else config.size_sweeps,
        config.samples if wide else config.size_samples,
        config.spread_scale,
    )
    return {
        "raw": mixing_error(mixing, truth, kind="raw"),
        "direction": mixing_error(mixing, truth, kind="direction"),
        "converged": converged,
        "seconds": time.perf_counter() - began,
    }


def cramer_rao(count: int, sources: int, *, kind: str) -> float:
    """The error of the best unbiased estimate for Laplace sources without noise: variance (2/3)(Z - 1)/N, + 1/N raw."""
    variance = (2 / 3 * (sources - 1) + (kind == "raw")) / count
    return math.sqrt(2 / math.pi * variance)


def compare(config: Config, run, say) -> dict:
    """Every fit, resumed where it stopped, with figures and a table."""
    todo = list(settings(config))
    done = [
        {name: record[name] for name in ("raw", "direction", "converged", "seconds")} for record in run.read_metrics()
    ]
    if done:
        say(f"{len(done)} of {len(todo)} fits are done already")
    # Threads: XLA and BLAS release the interpreter, and most of a fit of this size uses one core.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(fit_one, config, setting) for setting in todo[len(done) :]]
        try:
            for setting, result in zip(todo[len(done) :], waiting, strict=True):
                found = result.result()
                run.log_metrics(len(done) + 1, {name: float(value) for name, value in found.items()})
                done.append(found)
                label = METHODS[setting["method"]][0]
                say(
                    f"{len(done)}/{len(todo)} N={setting['count']} γ={setting['gamma']:g} {label}: "
                    f"raw {found['raw']:.4f}, direction {found['direction']:.4f}, {found['seconds']:.1f} s"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = [{**setting, **found} for setting, found in zip(todo, done, strict=True)]
    save_csv(rows, run.path / "fits.csv")
    table = summarise(rows)
    draw_errors(config, table, run.save_figure_path("errors.png"))
    curves = error_in_time(config) if config.gammas else []
    if curves:
        draw_time(config, curves, run.save_figure_path("time.png"))
    text = as_table(config, table)
    (run.path / "table.md").write_text(text, encoding="utf-8")
    say(f"\n{text}")
    return {"table": table, "time": curves}


def summarise(rows: list[dict]) -> list[dict]:
    """Means and standard errors over data sets."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["figure"], row["gamma"], row["count"], row["method"]), []).append(row)
    table = []
    for (figure, gamma, count, method), group in groups.items():
        entry = {"figure": figure, "gamma": gamma, "count": count, "method": method, "runs": len(group)}
        for kind in ("raw", "direction"):
            values = np.array([row[kind] for row in group])
            entry[kind] = float(values.mean())
            entry[f"{kind}_error"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
            entry[f"{kind}_worst"] = float(values.max())
        entry["converged"] = float(np.mean([row["converged"] for row in group]))
        table.append(entry)
    return table


def as_table(config: Config, table: list[dict]) -> str:
    """Markdown: raw and direction error of every method."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    text = []
    for figure, name in (("noise", "γ"), ("size", "N")):
        rows = [row for row in table if row["figure"] == figure]
        if not rows:
            continue
        text += [f"| {name} | " + " | ".join(METHODS[m][0] for m in methods) + " |", "|---|" + "---|" * len(methods)]
        for value in dict.fromkeys((row["gamma"], row["count"]) for row in rows):
            cells = {row["method"]: row for row in rows if (row["gamma"], row["count"]) == value}
            shown = [f"{cells[m]['raw']:.4f} / {cells[m]['direction']:.4f}" for m in methods]
            text.append(f"| {value[0] if figure == 'noise' else value[1]:g} | " + " | ".join(shown) + " |")
        text.append("")
    text.append(
        f"Raw / direction error, means over {config.runs} (noise) and {config.size_runs} (size) data sets. Without "
        f"noise the Cramér-Rao bound at N={config.num_examples} is "
        f"{cramer_rao(config.num_examples, config.sources, kind='raw'):.4f} / "
        f"{cramer_rao(config.num_examples, config.sources, kind='direction'):.4f}."
    )
    return "\n".join(text) + "\n"


def error_in_time(config: Config) -> list[dict]:
    """Direction error against warm seconds at the smallest gamma: curves of sampling methods, points of the rest."""
    gamma = min(config.gammas)
    x, truth = data_set((config.seed, 1, 0), config.num_examples, config.dimensions, config.sources, gamma)
    key = jax.random.key(config.seed)
    shared = jnp.asarray(x) - x.mean(axis=0)
    eigenvalues, axes = np.linalg.eigh(np.cov(x.T))
    turn = np.linalg.qr(np.random.default_rng(config.seed).normal(size=(config.sources, config.sources)))[0]
    start = (axes * np.sqrt(np.maximum(eigenvalues, 0)))[:, -config.sources :] @ turn
    e_step = {"observation_scale": gamma}
    sigma = config.spread_scale
    steps: dict[str, Callable] = {
        "em": lambda a, t: ica.em_step(a, shared, num_samples=config.samples, key=jax.random.fold_in(key, t), **e_step),
        "spread_em": lambda a, t: ica.em_step(
            a,
            shared,
            noise_scale=ica.paper_noise_scale(a) if sigma is None else sigma,
            num_samples=config.samples,
            key=jax.random.fold_in(key, t),
            **e_step,
        ),
        "natural_gradient": lambda a, t: ica.natural_gradient_step(
            a,
            shared,
            noise_scale=0.2,
            observation_scale=gamma,
            step_size=jnp.where(t < 40, 1.0, 0.1),
            key=jax.random.fold_in(key, t),
        ),
    }
    curves = []
    for method, step in steps.items():
        block = 2 if method == "natural_gradient" else 20
        advance = jax.jit(
            lambda a, t, step=step, block=block: jax.lax.fori_loop(0, block, lambda i, a: step(a, t + i), a)
        )
        mixing = jnp.asarray(start, jnp.float32)
        jax.block_until_ready(advance(mixing, 0))
        seconds, points = 0.0, []
        for t in range(0, 80 if method == "natural_gradient" else min(config.sweeps, 400), block):
            began = time.perf_counter()
            mixing = jax.block_until_ready(advance(mixing, t))
            seconds += time.perf_counter() - began
            points.append([seconds, mixing_error(np.asarray(mixing), truth, kind="direction")])
        curves.append({"method": method, "points": points})
    for method in installed_methods():
        if method not in steps:
            run = functools.partial(estimate, method, x, config.sources, gamma, config.seed, 0, 0, None)
            run()
            began = time.perf_counter()
            mixing, _ = run()
            seconds = time.perf_counter() - began
            curves.append({"method": method, "points": [[seconds, mixing_error(mixing, truth, kind="direction")]]})
    return curves


def draw_errors(config: Config, table: list[dict], path: Path) -> None:
    """Error against noise, raw and direction, and against size."""
    from matplotlib.figure import Figure

    num_panels = 2 * bool(config.gammas) + bool(config.sizes)
    figure = Figure(figsize=(1 + 4.2 * num_panels, 4.4), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    panels[0].set_ylabel("mean |A_est − A| / |A|")
    first = panels[0]
    for kind in ("raw", "direction") if config.gammas else ():
        axes = panels.pop(0)
        _draw_methods(axes, [row for row in table if row["figure"] == "noise"], "gamma", kind)
        bound = cramer_rao(config.num_examples, config.sources, kind=kind)
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label="Cramér-Rao bound, γ = 0")
        axes.set_xlabel("observation noise γ (entries of A are ±1)")
        axes.set_title(
            f"{kind} error, X={config.dimensions}, Z={config.sources}, N={config.num_examples:,}, "
            f"{config.runs} data sets",
            fontsize=10,
        )
    for axes in panels:
        _draw_methods(axes, [row for row in table if row["figure"] == "size"], "count", "raw")
        counts = np.geomspace(min(config.sizes), max(config.sizes), 50)
        bound = [cramer_rao(count, config.size_sources, kind="raw") for count in counts]
        axes.plot(counts, bound, color="black", linestyle="--", linewidth=1, label="Cramér-Rao bound, γ = 0")
        axes.set_xlabel("examples N")
        axes.set_title(
            f"raw error, X={config.size_dimensions}, Z={config.size_sources}, γ={config.size_gamma:g}, "
            f"{config.size_runs} data sets",
            fontsize=10,
        )
    first.legend(frameon=False, fontsize=8)
    figure.supxlabel(
        "Means over the data sets named above each panel; bars are two standard errors. The bound limits the mean over "
        "all data sets, so a mean over a few may lie below it.",
        fontsize=8,
    )
    save_figure(figure, path)


def _draw_methods(axes, rows: list[dict], along: str, kind: str) -> None:
    from matplotlib.ticker import NullFormatter

    for method in dict.fromkeys(row["method"] for row in rows):
        label, colour, marker = METHODS[method]
        mine = [row for row in rows if row["method"] == method]
        where, values = [row[along] for row in mine], [row[kind] for row in mine]
        bars = [2 * row[f"{kind}_error"] for row in mine]
        axes.errorbar(
            where, values, bars, label=label, color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=2
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")


def draw_time(config: Config, curves: list[dict], path: Path) -> None:
    """Direction error against wall time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        label, colour, marker = METHODS[curve["method"]]
        many = len(curve["points"]) > 1
        style = {"linestyle": "-" if many else "", "marker": "" if many else marker}
        axes.plot(*zip(*curve["points"], strict=True), label=label, color=colour, **style)
    bound = cramer_rao(config.num_examples, config.sources, kind="direction")
    axes.axhline(bound, color="black", linestyle="--", linewidth=1, label="Cramér-Rao bound, γ = 0")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds, compilation apart")
    axes.set_ylabel("direction error")
    axes.set_title(f"γ={min(config.gammas):g}, N={config.num_examples:,}: error against time", fontsize=11)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


# --- more sources than dimensions ---------------------------------------------------------------


def overcomplete(config: Config, run, say) -> dict:
    """Gibbs natural gradient for X < Z over several data sets."""
    done = [dict(record) for record in run.read_metrics()]
    cosines = np.load(run.path / "cosines.npy", allow_pickle=False).tolist() if done else []
    for index in range(len(done), config.runs):
        x, truth = data_set((config.seed, 2, index), config.num_examples, config.dimensions, config.sources, 0.0)
        began = time.perf_counter()
        result = ica.fit(
            x, config.sources, method="gibbs", max_iterations=config.sweeps, key=jax.random.key(config.seed + index)
        )
        mixing = np.asarray(result.mixing, np.float64)
        matched = match_columns(mixing, truth, kind="direction")
        cosine = (matched * truth).sum(axis=0) / (truth**2).sum(axis=0)
        cosines.append(cosine.tolist())
        np.save(run.path / "cosines.npy", np.array(cosines))
        record = {
            "direction": mixing_error(mixing, truth, kind="direction"),
            "raw": mixing_error(mixing, truth, kind="raw"),
            "worst_cosine": float(cosine.min()),
            "seconds": time.perf_counter() - began,
        }
        run.log_metrics(index + 1, record)
        done.append(record)
        say(
            f"data set {index + 1}/{config.runs}: direction error {record['direction']:.3f}, "
            f"worst cosine {record['worst_cosine']:.3f}, {record['seconds']:.1f} s"
        )
    draw_cosines(config, np.array(cosines), run.save_figure_path("overcomplete.png"))
    return {
        "median_direction_error": float(np.median([record["direction"] for record in done])),
        "every_column_found": int(sum(record["worst_cosine"] > 0.9 for record in done)),
        "runs": config.runs,
        "fits": [{k: record[k] for k in ("direction", "raw", "worst_cosine", "seconds")} for record in done],
    }


def draw_cosines(config: Config, cosines: np.ndarray, path: Path) -> None:
    """How well each true column is found: one row of dots for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.32 * len(cosines) + 1.4), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(cosines):
        axes.plot(
            row, np.full(len(row), index + 1), "o", color="C0" if row.min() > 0.9 else "C3", alpha=0.6, markersize=5
        )
    axes.axvline(0.9, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("cosine of each true column with its estimate (right of the line: found)")
    axes.set_ylabel("data set")
    axes.set_yticks(range(1, len(cosines) + 1))
    axes.set_title(
        f"{config.sources} sources from {config.dimensions} dimensions, N={config.num_examples:,}", fontsize=11
    )
    save_figure(figure, path)


STUDIES = {"overcomplete": overcomplete, "images": images, "audio": audio}


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 0, "seed", "size_gamma")
    _launch.require_at_least(config, 1, "runs", "sources", "dimensions", "size_sources", "size_dimensions")
    _launch.require_at_least(config, 1, "sweeps", "samples", "size_sweeps", "size_samples", "size_runs")
    _launch.require_at_least(config, 4, "patch")
    if config.preset in ("small", "published"):
        if not config.gammas and not config.sizes:
            raise UsageError("--gammas and --sizes are both empty: nothing to do.")
        if min(config.gammas, default=1) <= 0:
            raise UsageError(f"--gammas must be positive numbers, got {config.gammas}.")
        if config.sources > config.dimensions or config.size_sources > config.size_dimensions:
            raise UsageError("--sources must be at most --dimensions; --preset overcomplete takes more.")
    most = {"images": config.patch**2 - 1, "audio": 0}.get(config.preset, config.sources)
    if config.preset == "images" and config.sources > most:
        raise UsageError(f"--sources must be at most {most} for patches of {config.patch} pixels.")
    if min(config.sizes, default=config.num_examples) <= config.size_dimensions:
        raise UsageError("--sizes must exceed --size-dimensions: fewer examples fix no matrix.")
    if config.num_examples <= config.sources:
        raise UsageError("--num-examples must exceed --sources: fewer examples fix no matrix.")


def main(argv: list[str] | None = None) -> int:
    """Runs a study, resumes it, or says that it is finished."""
    config = _launch.parse(Config, PRESETS, "small", argv)
    check_config(config)
    study = STUDIES.get(config.preset, compare)
    return _launch.run_once(config, functools.partial(study, config), keep_metrics=True)


if __name__ == "__main__":
    launch.run_program(main)
