"""A generator trained by a critic of many scales of noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from spread_jax.divergences import jensen_shannon, kl, reverse_kl
from spread_jax.models._scales import ScalesMethod, ToldDetail
from spread_jax.models.method import parts_of
from spread_jax.nn import ScaleCritic
from spread_jax.objectives import density_ratio_generator_loss, density_ratio_losses, non_saturating
from spread_jax.training import LossOutput, Player

__all__ = ["DensityRatio"]

_DESCENTS = {"non_saturating": non_saturating, "js": jensen_shannon, "reverse_kl": reverse_kl, "kl": kl}


@dataclasses.dataclass(frozen=True)
class DensityRatio(ScalesMethod, ToldDetail):
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
    summaries: ClassVar = {"divergence_bound_nats": "divergence at least {:.3f} nats", "coverage": "coverage {:.2f}"}
    curves: ClassVar = {
        "lower bound on the divergence over scales, nats": {
            "divergence_bound": "training batch",
            "validation_divergence_bound_nats": "validation",
        },
        "share": {
            "critic_accuracy": "told by the critic, training batch",
            "validation_coverage": "covered, validation",
        },
    }

    generator_loss: Literal["non_saturating", "js", "reverse_kl", "kl"] = "non_saturating"
    """The divergence that the generator descends on."""
    critic_learning_rate: float = 6e-4
    """Adam's learning rate for the critic, which has to be ahead of the generator."""
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
        self.require_positive("critic_learning_rate")
        self.require_at_least(1, "critic_steps")
        if self.critic_width is not None:
            self.require_at_least(1, "critic_width")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """The generator and the critic."""
        model = self.game_adam(self.generator_learning_rate, num_steps, warmup=True)
        critic = self.game_adam(self.critic_learning_rate, num_steps * self.critic_steps)
        return (
            Player("model", ("generator",), self._generator_loss, model),
            Player("critic", ("critic",), self._critic_loss, critic, steps=self.critic_steps),
        )

    def _generator_loss(self, params, variables, batch, *, key, step):
        latent_key, noise_key = jax.random.split(key)
        generated, new = self.generated(params, variables, len(batch), latent_key, train=True)
        return self.descent(params, variables, generated, noise_key), LossOutput(parts_of(("generator",), (new,)), {})

    def descent(self, params, variables, generated, key):
        """What the generator descends on: the mean over `generated` of a function of the critic's log-ratio."""
        critic = self.network("critic", params, variables, train=False)
        losses = density_ratio_generator_loss(
            generated, critic, self.law(), key=key, divergence=_DESCENTS[self.generator_loss]
        )
        return losses.mean()

    def _critic_loss(self, params, variables, batch, *, key, step):
        mirror_key, latent_key, noise_key = jax.random.split(key, 3)
        x = self.shown(batch, mirror_key)
        generated = self.compared(params, variables, x, latent_key, train=True)
        critic = self.network("critic", params, variables, train=False)
        losses = density_ratio_losses(x, generated, critic, self.law(), key=noise_key)
        metrics = {"divergence_bound": losses.divergence, "critic_accuracy": losses.accuracy}
        return losses.critic, LossOutput({}, metrics)

    def compared(self, params, variables, x, key, *, train):
        """As many samples as there are images x, for the critic to tell from them."""
        return self.generated(params, variables, len(x), key, train=train)[0]

    def evaluate(self, state, x, *, key):
        """The critic's lower bound on the divergence over scales, how often it is right, and how far samples cover x.

        An image is covered if a sample is nearer to it than its third nearest fellow, seen at 8x8 pixels; of samples
        from the distribution of the images themselves about seven eighths are.
        """
        latent_key, noise_key = jax.random.split(key)
        generated = self.compared(state.params, state.variables, x, latent_key, train=False)
        coverage = jnp.broadcast_to(_coverage(x, generated), (len(x),))
        return {**self.critic_numbers(state, x, generated, noise_key), "coverage": coverage}

    def critic_numbers(self, state, x, generated, key):
        """The critic's lower bound on the divergence over scales of two sets of images, and how often it is right."""
        critic = self.network("critic", state.params, state.variables, train=False)
        losses = density_ratio_losses(x, generated, critic, self.law(), key=key)
        found = {"divergence_bound_nats": losses.divergence, "critic_accuracy": losses.accuracy}
        return {name: jnp.broadcast_to(value, (len(x),)) for name, value in found.items()}

    def advice(self, numbers, earlier):
        """Says of a critic that it is too strong, too weak or knows images by heart, and of samples that collapse."""
        bound = numbers["divergence_bound_nats"]
        said = critic_advice(numbers["critic_accuracy"])
        trained = [record["divergence_bound"] for record in earlier if "divergence_bound" in record][-_RECENT:]
        if trained and (known := sum(trained) / len(trained)) > bound + _BY_HEART:
            said.append(
                f"the critic's bound is {known:.2f} nats on training images and {bound:.2f} on held-out ones, so it "
                "learns images by heart: use mirrored, more images, or a higher lowest_noise_scale."
            )
        coverage = numbers["coverage"]
        best = max((record["validation_coverage"] for record in earlier if "validation_coverage" in record), default=0)
        if best > _COVERED and coverage < best / 2:
            said.append(
                f"samples cover {coverage:.0%} of held-out images, and have covered {best:.0%}: they become alike. "
                "Lower generator_learning_rate, or keep the bound as a term: density_ratio_vae."
            )
        return tuple(said)


def critic_advice(accuracy: float) -> list[str]:
    """What a user should know of how often a critic is right about held-out images."""
    if accuracy > _TOO_STRONG:
        return [
            f"the critic tells {accuracy:.0%} of held-out images from samples, and one that is always right "
            "teaches little: raise lowest_noise_scale, or lower critic_learning_rate or critic_steps."
        ]
    if accuracy < _TOO_WEAK:
        return [
            f"the critic is right {accuracy:.0%} of the time, as by chance: if samples do not look right, raise "
            "critic_learning_rate, critic_steps or critic_width."
        ]
    return []


# Of what `advice` speaks: shares that a critic is right, recent records, nats, and a coverage worth keeping.
_TOO_STRONG, _TOO_WEAK, _RECENT, _BY_HEART, _COVERED = 0.95, 0.51, 5, 0.15, 0.3


def _coverage(x: jax.Array, generated: jax.Array) -> jax.Array:
    """The share of x [n, *image] with a sample nearer than its third nearest fellow, at 8x8 pixels or fewer."""
    small = lambda images: jax.image.resize(
        images, (len(images), *(min(8, side) for side in images.shape[1:3]), images.shape[-1]), "linear"
    ).reshape(len(images), -1)
    ours, theirs = small(x), small(generated)
    squares = lambda a, b: jnp.square(a[:, None] - b[None]).sum(axis=-1)
    fellows = jnp.sort(squares(ours, ours), axis=1)[:, min(3, len(x) - 1)]  # the nearest is the image itself
    return (squares(ours, theirs).min(axis=1) < fellows).mean()
