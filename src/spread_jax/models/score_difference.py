"""A generator trained by the difference of two denoisers' scores over many scales of noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from spread_jax.models._scales import ScalesMethod
from spread_jax.models.method import parts_of
from spread_jax.nn import Denoiser
from spread_jax.objectives import denoising_loss, score_difference_loss
from spread_jax.training import LossOutput, Player

__all__ = ["ScoreDifference"]


@dataclasses.dataclass(frozen=True)
class ScoreDifference(ScalesMethod):
    r"""Generator against two denoisers, one of the data and one of its own samples, over a law of scales.

      grad D_w = E sigma^2 (s_q(y) - s_p(y)) . dg,   s_p(y) = grad log p~_sigma(y) = (E_p[x|y] - y) / sigma^2,

    the gradient of the reverse KL between spread samples and spread data, E_p[x|y] being what a denoiser learns.

    Source: Luo et al., Diff-Instruct, NeurIPS 2023; Yin et al., Distribution Matching Distillation, CVPR 2024.

    Example:
      >>> [player.moves for player in ScoreDifference(image_shape=(28, 28, 1)).players(10)]
      [('generator',), ('data_denoiser', 'sample_denoiser')]
    """

    name: ClassVar[str] = "score_difference"
    title: ClassVar[str] = "differences of scores over many scales of noise"
    parts: ClassVar = ("generator", "data_denoiser", "sample_denoiser")
    headlines: ClassVar = {
        "data_denoising_error": "denoising error {:.3f}",
        "score_difference": "score difference {:.3f}",
    }
    summaries: ClassVar = {"score_difference": "score difference {:.3f}"}
    curves: ClassVar = {
        "squared difference of scores, per pixel": {
            "score_difference": "training batch",
            "validation_score_difference": "validation",
        },
        "weighted squared error of a denoiser, per pixel": {
            "data_denoising_error": "of the data",
            "sample_denoising_error": "of the samples",
            "validation_data_denoising_error": "of the data, validation",
        },
    }

    denoiser_learning_rate: float = 1e-3
    """Adam's learning rate for both denoisers."""
    denoiser_steps: int = 1
    """Steps of the denoisers for each of the generator."""
    denoiser_width: int | None = None
    """Channels of the denoisers at half the image's size; as of the generator's width if not given."""

    def usual_network(self, part):
        """The usual generator, and denoisers that are told the scale."""
        if part == "generator":
            return super().usual_network(part)
        return self.told_network(Denoiser, self.denoiser_width or self.width)

    def output_shapes(self, part):
        """Images of every part."""
        return ((1, *self.image_shape),)

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("denoiser_learning_rate")
        self.require_at_least(1, "denoiser_steps")
        if self.denoiser_width is not None:
            self.require_at_least(1, "denoiser_width")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """The generator, and both denoisers together."""
        model = self.game_adam(self.generator_learning_rate, num_steps, warmup=True)
        denoisers = self.game_adam(self.denoiser_learning_rate, num_steps * self.denoiser_steps)
        moves = ("data_denoiser", "sample_denoiser")
        return (
            Player("model", ("generator",), self._generator_loss, model),
            Player("denoisers", moves, self._denoising_loss, denoisers, steps=self.denoiser_steps),
        )

    def _compared(self, params, variables, generated, key):
        return score_difference_loss(
            generated,
            self.network("data_denoiser", params, variables, train=False),
            self.network("sample_denoiser", params, variables, train=False),
            self.law(),
            key=key,
            weight=jnp.square,
        )

    def _generator_loss(self, params, variables, batch, *, key, step):
        latent_key, noise_key = jax.random.split(key)
        generated, new = self.generated(params, variables, len(batch), latent_key, train=True)
        terms = self._compared(params, variables, generated, noise_key)
        metrics = {"score_difference": terms.squared_difference.mean() / self.pixels}
        return terms.loss.mean(), LossOutput(parts_of(("generator",), (new,)), metrics)

    def _denoising_errors(self, part, params, variables, x, key):
        # The weight under which the network's own error has one size at all scales.
        scale = 0.25 if self.data_scale is None else self.data_scale
        weight = lambda sigma: (1 / scale**2 + 1 / jnp.square(sigma)) / self.pixels
        denoise = self.network(part, params, variables, train=False)
        return denoising_loss(x, denoise, self.law(), key=key, weight=weight)

    def _denoising_loss(self, params, variables, batch, *, key, step):
        mirror_key, latent_key, *keys = jax.random.split(key, 4)
        sides = {
            "data": self.shown(batch, mirror_key),
            "sample": self.generated(params, variables, len(batch), latent_key, train=True)[0],
        }
        errors = {
            f"{side}_denoising_error": self._denoising_errors(f"{side}_denoiser", params, variables, x, key).mean()
            for (side, x), key in zip(sides.items(), keys, strict=True)
        }
        return sum(errors.values()), LossOutput({}, errors)

    def evaluate(self, state, x, *, key):
        """How far the scores of data and samples differ, and the error of the data's denoiser."""
        latent_key, noise_key, data_key = jax.random.split(key, 3)
        generated, _ = self.generated(state.params, state.variables, len(x), latent_key, train=False)
        terms = self._compared(state.params, state.variables, generated, noise_key)
        errors = self._denoising_errors("data_denoiser", state.params, state.variables, x, data_key)
        return {"score_difference": terms.squared_difference / self.pixels, "data_denoising_error": errors}
