"""The table of a comparison: its rows and columns, means with standard errors over seeds, Markdown, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spread_jax.evaluation import image_grid, save_figure
from spread_jax.models import scores


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      title: for people.
      baselines: rows of which the difference is taken, seed by seed.
    """

    title: str
    baselines: tuple[str, ...] = ("fixed",)


ROWS = {
    "vae": Row("VAE", ()),
    "fixed": Row("fixed Gaussian", ("vae",)),
    "laplace": Row("fixed Laplace"),
    "low_rank": Row("learned covariance"),
    "transformed": Row("learned location"),
    "wae_mmd": Row("WAE-MMD"),
    "spread_gan": Row("spread GAN"),
    "density_ratio": Row("many scales"),
    "density_ratio_vae": Row("many scales and bound"),
    "score_difference": Row("many scales, scores"),
    "learned_sigma": Row("VAE, learned sigma", ("vae",)),
    "last_step": Row("fixed, last step"),
    "flow": Row("fixed, flow of latents"),
    "constant_sigma": Row("fixed, constant sigma"),
    "importance": Row("fixed, importance bound"),
}
# How near g comes to the data where z suits it, apart from how near N(0, I) comes to such z.
ROWS |= {
    f"{name}_mixture": Row(f"{row.title}, mixture of latents", (name, *(f"{other}_mixture" for other in row.baselines)))
    for name, row in ROWS.items()
    if name not in ("spread_gan", "density_ratio", "score_difference", "last_step", "flow")
}


class Metric(NamedTuple):
    """A column of the table.

    Attributes:
      title: for people, with the unit.
      better: the direction, as an arrow; empty where there is none.
      compared: whether rows may be subtracted: bounds under different noises may not.
    """

    title: str
    better: str = ""
    compared: bool = True


METRICS = {
    "frechet_distance": Metric("Fréchet distance", "↓"),
    "kernel_distance": Metric("kernel distance", "↓"),
    "precision": Metric("precision", "↑"),
    "recall": Metric("recall", "↑"),
    "density": Metric("density", "↑"),
    "coverage": Metric("coverage", "↑"),
    "sharpness": Metric("sharpness over real", "→ 1"),
    "held_out_reconstruction_mse": Metric("squared error per pixel", "↓"),
    "held_out_bound_nats": Metric("own bound, held out, nats", compared=False),
    "latent_log_density_nats": Metric("log density of held-out latents, nats", "↑"),
    "images_per_second": Metric("images/s", compared=False),
    "training_seconds": Metric("training, seconds", compared=False),
    "parameters": Metric("parameters", compared=False),
}
DRAWN = (
    "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "sharpness",
    "held_out_reconstruction_mse",
)  # fmt: skip


def by_row(runs: Sequence[Mapping]) -> dict[str, dict[int, dict[str, float]]]:
    """{row: {seed: numbers}}, rows in the order of ROWS."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for results in runs:
        for row, numbers in results["rows"].items():
            found.setdefault(row, {})[results["seed"]] = numbers
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def table(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One dictionary a row: the mean over seeds of every metric, and its standard error as <metric>_standard_error."""
    lines = []
    for row, seeds in rows.items():
        line: dict[str, Any] = {"method": row, "title": ROWS[row].title, "seeds": len(seeds)}
        for metric in METRICS:
            values = [numbers.get(metric) for numbers in seeds.values()]
            known = all(value is not None for value in values)
            line[metric], line[f"{metric}_standard_error"] = scores.mean_and_error(values) if known else (None, None)
        lines.append(line)
    return lines


