"""What methods share that compare data and samples over a law of noise scales."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spread_jax.models.method import Method, SettingError, to_unit
from spread_jax.nn.conditional import haar_parts
from spread_jax.noise import LogUniformScales


@dataclasses.dataclass(frozen=True)
class ToldScale(Method):
    """A method with networks that are told the scale of the noise, and what scale the data have."""

    data_mean: float | None = None
    """Mean of the images' pixels, which are in [0, 1]; of the training images if not given."""
    data_scale: float | None = None
    """Standard deviation of the images' pixels; of the training images if not given."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        if self.data_scale is not None:
            self.require_positive("data_scale")
        if self.data_mean is not None and not math.isfinite(self.data_mean):
            raise SettingError("data_mean", f"must be finite, got {self.data_mean}.")

    def with_data(self, images: np.ndarray) -> Method:
        """With the scales of the first 5,000 images, where they are not given."""
        found = self.scales_of(np.asarray(images[:5000]) / 255.0)
        missing = {name: round(float(value), 6) for name, value in found.items() if getattr(self, name) is None}
        return dataclasses.replace(super().with_data(images), **missing)

    def scales_of(self, images: np.ndarray) -> dict[str, float]:
        """{setting: what it is of images in [0, 1]}."""
        return {"data_mean": images.mean(), "data_scale": max(images.std(), 1e-3)}

    def told_network(self, kind: Any, width: int) -> Any:
        """A network that is told the scale of the noise, for data of this mean and these scales."""
        known = {name: getattr(self, name, None) for name in ("data_mean", "data_scale", "detail_scale")}
        known = {name: value for name, value in known.items() if value is not None}
        return kind(width, dtype=jnp.dtype(self.compute_dtype), **known)

    def example_inputs(self, part: str) -> tuple[jax.Array, ...]:
        """A batch of one, with a scale for a network that is told it."""
        inputs = super().example_inputs(part)
        return inputs if part in ("encoder", "generator") else (*inputs, jnp.ones(1))

    def game_adam(self, rate: float, steps: int, *, warmup: bool = False) -> optax.GradientTransformation:
        """Adam without momentum, as Diffusion-GAN and the nets before it have it: what a player follows moves."""
        return optax.adam(self.schedule(rate, steps, warmup=warmup), b1=0.0, b2=0.99)


@dataclasses.dataclass(frozen=True)
class ToldDetail(ToldScale):
    """A method with a `ScaleCritic`, which sees coarse and fine parts of images."""

    detail_scale: float | None = None
    """Root mean square of the differences within blocks of 2x2 pixels; of the training images if not given."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        if self.detail_scale is not None:
            self.require_positive("detail_scale")

    def scales_of(self, images: np.ndarray) -> dict[str, float]:
        """{setting: what it is of images in [0, 1]}."""
        fine = max(math.sqrt(np.square(haar_parts(images)[1]).mean()), 1e-3)
        return {**super().scales_of(images), "detail_scale": fine}


@dataclasses.dataclass(frozen=True)
class ScalesMethod(ToldScale):
    """A generator whose samples are compared with data at scales of noise from a log-uniform law."""

    ema_decay: float = 0.998
    """Decay of the generator's moving average, which draws the samples."""
    final_learning_rate_fraction: float = 0.05
    """Cosine decay to this fraction of the learning rates; 1 for none."""
    decay_start: float = 0.5
    """Share of the steps before that decay; it lets the players settle, and a game settles on sharper samples."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the generator's learning rate, at most half of all steps."""
    lowest_noise_scale: float = 0.05
    """Smallest standard deviation of the noise, images being in [0, 1]; what is finer is seen by nothing."""
    highest_noise_scale: float = 1.0
    """Largest standard deviation of the noise, at which data and samples overlap from the start."""
    generator_learning_rate: float = 3e-4
    """Adam's learning rate for the generator."""
    mirrored: bool = False
    """Show mirrored copies of the images too, where few images would be learned by heart."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("generator_learning_rate", "lowest_noise_scale")
        if not self.lowest_noise_scale < self.highest_noise_scale < float("inf"):
            raise SettingError(
                "highest_noise_scale",
                f"must be above lowest_noise_scale, got {self.highest_noise_scale} and {self.lowest_noise_scale}.",
            )

    def law(self) -> LogUniformScales:
        """w, the law of noise scales."""
        return LogUniformScales(self.lowest_noise_scale, self.highest_noise_scale)

    def shown(self, batch: jax.Array, key: jax.Array) -> jax.Array:
        """Images of a batch in [0, 1], each mirrored by chance if that was asked for."""
        x = to_unit(batch)
        if not self.mirrored:
            return x
        chosen = jax.random.bernoulli(key, shape=(len(x), 1, 1, 1))
        return jnp.where(chosen, x[:, :, ::-1], x)

    def generated(self, params, variables, count, key, *, train):
        """Samples from the prior [count, *image], and the generator's new variables."""
        z = jax.random.normal(key, (count, self.latent_dim))
        drawn = self.network("generator", params, variables, train=train)(z)
        return drawn if train else (drawn, {})
