"""`fit`: trains any method in a run's folder, or resumes it there, or says that it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spread_jax._files import read_json
from spread_jax._progress import Progress, tell
from spread_jax.data import Dataset
from spread_jax.data.places import remember
from spread_jax.errors import UsageError
from spread_jax.evaluation import save_curves, write_report
from spread_jax.models._saved import to_json
from spread_jax.models.evaluate import fitted_latents
from spread_jax.models.latents import LatentMixture
from spread_jax.models.method import Method, SettingError
from spread_jax.models.pictures import draw_fitted, draw_pictures
from spread_jax.models.run import Programs, Trained, held_out, latents_path, saved_latents
from spread_jax.models.settings import SPLITS, DataSettings, FitSettings, open_splits
from spread_jax.runtime import first_process, versions
from spread_jax.training import (
    Checkpointer,
    NonFiniteLossError,
    RunDirectory,
    RunDirectoryError,
    StepRecord,
    StopRequest,
    TrainingInterrupted,
    abstract_state,
    local_copy,
    make_train_step,
    place_batch,
    place_state,
    read_run,
    train,
)

__all__ = ["RESUMABLE", "evaluation_key", "fit", "shown_latents"]

LOCAL = ("data.cache_dir",)  # a place on this machine, which no folder from elsewhere may name
# What may differ when a run is resumed: these change what is recorded and kept, not what is computed.
RESUMABLE = (
    *(f"fit.{name}" for name in (
        "steps", "devices", "model_parallel", "record_every", "sample_every", "save_every", "keep", "held_out_examples",
        "mixture_samples",
    )),
    "data.data",  # may have moved; its pixels are compared by their fingerprint
)  # fmt: skip


def fit(
    method: Method,
    data: str | os.PathLike | DataSettings | Mapping[str, Dataset],
    run_dir: str | os.PathLike,
    settings: FitSettings = FitSettings(),  # noqa: B008 (frozen)
    *,
    data_settings: DataSettings | None = None,
    about: Mapping[str, Any] | None = None,
    resumable: tuple[str, ...] = (),
    pictures: bool = True,
    real_images: bool = True,
    tensorboard: bool = True,
    extra_results: Callable[[Trained, Mapping[str, Dataset]], Mapping[str, Any]] | None = None,
    on_log: Callable[[int, Mapping[str, float]], object] | None = None,
    quiet: bool = False,
) -> Trained:
    """Trains a method in a run's folder, or resumes it there; of a finished run it reads what is there.

    The folder gets config.json, metrics.jsonl, TensorBoard events, sealed checkpoints, pictures, results.json and
    report.html. A run that was interrupted, or killed, continues from its newest sound checkpoint to the same bits.

    Args:
      method: what to train, such as `DeltaVae(latent_dim=32)`; its image shape is taken from the data.
      data: a name or a path as `open_dataset` takes it, `DataSettings`, or the splits themselves.
      run_dir: the run's folder; it is made if it does not exist.
      settings: how long, on how many devices, and what is kept.
      data_settings: where splits that are given are from, to be kept in config.json.
      about: what else is kept in config.json, and must be the same when the run is resumed.
      resumable: names in `about` that may differ then.
      pictures: whether to draw samples, reconstructions, interpolations and curves.
      real_images: whether the report shows images of the data set.
      tensorboard: whether to write TensorBoard events.
      extra_results: (trained, splits) -> what else belongs into results.json; `trained.results` has the rest by then.
      on_log: called with the step and the numbers of each record.
      quiet: whether to say nothing.

    Returns:
      The method and its state after the last step.

    Raises:
      SettingError: a setting cannot work; the message names it.
      DatasetError: the data cannot be opened.
      RunDirectoryError: the folder cannot be used, or holds a run with other settings.
      UsageError: the loss stopped being finite; the message has the last good checkpoint and what to try.
      TrainingInterrupted: a signal asked for it; the state is saved and the user told.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from spread_jax.data import Dataset
      >>> from spread_jax.models import DeltaVae, FitSettings, fit, open_run, reconstruct, sample
      >>> images = np.zeros((8, 16, 16, 1), np.uint8)
      >>> splits = {name: Dataset.from_array(images) for name in ("train", "validation", "test")}
      >>> run = fit(DeltaVae(latent_dim=2, width=2), splits, tempfile.mkdtemp(),
      ...           FitSettings(steps=2, batch_size=4), pictures=False, tensorboard=False, quiet=True)
      >>> sample(run, 3).shape, reconstruct(open_run(run.path), images)[1].shape
      ((3, 16, 16, 1), (8, 16, 16, 1))
    """
    say = tell if first_process() and not quiet else lambda sentence: None
    settings.validate()
    mesh = settings.mesh()
    # Data first: what is wrong with it is said before anything is written.
    if isinstance(data, Mapping):
        splits = dict(data)
        if missing := [split for split in SPLITS if split not in splits]:
            raise SettingError("data", f"must have the splits {', '.join(SPLITS)}; {missing[0]} is missing.")
        data = data_settings or DataSettings(splits["train"].name)
    else:
        data = data if isinstance(data, DataSettings) else DataSettings(os.fspath(data))
        splits = open_splits(data, quiet=quiet)
        remember(splits["train"], data.data, cache_dir=data.cache_dir)
        say(f"data: {splits['train'].source}: " + ", ".join(f"{len(d):,} {s}" for s, d in splits.items()))
    train_split = splits["train"]
    method = dataclasses.replace(method, image_shape=tuple(train_split.image_shape))
    method.validate()
    method = method.with_data(train_split.images)
    if settings.batch_size // settings.accumulate < method.smallest_batch:
        raise SettingError(
            "batch_size",
            f"must be at least {method.smallest_batch * settings.accumulate} for {method.title}, got "
            f"{settings.batch_size}: its loss compares sets of images.",
        )
    settings.loader(train_split)  # refuses a batch that does not fit
    config = {
        **(about or {}),
        "seed": settings.seed,
        "method": to_json(method),
        "fit": to_json(settings),
        "data": to_json(data),
        "data_fingerprint": train_split.fingerprint,
        "held_out_fingerprints": {split: splits[split].fingerprint for split in SPLITS if split != "train"},
    }
    planned = _planned_steps(Path(run_dir))
    if planned is not None and method.turns.total_steps(settings.steps) < _saved_step(Path(run_dir)):
        config["fit"]["steps"] = planned  # nothing is trained, so the run is still one of as many steps as before
    with RunDirectory.open(
        Path(run_dir),
        config,
        resumable_keys=(*RESUMABLE, *resumable),
        local_keys=LOCAL,
        tensorboard=tensorboard,
        on_log=on_log,
    ) as folder:
        job = _Job(method, settings, splits, folder, mesh, say, quiet, pictures, planned)
        done = folder.finished_steps
        if done >= settings.steps:
            if pictures and not (folder.path / "report.html").exists():  # a crash has cost it
                write_report(folder.path, real_images=real_images)
            say(f"{folder.path} is finished ({done} steps); raise the steps to continue.")
            trained = job.as_trained(job.restored())
            trained.results, trained.records = folder.results, folder.read_metrics()
            trained.latents = saved_latents(latents_path(folder.path, int(trained.state.step)), method)
            return trained
        trained, speed = job.train()
        results = {
            **(about or {}),
            "seed": settings.seed,
            "objective": method.name,
            **({"noise": method.noise.name} if hasattr(method, "noise") else {}),
            "data": train_split.source,
            "train_images": len(train_split),
            "held_out_images": min(len(splits["test"]), settings.held_out_examples),
            "steps": settings.steps,
            "steps_of_all_players": int(trained.state.step),
            "batch_size": settings.batch_size,
            "parameters": parameters(method, trained.state),
            "noise_scale": None if (scale := jax.jit(method.noise_scale_of)(trained.state)) is None else float(scale),
            **speed,
            **{f"held_out_{name}": value for name, value in job.held_out(trained, "test").items()},
            **({f"last_{name}_gain_nats": float(gain) for name, gain in trained.state.gain.items()}),
            "device": jax.devices()[0].device_kind,
            "devices": settings.devices or jax.device_count(),
            "processes": jax.process_count(),
            "versions": versions(),
        }
        trained.results, trained.records = results, folder.read_metrics()
        if method.mixture_latents or (settings.mixture_samples and trained.has_encoder):
            trained.latents = job.fitted(trained)
            folder.write_file(latents_path(folder.path, int(trained.state.step)).name, trained.latents.to_bytes())
        if pictures:
            job.draw(trained)
            if trained.latents is not None and not method.mixture_latents:
                draw_fitted(trained, folder, trained.latents.sample(64, job.key))
            title = ", ".join(str(part) for part in (config.get("preset"), f"seed {settings.seed}") if part)
            if panels := _panels(method, trained.records):
                save_curves(
                    trained.records,
                    panels,
                    folder.save_figure_path("curves.png", caption="Metrics against the step.", section="Curves"),
                    title=title,
                )
        if extra_results is not None:
            results |= extra_results(trained, splits)
        folder.write_results(results)
        if pictures:
            write_report(folder.path, real_images=real_images)
            figures = sorted(path.name for path in folder.path.glob("*.png"))
            say(f"figures: {folder.path}/{', '.join(figures)}; all in report.html")
        return trained


def evaluation_key(seed: int) -> jax.Array:
    """The random key of held-out numbers and pictures.

    Example:
      >>> evaluation_key(0).shape
      ()
    """
    return jax.random.fold_in(jax.random.key(seed), 0x5EED)


def shown_latents(seed: int, latent_dim: int, num: int = 64) -> np.ndarray:
    """The latents [num, Z] whose images are shown, the same throughout a run and under every method.

    Example:
      >>> shown_latents(0, latent_dim=3, num=2).shape
      (2, 3)
    """
    return np.asarray(jax.random.normal(evaluation_key(seed), (num, latent_dim)))


def parameters(method: Method, state: Any) -> int:
    """How many numbers the model trains, without those of other players.

    Example:
      >>> from spread_jax.models import DeltaVae
      >>> method = DeltaVae(image_shape=(16, 16, 1), latent_dim=2, width=2)
      >>> parameters(method, jax.eval_shape(lambda: method.initial_state(jax.random.key(0), 1)))
      940
    """
    moved = {part: state.params[part] for part in method.players(1)[0].moves}
    return sum(leaf.size for leaf in jax.tree.leaves(moved))


def _planned_steps(run_dir: Path) -> int | None:
    """The steps that a run was to have when it was started or resumed last."""
    try:
        steps = read_json(run_dir / "config.json")["fit"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a new folder, or one that `RunDirectory.open` will refuse
    return steps if type(steps) is int else None


def _panels(method: Method, records: list[Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """The method's panels that a run has points for; what is 0 throughout is not drawn."""
    has = {name for record in records for name, value in record.items() if value}
    kept = {label: {n: text for n, text in series.items() if n in has} for label, series in method.curves.items()}
    return {label: series for label, series in kept.items() if series}


