"""Ways to train one generator, compared: the same networks, data and steps, several seeds, means with their errors.

  vae              Gaussian p(x|z) whose standard deviation is the spread noise's; clean images
  fixed            Gaussian spread noise (the delta-VAE)
  laplace          Laplace spread noise of the same standard deviation
  low_rank         Gaussian spread noise with a learned covariance
  transformed      Gaussian spread noise around a learned location
  wae_mmd          Wasserstein autoencoder
  spread_gan       GAN whose discriminator sees spread images
  learned_sigma    vae, its standard deviation trained
  constant_sigma   fixed, the final noise scale from the start
  importance       fixed, by the importance-weighted bound

and without training again: of each run with an encoder, samples whose latents are drawn from a mixture of Gaussians
fitted to the aggregate posterior in place of the prior; of `fixed`, also from a flow, and by the networks of the last
step in place of their moving average.

  python -m experiments.compare                                  synthetic faces, 64x64, sized for 2 cores
  python -m experiments.compare --preset mnist --data PATH       MNIST in its idx format, sized for 2 cores
  python -m experiments.compare --preset digits                  scikit-learn's digits, the quickest
  python -m experiments.compare --preset celeba --data PATH      the published networks and settings, for a GPU
  python -m experiments.compare --methods vae fixed --seeds 5    some of it; the folder keeps what it has

Each run has a folder of its own in the comparison's. The same command again resumes an interrupted comparison, in the
middle of a run too; other --methods and more --seeds add to it. Writes table.md, table.csv, results.json,
comparison.png, samples.png and report.html, of everything in the folder that is finished.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tyro

from experiments import _generator, _latents, _launch, _scores, _train
from experiments._generator import GeneratorConfig
from spread_jax.data import Dataset
from spread_jax.evaluation import image_grid, write_report
from spread_jax.training import RunDirectory, RunDirectoryError

MethodName = Literal[
    "vae", "fixed", "laplace", "low_rank", "transformed", "wae_mmd", "spread_gan",
    "learned_sigma", "constant_sigma", "importance",
]  # fmt: skip
METHODS = get_args(MethodName)
ROW_NAMES = {"": "{}", "mixture": "{}_mixture"}  # of what a run gives, others are of `fixed` alone
SHOWN = 20  # samples of each row of samples.png
_ELSEWHERE = tyro.conf.Suppress  # set by the method


@dataclasses.dataclass(frozen=True)
class Config(GeneratorConfig):
    """Settings of a comparison: what all its runs share. Images have values in [0, 1]; noise scales are in those."""

    preset: Literal["faces", "mnist", "digits", "celeba"] = "faces"
    noise: Annotated[Literal["gaussian", "laplace", "low_rank", "transformed"], _ELSEWHERE] = "gaussian"
    objective: Annotated[Literal["spread_elbo", "elbo", "importance", "wae_mmd", "spread_gan"], _ELSEWHERE] = (
        "spread_elbo"
    )
    learned_scale: Annotated[bool, _ELSEWHERE] = False

    workdir: str | None = None
    """The comparison's folder, with one for each run inside; runs/compare/<preset> if not given."""
    methods: tuple[MethodName, ...] = METHODS
    """What to train; what the folder has already stays in the table."""
    seed: int = 0
    """The first seed; each decides the order of the data, the initial parameters and all noise."""
    seeds: int = 3
    """How many, counted up from the first."""
    image_size: Literal[28, 64] = 64
    """Height and width that images are brought to."""
    samples: int = 10_000
    """Held-out images at most, and as many samples."""
    features: str | None = None
    """`inception`, or a file made by experiments.features; those of the data, trained if need be, if not given."""
    feature_steps: int = 600
    """Training steps of the features, where they are trained here."""
    mixture_components: int = 10
    """Gaussians in the mixture of latents; 0 for no such rows."""
    flow_steps: int = 1500
    """Adam steps of the flow of latents; 0 for no such row."""
    flow_couplings: int = 8
    """Couplings of the flow."""
    latent_examples: int = 5000
    """Training images whose posteriors the mixture and the flow are fitted to, at most."""

    steps: int = 1000
    width: int = 8
    importance_samples: int = 5
    noise_decay_every: int = 70
    ema_decay: float = 0.99
    sample_every: int = 100_000
    save_every: int = 200
    keep: int = 1
    held_out_examples: int = 1000


