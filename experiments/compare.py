"""Ways to train one generator, compared: the same networks, data and steps, several seeds, means with their errors.

  vae              Gaussian p(x|z) whose standard deviation is the spread noise's; clean images
  fixed            Gaussian spread noise (the delta-VAE)
  laplace          Laplace spread noise of the same standard deviation
  low_rank         Gaussian spread noise with a learned covariance
  transformed      Gaussian spread noise around a learned location
  wae_mmd          Wasserstein autoencoder
  spread_gan       GAN whose critic sees images spread at one scale, which is annealed
  density_ratio    the same critic over many scales of noise at once
  density_ratio_vae  the same with an encoder and the bound at one scale
  score_difference two denoisers over many scales of noise, in place of a critic
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import _table
from spread_jax import models, runtime
from spread_jax.cli import flags, launch
from spread_jax.data import Dataset
from spread_jax.evaluation import save_csv, write_report
from spread_jax.models import (
    LatentDensity,
    Method,
    SettingError,
    Trained,
    evaluation_key,
    fit,
    fit_flow,
    fit_mixture,
    open_splits,
    posteriors,
    sample,
    scores,
    standard_normal,
)
from spread_jax.training import RunDirectory, RunDirectoryError

GAME = {"final_learning_rate_fraction": 0.05, "decay_start": 0.5, "warmup_steps": 0}
# What is trained for each row that is not derived from another's run.
TRAINED: dict[str, Callable[[flags.Parsed], Method]] = {
    "vae": lambda typed: typed.build("elbo", learned_scale=False),
    "fixed": lambda typed: typed.build("spread_elbo"),
    "laplace": lambda typed: typed.build("spread_elbo", "laplace"),
    "low_rank": lambda typed: typed.build("spread_elbo", "low_rank"),
    "transformed": lambda typed: typed.build("spread_elbo", "transformed"),
    "wae_mmd": lambda typed: typed.build("wae_mmd"),
    # Games settle late, and wander before. One scale of noise has to become small: what is finer stays in the samples.
    "spread_gan": lambda typed: typed.build("spread_gan", final_noise_scale=0.05, **GAME),
    "density_ratio": lambda typed: typed.build("density_ratio", **GAME),
    "density_ratio_vae": lambda typed: typed.build("density_ratio_vae", noise_scale=0.25, **GAME),
    "score_difference": lambda typed: typed.build("score_difference", **GAME),
    "learned_sigma": lambda typed: typed.build("elbo", learned_scale=True),
    "constant_sigma": lambda typed: typed.build("spread_elbo", noise_scale=typed.settings["final_noise_scale"]),
    "importance": lambda typed: typed.build("importance"),
}
MethodName = Literal[tuple(TRAINED)]
SHOWN = 20  # samples of each row of samples.png
_DRAWN = 2048  # samples in memory as floats


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how thoroughly."""

    methods: tuple[MethodName, ...] = tuple(TRAINED)
    """What to train; what the folder has already stays in the table."""
    seeds: int = 3
    """How many, counted up from --seed; each decides the order of the data, the initial parameters and all noise."""
    samples: int = 10_000
    """Held-out images at most, and as many samples."""
    features: str | None = None
    """`inception`, or a file made by `spread-jax features`; those of the data, trained if need be, if not given."""
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

    def validate(self) -> None:
        """Refuses numbers that cannot work."""
        lowest = {"samples": scores.FEWEST, **dict.fromkeys(("mixture_components", "flow_steps"), 0)}
        lowest |= dict.fromkeys(("seeds", "feature_steps", "flow_couplings", "latent_examples"), 1)
        for name, minimum in lowest.items():
            if not getattr(self, name) >= minimum:
                raise SettingError(name, f"must be at least {minimum}, got {getattr(self, name)}.")
        if not self.methods:
            raise SettingError("methods", "needs at least one name: " + ", ".join(TRAINED) + ".")


