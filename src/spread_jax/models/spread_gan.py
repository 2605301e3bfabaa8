"""A GAN whose critic sees spread images alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from spread_jax.divergences import jensen_shannon, kl
from spread_jax.models._scales import ToldDetail
from spread_jax.models._spread import SpreadMethod
from spread_jax.models.method import adam, parts_of, to_unit
from spread_jax.nn import ScaleCritic
from spread_jax.objectives import spread_gan_losses
from spread_jax.training import LossOutput, Player

__all__ = ["SpreadGan"]

_DIVERGENCES = {"js": jensen_shannon, "kl": kl}


@dataclasses.dataclass(frozen=True)
class SpreadGan(ToldDetail, SpreadMethod):
    r"""Generator against critic, on spread data and spread samples: an f-GAN with instance noise.

      D_f(p~||q~)  >=  E_{p~} T(y) - E_{q~} f*(T(y)),

    which the critic raises, a learned noise with it, and the generator lowers by the non-saturating loss. The noise has
    one scale at a time, which falls; the critic is told it, as in `DensityRatio`, where all scales are there at once.

    Source: Nowozin, Cseke and Tomioka, f-GAN, NIPS 2016; Sønderby et al., Amortised MAP Inference, ICLR 2017.

    Example:
      >>> [player.name for player in SpreadGan(image_shape=(28, 28, 1), critic_steps=2).players(10)]
      ['model', 'critic']
    """

    name: ClassVar[str] = "spread_gan"
    title: ClassVar[str] = "spread GAN: a critic that sees spread images"
    parts: ClassVar = ("generator", "critic")
    headlines: ClassVar = {"divergence_bound": "divergence at least {:.3f} nats"}
    summaries: ClassVar = {"divergence_bound_nats": "divergence at least {:.3f} nats"}
    curves: ClassVar = {
        "lower bound on the spread divergence, nats": {
            "divergence_bound": "training batch",
            "validation_divergence_bound_nats": "validation",
        },
        "rise of the divergence in a turn, nats": {"critic_gain": "of its own batches"},
        "noise scale": {"noise_scale": "sigma"},
    }

    gan_divergence: Literal["js", "kl"] = "js"
    """The divergence whose lower bound the critic maximises; the generator's loss is the non-saturating one."""
    final_learning_rate_fraction: float = 0.05
    """Cosine decay to this fraction of the learning rates; 1 for none."""
    decay_start: float = 0.5
    """Share of the steps before that decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the generator's learning rate, at most half of all steps."""
    final_noise_scale: float = 0.05
    """The noise is annealed down to this; what is finer is seen by nothing and stays in the samples."""
    generator_learning_rate: float = 3e-4
    """Adam's learning rate for the generator: where it is the critic's or larger, the critic falls behind and its bound
    ends at 0 whatever the samples are."""
    critic_learning_rate: float = 6e-4
    """Adam's learning rate for the critic."""
    critic_steps: int = 1
    """Steps of the critic for each of the generator."""
    critic_width: int | None = None
    """Channels of the critic's first convolution; as of the generator's width if not given."""

    def usual_network(self, part):
        """The usual generator, and a critic that is told the scale."""
        if part != "critic":
            return super().usual_network(part)
        return self.told_network(ScaleCritic, self.critic_width or self.width)

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("generator_learning_rate", "critic_learning_rate")
        self.require_at_least(1, "critic_steps")
        if self.critic_width is not None:
            self.require_at_least(1, "critic_width")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """The generator, and the critic together with a learned noise: both raise one bound."""
        moves, optimizer = ("critic",), self.game_adam(self.critic_learning_rate, num_steps * self.critic_steps)
        if self.noise.learned:
            moves = ("critic", "noise")
            each = {"critic": optimizer, "noise": adam(self.noise.noise_learning_rate)}
            optimizer = optax.partition(each, {part: part for part in moves})
        generator = self.game_adam(self.generator_learning_rate, num_steps, warmup=True)
        return (
            Player("model", ("generator",), self._generator_loss, generator),
            Player(
                "critic", moves, self._critic_loss, optimizer, steps=self.critic_steps, look_again=self.noise.learned
            ),
        )

    def _losses(self, params, variables, noise, x, key, step, *, train):
        latent_key, noise_key = jax.random.split(key)
        generated = self.network("generator", params, variables, train=train)(
            jax.random.normal(latent_key, (x.shape[0], self.latent_dim))
        )
        generated, new = generated if train else (generated, {})
        critic = functools.partial(
            self.network("critic", params, variables, train=False), sigma=self.scale_at(step).astype(x.dtype)
        )
        losses = spread_gan_losses(
            x, generated, critic, noise, key=noise_key, divergence=_DIVERGENCES[self.gan_divergence]
        )
        return losses, new

    def _generator_loss(self, params, variables, batch, *, key, step):
        noise = self.noise_at(params, variables, step)
        losses, new = self._losses(params, variables, noise, to_unit(batch), key, step, train=True)
        return losses.generator, LossOutput(parts_of(("generator",), (new,)), self.noise_metrics(noise, step))

    def _critic_loss(self, params, variables, batch, *, key, step):
        advanced = self.advanced(params, variables)
        variables = {**variables, **advanced}
        noise = self.noise_at(params, variables, step)
        losses, _ = self._losses(params, variables, noise, to_unit(batch), key, step, train=True)
        return losses.critic, LossOutput(advanced, {"divergence_bound": losses.divergence})

    def evaluate(self, state, x, *, key):
        """The critic's lower bound on the spread divergence, of as many samples as there are images."""
        losses, _ = self._losses(state.params, state.variables, self.noise_of(state), x, key, state.step, train=False)
        return {"divergence_bound_nats": jnp.broadcast_to(losses.divergence, (len(x),))}