PRESETS = {
    "faces": Config(),
    "mnist": Config(
        preset="mnist",
        data="mnist",
        image_size=28,
        samples=2000,
        steps=600,
        batch_size=100,
        latent_dim=10,
        width=16,
        final_noise_scale=0.3,
        noise_decay_every=50,
        descent_steps=4,
        noise_learning_rate=1e-3,
        mmd_weight=10.0,
        discriminator_learning_rate=2e-3,
        generator_learning_rate=1e-3,
    ),
    "digits": Config(
        preset="digits",
        data="digits",
        seeds=2,
        image_size=28,
        steps=300,
        batch_size=64,
        latent_dim=10,
        width=8,
        final_noise_scale=0.3,
        noise_decay_every=25,
        mmd_weight=10.0,
        discriminator_learning_rate=2e-3,
        generator_learning_rate=1e-3,
        learning_rate=5e-3,
        ema_decay=0.98,
        save_every=100,
    ),
    "celeba": Config(
        preset="celeba",
        data="celeb_a",
        steps=81_400,  # 50 epochs of 162,770 images
        batch_size=100,
        latent_dim=64,
        width=128,
        final_noise_scale=0.5,
        learning_rate=1e-4,
        final_learning_rate_fraction=1.0,
        warmup_steps=0,
        ema_decay=0.999,
        transform_features=32,
        transform_coefficient=0.1,
        descent_steps=16_280,  # 10 epochs
        ascent_steps=1000,
        noise_learning_rate=1e-5,
        discriminator_learning_rate=2e-4,  # of DCGAN, both
        generator_learning_rate=2e-4,
        record_every=100,
        save_every=2000,
        held_out_examples=10_000,
        mixture_components=50,
    ),
}

# What may differ when a comparison is resumed. Runs that took other steps, or were scored on other images, would not
# compare; which runs there are, and where things are kept, is free.
RESUMABLE = (
    "workdir",
    "data",  # may have moved; its pixels are compared by their fingerprint
    "features",  # the same
    "feature_steps",
    "methods",
    "seed",
    "seeds",
    "cache_dir",
    "record_every",
    "sample_every",
    "save_every",
    "keep",
    "quiet",
)


# What a run's scores depend on, besides its training.
SCORING = ("samples", "mixture_components", "flow_steps", "flow_couplings", "latent_examples")


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      title: for people.
      changes: (config) -> what differs from the shared settings; None of a row derived from a run of `fixed`.
      baselines: rows of which the difference is taken, seed by seed.
    """

    title: str
    changes: Callable[[Config], dict[str, Any]] | None
    baselines: tuple[str, ...]


ROWS = {
    "vae": Method("VAE", lambda c: {"objective": "elbo"}, ()),
    "fixed": Method("fixed Gaussian", lambda c: {}, ("vae",)),
    "laplace": Method("fixed Laplace", lambda c: {"noise": "laplace"}, ("fixed",)),
    "low_rank": Method("learned covariance", lambda c: {"noise": "low_rank"}, ("fixed",)),
    "transformed": Method("learned location", lambda c: {"noise": "transformed"}, ("fixed",)),
    "wae_mmd": Method("WAE-MMD", lambda c: {"objective": "wae_mmd"}, ("fixed",)),
    "spread_gan": Method("spread GAN", lambda c: {"objective": "spread_gan"}, ("fixed",)),
    "learned_sigma": Method("VAE, learned sigma", lambda c: {"objective": "elbo", "learned_scale": True}, ("vae",)),
    "last_step": Method("fixed, last step", None, ("fixed",)),
    "flow": Method("fixed, flow of latents", None, ("fixed",)),
    "constant_sigma": Method("fixed, constant sigma", lambda c: {"noise_scale": c.final_noise_scale}, ("fixed",)),
    "importance": Method("fixed, importance bound", lambda c: {"objective": "importance"}, ("fixed",)),
}
# How near g comes to the data where z suits it, apart from how near N(0, I) comes to such z.
ROWS |= {
    f"{name}_mixture": Method(
        f"{ROWS[name].title}, mixture of latents", None, (name, *(f"{other}_mixture" for other in ROWS[name].baselines))
    )
    for name in METHODS
    if name != "spread_gan"
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


def check_config(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Refuses numbers that cannot work, of every method that was asked for, naming the flag."""
    _launch.require_at_least(config, 0, "seed", "mixture_components", "flow_steps")
    _launch.require_at_least(config, 1, "seeds", "feature_steps", "flow_couplings", "latent_examples")
    _launch.require_at_least(config, _scores.FEWEST, "samples")
    if not config.methods:
        raise _launch.UsageError("--methods needs at least one name: " + ", ".join(METHODS) + ".")
    for method in config.methods:
        _generator.check_config(run_config(config, method, config.seed), image_shape)