def _saved_step(run_dir: Path) -> int:
    """The newest step of a run's folder that has a checkpoint; 0 of none."""
    with contextlib.suppress(RunDirectoryError), read_run(run_dir).checkpointer() as saver:
        return saver.latest_step or 0
    return 0  # no folder of a run yet, or one that `RunDirectory.open` will refuse


class _Job:
    """One call of `fit`: what its parts share."""

    def __init__(self, method, settings, splits, folder, mesh, say, quiet, pictures, planned):
        self.method, self.settings, self.splits, self.folder = method, settings, splits, folder
        self.mesh, self.say, self.quiet, self.pictures = mesh, say, quiet, pictures
        self.planned = planned
        self.programs = Programs(method)
        self.key = evaluation_key(settings.seed)
        self.num_steps = method.turns.total_steps(settings.steps)

    def initial_state(self):
        return self.programs.initial_state(jax.random.key(self.settings.seed), self.settings.steps)

    def abstract(self):
        return jax.eval_shape(lambda: self.method.initial_state(jax.random.key(0), self.settings.steps))

    def saver(self) -> Checkpointer:
        metric, mode = self.method.best_metric or (None, "max")
        best = metric and f"validation_{metric}"
        return self.folder.checkpointer(keep=self.settings.keep, best_metric=best, best_mode=mode)

    def restored(self):
        """The state of the newest checkpoint."""
        with self.saver() as saver:
            return saver.restore(self.abstract()).state

    def held_out(self, trained: Trained, split: str) -> dict[str, float]:
        settings = self.settings
        return held_out(
            trained, self.splits[split], count=settings.held_out_examples, batch_size=settings.batch_size, key=self.key
        )

    def fitted(self, trained: Trained) -> LatentMixture:
        return fitted_latents(trained, self.splits["train"], seed=self.settings.seed)

    def draw(self, trained: Trained) -> None:
        if self.method.mixture_latents:
            latents = (trained.latents or self.fitted(trained)).sample(64, self.key)
        else:
            latents = shown_latents(self.settings.seed, self.method.latent_dim)
        draw_pictures(trained, self.folder, np.asarray(self.splits["validation"].images[:12]), latents, self.key)

    def as_trained(self, state) -> Trained:
        return Trained(self.method, state, path=self.folder.path, programs=self.programs)

    def evaluate(self, step: int, state: Any) -> dict[str, float]:
        trained = self.as_trained(local_copy(state))
        numbers = self.held_out(trained, "validation")
        self.method.check_state(step, trained.state)
        told = [f"step {step}: validation {self.method.summary(numbers)}"]
        told += [f"last turn of the {name} {float(gain):+.2f} nats" for name, gain in trained.state.gain.items()]
        if self.pictures:
            self.draw(trained)
            told.append(f"{self.folder.path}/samples.png")
        metrics = {f"validation_{name}": value for name, value in numbers.items()}
        advice = self.method.advice(numbers, self.folder.read_metrics()) if first_process() else ()
        self.folder.log_metrics(step, metrics)
        self.progress.note("; ".join(told))
        for sentence in advice:
            self.progress.note(f"step {step}: {sentence}")
        return metrics

    def train(self) -> tuple[Trained, dict[str, float | None]]:
        """Trains from the newest sound checkpoint, or from the start: the generator, and how fast that was."""
        with self.saver() as saver:
            restored = saver.restore(abstract_state(self.abstract(), self.mesh))
            start = 0 if restored is None else restored.step
            if restored is None:
                state = place_state(self.initial_state(), self.mesh)
            else:
                state = restored.state
                settings = self.settings
                if start > self.num_steps:
                    stands = self.method.turns.own_steps(0, start)
                    raise SettingError("steps", f"must be at least {stands}, where the run is, got {settings.steps}.")
                self.say(f"resuming {self.folder.path} after step {start}")
                self.tell_of_other_steps(start)
            self.folder.truncate_metrics(start)
            count, settings = parameters(self.method, state), self.settings
            self.say(
                f"run: {self.folder.path}: {count:,} parameters, {self.num_steps} steps of {settings.batch_size} images"
            )
            state, speed = self.steps(saver, state, start)
        return self.as_trained(local_copy(state)), speed

    def tell_of_other_steps(self, start: int) -> None:
        """A rate that decays over the steps of a run was another until now, if the run was to have other steps."""
        was, now = self.planned, self.settings.steps
        if was not in (None, now) and self.method.final_learning_rate_fraction < 1:
            self.say(
                f"the learning rate had decayed over {was} steps so far: from step {start} on it follows the decay of "
                f"{now} steps, so the result is not that of {now} steps at once."
            )

    def steps(self, saver: Checkpointer, state: Any, start: int) -> tuple[Any, dict[str, float | None]]:
        settings, folder, num_steps = self.settings, self.folder, self.num_steps
        step = make_train_step(
            self.method.players(settings.steps),
            ema_decay=self.method.ema_decay,
            averaged=self.method.generator_variables,
            accumulate=settings.accumulate,
            mesh=self.mesh,
        )
        rates: list[tuple[float, float]] = []
        timed_steps, stepping = start + 1, 0.0  # the first step compiles and is not timed
        began = time.perf_counter()

        def on_record(record: StepRecord) -> None:
            nonlocal timed_steps, stepping
            if record.step > timed_steps:
                stepping += (record.step - timed_steps) * record.seconds_per_step * (1 - record.waiting)
                timed_steps = record.step
            rate = settings.batch_size / record.seconds_per_step
            rates.append((rate, record.waiting))
            speed = {"images_per_second": rate, "waiting_share": record.waiting}
            folder.log_metrics(record.step, {**record.metrics, **speed})
            headline = self.method.headline(record.metrics)
            self.progress.update(record.step, num_steps, f"{headline}, {rate:.0f} images/s")
            self.method.check(record.step, record.metrics)

        batches = settings.loader(self.splits["train"]).iterate(start, place=lambda b: place_batch(b, self.mesh))
        try:
            # Closed whatever happens, or its thread would live as long as somebody keeps the exception.
            with (
                contextlib.closing(batches),
                StopRequest() as stop,
                Progress("step", quiet=self.quiet) as self.progress,
            ):
                if start < num_steps:
                    state = train(
                        state,
                        step,
                        (batch for _, batch in batches),
                        start_step=start,
                        num_steps=num_steps,
                        on_record=on_record,
                        record_every=settings.record_every,
                        on_evaluate=self.evaluate,
                        evaluate_every=settings.sample_every,
                        save=lambda step, state, metrics: saver.save(step, state, metrics=metrics),
                        save_every=settings.save_every,
                        stop=stop,
                    )
        except TrainingInterrupted as interruption:
            saver.wait()
            if first_process():
                tell(f"{interruption} The state is saved; repeat the command to continue.")
            raise
        except NonFiniteLossError as error:
            saver.wait()
            raise UsageError(self.told_of_no_number(error, saver)) from None
        saver.wait()
        timed = rates[1:] or rates
        seconds = time.perf_counter() - began
        return state, {
            "images_per_second": float(np.median([rate for rate, _ in timed])) if timed else None,
            "waiting_share": float(np.mean([waiting for _, waiting in timed])) if timed else None,
            "step_share": stepping / seconds if timed else None,
            "seconds": seconds,
        }

    def told_of_no_number(self, error: NonFiniteLossError, saver: Checkpointer) -> str:
        last, method = saver.latest_step, self.method
        kept = f"The last good checkpoint is step {last} in {self.folder.checkpoints_path}." if last is not None else ""
        rates = [n for n in ("learning_rate", "generator_learning_rate", "critic_learning_rate") if hasattr(method, n)]
        told = " and ".join(f"--{name.replace('_', '-')} (now {getattr(method, name)})" for name in rates)
        scale = f", a larger --noise-scale (now {method.noise_scale})" if hasattr(method, "final_noise_scale") else ""
        return (
            f"{error} {kept} Nothing after it was saved. Try a smaller {told}{scale}, or --compute-dtype float32, in a "
            "new run's folder."
        )