# Settings as of `spread_jax.models.PRESETS`. Images have values in [0, 1]; noise scales are in those units.
FACES: dict[str, Any] = {
    "steps": 1000,
    "width": 8,
    "importance_samples": 5,
    "mirrored": True,
    "generator_learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "noise_decay_every": 70,
    "ema_decay": 0.99,
    "sample_every": 100_000,
    "save_every": 200,
    "keep": 1,
    "held_out_examples": 1000,
}
PRESETS = {
    "faces": FACES,
    "mnist": {
        **FACES,
        "data": "mnist",
        "mirrored": False,
        "image_size": 28,
        "channels": 1,
        "samples": 2000,
        "steps": 600,
        "batch_size": 100,
        "latent_dim": 10,
        "width": 16,
        "final_noise_scale": 0.3,
        "noise_decay_every": 50,
        "descent_steps": 4,
        "noise_learning_rate": 1e-3,
        "mmd_weight": 10.0,
    },
    "digits": {
        **FACES,
        "data": "digits",
        "mirrored": False,
        "seeds": 2,
        "image_size": 28,
        "channels": 1,
        "steps": 300,
        "batch_size": 64,
        "latent_dim": 10,
        "final_noise_scale": 0.3,
        "noise_decay_every": 25,
        "mmd_weight": 10.0,
        "learning_rate": 5e-3,
        "ema_decay": 0.98,
        "save_every": 100,
    },
    "celeba": {
        **FACES,
        **models.PRESETS["published"],
        "sample_every": FACES["sample_every"],
        "mixture_components": 50,
    },
}

# What may differ when a comparison is resumed. Runs that took other steps, or were scored on other images, would not
# compare; which runs there are, and where things are kept, is free.
RESUMABLE = (
    *(f"fit.{name}" for name in ("seed", "record_every", "sample_every", "save_every", "keep")),
    *(f"data.{name}" for name in ("data", "cache_dir")),  # may have moved; pixels are compared by their fingerprint
    *(f"comparison.{name}" for name in ("methods", "seeds", "features", "feature_steps")),
)
# What a run's scores depend on, besides its training.
SCORING = ("samples", "mixture_components", "flow_steps", "flow_couplings", "latent_examples")


class Reference(NamedTuple):
    """What every row is measured against."""

    splits: Mapping[str, Dataset]
    extract: scores.Features
    images: np.ndarray
    features: np.ndarray

    def about(self) -> dict[str, Any]:
        """What a table was made with."""
        return {
            "data": self.splits["train"].source,
            "samples": len(self.images),
            "features": self.extract.name,
            "features_fingerprint": self.extract.fingerprint,
        }


def train_and_score(
    typed: flags.Parsed, method: Method, row: str, seed: int, folder: Path, reference: Reference, on_log: launch.Hook
) -> dict:
    """Trains or resumes one run: its results, with the scores of each row that it gives."""
    comparison: Comparison = typed.extra

    def scored(run: Trained, splits: Mapping[str, Dataset]) -> dict[str, Any]:
        rows, shown = score(comparison, run, row, seed, reference)
        rows[row] |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(run.state.params)), **speed(run)}
        part = folder / ".shown.npz.part"
        with open(part, "wb") as file:
            np.savez(file, **shown)
        part.replace(folder / "shown.npz")
        return {"method": row, "rows": rows}

    run = fit(
        method,
        reference.splits,
        folder,
        dataclasses.replace(typed.fit, seed=seed),
        data_settings=typed.data,
        about={
            "experiment": "compare",
            "preset": typed.preset,
            "row": row,
            "features_fingerprint": reference.extract.fingerprint,
            **{name: getattr(comparison, name) for name in SCORING},
        },
        extra_results=scored,
        pictures=typed.run.pictures,
        real_images=typed.run.report_real_images,
        tensorboard=False,
        on_log=on_log,
        quiet=typed.run.quiet,
    )
    return run.results


def speed(run: Trained) -> dict[str, float]:
    """From every record of a run, also those before an interruption; compilation and evaluation apart."""
    rates = [r["images_per_second"] for r in run.records if math.isfinite(r.get("images_per_second", math.nan))]
    if not rates:
        return {}
    rate, images = float(np.median(rates)), run.results["steps_of_all_players"] * run.results["batch_size"]
    return {"images_per_second": rate, "training_seconds": images / rate}


