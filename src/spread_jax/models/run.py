"""A trained generator: what `fit` returns and `open_run` reads from a folder, and what can be done with it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._files import read_json, reason
from spread_jax.data import Dataset
from spread_jax.errors import UsageError
from spread_jax.models._saved import method_from_json
from spread_jax.models.latents import LatentMixture
from spread_jax.models.method import Encoded, Method, to_unit
from spread_jax.runtime import jit_for_few_calls
from spread_jax.training import RunDirectoryError, TrainState, read_run

__all__ = ["Programs", "Trained", "encode", "held_out", "open_run", "reconstruct", "sample"]

_BATCH = 64


class Programs:
    """A method's functions, each compiled once, when it is first called.

    Args:
      method: the method.

    Attributes:
      method: the method.
    """

    def __init__(self, method: Method):
        self.method = method

    @functools.cached_property
    def initial_state(self) -> Callable:
        """(key, num_steps) -> the state at step 0."""
        compiled = functools.lru_cache(
            lambda num_steps: jit_for_few_calls(lambda key: self.method.initial_state(key, num_steps))
        )
        return lambda key, num_steps: compiled(num_steps)(key)

    @functools.cached_property
    def generate(self) -> Callable:
        """(generator variables, z [n, Z]) -> images [n, *image] in [0, 1]."""
        return jit_for_few_calls(self.method.generate)

    @functools.cached_property
    def evaluate(self) -> Callable:
        """(state, images, key) -> named numbers, each [n]."""
        return jit_for_few_calls(lambda state, x, key: self.method.evaluate(state, to_unit(x), key=key))

    @functools.cached_property
    def encode(self) -> Callable:
        """(state, images, key) -> (Encoded, g of the mean)."""

        def run(state, x, key):
            found = self.method.encode(state, to_unit(x), key=key)
            variables = self.method.generator_variables(state.params, state.variables)
            return found, self.method.generate(variables, found.mean)

        return jit_for_few_calls(run)


def saved_config(folder: Path) -> dict[str, Any]:
    """A run's config.json as it is, which may come from anywhere; {} if it cannot be read."""
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}


class Trained:
    """A method and the state that training has brought it to.

    Attributes:
      method: what was trained.
      state: its state, on one device.
      path: the run's folder, or None.
      results: what was found at the end of training; {} of a run that has not ended.
      latents: the density of z that samples are drawn from; None for the prior N(0, I).
      records: the lines of metrics.jsonl, of what `fit` returned; [] of a run that was read from its folder.
      programs: the method's compiled functions.
    """

    def __init__(
        self,
        method: Method,
        state: TrainState,
        *,
        path: Path | None = None,
        results: Mapping[str, Any] | None = None,
        latents: LatentMixture | None = None,
        programs: Programs | None = None,
    ):
        self.method, self.state, self.path, self.latents = method, state, path, latents
        self.results = dict(results or {})
        self.records: list[dict[str, Any]] = []
        self.programs = programs or Programs(method)

    @property
    def has_encoder(self) -> bool:
        """Whether images can be encoded and reconstructed."""
        return "encoder" in self.method.parts

    def __repr__(self) -> str:
        return f"Trained({self.method.name}, step {int(self.state.step)}, {self.path})"