def run_config(config: Config, method: str, seed: int) -> GeneratorConfig:
    """The training settings of one run."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(GeneratorConfig)}
    return GeneratorConfig(**{**shared, "workdir": None, "seed": seed, **ROWS[method].changes(config)})


class Reference(NamedTuple):
    """What every row is measured against."""

    datasets: Mapping[str, Dataset]
    extract: _scores.Features
    images: np.ndarray
    features: np.ndarray


def train_and_score(
    config: Config,
    method: str,
    seed: int,
    folder: Path,
    reference: Reference,
    say: Callable,
    on_log: _launch.Hook | None = None,
) -> dict:
    """Trains or resumes or reads one run: its results, with the scores of each row that it gives."""
    settings = run_config(config, method, seed)
    saved = {
        **_generator.saved_config(settings, reference.datasets["train"]),
        "method": method,
        "features_fingerprint": reference.extract.fingerprint,
        **{name: getattr(config, name) for name in SCORING},
    }
    on_log = _launch.prefixed(on_log, folder.name)
    with RunDirectory.open(folder, saved, resumable_keys=RESUMABLE, tensorboard=False, on_log=on_log) as run:
        if run.finished:
            return run.results
        say(f"{method}, seed {seed}")
        model, trained = _generator.train_run(settings, run, reference.datasets, say=say)
        scores, shown = score(config, model, trained.state, reference, fixed=method == "fixed")
        of_run = {
            **_train_numbers(model, settings, run),
            "parameters": _train.parameters(trained.state)
            + sum(leaf.size for leaf in jax.tree.leaves(trained.state.noise_params)),
        }
        _save_shown(shown, run.path / "shown.npz")
        results = {
            "experiment": "compare",
            "preset": config.preset,
            "method": method,
            "seed": seed,
            "steps": settings.steps,
            "rows": {ROW_NAMES.get(name, name).format(method): {**found, **(of_run if name == "" else {})}
                     for name, found in scores.items()},
            "device": jax.devices()[0].device_kind,
            "versions": _launch.versions(),
        }  # fmt: skip
        run.write_results(results)
        say(f"{method}, seed {seed}: Fréchet distance {scores['']['frechet_distance']:.3f}")
        return results


def _train_numbers(model: _generator.Model, settings: GeneratorConfig, run: RunDirectory) -> dict[str, float]:
    """Speed from every record of the run, also those before an interruption; compilation and evaluation apart."""
    rates = [r["images_per_second"] for r in run.read_metrics() if math.isfinite(r.get("images_per_second", math.nan))]
    if not rates:
        return {}
    rate = float(np.median(rates))
    return {"images_per_second": rate, "training_seconds": model.num_steps * settings.batch_size / rate}


def score(
    config: Config, model: _generator.Model, state: Any, reference: Reference, *, fixed: bool
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Scores and shown samples of the rows that a run gives: "" is its own, others are of other samplers.

    Args:
      config: of the comparison.
      model: of the run.
      state: after its last step.
      reference: what samples are measured against.
      fixed: whether to score the last step, and a flow of latents, too.
    """
    settings, count = model.config, len(reference.images)
    key = _generator.evaluation_key(settings)
    averaged, prior = model.averaged(state), _latents.standard_normal(settings.latent_dim)
    samplers = {"": (averaged, prior)}
    held_out = model.held_out(state, reference.datasets["test"], key)
    bound = next((held_out[n] for n in ("importance_bound_nats", "elbo_nats") if n in held_out), None)
    own = {f"held_out_{name}": value for name, value in held_out.items()}
    if bound is not None:
        own["held_out_bound_nats"] = bound
    of_latents = {"": own}
    if fixed:
        samplers["last_step"] = (model.current(state), prior)
    with_mixture = config.mixture_components and not model.adversarial
    with_flow = config.flow_steps and fixed
    if with_mixture or with_flow:
        found = {
            split: _latents.posteriors(
                model, state, reference.datasets[split], count=config.latent_examples,
                batch_size=settings.batch_size, key=jax.random.fold_in(key, index),
            )
            for index, split in enumerate(("train", "validation", "test"), 1)
        }  # fmt: skip
        densities = {"": prior}
        if with_mixture:
            densities["mixture"] = _latents.fit_mixture(
                found["train"], components=config.mixture_components, seed=settings.seed
            )
        if with_flow:
            densities["flow"] = _latents.fit_flow(
                found["train"],
                found["validation"],
                seed=settings.seed,
                steps=config.flow_steps,
                couplings=config.flow_couplings,
            )
        unseen = found["test"].draw(jax.random.fold_in(key, 4))
        for name, density in densities.items():
            samplers[name] = (averaged, density)
            of_latents.setdefault(name, {})["latent_log_density_nats"] = float(density.log_density(unseen).mean())
    scores, shown = {}, {}
    for name, (variables, density) in samplers.items():
        generate = lambda z, variables=variables: model.generate(variables, z)
        samples = _scores.sample_images(generate, density.sample(count, jax.random.fold_in(key, 0)))
        measured = _scores.sample_scores(samples, reference.images, reference.features, reference.extract)
        scores[name] = {**measured, **of_latents.get(name, {})}
        shown[name] = _scores.sample_images(generate, density.sample(SHOWN, key))
    return scores, shown


