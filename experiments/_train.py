"""What experiments that train a generator share: a resumable run, networks as callables, held-out means."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import _launch
from spread_jax.data import Dataset, Loader
from spread_jax.training import (
    Checkpointer,
    NonFiniteLossError,
    RunDirectory,
    StepRecord,
    StopRequest,
    TrainingInterrupted,
    abstract_state,
    local_copy,
    make_mesh,
    place_batch,
    place_state,
    train,
)


class Trained(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: after the last step, on one device.
      seconds: of this process's part of the run.
      images_per_second: median over its records, or None if there were no steps left.
      waiting_share: mean share of the time spent waiting for data, or None.
      step_share: share of `seconds` spent in train steps; the rest is compilation, data, evaluations, pictures and
        checkpoints. None if there were no steps left.
    """

    state: Any
    seconds: float
    images_per_second: float | None
    waiting_share: float | None
    step_share: float | None


def fit(
    config: Any,
    run: RunDirectory,
    saver: Checkpointer,
    loader: Loader,
    initial_state: Callable[[], Any],
    train_step: Callable,
    evaluate: Callable[[int, Any], tuple[Mapping[str, float], str]],
    *,
    mesh: Mesh,
    say: Callable[..., None],
    headline: Callable[[Mapping[str, float]], str],
    check: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
) -> Trained:
    """Trains from the newest sound checkpoint, or from the start, to `config.steps`.

    Args:
      config: a `GeneratorConfig`, whose `steps` are those of all players.
      run: gets a line of metrics at every record and evaluation.
      saver: gets the state every `save_every` steps.
      loader: batches by step, of this process.
      initial_state: () -> the state at step 0, with `params`.
      train_step: (state, batch) -> (state, metrics).
      evaluate: (step, state) -> (metrics, a sentence for the terminal), every `sample_every` steps; the state is on one
        device, and every process evaluates.
      mesh: where state and batches are placed, as `mesh_of` makes it.
      say: as made by `_launch.talker`.
      headline: metrics -> what of them the terminal shows.
      check: (step, metrics) -> None at every record; raises to stop the run before it saves.

    Raises:
      TrainingInterrupted: a signal asked for it; the state is saved and the user told.
      UsageError: the loss stopped being finite; the message has the last good checkpoint and what to try.
    """
    restored = saver.restore(abstract_state(jax.eval_shape(initial_state), mesh))
    if restored is None:
        state, start_step = place_state(initial_state(), mesh), 0
    else:
        state, start_step = restored.state, restored.step
        say(f"resuming {run.path} after step {start_step}")
    run.truncate_metrics(start_step)
    say(f"run: {run.path}: {parameters(state):,} parameters, {config.steps} steps of {config.batch_size} images")

    rates: list[tuple[float, float]] = []
    timed_steps, stepping = start_step + 1, 0.0  # the first step compiles and is not timed
    began = time.perf_counter()

    def on_record(record: StepRecord) -> None:
        nonlocal timed_steps, stepping
        if record.step > timed_steps:
            stepping += (record.step - timed_steps) * record.seconds_per_step * (1 - record.waiting)
            timed_steps = record.step
        rate = config.batch_size / record.seconds_per_step
        rates.append((rate, record.waiting))
        run.log_metrics(record.step, {**record.metrics, "images_per_second": rate, "waiting_share": record.waiting})
        progress.update(record.step, headline(record.metrics), rate)
        check(record.step, record.metrics)

    def on_evaluate(step: int, state: Any) -> Mapping[str, float]:
        metrics, sentence = evaluate(step, local_copy(state))
        run.log_metrics(step, metrics)
        progress.note(sentence)
        return metrics

    try:
        with (
            StopRequest() as stop,
            _launch.progress(config.steps, start_step, quiet=config.quiet) as progress,
        ):
            if start_step < config.steps:
                state = train(
                    state,
                    train_step,
                    (batch for _, batch in loader.iterate(start_step, place=lambda batch: place_batch(batch, mesh))),
                    start_step=start_step,
                    num_steps=config.steps,
                    on_record=on_record,
                    record_every=config.record_every,
                    on_evaluate=on_evaluate,
                    evaluate_every=config.sample_every,
                    save=lambda step, state, metrics: saver.save(step, state, metrics=metrics),
                    save_every=config.save_every,
                    stop=stop,
                )
    except TrainingInterrupted as interruption:
        saver.wait()
        say(f"{interruption} The state is saved; repeat the command to go on.", always=True)
        raise
    except NonFiniteLossError as error:
        saver.wait()
        last = saver.latest_step
        kept = f"The last good checkpoint is step {last} in {run.checkpoints_path}." if last is not None else ""
        rate = "generator_learning_rate" if config.objective == "spread_gan" else "learning_rate"
        raise _launch.UsageError(
            f"{error} {kept} Nothing after it was saved. "
            f"Try a smaller --{rate.replace('_', '-')} (now {getattr(config, rate)}), "
            f"a larger --noise-scale (now {config.noise_scale}), or --compute-dtype float32, in a new --workdir."
        ) from None
    saver.wait()
    timed = rates[1:] or rates
    seconds = time.perf_counter() - began
    return Trained(
        local_copy(state),
        seconds,
        float(np.median([rate for rate, _ in timed])) if timed else None,
        float(np.mean([waiting for _, waiting in timed])) if timed else None,
        stepping / seconds if timed else None,
    )


