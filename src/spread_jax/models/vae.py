"""The variational autoencoder: noise on the model alone, clean images."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from spread_jax.models._spread import SpreadMethod
from spread_jax.models.delta_vae import DeltaVae
from spread_jax.models.method import Encoded, SettingError, adam, parts_of, to_unit
from spread_jax.objectives import elbo
from spread_jax.training import LossOutput, Player

__all__ = ["Vae"]


@dataclasses.dataclass(frozen=True)
class Vae(SpreadMethod):
    r"""Clean images, and a decoder whose distribution is the noise around g(z): the one-sided case.

      max over encoder and generator of  E_{q(z|x)} log p(x|g(z)) - KL(q(z|x) || N(0, I)).

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, equation 3.

    Example:
      >>> Vae(learned_scale=True).name
      'elbo'
    """

    name: ClassVar[str] = "elbo"
    title: ClassVar[str] = "VAE: the evidence lower bound of clean images"
    headlines: ClassVar = DeltaVae.headlines
    summaries: ClassVar = DeltaVae.summaries
    curves: ClassVar = DeltaVae.curves
    best_metric: ClassVar = ("elbo_nats", "max")
    bounds: ClassVar = ("elbo_nats",)
    learns_noise: ClassVar = False

    learning_rate: float = 2e-3
    """Adam's learning rate for encoder and generator, after the warm-up."""
    num_latent_samples: int = 1
    """S_z, latent draws for each image."""
    learned_scale: bool = False
    """Train the scale of the decoder's distribution too, from the noise scale on."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("learning_rate")
        self.require_at_least(1, "num_latent_samples")
        if self.noise.learned:
            raise SettingError(
                "noise",
                f"must be fixed, got {self.noise.name}: a VAE spreads no images, so a learned noise has nothing to "
                "learn from. Use gaussian or laplace, or train a delta-VAE.",
            )

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """Encoder and generator together, and the scale if it is trained."""
        parts = ("encoder", "generator", *(("log_scale",) if self.learned_scale else ()))
        return (Player("model", parts, self._loss, adam(self.schedule(self.learning_rate, num_steps))),)

    def extra_parts(self, *, key):
        """The logarithm of the scale, if it is trained."""
        return ({"log_scale": jnp.full((), math.log(self.noise_scale))} if self.learned_scale else {}), {}

    def _scale(self, params, step):
        return jnp.exp(params["log_scale"]) if self.learned_scale else self.scale_at(step)

    def noise_at(self, params, variables, step):
        """The decoder's distribution at a step."""
        return self.noise.noise({}, None, self._scale(params, step))

    def noise_scale_of(self, state):
        """Standard deviation of the decoder's distribution."""
        return self._scale(state.params, state.step)

    def scored_noise(self, state):
        """The decoder's distribution, under which images are scored as they are."""
        return Unspread(self.noise_of(state))

    def _terms(self, params, variables, noise, x, key, *, train):
        encode, decode = (self.network(part, params, variables, train=train) for part in ("encoder", "generator"))
        samples = self.num_latent_samples if train else 1
        return elbo(x, encode, decode, noise, key=key, num_latent_samples=samples, has_aux=train)

    def _loss(self, params, variables, batch, *, key, step):
        noise = self.noise_at(params, variables, step)
        terms, auxiliary = self._terms(params, variables, noise, to_unit(batch), key, train=True)
        bound = terms.elbo.mean()
        metrics = {
            "elbo": bound,
            "log_likelihood": terms.log_likelihood.mean(),
            "kl": terms.kl.mean(),
            "noise_scale": self._scale(params, step),
        }
        return -bound, LossOutput(parts_of(("encoder", "generator"), auxiliary), metrics)

    def evaluate(self, state, x, *, key):
        """The bound and its KL, bits per dimension, and the error of reconstructions."""
        terms = self._terms(state.params, state.variables, self.noise_of(state), x, key, train=False)
        encode, decode = (
            self.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
        )
        return {
            "elbo_nats": terms.elbo,
            "kl_nats": terms.kl,
            "bits_per_dim": -terms.elbo / (self.pixels * math.log(2)),
            "reconstruction_mse": jnp.square(decode(encode(x)[0]) - x).reshape(len(x), -1).mean(axis=1),
        }

    def encode(self, state, x, *, key):
        """q(z|x)."""
        mean, log_std = self.network("encoder", state.params, state.variables, train=False)(x)
        return Encoded(mean, jnp.exp(log_std), x)


class Unspread:
    """Leaves data as they are and scores them under the decoder's distribution."""

    def __init__(self, noise):
        self.log_prob, self.location = noise.log_prob, noise.location

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """x itself."""
        return x