def _save_shown(shown: Mapping[str, np.ndarray], path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, **{name or "own": images for name, images in shown.items()})
    part.replace(path)


def real_scores(config: Config, reference: Reference) -> dict[str, float]:
    """The scores of as many training images, which a perfect generator would get."""
    train, count = reference.datasets["train"], len(reference.images)
    rows = _scores.random_rows(len(train), count, 0)
    return _scores.sample_scores(
        np.asarray(train.images[rows]), reference.images, reference.features, reference.extract
    )


# --- the table


def finished_runs(folder: Path) -> list[dict]:
    """The results of every finished run of a comparison, in the order of ROWS and of seeds."""
    found = []
    for method in METHODS:
        for path in sorted(folder.glob(f"{method}-*"), key=lambda p: (len(p.name), p.name)):
            if not path.name.removeprefix(f"{method}-").isdigit():
                continue
            try:
                with RunDirectory.reopen(path) as run:
                    results = run.results
            except RunDirectoryError:
                continue  # not a run's folder
            if results:
                found.append(results)
    return found


def by_row(runs: Sequence[Mapping]) -> dict[str, dict[int, dict[str, float]]]:
    """{row: {seed: scores}}, rows in the order of ROWS."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for results in runs:
        for row, scores in results["rows"].items():
            found.setdefault(row, {})[results["seed"]] = scores
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def table(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One dictionary a row: the mean over seeds of every metric, and its standard error as <metric>_standard_error."""
    lines = []
    for row, seeds in rows.items():
        line: dict[str, Any] = {"method": row, "title": ROWS[row].title, "seeds": len(seeds)}
        for metric in METRICS:
            values = [scores.get(metric) for scores in seeds.values()]
            known = all(value is not None for value in values)
            line[metric], line[f"{metric}_standard_error"] = _scores.mean_and_error(values) if known else (None, None)
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
                    mean, error = _scores.mean_and_error([mine - other for mine, other in pairs])
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


def as_markdown(config: Config, lines: list[dict], changes: list[dict], real: Mapping[str, float], about: dict) -> str:
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
        f"{config.steps:,} steps of {config.batch_size} images each.\n"
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


# --- pictures


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
            seeds = [scores[metric] for scores in rows[line["method"]].values()]
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
    _launch.save_figure(figure, path)


