"""Draws samples from a trained generator of any noise and objective: one grid, or a folder of PNG files.

python -m experiments.sample runs/celeba/demo-0                       a grid of 64 in the run's folder
python -m experiments.sample runs/celeba/demo-0 --num 1000 --folder samples/
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tyro

from experiments import _launch
from experiments._generator import Model, load_config
from spread_jax.evaluation import image_grid, save_image
from spread_jax.training import AlternatingState, Checkpointer

BATCH = 64


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What to draw."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as printed when it was trained."""
    num: int = 64
    """How many samples."""
    seed: int = 0
    """Seed of the latents; sample i of a seed is the same whatever the number drawn."""
    step: int | None = None
    """Draw from the checkpoint of this step; the newest sound one if not given."""
    grid: Path | None = None
    """Where the grid goes; samples_seed<seed>.png in the run's folder if not given."""
    folder: Path | None = None
    """Write each sample as a PNG of its own into this folder instead of a grid."""
    columns: int | None = None
    """Samples in a row of the grid; about the square root of their number if not given."""


def load_run(run: Path, step: int | None = None) -> tuple[Model, AlternatingState]:
    """The model of a run and its state, of the newest sound checkpoint if no step is given."""
    config_path = run / "config.json"
    if not config_path.is_file():
        raise _launch.UsageError(
            f"{run} is not a run's folder: it has no config.json. Train one first, for example with `make demo`, "
            "and pass the folder it prints."
        )
    try:
        config, image_shape = load_config(json.loads(config_path.read_text(encoding="utf-8")))
        model = Model(config, image_shape)
        abstract_state = jax.eval_shape(model.initial_state)
    except OSError as error:
        raise _launch.UsageError(f"{config_path} cannot be read: {error.strerror or error}.") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        _launch.UsageError,
    ) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0].rstrip(".")
        raise _launch.UsageError(
            f"{config_path} is not the config of a run that trains a generator: {problem}."
        ) from None
    with Checkpointer(run / "checkpoints") as checkpointer:
        restored = checkpointer.restore(abstract_state, step=step)
        if restored is None:
            raise _launch.UsageError(f"{run} has no checkpoint yet: train it for longer, or name another run.")
    return model, restored.state


def load_generator(run: Path, step: int | None = None) -> tuple[Model, object, int]:
    """The model of a run, its averaged generator variables, and the step they are from."""
    model, state = load_run(run, step)
    return model, model.averaged(state), int(state.step)


def draw(model: Model, variables, *, num: int, seed: int) -> np.ndarray:
    """Images [num, height, width, channels] in [0, 1]; image i depends on the seed and i only."""
    key = jax.random.key(seed)
    latent = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (model.config.latent_dim,)))
    batches = []
    for start in range(0, num, BATCH):  # one shape, one compilation
        batches.append(np.asarray(model.generate(variables, latent(np.arange(start, start + BATCH)))))
    return np.concatenate(batches)[:num]


def main(argv: list[str] | None = None) -> int:
    """Draws and writes."""
    config = _launch.parse_plain(SampleConfig, __doc__, argv)
    if config.num < 1 or config.seed < 0 or (config.columns is not None and config.columns < 1):
        raise _launch.UsageError(
            f"--num and --columns must be at least 1 and --seed at least 0, "
            f"got {config.num}, {config.columns} and {config.seed}."
        )
    _launch.configure_jax()
    model, variables, step = load_generator(config.run, config.step)
    images = draw(model, variables, num=config.num, seed=config.seed)
    try:
        if config.folder is not None:
            config.folder.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images):
                save_image(image_grid(image[None], padding=0), config.folder / f"{index:06d}.png")
            written = config.folder
        else:
            written = config.grid or config.run / f"samples_seed{config.seed}.png"
            written.parent.mkdir(parents=True, exist_ok=True)
            save_image(image_grid(images, columns=config.columns), written)
    except OSError as error:
        raise _launch.UsageError(f"The samples could not be written: {error}. Choose another place.") from None
    _launch.print_result({"experiment": "sample", "run": str(config.run), "step": step, "num": config.num,
                          "seed": config.seed, "written": str(written)})  # fmt: skip
    return 0


if __name__ == "__main__":
    _launch.run(main)
