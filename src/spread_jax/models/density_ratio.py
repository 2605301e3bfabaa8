"""A generator trained by a critic of many scales of noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from spread_jax.divergences import jensen_shannon, kl, reverse_kl
from spread_jax.models._scales import ScalesMethod
from spread_jax.models.method import parts_of
from spread_jax.nn import ScaleCritic
from spread_jax.objectives import density_ratio_generator_loss, density_ratio_losses, non_saturating
from spread_jax.training import LossOutput, Player

__all__ = ["DensityRatio"]

_DESCENTS = {"non_saturating": non_saturating, "js": jensen_shannon, "reverse_kl": reverse_kl, "kl": kl}


@dataclasses.dataclass(frozen=True)
class DensityRatio(ScalesMethod):
    r"""Generator against a critic that is told the scale of the noise, over a law of scales.

      D_w(p||q) = E_{sigma ~ w} D_f(p~_sigma || q~_sigma),   log sigma uniform between two ends.

    The critic learns log p~_sigma(y) - log q~_sigma(y) by logistic regression at random sigma; the generator descends
    along its gradient. Large scales say where the mass is, small ones what it looks like, and none is a compromise.

    Source: Chen et al., DiffRatio, 2025 (arXiv 2502.08005); Wang et al., Diffusion-GAN, ICLR 2023.

    Example:
      >>> [player.name for player in DensityRatio(image_shape=(28, 28, 1), critic_steps=2).players(10)]
      ['model', 'critic']
    """

    name: ClassVar[str] = "density_ratio"
    title: ClassVar[str] = "density ratios over many scales of noise"
    parts: ClassVar = ("generator", "critic")
    headlines: ClassVar = {
        "divergence_bound": "divergence at least {:.3f} nats",
        "critic_accuracy": "critic right {:.2f}",
    }
    summaries: ClassVar = {"divergence_bound_nats": "divergence at least {:.3f} nats"}
    curves: ClassVar = {
        "lower bound on the divergence over scales, nats": {
            "divergence_bound": "training batch",
            "validation_divergence_bound_nats": "validation",
        },
        "share that the critic tells": {"critic_accuracy": "training batch"},
    }

    generator_loss: Literal["non_saturating", "js", "reverse_kl", "kl"] = "non_saturating"
    """The divergence that the generator descends on."""
    critic_learning_rate: float = 3e-4
    """Adam's learning rate for the critic."""
    critic_steps: int = 1
    """Steps of the critic for each of the generator."""
    critic_width: int | None = None
    """Channels of the critic's first convolution; as of the generator's width if not given."""

    def usual_network(self, part):
        """The usual generator, and a critic that is told the scale."""
        if part != "critic":
            return super().usual_network(part)
        return self.scaled_network(ScaleCritic, self.critic_width or self.width)

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("critic_learning_rate")
        self.require_at_least(1, "critic_steps")
        if self.critic_width is not None:
            self.require_at_least(1, "critic_width")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """The generator and the critic."""
        model = self.adam(self.generator_learning_rate, num_steps, warmup=True)
        critic = self.adam(self.critic_learning_rate, num_steps * self.critic_steps)
        return (
            Player("model", ("generator",), self._generator_loss, model),
            Player("critic", ("critic",), self._critic_loss, critic, steps=self.critic_steps),
        )

    def _generator_loss(self, params, variables, batch, *, key, step):
        latent_key, noise_key = jax.random.split(key)
        generated, new = self.generated(params, variables, len(batch), latent_key, train=True)
        loss = density_ratio_generator_loss(
            generated,
            self.network("critic", params, variables, train=False),
            self.law(),
            key=noise_key,
            divergence=_DESCENTS[self.generator_loss],
        ).mean()
        return loss, LossOutput(parts_of(("generator",), (new,)), {})

    def _losses(self, params, variables, x, key, *, train):
        latent_key, noise_key = jax.random.split(key)
        generated, _ = self.generated(params, variables, len(x), latent_key, train=train)
        critic = self.network("critic", params, variables, train=False)
        return density_ratio_losses(x, generated, critic, self.law(), key=noise_key)

    def _critic_loss(self, params, variables, batch, *, key, step):
        key, mirror_key = jax.random.split(key)
        x = self.shown(batch, mirror_key)
        losses = self._losses(params, variables, x, key, train=True)
        metrics = {"divergence_bound": losses.divergence, "critic_accuracy": losses.accuracy}
        return losses.critic, LossOutput({}, metrics)

    def evaluate(self, state, x, *, key):
        """The critic's lower bound on the divergence over scales, and how often it is right."""
        losses = self._losses(state.params, state.variables, x, key, train=False)
        every = lambda value: jnp.broadcast_to(value, (len(x),))
        return {"divergence_bound_nats": every(losses.divergence), "critic_accuracy": every(losses.accuracy)}
