"""A generator trained by a critic of many scales of noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spread_jax.divergences import jensen_shannon, kl, reverse_kl
from spread_jax.models.method import Method, SettingError, parts_of, to_unit
from spread_jax.nn import ScaleCritic
from spread_jax.noise import LogUniformScales
from spread_jax.objectives import density_ratio_generator_loss, density_ratio_losses, non_saturating
from spread_jax.training import LossOutput, Player

__all__ = ["DensityRatio"]

_DESCENTS = {"non_saturating": non_saturating, "js": jensen_shannon, "reverse_kl": reverse_kl, "kl": kl}


@dataclasses.dataclass(frozen=True)
class DensityRatio(Method):
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

    ema_decay: float = 0.999
    """Decay of the generator's moving average, which draws the samples."""
    final_learning_rate_fraction: float = 1.0
    """Cosine decay to this fraction of the learning rates; 1 for none."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the generator's learning rate, at most half of all steps."""
    lowest_noise_scale: float = 0.05
    """Smallest standard deviation of the noise, images being in [0, 1]; what is finer is seen by nothing."""
    highest_noise_scale: float = 1.0
    """Largest standard deviation of the noise, at which data and samples overlap from the start."""
    generator_loss: Literal["non_saturating", "js", "reverse_kl", "kl"] = "non_saturating"
    """The divergence that the generator descends on."""
    generator_learning_rate: float = 3e-4
    """Adam's learning rate for the generator."""
    critic_learning_rate: float = 3e-4
    """Adam's learning rate for the critic."""
    critic_steps: int = 1
    """Steps of the critic for each of the generator."""
    critic_width: int | None = None
    """Channels of the critic's first convolution; as of the generator's width if not given."""
    mirrored: bool = False
    """Show the critic mirrored copies too, where few images would be learned by heart."""
    data_mean: float | None = None
    """Mean of the images' pixels, which are in [0, 1]; of the training images if not given."""
    data_scale: float | None = None
    """Standard deviation of the images' pixels; of the training images if not given."""

    def usual_network(self, part):
        """The usual generator, and a critic that is told the scale."""
        if part != "critic":
            return super().usual_network(part)
        return ScaleCritic(
            self.critic_width or self.width,
            data_mean=0.5 if self.data_mean is None else self.data_mean,
            data_scale=0.25 if self.data_scale is None else self.data_scale,
            dtype=jnp.dtype(self.compute_dtype),
        )

    def with_data(self, images: np.ndarray) -> Method:
        """With mean and scale of the first 5,000 images, where they are not given."""
        unit = np.asarray(images[:5000]) / 255.0
        mean = round(float(unit.mean()), 6) if self.data_mean is None else self.data_mean
        scale = round(max(float(unit.std()), 1e-3), 6) if self.data_scale is None else self.data_scale
        return dataclasses.replace(self, data_mean=mean, data_scale=scale)

    def example_inputs(self, part):
        """A batch of one, for the critic with a scale."""
        inputs = super().example_inputs(part)
        return (*inputs, jnp.ones(1)) if part == "critic" else inputs

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("generator_learning_rate", "critic_learning_rate", "lowest_noise_scale")
        self.require_at_least(1, "critic_steps")
        if self.critic_width is not None:
            self.require_at_least(1, "critic_width")
        if not self.lowest_noise_scale < self.highest_noise_scale < float("inf"):
            raise SettingError(
                "highest_noise_scale",
                f"must be above lowest_noise_scale, got {self.highest_noise_scale} and {self.lowest_noise_scale}.",
            )

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """The generator and the critic."""
        # Adam without momentum, as Diffusion-GAN and the nets before it have it: the critic's target moves.
        adam = lambda rate, steps: optax.adam(self.schedule(rate, steps, warmup=steps == num_steps), b1=0.0, b2=0.99)
        return (
            Player("model", ("generator",), self._generator_loss, adam(self.generator_learning_rate, num_steps)),
            Player(
                "critic",
                ("critic",),
                self._critic_loss,
                adam(self.critic_learning_rate, num_steps * self.critic_steps),
                steps=self.critic_steps,
            ),
        )

    def law(self) -> LogUniformScales:
        """w, the law of noise scales."""
        return LogUniformScales(self.lowest_noise_scale, self.highest_noise_scale)

    def generated(self, params, variables, count, key, *, train):
        """Samples from the prior [count, *image], and the generator's new variables."""
        z = jax.random.normal(key, (count, self.latent_dim))
        drawn = self.network("generator", params, variables, train=train)(z)
        return drawn if train else (drawn, {})

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
        x = to_unit(batch)
        if self.mirrored:
            chosen = jax.random.bernoulli(mirror_key, shape=(len(x), 1, 1, 1))
            x = jnp.where(chosen, x[:, :, ::-1], x)
        losses = self._losses(params, variables, x, key, train=True)
        metrics = {"divergence_bound": losses.divergence, "critic_accuracy": losses.accuracy}
        return losses.critic, LossOutput({}, metrics)

    def evaluate(self, state, x, *, key):
        """The critic's lower bound on the divergence over scales, and how often it is right."""
        losses = self._losses(state.params, state.variables, x, key, train=False)
        every = lambda value: jnp.broadcast_to(value, (len(x),))
        return {"divergence_bound_nats": every(losses.divergence), "critic_accuracy": every(losses.accuracy)}