def open_run(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    method: Method | None = None,
    networks: Mapping[str, Any] | None = None,
) -> Trained:
    """A run's generator from its folder.

    Args:
      path: the folder that `fit` was given, finished or not.
      step: of the checkpoint to read; the newest sound one if None.
      method: what was trained, if it is a method of your own; read from the folder if None.
      networks: your own modules that it was trained with, by part.

    Returns:
      The method and its state.

    Raises:
      UsageError: it is not the folder of such a run, or another method's or other networks', or has no sound
        checkpoint.
      CheckpointError: the step that was asked for is damaged or missing.
    """
    from spread_jax.models import METHODS

    folder = Path(path)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UsageError(
            f"{path} is not a run's folder: it has no config.json. Train one first, as with `spread-jax train`, "
            "and pass the folder it prints."
        )
    try:
        found = read_run(folder)
        saved = found.config
        if method is None:
            method = method_from_json(saved["method"], METHODS, networks or {})
        elif saved["method"]["name"] != method.name:
            raise ValueError(f"it trained {saved['method']['name']!r}, and the method given is {method.name!r}")
        method.validate()
        programs = Programs(method)
        abstract = jax.eval_shape(lambda: method.initial_state(jax.random.key(0), 1))
    except (
        RunDirectoryError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"{config_path} is not the config of a run that trains a generator: {problem}.") from None
    with found.checkpointer() as saver:
        restored = saver.restore(abstract, step=step)
    if restored is None:
        raise UsageError(f"{path} has no checkpoint yet: train it, or wait for its first one.")
    latents = saved_latents(latents_path(folder, int(restored.state.step)), method)
    return Trained(method, restored.state, path=folder, results=found.results, latents=latents, programs=programs)


def latents_path(folder: Path, step: int) -> Path:
    """Where the density of latents of a step is kept, of a run that has one."""
    return folder / f"latents_{step:06d}.npz"


def saved_latents(path: Path, method: Method) -> LatentMixture | None:
    """The density of latents in a run's folder; None where there is none."""
    remedy = "Remove it, and `spread-jax sample --latents mixture` fits it again."
    try:
        found = LatentMixture.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be used: {reason(error)} {remedy}") from None
    if found.means.shape[1] != method.latent_dim:
        raise UsageError(
            f"{path} is of another run: its latents have {found.means.shape[1]} dimensions, and this run's have "
            f"{method.latent_dim}. {remedy}"
        )
    return found


def sample(
    run: Trained | str | os.PathLike,
    num: int,
    *,
    seed: int = 0,
    latents: np.ndarray | Callable[[int, jax.Array], np.ndarray] | Literal["prior"] | None = None,
    truncation: float = 1.0,
    last_step: bool = False,
) -> np.ndarray:
    """Images x = g(z) by the generator's moving average.

    Args:
      run: what `fit` or `open_run` returned, or a run's folder.
      num: how many.
      seed: of the latents; image i of a seed is the same whatever the number drawn.
      latents: z [num, Z], or a sampler (num, key) -> z, such as `LatentDensity.sample`, or "prior" for N(0, I). That of
        the run if not given: `run.latents`, or the prior where that is None.
      truncation: in (0, 1], what standard deviations of the prior, or of the run's own mixture, are multiplied by.
        Below 1 fewer samples are odd, and they are less varied.
      last_step: draw with the networks of the last step in place of their moving average.

    Returns:
      float32 [num, height, width, channels] in [0, 1].

    Raises:
      ValueError: a number is out of range, or latents of another shape.
    """
    run = as_trained(run)
    if num < 1 or seed < 0:
        raise ValueError(f"num must be at least 1 and seed at least 0, got {num} and {seed}.")
    if not 0 < truncation <= 1:
        raise ValueError(f"truncation must be in (0, 1], got {truncation}.")
    if latents is None and run.latents is not None:
        latents, truncation = run.latents.narrowed(truncation).sample, 1.0
    if latents is None or isinstance(latents, str):
        if latents not in (None, "prior"):
            raise ValueError(f'latents must be "prior", an array or a sampler, got {latents!r}.')
        latents, truncation = truncation * prior_latents(run.method.latent_dim, num, seed), 1.0
    if truncation < 1:
        raise ValueError(f"truncation must be 1 for latents of your own, got {truncation}: narrow these yourself.")
    if callable(latents):
        latents = latents(num, jax.random.key(seed))
    latents = np.asarray(latents, np.float32)
    if latents.shape != (num, run.method.latent_dim):
        raise ValueError(f"latents must have shape {(num, run.method.latent_dim)}, got {latents.shape}.")
    state = run.state
    variables = run.method.generator_variables(state.params, state.variables) if last_step else state.ema
    return in_batches(lambda z: (run.programs.generate(variables, z),), latents)[0]


