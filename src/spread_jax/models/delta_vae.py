"""The delta-VAE: a deterministic generator trained by the evidence lower bound of spread images."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from spread_jax.models._spread import SpreadMethod
from spread_jax.models.method import Encoded, adam, parts_of, to_unit
from spread_jax.objectives import spread_elbo
from spread_jax.training import LossOutput, Player

__all__ = ["DeltaVae"]


@dataclasses.dataclass(frozen=True)
class DeltaVae(SpreadMethod):
    r"""Data and model spread by the same noise; the model ascends on the evidence lower bound of spread images.

      max over encoder and generator of  E_{p(y|x)} [ E_{q(z|y)} log p(y|g(z)) - KL(q(z|y) || N(0, I)) ].

    A learned noise takes turns with the model and ascends on the upper bound of KL(p~ || p~_theta) that this is: see
    `LearnedNoise.through_encoder` for what of the gradient it follows.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on training implicit models.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> method = DeltaVae(image_shape=(28, 28, 1), latent_dim=4, width=2)
      >>> state = method.initial_state(jax.random.key(0), num_steps=10)
      >>> method.generate(state.ema, jnp.zeros((3, 4))).shape
      (3, 28, 28, 1)
    """

    name: ClassVar[str] = "spread_elbo"
    title: ClassVar[str] = "delta-VAE: the evidence lower bound of spread images"
    headlines: ClassVar = {"elbo": "ELBO {:.0f} nats", "kl": "KL {:.0f}"}
    summaries: ClassVar = {"elbo_nats": "ELBO {:.1f} nats", "reconstruction_mse": "reconstruction error {:.5f}"}
    curves: ClassVar = {
        "nats per example": {"elbo": "ELBO, training batch", "validation_elbo_nats": "ELBO, validation"},
        "KL, nats per example": {"kl": "KL(q(z|y) || p(z))"},
        "squared error per pixel": {"validation_reconstruction_mse": "reconstruction, validation"},
        "rise of the divergence in a turn, nats": {"noise_gain": "of its own batches"},
        "noise scale": {"noise_scale": "sigma"},
    }
    best_metric: ClassVar = ("elbo_nats", "max")
    bounds: ClassVar = ("elbo_nats",)

    learning_rate: float = 2e-3
    """Adam's learning rate for encoder and generator, after the warm-up."""
    num_spread_samples: int = 1
    """S_y, noisy copies of each image."""
    num_latent_samples: int = 1
    """S_z, latent draws for each noisy copy."""
    low_variance: bool = False
    """Evaluate the likelihood at the noise-free image."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("learning_rate")
        self.require_at_least(1, "num_spread_samples", "num_latent_samples")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """Encoder and generator together, and a learned noise."""
        rate = self.schedule(self.learning_rate, num_steps)
        model = Player("model", ("encoder", "generator"), self._loss, adam(rate), steps=self.model_steps())
        return (model, *self.noise_player(self.ascent(self._divergence)))

    def terms(self, params, variables, noise, x, key, *, see=lambda y: y):
        """The terms of the bound of images x, and the networks' new variables."""
        encoder = self.network("encoder", params, variables, train=True)
        decode = self.network("generator", params, variables, train=True)
        return spread_elbo(
            x,
            lambda y: encoder(see(y)),
            decode,
            noise,
            key=key,
            num_spread_samples=self.num_spread_samples,
            num_latent_samples=self.num_latent_samples,
            low_variance=self.low_variance,
            has_aux=True,
        )

    def bound(self, terms) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(the mean of what the model ascends on, metrics)."""
        bound = terms.elbo.mean()
        return bound, {"elbo": bound, "log_likelihood": terms.log_likelihood.mean(), "kl": terms.kl.mean()}

    def _loss(self, params, variables, batch, *, key, step):
        noise = self.noise_at(params, variables, step)
        terms, auxiliary = self.terms(params, variables, noise, to_unit(batch), key)
        bound, metrics = self.bound(terms)
        # At least KL(p~ || p~_theta) = -H(p~) - E log p~_theta, for spreading makes no image less uncertain than the
        # noise is: H(p~) = H(p(y|x)) + I(x; y).
        metrics |= {"spread_kl_bound": -bound - self.entropy(noise), **self.noise_metrics(noise, step)}
        return -bound, LossOutput(parts_of(("encoder", "generator"), auxiliary), metrics)

    def _divergence(self, params, variables, noise, batch, key, step):
        # Where q(z|y) is the posterior the gradient through the encoder's input is zero, and where it is not it is that
        # of the slack KL(q(z|y) || p(z|y)) alone: noise that follows it learns to mislead the encoder.
        see = (lambda y: y) if self.noise.through_encoder else jax.lax.stop_gradient
        terms, _ = self.terms(params, variables, noise, to_unit(batch), key, see=see)
        return -self.bound(terms)[0] - self.entropy(noise)

    def evaluate(self, state, x, *, key):
        """The bound and its KL, bits per dimension, the bound on the spread KL, and the error of reconstructions."""
        noise = self.noise_of(state)
        encode, decode = (
            self.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
        )
        spread_key, latent_key = jax.random.split(key)
        y = noise.sample(x, key=spread_key)
        terms = spread_elbo(x, encode, decode, noise, key=latent_key, spread_samples=y)
        return {
            "elbo_nats": terms.elbo,
            "kl_nats": terms.kl,
            "bits_per_dim": -terms.elbo / (self.pixels * math.log(2)),
            "spread_kl_bound_nats": -terms.elbo - self.entropy(noise),
            "reconstruction_mse": jnp.square(decode(encode(y)[0]) - x).reshape(len(x), -1).mean(axis=1),
        }

    def encode(self, state, x, *, key):
        """q(z|y) of images spread once."""
        y = self.noise_of(state).sample(x, key=key)
        mean, log_std = self.network("encoder", state.params, state.variables, train=False)(y)
        return Encoded(mean, jnp.exp(log_std), y)
