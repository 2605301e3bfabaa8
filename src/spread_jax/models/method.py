"""What every way to train a generator is: a value that holds its settings, its networks and its players."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tyro.conf import Suppress

from spread_jax.nn import image_encoder, image_generator
from spread_jax.noise import SpreadNoise
from spread_jax.training import (
    Player,
    Round,
    TrainState,
    create_train_state,
    learning_rate_schedule,
)

__all__ = ["Encoded", "Method", "SettingError", "adam"]

PyTree = Any


class SettingError(ValueError):
    """A setting that cannot work.

    Attributes:
      setting: its name.
      problem: what is wrong with it and what to do; the message is both, one after the other.
    """

    def __init__(self, setting: str, problem: str):
        self.setting, self.problem = setting, problem
        super().__init__(f"{setting} {problem}")


class Encoded(NamedTuple):
    """What an encoder makes of images x.

    Attributes:
      mean: [n, Z], of q(z|y), or of q(z|x) where images are not spread.
      std: [n, Z], its standard deviations; 0 of a deterministic encoder.
      seen: [n, *image], what the encoder was shown: spread images y, or x.
    """

    mean: jax.Array
    std: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a generator x = g(z), as a value: nothing here changes, and every function of it is pure.

    A method of your own is a subclass: it names its networks, its players and what can be measured on images that it
    has not seen. `fit`, `sample` and `evaluate` know no more of it than that. Fields are its settings; the command line
    shows those of the method that was chosen, with the text under them.

    Attributes:
      name: its name at the command line and in a run's folder.
      title: a line for people.
      parts: its networks by name; one of them is the generator.
      headlines: metric -> how the terminal tells it while training.
      summaries: held-out number -> how the terminal tells it.
      curves: axis label, with its unit -> {metric: legend}, the panels of curves.png.
      best_metric: the held-out number that picks the best checkpoint and "max" or "min"; None to keep no best one.
      bounds: held-out numbers whose standard errors are given.
      smallest_batch: images that a loss needs at least; 2 where it compares sets.
      mixture_latents: whether z of samples are from a mixture of Gaussians fitted to the aggregate posterior, and not
        from the prior.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("encoder", "generator")
    headlines: ClassVar[Mapping[str, str]] = {}
    summaries: ClassVar[Mapping[str, str]] = {}
    curves: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = None
    bounds: ClassVar[tuple[str, ...]] = ()
    smallest_batch: ClassVar[int] = 1
    mixture_latents: ClassVar[bool] = False

    image_shape: Suppress[tuple[int, int, int]] = (64, 64, 3)
    """(height, width, channels); `fit` takes it from the data."""
    networks: Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Flax modules of your own in place of the usual ones, by part: "encoder", "generator", ..."""

    latent_dim: int = 16
    """Z, dimensions of z."""
    width: int = 16
    """Channels of the encoder's first convolution, which the other layers are multiples of."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions; parameters, statistics and the bound stay float32."""
    final_learning_rate_fraction: float = 0.1
    """Cosine decay to this fraction of the learning rates; 1 for none."""
    decay_start: float = 0.0
    """Share of the steps before that decay."""
    warmup_steps: int = 50
    """Steps of linear warm-up of the model's learning rate, at most half of all steps."""
    ema_decay: float = 0.995
    """Decay of the generator's moving average, which draws the samples."""

    # --- what a method must say of itself

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """Who trains, the model first, over `num_steps` steps of the model; losses take uint8 batches."""
        raise NotImplementedError

    def evaluate(self, state: TrainState, x: jax.Array, *, key: jax.Array) -> dict[str, jax.Array]:
        """Named numbers of images x [n, *image] in [0, 1] that were not trained on, each [n]."""
        raise NotImplementedError

    def encode(self, state: TrainState, x: jax.Array, *, key: jax.Array) -> Encoded | None:
        """What the encoder makes of images x [n, *image] in [0, 1]; None of a method without one."""
        return None

    # --- what a method may say

    def validate(self) -> None:
        """Refuses settings that cannot work.

        Raises:
          SettingError: it names the setting.
        """
        self.require_at_least(1, "latent_dim", "width")
        self.require_at_least(0, "warmup_steps")
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise SettingError(
                "final_learning_rate_fraction", f"must be in [0, 1], got {self.final_learning_rate_fraction}."
            )
        for name in ("decay_start", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(name, f"must be in [0, 1), got {getattr(self, name)}.")
        unknown = [part for part in self.networks if part not in self.parts]
        if unknown:
            raise SettingError(
                "networks", f"has {unknown[0]!r}, and this method's parts are {', '.join(map(repr, self.parts))}."
            )
        self._check_networks(self.modules)

    def extra_parts(self, *, key: jax.Array) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        """(parameters, variables) of parts that are no networks, such as a noise."""
        return {}, {}

    def with_data(self, images: np.ndarray) -> Method:
        """The method with the settings that are taken from the training images, uint8 [n, *image]."""
        return self

    def scored_noise(self, state: TrainState) -> SpreadNoise | None:
        """The noise under which likelihoods of images are bounded; None where there are none."""
        return None

    def noise_scale_of(self, state: TrainState) -> jax.Array | None:
        """Standard deviation of the noise added to each pixel; None where there is no noise."""
        return None

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with every record, on the host; raises to stop a run before it saves."""

    def advice(self, numbers: Mapping[str, float], earlier: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
        """What a user should know of held-out numbers, in sentences; `earlier` are the records so far, oldest first."""
        return ()

    def check_state(self, step: int, state: TrainState) -> None:
        """Called with every evaluation, on the host; raises to stop a run before it saves."""

    # --- what all methods share

    @functools.cached_property
    def modules(self) -> dict[str, Any]:
        """part -> its Flax module: the caller's, or the usual one."""
        return {part: self.networks[part] if part in self.networks else self.usual_network(part) for part in self.parts}

    def usual_network(self, part: str) -> Any:
        """The usual Flax module of a part for images of this shape; those of a method's own parts are its to give."""
        return self.image_network({"encoder": image_encoder, "generator": image_generator}[part], part)

    @functools.cached_property
    def turns(self) -> Round:
        """Whose turn each step is."""
        return Round(tuple(player.steps for player in self.players(1)))

    @property
    def pixels(self) -> int:
        """Numbers in an image."""
        return math.prod(self.image_shape)

    def image_network(self, build: Callable, part: str) -> Any:
        """What `image_encoder` and the like build for images of this shape, their refusals as a SettingError."""
        options = {"latent_dim": self.latent_dim} if part == "encoder" else {}
        try:
            return build(self.image_shape, width=self.width_of(part), dtype=jnp.dtype(self.compute_dtype), **options)
        except ValueError as error:
            message = str(error)
            setting = next((name for name in ("width", "latent_dim") if message.startswith(name)), None)
            if setting is None:
                side = self.image_shape[0]
                raise SettingError(
                    "image_size", f"= {side} has no usual networks: {message} Or pass your own."
                ) from None
            raise SettingError(setting, message.removeprefix(setting).strip()) from None

    def width_of(self, part: str) -> int:
        """Channels of a usual network's first convolution."""
        return self.width

    def network(self, part: str, params: Mapping, variables: Mapping, *, train: bool) -> Callable:
        """A network as a callable; in training it returns (output, its new variables)."""
        module, own = self.modules[part], variables.get(part, {})
        options = {"train": train} if _takes_train(module) else {}
        apply = functools.partial(module.apply, {"params": params[part], **own}, **options)
        return functools.partial(apply, mutable=list(own)) if train else apply

    def initial_state(self, key: jax.Array, num_steps: int) -> TrainState:
        """The state at step 0; networks of one name and shape start alike under every method."""
        network_key, run_key, other_key = jax.random.split(key, 3)
        keys = dict(zip(("encoder", "generator"), jax.random.split(network_key), strict=True))
        others = [part for part in self.modules if part not in keys]
        keys |= {part: jax.random.fold_in(other_key, index) for index, part in enumerate(others, 1)}
        params, variables = self.extra_parts(key=other_key)
        for part in self.modules:
            options = {"train": False} if _takes_train(self.modules[part]) else {}
            found = dict(self.modules[part].init(keys[part], *self.example_inputs(part), **options))
            params[part], variables[part] = found.pop("params"), found
        return create_train_state(
            params, variables, self.players(num_steps), key=run_key, averaged=self.generator_variables
        )

    def example_inputs(self, part: str) -> tuple[jax.Array, ...]:
        """A batch of one of what a network takes."""
        return (jnp.zeros((1, self.latent_dim) if part == "generator" else (1, *self.image_shape)),)

    @staticmethod
    def generator_variables(params: Mapping, variables: Mapping) -> dict[str, PyTree]:
        """The generator's parameters and variables, whose moving average draws the samples."""
        return {"params": params["generator"], **variables["generator"]}

    def generate(self, generator_variables: Mapping, z: jax.Array) -> jax.Array:
        """x = g(z) for z [n, Z], with variables as `generator_variables` or a state's `ema` gives them."""
        module = self.modules["generator"]
        return module.apply(generator_variables, z, **({"train": False} if _takes_train(module) else {}))

    def schedule(self, peak: float, num_steps: int, *, warmup: bool = True) -> optax.Schedule:
        """The learning rate of a player over its own steps."""
        return learning_rate_schedule(
            peak,
            num_steps=num_steps,
            warmup=min(self.warmup_steps, num_steps // 2) if warmup else 0,
            final_fraction=self.final_learning_rate_fraction,
            decay_start=self.decay_start,
        )

    def headline(self, metrics: Mapping[str, float]) -> str:
        """The recorded numbers that the terminal shows while training."""
        return _told(self.headlines, metrics)

    def summary(self, numbers: Mapping[str, float]) -> str:
        """The held-out numbers that the terminal shows."""
        return _told(self.summaries, numbers)

    def require_at_least(self, minimum: float, *settings: str) -> None:
        """Refuses settings below a minimum."""
        for name in settings:
            if not getattr(self, name) >= minimum:
                raise SettingError(name, f"must be at least {minimum}, got {getattr(self, name)}.")

    def require_positive(self, *settings: str) -> None:
        """Refuses settings that are not positive and finite."""
        for name in settings:
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(name, f"must be positive and finite, got {getattr(self, name)}.")

    def _check_networks(self, modules: Mapping[str, Any]) -> None:
        """Refuses networks of the caller's whose outputs do not fit."""
        for part in self.networks:
            module = modules[part]
            inputs = self.example_inputs(part)
            options = {"train": False} if _takes_train(module) else {}
            try:
                call = functools.partial(module.init_with_output, jax.random.key(0), **options)
                found = jax.eval_shape(call, *inputs)[0]
            except Exception as error:  # of the caller's module, whatever it is
                why = " ".join(str(error).split())[:300]
                raise SettingError(
                    f"networks[{part!r}]",
                    f"cannot be called with an array of shape {inputs[0].shape}: {type(error).__name__}: {why}",
                ) from error
            wanted = self.output_shapes(part)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(found))
            if shapes != wanted:
                raise SettingError(
                    f"networks[{part!r}]",
                    f"must return {_shapes(wanted)} for {inputs[0].shape}, got {_shapes(shapes)}.",
                )

    def output_shapes(self, part: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a network returns for a batch of one."""
        return {
            "generator": ((1, *self.image_shape),),
            "encoder": ((1, self.latent_dim), (1, self.latent_dim)),
        }.get(part, ((1,),))


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam with the first decay of the paper and of DCGAN, 0.5."""
    return optax.adam(rate, b1=0.5)


def to_unit(batch: jax.Array) -> jax.Array:
    """uint8 images as float32 in [0, 1]; floating-point ones as they are."""
    return batch.astype(jnp.float32) / 255.0 if batch.dtype == jnp.uint8 else batch


def parts_of(parts: tuple[str, ...], auxiliary: tuple) -> dict[str, PyTree]:
    """{part: its new variables}, of networks that were called in training, without those that have none."""
    return {part: new for part, new in zip(parts, auxiliary, strict=True) if new}


def _takes_train(module: Any) -> bool:
    return "train" in inspect.signature(type(module).__call__).parameters


def _told(texts: Mapping[str, str], numbers: Mapping[str, float]) -> str:
    return ", ".join(text.format(numbers[name]) for name, text in texts.items() if name in numbers)


def _shapes(shapes: tuple) -> str:
    return " and ".join(map(str, shapes)) or "nothing"