def draw_samples(folder: Path, rows: Mapping, path: Path) -> None:
    """Samples of every row, of its first seed, at the same latents: of the prior, or of its own density."""
    from matplotlib.figure import Figure

    shown = {}
    for row, seeds in rows.items():
        if ROWS[row].changes:
            method, name = row, "own"
        elif row.endswith("_mixture"):
            method, name = row.removesuffix("_mixture"), "mixture"
        else:
            method, name = "fixed", row
        with np.load(folder / f"{method}-{min(seeds)}" / "shown.npz", allow_pickle=False) as arrays:
            shown[row] = arrays[name]
    images = next(iter(shown.values()))
    columns = len(images) if images.shape[1] < 64 else len(images) // 2
    scale = 0.45 if images.shape[1] < 64 else 0.75
    tall = math.ceil(len(images) / columns) * scale + 0.25
    figure = Figure(figsize=(columns * scale, tall * len(shown)), layout="constrained")
    for axes, (row, images) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
        axes.imshow(image_grid(images, columns=columns, padding=1))
        axes.set_title(ROWS[row].title, fontsize=9, loc="left")
        axes.axis("off")
    _launch.save_figure(figure, path)


def publish(config: Config, run: RunDirectory, reference: Reference, real: Mapping[str, float]) -> dict:
    """Tables and results of what is finished."""
    runs = finished_runs(run.path)
    rows = by_row(runs)
    lines, changes = table(rows), differences(rows)
    about = {
        "data": reference.datasets["train"].source,
        "samples": len(reference.images),
        "features": reference.extract.name,
        "features_fingerprint": reference.extract.fingerprint,
    }
    text = as_markdown(config, lines, changes, real, about)
    part = run.path / ".table.md.part"
    part.write_text(text, encoding="utf-8")
    part.replace(run.path / "table.md")
    _launch.save_csv(lines, run.path / "table.csv")
    return {
        "experiment": "compare",
        "preset": config.preset,
        **about,
        "train_images": len(reference.datasets["train"]),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "runs": sorted(f"{found['method']}-{found['seed']}" for found in runs),
        "table": lines,
        "differences": changes,
        "training_images": dict(real),
        "device": jax.devices()[0].device_kind,
        "versions": _launch.versions(),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains and scores what is missing, then compares all there is."""
    config = _launch.parse(Config, PRESETS, "faces", argv)
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)
    on_log = _launch.load_hook(config.on_log)

    config = dataclasses.replace(config, methods=tuple(m for m in METHODS if m in config.methods))
    channels = 1 if config.image_size == 28 else None
    check_config(config, (config.image_size, config.image_size, channels or 3))

    # Data first: what is wrong with it is said before anything is written.
    datasets = _generator.open_splits(config, config.image_size, channels=channels)
    train, test = datasets["train"], datasets["test"]
    _scores.require_enough(train, test)
    config = _generator.with_scale_from_data(config, train)
    say(f"data: {train.source}: " + ", ".join(f"{len(d):,} {s}" for s, d in datasets.items()))
    extract = _scores.find_features(
        config.features, train, cache_dir=config.cache_dir, steps=config.feature_steps, say=say
    )

    workdir = Path(config.workdir or f"runs/compare/{config.preset}")
    saved = {**_generator.saved_config(config, train), "features_fingerprint": extract.fingerprint}
    wanted = [(method, seed) for seed in range(config.seed, config.seed + config.seeds) for method in config.methods]
    with RunDirectory.open(workdir, saved, resumable_keys=RESUMABLE, tensorboard=False) as run:
        if run.finished and all(f"{method}-{seed}" in run.results["runs"] for method, seed in wanted):
            say(f"{workdir} has these {len(wanted)} runs; ask for other --methods or more --seeds to add to it.")
            _launch.print_result(run.results)
            return 0
        count = min(config.samples, len(test), len(train))
        held_out = np.asarray(test.images[:count])
        reference = Reference(datasets, extract, held_out, extract(held_out))
        real = real_scores(config, reference)
        for index, (method, seed) in enumerate(wanted):
            say(f"run {index + 1} of {len(wanted)}")
            train_and_score(config, method, seed, run.path / f"{method}-{seed}", reference, say, on_log)
            results = publish(config, run, reference, real)
        rows = by_row(finished_runs(run.path))
        draw_comparison(rows, results["table"], real, run.save_figure_path("comparison.png"))
        draw_samples(run.path, rows, run.save_figure_path("samples.png"))
        run.write_results(results)
        write_report(run.path)
        say(f"{(run.path / 'table.md').read_text(encoding='utf-8')}\ntables, figures and report: {run.path}")
        _launch.print_result(results)
    return 0


if __name__ == "__main__":
    _launch.run(main)