def score(
    comparison: Comparison, run: Trained, row: str, seed: int, reference: Reference
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Scores and shown samples of the rows that a run gives: its own, and those of other samplers.

    Args:
      comparison: how thoroughly.
      run: after its last step, with the held-out numbers among its results.
      row: its own.
      seed: its own.
      reference: what samples are measured against.
    """
    key = evaluation_key(seed)
    prior = standard_normal(run.method.latent_dim)
    own = {name: value for name, value in run.results.items() if name.startswith("held_out_")}
    del own["held_out_images"]
    for bound in ("held_out_importance_bound_nats", "held_out_elbo_nats"):
        if bound in own:
            own.setdefault("held_out_bound_nats", own[bound])
    samplers: dict[str, tuple[LatentDensity, dict[str, Any]]] = {row: (prior, {})}
    extra: dict[str, dict[str, float]] = {row: own}
    densities = latent_densities(comparison, run, row, seed, reference.splits)
    if densities:
        test = posteriors(run, reference.splits["test"], count=comparison.latent_examples, seed=3 * seed + 2)
        unseen = test.draw(jax.random.fold_in(key, 4))
        for name, density in {row: prior, **densities}.items():
            samplers[name] = (density, {})
            extra.setdefault(name, {})["latent_log_density_nats"] = float(density.log_density(unseen).mean())
    if row == "fixed":
        samplers["last_step"] = (prior, {"last_step": True})
    rows, shown = {}, {}
    for name, (density, options) in samplers.items():
        samples = draw(run, density.sample(len(reference.images), jax.random.fold_in(key, 0)), **options)
        measured = scores.sample_scores(samples, reference.images, reference.features, reference.extract)
        rows[name] = {**measured, **extra.get(name, {})}
        shown[name] = draw(run, density.sample(SHOWN, key), **options)
    return rows, shown


def latent_densities(
    comparison: Comparison, run: Trained, row: str, seed: int, splits: Mapping[str, Dataset]
) -> dict[str, LatentDensity]:
    """{row: a density fitted to the aggregate posterior}: a mixture of every encoder's, of `fixed` also a flow."""
    with_mixture = comparison.mixture_components and run.has_encoder
    with_flow = comparison.flow_steps and row == "fixed"
    if not (with_mixture or with_flow):
        return {}
    count, found = comparison.latent_examples, {}
    train = posteriors(run, splits["train"], count=count, seed=3 * seed)
    if with_mixture:
        found[f"{row}_mixture"] = fit_mixture(train, components=comparison.mixture_components, seed=seed)
    if with_flow:
        validation = posteriors(run, splits["validation"], count=count, seed=3 * seed + 1)
        found["flow"] = fit_flow(
            train, validation, seed=seed, steps=comparison.flow_steps, couplings=comparison.flow_couplings
        )
    return found


def draw(run: Trained, latents: np.ndarray, **options: Any) -> np.ndarray:
    """uint8 images of latents, as a file would hold them."""
    parts = [latents[start : start + _DRAWN] for start in range(0, len(latents), _DRAWN)]
    return np.concatenate([scores.to_bytes(sample(run, len(z), latents=z, **options)) for z in parts])


def real_scores(reference: Reference) -> dict[str, float]:
    """The scores of as many training images, which a perfect generator would get."""
    train = reference.splits["train"]
    rows = scores.random_rows(len(train), len(reference.images), 0)
    return scores.sample_scores(np.asarray(train.images[rows]), reference.images, reference.features, reference.extract)


def finished_runs(folder: Path) -> list[dict]:
    """The results of every finished run of a comparison, in the order of ROWS and of seeds."""
    found = []
    for method in TRAINED:
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


def publish(typed: flags.Parsed, folder: Path, reference: Reference, real: Mapping[str, float]) -> tuple[dict, list]:
    """Tables and results of what is finished, and the runs' own results."""
    runs = finished_runs(folder)
    rows = _table.by_row(runs)
    lines, changes = _table.table(rows), _table.differences(rows)
    about = {**reference.about(), "steps": typed.fit.steps, "batch_size": typed.fit.batch_size}
    part = folder / ".table.md.part"
    part.write_text(_table.as_markdown(lines, changes, real, about), encoding="utf-8")
    part.replace(folder / "table.md")
    save_csv(lines, folder / "table.csv")
    results = {
        "experiment": "compare",
        "preset": typed.preset,
        **about,
        "train_images": len(reference.splits["train"]),
        "runs": sorted(f"{found['method']}-{found['seed']}" for found in runs),
        "table": lines,
        "differences": changes,
        "training_images": dict(real),
        "device": jax.devices()[0].device_kind,
        "versions": runtime.versions(),
    }
    return results, runs


def methods_of(typed: flags.Parsed, train: Dataset, networks: Mapping[str, Any]) -> dict[str, Method]:
    """{row: what is trained}, of the rows that were asked for.

    Args:
      typed: the flags.
      train: the training split, whose pixels may decide the noise scale.
      networks: Flax modules in place of the usual ones, by part.
    """
    shared = typed.build("spread_elbo").with_data(train.images)
    scale = {name: getattr(shared, name) for name in ("noise_scale", "final_noise_scale")}
    typed = typed._replace(settings={**typed.settings, **scale, "noise_scale_from_data": None})
    found = {}
    for row, make in TRAINED.items():
        if row in typed.extra.methods:
            method = dataclasses.replace(make(typed), image_shape=tuple(train.image_shape))
            own = {part: networks[part] for part in method.modules if part in networks}
            found[row] = dataclasses.replace(method, networks=own)
    return found


def main(argv: list[str] | None = None, *, networks: Mapping[str, Any] | None = None) -> int:
    """Trains and scores what is missing, then compares all there is.

    Args:
      argv: the arguments; those of the process if None.
      networks: Flax modules in place of the usual ones, by part.
    """
    typed = flags.parse_training(
        argv, prog="python -m experiments.compare", description=__doc__, presets=PRESETS, default="faces",
        extra=Comparison(), all_methods=True,
    )  # fmt: skip
    comparison: Comparison = typed.extra
    say, on_log = launch.talker(quiet=typed.run.quiet), launch.load_hook(typed.run.on_log)
    runtime.configure()

    # Data and settings first: what is wrong with them is said before anything is written.
    comparison.validate()
    typed.fit.validate()
    splits = open_splits(typed.data, quiet=typed.run.quiet)
    train, test = splits["train"], splits["test"]
    scores.require_enough(train, test)
    methods = methods_of(typed, train, networks or {})
    for method in methods.values():
        method.validate()
    say(f"data: {train.source}: " + ", ".join(f"{len(d):,} {s}" for s, d in splits.items()))
    extract = scores.find_features(
        comparison.features, train, cache_dir=typed.data.cache_dir, steps=comparison.feature_steps, say=say
    )

    workdir = Path(typed.run.workdir or f"runs/compare/{typed.preset}")
    config = {
        "experiment": "compare",
        "preset": typed.preset,
        "settings": typed.settings,
        "fit": typed.fit,
        "data": typed.data,
        "comparison": comparison,
        "data_fingerprint": train.fingerprint,
        "features_fingerprint": extract.fingerprint,
    }
    wanted = [(row, seed) for seed in range(typed.fit.seed, typed.fit.seed + comparison.seeds) for row in methods]
    with RunDirectory.open(workdir, config, resumable_keys=RESUMABLE, tensorboard=False) as folder:
        if folder.finished and all(f"{row}-{seed}" in folder.results["runs"] for row, seed in wanted):
            if not (folder.path / "report.html").exists():  # a crash has cost it
                write_report(folder.path, real_images=typed.run.report_real_images)
            say(f"{workdir} has these {len(wanted)} runs; ask for other --methods or more --seeds to add to it.")
            launch.print_result(folder.results)
            return 0
        count = min(comparison.samples, len(test), len(train))
        held_out = np.asarray(test.images[:count])
        reference = Reference(splits, extract, held_out, extract(held_out))
        real = real_scores(reference)
        finished = {f"{found['method']}-{found['seed']}" for found in finished_runs(folder.path)}
        for index, (row, seed) in enumerate(wanted):
            name = f"{row}-{seed}"
            if name not in finished:
                say(f"run {index + 1} of {len(wanted)}: {row}, seed {seed}")
                hook = launch.prefixed(on_log, name)
                found = train_and_score(typed, methods[row], row, seed, folder.path / name, reference, hook)
                say(f"{row}, seed {seed}: Fréchet distance {found['rows'][row]['frechet_distance']:.3f}")
            results, runs = publish(typed, folder.path, reference, real)
        rows = _table.by_row(runs)
        _table.draw_comparison(
            rows,
            results["table"],
            real,
            folder.save_figure_path("comparison.png", caption="Every metric, method and seed."),
        )
        _table.draw_samples(
            folder.path,
            runs,
            folder.save_figure_path("samples.png", caption="Samples of every row, of its first seed."),
        )
        folder.write_results(results)
        write_report(folder.path, real_images=typed.run.report_real_images)
        say(f"{(folder.path / 'table.md').read_text(encoding='utf-8')}\ntables, figures and report: {folder.path}")
        launch.print_result(results)
    return 0


if __name__ == "__main__":
    launch.run_program(main)