def mesh_of(config: Any) -> Mesh:
    """The devices a config asks for; refuses what cannot be divided among them, naming the flag.

    Args:
      config: has `devices`, `model_parallel`, `accumulate` and `batch_size`.
    """
    try:
        mesh = make_mesh(config.devices, model_parallel=config.model_parallel)
    except ValueError as error:
        hint = " To make devices of a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=8."
        raise _launch.UsageError(
            f"--devices {config.devices or 'all'} with --model-parallel {config.model_parallel}: {error}"
            f"{hint if jax.default_backend() == 'cpu' else ''}"
        ) from None
    parts = mesh.shape["data"] * config.accumulate
    if config.batch_size % parts:
        raise _launch.UsageError(
            f"--batch-size must be a multiple of {parts}, the number of parts that {mesh.shape['data']} devices with "
            f"--accumulate {config.accumulate} cut a batch into, got {config.batch_size}."
        )
    return mesh


def parameters(state: Any) -> int:
    """How many numbers the model trains, without those of a learned noise or a discriminator."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def network(module: Any, name: str, params: Any, batch_stats: Any, *, train: bool) -> Callable:
    """A module as a callable; in training it returns (output, {"batch_stats": new ones})."""
    variables = {"params": params[name], "batch_stats": batch_stats[name]}
    return functools.partial(module.apply, variables, train=train, **({"mutable": ["batch_stats"]} if train else {}))


def generator_variables(params: Any, batch_stats: Any) -> dict:
    """The part whose moving average draws the samples."""
    return {"params": params["generator"], "batch_stats": batch_stats["generator"]}


def to_unit(batch: jax.Array) -> jax.Array:
    """uint8 images as float32 in [0, 1]."""
    return batch.astype(jnp.float32) / 255.0


def held_out(
    evaluate_batch: Callable[[np.ndarray, jax.Array], Mapping[str, jax.Array]],
    dataset: Dataset,
    *,
    count: int,
    batch_size: int,
    key: jax.Array,
) -> dict[str, tuple[float, float]]:
    """Means over a split's first images, and their standard errors (NaN of one image).

    Args:
      evaluate_batch: (uint8 batch, key) -> named numbers, each [batch].
      dataset: the split.
      count: how many images, at most.
      batch_size: images at once, at most.
      key: a JAX random key.
    """
    count = min(len(dataset), count)
    size = min(count, batch_size)
    columns, names = [], []
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count  # the last batch wraps to keep its shape
        values = evaluate_batch(np.asarray(dataset.images[rows]), jax.random.fold_in(key, start))
        names = list(values)
        columns.append(np.stack(list(values.values()), axis=1)[: count - start])
    values = np.concatenate(columns).astype(np.float64)
    means = values.mean(axis=0).tolist()
    errors = [column.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan for column in values.T]
    return {name: (mean, float(error)) for name, mean, error in zip(names, means, errors, strict=True)}