def differences(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Paired differences of rows and their baselines: means and standard errors over the seeds that both have."""
    lines = []
    for row, seeds in rows.items():
        for baseline in ROWS[row].baselines:
            common = [seed for seed in seeds if seed in rows.get(baseline, {})]
            line: dict[str, Any] = {"method": row, "baseline": baseline, "seeds": len(common)}
            for metric, of_metric in METRICS.items():
                pairs = [(seeds[s].get(metric), rows[baseline][s].get(metric)) for s in common]
                if of_metric.compared and pairs and all(None not in pair for pair in pairs):
                    mean, error = scores.mean_and_error([mine - other for mine, other in pairs])
                    line |= {metric: mean, f"{metric}_standard_error": error}
            if len(line) > 3:
                lines.append(line)
    return lines


def with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    """A number and its standard error: two digits of the error, four of a number without one."""
    plus = "+" if sign else ""
    if value is None:
        return ""
    if error is None or not error > 0 or not math.isfinite(error):
        return f"{value:{plus},.0f}" if abs(value) >= 1e4 else f"{value:{plus}.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{plus},.{decimals}f} ± {error:.{decimals}f}"


def as_markdown(lines: list[dict], changes: list[dict], real: Mapping[str, float], about: Mapping[str, Any]) -> str:
    """The tables, and what they were made with."""
    known = [m for m in METRICS if any(line[m] is not None for line in lines)]
    text = []
    for metrics in ([m for m in known if m in DRAWN], [m for m in known if m not in DRAWN]):
        rows = [
            [line["title"], str(line["seeds"]), *(with_error(line[m], line[f"{m}_standard_error"]) for m in metrics)]
            for line in lines
            if any(line[m] is not None for m in metrics)
        ]
        if any(m in real for m in metrics):
            rows.insert(0, ["*training images*", "", *(with_error(real.get(m), None) for m in metrics)])
        head = [f"{METRICS[m].title} {METRICS[m].better}".strip() for m in metrics]
        text.append(pipe_table(["method", "seeds", *head], rows))
    text.append(
        f"Means over seeds ± standard error. {about['samples']:,} samples against as many held-out images of "
        f"{about['data']}; features: {about['features']} ({about['features_fingerprint']}). "
        f"{about['steps']:,} steps of {about['batch_size']} images each.\n"
    )
    if changes:
        metrics = [m for m in known if any(m in line for line in changes)]
        rows = []
        for line in changes:
            name = f"{ROWS[line['method']].title} − {ROWS[line['baseline']].title}"
            cells = [with_error(line.get(m), line.get(f"{m}_standard_error"), sign=True) for m in metrics]
            rows.append([name, str(line["seeds"]), *cells])
        text.append(pipe_table(["difference", "seeds", *(METRICS[m].title for m in metrics)], rows))
        text.append("Differences seed by seed, their mean ± standard error.\n")
    return "\n".join(text)


def pipe_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_comparison(rows: Mapping, lines: list[dict], real: Mapping[str, float], path: Path) -> None:
    """A panel for each metric: every seed, the mean with its standard error, and the training images as a line."""
    from matplotlib.figure import Figure

    metrics = [m for m in DRAWN if any(line[m] is not None for line in lines)]
    columns = math.ceil(len(metrics) / 2)
    height = 0.3 * len(lines) + 1.1
    figure = Figure(figsize=(2.9 * columns + 1.6, 2 * height), layout="constrained")
    panels = figure.subplots(2, columns, sharey=True, squeeze=False)
    for axes in panels.ravel()[len(metrics) :]:
        axes.set_visible(False)
    for axes, metric in zip(panels.ravel(), metrics, strict=False):
        for place, line in enumerate(lines):
            if line[metric] is None:
                continue
            seeds = [numbers[metric] for numbers in rows[line["method"]].values()]
            axes.plot(seeds, [place + 0.25] * len(seeds), ".", color="C7", markersize=4)
            axes.errorbar(
                line[metric], place, xerr=line[f"{metric}_standard_error"] or 0, fmt="o", color="C0", markersize=4,
                capsize=2,
            )  # fmt: skip
        if metric == "sharpness":
            axes.set_xscale("log", base=2)  # noise can be many times as sharp as images
            axes.xaxis.set_major_formatter("{x:g}")
        if real.get(metric) is not None:
            axes.axvline(real[metric], color="C2", linestyle="--", linewidth=1)
        axes.set_title(f"{METRICS[metric].title} {METRICS[metric].better}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[0, 0].set_yticks(range(len(lines)), [line["title"] for line in lines])
    panels[0, 0].set_ylim(len(lines) - 0.5, -0.5)
    figure.supxlabel("blue: mean ± standard error over seeds; grey: each seed; dashed: training images", fontsize=8)
    save_figure(figure, path)


def draw_samples(folder: Path, runs: Sequence[Mapping], path: Path) -> None:
    """Samples of every row, of its first seed, at the same latents: of the prior, or of its own density."""
    from matplotlib.figure import Figure

    shown = {}
    for row in ROWS:
        of_row = [results for results in runs if row in results["rows"]]
        if of_row:
            first = min(of_row, key=lambda results: results["seed"])
            with np.load(folder / f"{first['method']}-{first['seed']}" / "shown.npz", allow_pickle=False) as arrays:
                shown[row] = arrays[row]
    images = next(iter(shown.values()))
    columns = len(images) if images.shape[1] < 64 else len(images) // 2
    scale = 0.45 if images.shape[1] < 64 else 0.75
    tall = math.ceil(len(images) / columns) * scale + 0.25
    figure = Figure(figsize=(columns * scale, tall * len(shown)), layout="constrained")
    for axes, (row, images) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
        axes.imshow(image_grid(images, columns=columns, padding=1))
        axes.set_title(ROWS[row].title, fontsize=9, loc="left")
        axes.axis("off")
    save_figure(figure, path)
