"""The delta-VAE whose generator a critic of many scales of noise sharpens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from spread_jax.models.density_ratio import DensityRatio
from spread_jax.models.method import Encoded, SettingError, adam, parts_of, to_unit
from spread_jax.noise import GaussianNoise, SpreadNoise
from spread_jax.objectives import spread_elbo
from spread_jax.training import LossOutput, Player, TrainState

__all__ = ["DensityRatioVae"]


@dataclasses.dataclass(frozen=True)
class DensityRatioVae(DensityRatio):
    r"""Density ratios over many scales of noise, with an encoder and the evidence lower bound at one of them.

      generator:  min  D_w(p||q) - (weight / X) E[ELBO at noise_scale],      X numbers in an image,
      encoder:    max  ELBO,

    The bound makes the generator cover the data, and the critic makes it sharp. The encoder learns under any weight,
    0 too: there are reconstructions, and a bound on the likelihood of spread images, of what the critic has trained.

    Example:
      >>> [player.moves for player in DensityRatioVae(image_shape=(28, 28, 1)).players(10)]
      [('encoder', 'generator'), ('critic',)]
    """

    name: ClassVar[str] = "density_ratio_vae"
    title: ClassVar[str] = "delta-VAE sharpened by density ratios over many scales of noise"
    parts: ClassVar = ("encoder", "generator", "critic")
    headlines: ClassVar = {"elbo": "ELBO {:.0f} nats", **DensityRatio.headlines}
    summaries: ClassVar = {"elbo_nats": "ELBO {:.1f} nats", **DensityRatio.summaries}
    curves: ClassVar = {
        "nats per example": {"elbo": "ELBO, training batch", "validation_elbo_nats": "ELBO, validation"},
        **DensityRatio.curves,
    }
    bounds: ClassVar = ("elbo_nats",)

    noise_scale: float = 0.25
    """Standard deviation of the noise that images are spread by for the encoder and the bound."""
    bound_weight: float = 1.0
    """Weight of the bound in the generator's loss, in nats per number of an image; 0 for the encoder alone."""
    encoder_learning_rate: float = 1e-3
    """Adam's learning rate for the encoder."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("noise_scale", "encoder_learning_rate")
        if not 0 <= self.bound_weight < math.inf:
            raise SettingError("bound_weight", f"must be finite and at least 0, got {self.bound_weight}.")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """Encoder and generator together, and the critic."""
        model, critic = super().players(num_steps)
        moves = ("encoder", "generator")
        each = {"encoder": adam(self.schedule(self.encoder_learning_rate, num_steps)), "generator": model.optimizer}
        optimizer = optax.partition(each, {part: part for part in moves})
        return model._replace(moves=moves, loss=self._model_loss, optimizer=optimizer), critic

    def _noise(self) -> SpreadNoise:
        return GaussianNoise(self.noise_scale)

    def scored_noise(self, state: TrainState) -> SpreadNoise | None:
        """The spread noise of the encoder and the bound."""
        return self._noise()

    def noise_scale_of(self, state: TrainState) -> jax.Array | None:
        """Standard deviation of that noise."""
        return jnp.asarray(self.noise_scale)

    def _model_loss(self, params, variables, batch, *, key, step):
        ratio_key, bound_key = jax.random.split(key)
        ratio, output = self._generator_loss(params, variables, batch, key=ratio_key, step=step)
        # The encoder's gradient is that of the bound whatever the weight is, the generator's is weighted.
        weighted = lambda p: self.bound_weight * p + (1 - self.bound_weight) * jax.lax.stop_gradient(p)
        generator = jax.tree.map(weighted, params["generator"])
        # With the batch statistics of samples from the prior, as the generator has them when it is used.
        decode = self.network("generator", {"generator": generator}, variables, train=False)
        terms, (seen, _) = spread_elbo(
            to_unit(batch),
            self.network("encoder", params, variables, train=True),
            lambda z: (decode(z), None),
            self._noise(),
            key=bound_key,
            has_aux=True,
        )
        bound = terms.elbo.mean()
        metrics = {"elbo": bound, "kl": terms.kl.mean()}
        updates = {**output.variables, **parts_of(("encoder",), (seen,))}
        return ratio - bound / self.pixels, LossOutput(updates, metrics)

    def evaluate(self, state: TrainState, x: jax.Array, *, key: jax.Array) -> Mapping[str, jax.Array]:
        """The critic's numbers, the bound and its KL, and the error of reconstructions."""
        ratio_key, spread_key, latent_key = jax.random.split(key, 3)
        encode, decode = (
            self.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
        )
        y = self._noise().sample(x, key=spread_key)
        terms = spread_elbo(x, encode, decode, self._noise(), key=latent_key, spread_samples=y)
        return {
            **super().evaluate(state, x, key=ratio_key),
            "elbo_nats": terms.elbo,
            "kl_nats": terms.kl,
            "reconstruction_mse": jnp.square(decode(encode(y)[0]) - x).reshape(len(x), -1).mean(axis=1),
        }

    def encode(self, state, x, *, key):
        """q(z|y) of images spread once."""
        y = self._noise().sample(x, key=key)
        mean, log_std = self.network("encoder", state.params, state.variables, train=False)(y)
        return Encoded(mean, jnp.exp(log_std), y)
