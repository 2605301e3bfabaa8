"""What methods share that add noise to images: its scale, its annealing, and a noise that learns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spread_jax.errors import UsageError
from spread_jax.models.method import Method, SettingError, adam
from spread_jax.noise import FixedGaussian, NoiseModel, SpreadNoise, check_noise_range
from spread_jax.training import LossOutput, Player, TrainState, noise_scale_schedule


@dataclasses.dataclass(frozen=True)
class SpreadMethod(Method):
    """A method with noise on images, whose scale is annealed over the model's steps.

    Attributes:
      learns_noise: whether a learned noise has something to learn from.
    """

    learns_noise: ClassVar[bool] = True

    noise: NoiseModel = FixedGaussian()  # noqa: RUF009 (frozen)
    """The noise; see `spread_jax.models.NOISES`."""
    noise_scale: float = 0.5
    """Standard deviation of the noise added to each pixel at the start, images being in [0, 1]."""
    final_noise_scale: float = 0.25
    """It is annealed down to this."""
    noise_decay: float = 0.9
    """Factor of each reduction."""
    noise_decay_every: int = 160
    """Steps of the model between reductions."""
    noise_scale_from_data: float | None = None
    """Start from this share of the standard deviation of the training images' pixels (root mean square over the
    pixels) in place of the noise scale, and scale the final one alike."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_at_least(1, "noise_decay_every")
        self.require_positive("noise_scale")
        if self.noise_scale_from_data is not None:
            self.require_positive("noise_scale_from_data")
        if not 0 < self.final_noise_scale <= self.noise_scale:
            raise SettingError(
                "final_noise_scale",
                f"must be positive and at most noise_scale, got {self.final_noise_scale} and {self.noise_scale}.",
            )
        if not 0 < self.noise_decay < 1:
            raise SettingError("noise_decay", f"must be between 0 and 1, got {self.noise_decay}.")
        try:
            self.noise.validate(self.image_shape)
        except ValueError as error:
            setting, _, problem = str(error).partition(" ")
            raise SettingError(setting, problem) from None

    def with_data(self, images: np.ndarray) -> Method:
        """With the noise scale that `noise_scale_from_data` means for the first 5,000 images."""
        if self.noise_scale_from_data is None:
            return self
        unit = np.asarray(images[:5000]) / 255.0
        scale = round(self.noise_scale_from_data * float(np.sqrt(unit.var(axis=0).mean())), 6)
        if not scale > 0:
            raise SettingError("noise_scale_from_data", "needs images that vary, and these do not: give noise_scale.")
        final = scale * self.final_noise_scale / self.noise_scale
        return dataclasses.replace(self, noise_scale=scale, final_noise_scale=final)

    def scale_at(self, step: jax.Array | int) -> jax.Array:
        """Standard deviation of the noise after so many steps of all players."""
        return self._scales(self.turns.own_steps(0, step))

    @functools.cached_property
    def _scales(self) -> optax.Schedule:
        return noise_scale_schedule(
            self.noise_scale, self.final_noise_scale, decay=self.noise_decay, every=self.noise_decay_every
        )

    def noise_at(self, params: Mapping, variables: Mapping, step: jax.Array | int) -> SpreadNoise:
        """The spread noise p(y|x) of a step."""
        return self.noise.noise(params.get("noise", {}), variables.get("noise"), self.scale_at(step))

    def noise_of(self, state: TrainState) -> SpreadNoise:
        """The spread noise p(y|x) of a state."""
        return self.noise_at(state.params, state.variables, state.step)

    def scored_noise(self, state: TrainState) -> SpreadNoise | None:
        """The spread noise of a state."""
        return self.noise_of(state)

    def noise_scale_of(self, state: TrainState) -> jax.Array | None:
        """Standard deviation of the noise added to each pixel."""
        return self.scale_at(state.step)

    def entropy(self, noise: SpreadNoise) -> jax.Array:
        """Entropy of the noise on an image, in nats."""
        return noise.entropy(jnp.zeros((1, *self.image_shape)))[0]

    def extra_parts(self, *, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """The learned noise's parameters and variables."""
        if not self.noise.learned:
            return {}, {}
        params, variables = self.noise.init(self.image_shape, key=key)
        return {"noise": params}, {} if variables is None else {"noise": variables}

    def advanced(self, params: Mapping, variables: Mapping) -> dict[str, Any]:
        """The learned noise's variables moved towards what belongs to its parameters."""
        if not self.noise.learned or "noise" not in variables:
            return {}
        return {"noise": self.noise.advance(params["noise"], variables["noise"])}

    def model_steps(self) -> int:
        """Steps of the model in a round."""
        return self.noise.descent_steps if self.noise.learned else 1

    def noise_player(self, loss: Callable) -> tuple[Player, ...]:
        """The learned noise as a player; nobody if the noise is fixed."""
        if not self.noise.learned:
            return ()
        rate = self.noise.noise_learning_rate
        return (Player("noise", ("noise",), loss, adam(rate), steps=self.noise.ascent_steps, look_again=True),)

    def noise_metrics(self, noise: SpreadNoise, step: jax.Array) -> dict[str, jax.Array]:
        """Named scalars of the noise."""
        return {"noise_scale": self.scale_at(step), **self.noise.diagnostics(noise, self.image_shape)}

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stops a run whose learned noise has left its range."""
        check_noise_range(step, metrics, {n: limits for n, limits in self.noise.limits().items() if n in metrics})

    def check_state(self, step: int, state: TrainState) -> None:
        """Stops a run whose learned noise has broken its constraint."""
        if self.noise.learned:
            try:
                self.noise.check(state.params["noise"], state.variables.get("noise"))
            except ValueError as error:
                raise UsageError(f"After step {step}: {error}") from None

    def ascent(self, bound: Callable) -> Callable:
        """The learned noise's loss, minus what `bound(params, variables, noise, x, key, step)` gives as divergence.

        The variables are moved first, so that what is measured is of the parameters that are there.
        """

        def loss(params, variables, batch, *, key, step):
            advanced = self.advanced(params, variables)
            variables = {**variables, **advanced}
            noise = self.noise_at(params, variables, step)
            divergence = bound(params, variables, noise, batch, key, step)
            return -divergence, LossOutput(advanced, self.noise.diagnostics(noise, self.image_shape))

        return loss
