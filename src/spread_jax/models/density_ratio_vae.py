"""The delta-VAE whose generator a critic of many scales of noise sharpens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from spread_jax.models.density_ratio import DensityRatio, critic_advice
from spread_jax.models.method import Encoded, adam, parts_of
from spread_jax.noise import GaussianNoise, SpreadNoise
from spread_jax.objectives import spread_elbo
from spread_jax.training import LossOutput, Player, TrainState

__all__ = ["DensityRatioVae"]

_WORSE = 1.5  # how many times the best error so far is worth a word


@dataclasses.dataclass(frozen=True)
class DensityRatioVae(DensityRatio):
    r"""Density ratios over many scales of noise between images and what is made of their latents, and the bound.

      min over encoder and generator of  D_w(p||q) - (weight / X) E[ELBO at noise_scale],   X numbers in an image,

    where q is the law of g(z), z ~ q(z|y) of an image x spread to y. The bound makes these cover the data, and the
    critic makes them sharp. The generator is trained on the aggregate posterior and not on the prior, so latents of
    samples are drawn from a mixture of Gaussians that is fitted to it when training has ended.

    Source: Larsen et al., Autoencoding beyond pixels, ICML 2016; Ghosh et al., From Variational to Deterministic
    Autoencoders, ICLR 2020 (the mixture).

    Example:
      >>> [player.moves for player in DensityRatioVae(image_shape=(28, 28, 1)).players(10)]
      [('encoder', 'generator'), ('critic',)]
    """

    name: ClassVar[str] = "density_ratio_vae"
    title: ClassVar[str] = "delta-VAE sharpened by density ratios over many scales of noise"
    parts: ClassVar = ("encoder", "generator", "critic")
    headlines: ClassVar = {"elbo": "ELBO {:.0f} nats", **DensityRatio.headlines}
    summaries: ClassVar = {
        "elbo_nats": "ELBO {:.1f} nats",
        "divergence_bound_nats": "divergence at least {:.3f} nats",
        "reconstruction_mse": "reconstruction error {:.5f}",
    }
    curves: ClassVar = {
        "nats per example": {"elbo": "ELBO, training batch", "validation_elbo_nats": "ELBO, validation"},
        "squared error per pixel": {"validation_reconstruction_mse": "reconstruction, validation"},
        **{label: DensityRatio.curves[label] for label in DensityRatio.curves if label != "share"},
        "share": {"critic_accuracy": "told by the critic, training batch"},
    }
    bounds: ClassVar = ("elbo_nats",)
    mixture_latents: ClassVar = True

    noise_scale: float = 0.25
    """Standard deviation of the noise that images are spread by for the encoder and the bound."""
    bound_weight: float = 32.0
    """Weight of the bound in nats per number of an image; of less the critic makes all images alike."""
    generator_learning_rate: float = 1e-3
    """Adam's learning rate for the generator."""
    critic_learning_rate: float = 2e-3
    """Adam's learning rate for the critic, which has to be ahead of the generator."""
    encoder_learning_rate: float = 1e-3
    """Adam's learning rate for the encoder."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("noise_scale", "bound_weight", "encoder_learning_rate")

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

    def _again(self, params, variables, x, key, *, train):
        """(the bound's terms of images x, g(z) with z ~ q(z|y) of each, the networks' new variables)."""
        encode, decode = (self.network(part, params, variables, train=train) for part in ("encoder", "generator"))

        def keep(network):
            return network if train else lambda inputs: (network(inputs), {})

        def decode_and_keep(z):
            generated, new = keep(decode)(z)
            return generated, (generated, new)

        terms, (seen, (generated, new)) = spread_elbo(
            x, keep(encode), decode_and_keep, self._noise(), key=key, has_aux=True
        )
        return terms, generated, parts_of(("encoder", "generator"), (seen, new))

    def _model_loss(self, params, variables, batch, *, key, step):
        mirror_key, bound_key, ratio_key = jax.random.split(key, 3)
        x = self.shown(batch, mirror_key)
        terms, generated, new = self._again(params, variables, x, bound_key, train=True)
        bound = terms.elbo.mean()
        loss = self.descent(params, variables, generated, ratio_key) - self.bound_weight * bound / self.pixels
        return loss, LossOutput(new, {"elbo": bound, "kl": terms.kl.mean()})

    def compared(self, params, variables, x, key, *, train):
        """Images g(z), z ~ q(z|y) of images x spread once."""
        return self._again(params, variables, x, key, train=train)[1]

    def evaluate(self, state: TrainState, x: jax.Array, *, key: jax.Array) -> Mapping[str, jax.Array]:
        """The critic's numbers, of what is made of the images' own latents; the bound, its KL and squared errors."""
        bound_key, ratio_key, error_key = jax.random.split(key, 3)
        terms, generated, _ = self._again(state.params, state.variables, x, bound_key, train=False)
        decode = self.network("generator", state.params, state.variables, train=False)
        errors = decode(self.encode(state, x, key=error_key).mean) - x
        return {
            **self.critic_numbers(state, x, generated, ratio_key),
            "elbo_nats": terms.elbo,
            "kl_nats": terms.kl,
            "reconstruction_mse": jnp.square(errors).reshape(len(x), -1).mean(axis=1),
        }

    def advice(self, numbers, earlier):
        """Says of a critic that it is too strong or too weak, and of reconstructions that become worse."""
        said, error = critic_advice(numbers["critic_accuracy"]), numbers["reconstruction_mse"]
        name = "validation_reconstruction_mse"
        best = min((record[name] for record in earlier if name in record), default=error)
        if error > _WORSE * best:
            said.append(
                f"the squared error of reconstructions is {error:.4f}, and has been {best:.4f}: raise bound_weight, or "
                "lower generator_learning_rate."
            )
        return tuple(said)

    def encode(self, state, x, *, key):
        """q(z|y) of images spread once."""
        y = self._noise().sample(x, key=key)
        mean, log_std = self.network("encoder", state.params, state.variables, train=False)(y)
        return Encoded(mean, jnp.exp(log_std), y)