def prior_latents(latent_dim: int, num: int, seed: int) -> np.ndarray:
    """z ~ N(0, I), [num, Z]; that of number i depends on the seed and i only."""
    key = jax.random.key(seed)
    draw = jax.jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (latent_dim,))))
    return in_batches(lambda i: (draw(i),), np.arange(num))[0]


def encode(run: Trained | str | os.PathLike, images: np.ndarray, *, seed: int = 0) -> Encoded:
    """q(z|y) of images, y drawn once for each; of q(z|x) where a method does not spread images.

    Args:
      run: what `fit` or `open_run` returned, or a run's folder.
      images: [n, height, width, channels], uint8 or floats in [0, 1].
      seed: of the noise.

    Returns:
      Mean and standard deviation, each [n, Z], and what the encoder saw.

    Raises:
      ValueError: the method has no encoder, or images of another shape.
    """
    return Encoded(*_encoded(run, images, seed)[:3])


def reconstruct(
    run: Trained | str | os.PathLike, images: np.ndarray, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(what the encoder sees of images, g of its mean).

    Args:
      run: what `fit` or `open_run` returned, or a run's folder.
      images: [n, height, width, channels], uint8 or floats in [0, 1].
      seed: of the noise.

    Returns:
      Images and their reconstructions, each float32 [n, height, width, channels].

    Raises:
      ValueError: the method has no encoder, or images of another shape.
    """
    found = _encoded(run, images, seed)
    return found[2], found[3]


def _encoded(run, images, seed):
    run, images = as_trained(run), np.asarray(images)
    if not run.has_encoder:
        raise ValueError(f"{run.method.title} has no encoder, so its images cannot be encoded or reconstructed.")
    if images.ndim != 4 or images.shape[1:] != tuple(run.method.image_shape):
        raise ValueError(f"images must have shape (n, *{run.method.image_shape}), got {images.shape}.")
    key = jax.random.key(seed)

    def one(batch, start):
        found, again = run.programs.encode(run.state, batch, jax.random.fold_in(key, start))
        return (*found, again)

    return in_batches(one, images, with_start=True)


def held_out(run: Trained, dataset: Dataset, *, count: int, batch_size: int, key: jax.Array) -> dict[str, float]:
    """Means over a split's first images of what the method measures on images that it has not seen.

    Args:
      run: the generator.
      dataset: the split.
      count: images at most.
      batch_size: images at once, at most.
      key: a JAX random key.

    Returns:
      The means of `Method.evaluate`'s numbers, and <name>_standard_error (without "_nats") of the bounds among them.
    """
    count = min(len(dataset), count)
    size = max(min(count, batch_size), run.method.smallest_batch)
    names: list[str] = []

    def one(batch, start):
        found = run.programs.evaluate(run.state, batch, jax.random.fold_in(key, start))
        names[:] = found
        return (jnp.stack(list(found.values()), axis=1),)

    values = in_batches(one, dataset.images[:count], size=size, with_start=True)[0].astype(np.float64)
    means = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    for name in run.method.bounds:
        column = values[:, names.index(name)]
        error = float(column.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        means[f"{name.removesuffix('_nats')}_standard_error"] = error
    return means


def in_batches(
    function: Callable, rows: np.ndarray, *, size: int = _BATCH, with_start: bool = False
) -> tuple[np.ndarray, ...]:
    """function(part of the rows) -> arrays, put together; the last part wraps round to keep its shape."""
    count = len(rows)
    parts = []
    for start in range(0, count, size):
        index = np.arange(start, start + size) % count
        found = function(np.asarray(rows[index]), *((start,) if with_start else ()))
        parts.append([np.asarray(array)[: count - start] for array in found])
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def as_trained(run: Trained | str | os.PathLike) -> Trained:
    return run if isinstance(run, Trained) else open_run(run)
