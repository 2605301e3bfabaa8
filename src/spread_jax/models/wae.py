"""The Wasserstein autoencoder with an MMD penalty on the latents."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from spread_jax.models.method import Encoded, Method, adam, parts_of, to_unit
from spread_jax.objectives import wae_mmd_loss
from spread_jax.training import LossOutput, Player

__all__ = ["WaeMmd"]


@dataclasses.dataclass(frozen=True)
class WaeMmd(Method):
    r"""Deterministic encoder and generator without noise; the aggregate posterior is pulled towards the prior.

      min over encoder and generator of  E |x - g(e(x))|^2 + weight MMD^2({e(x)}, N(0, I)).

    Source: Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, algorithm 2.

    Example:
      >>> WaeMmd(mmd_weight=10.0).name
      'wae_mmd'
    """

    name: ClassVar[str] = "wae_mmd"
    title: ClassVar[str] = "Wasserstein autoencoder with an MMD penalty"
    headlines: ClassVar = {"reconstruction_mse": "reconstruction error {:.4f}", "mmd": "MMD^2 {:.4f}"}
    summaries: ClassVar = {"mmd": "MMD^2 {:.4f}", "reconstruction_mse": "reconstruction error {:.5f}"}
    curves: ClassVar = {
        "MMD of latents, squared": {"mmd": "training batch", "validation_mmd": "validation"},
        "squared error per pixel": {"validation_reconstruction_mse": "reconstruction, validation"},
    }
    best_metric: ClassVar = ("loss", "min")
    smallest_batch: ClassVar = 2

    learning_rate: float = 2e-3
    """Adam's learning rate for encoder and generator, after the warm-up."""
    mmd_weight: float = 100.0
    """Weight of the penalty on the latents (published: 100 for faces, 10 for MNIST)."""

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_positive("learning_rate")
        self.require_at_least(0, "mmd_weight")

    def players(self, num_steps: int) -> tuple[Player, ...]:
        """Encoder and generator together."""
        return (
            Player("model", ("encoder", "generator"), self._loss, adam(self.schedule(self.learning_rate, num_steps))),
        )

    def _loss(self, params, variables, batch, *, key, step):
        x = to_unit(batch)
        encode, decode = (self.network(part, params, variables, train=True) for part in ("encoder", "generator"))

        def encode_mean(x):
            (mean, _), new = encode(x)
            return mean, new

        terms, auxiliary = wae_mmd_loss(x, encode_mean, decode, key=key, weight=self.mmd_weight, has_aux=True)
        metrics = {"reconstruction_mse": terms.reconstruction.mean() / self.pixels, "mmd": terms.mmd}
        return terms.loss, LossOutput(parts_of(("encoder", "generator"), auxiliary), metrics)

    def evaluate(self, state, x, *, key):
        """The loss, its penalty, and the error of reconstructions."""
        encode, decode = (
            self.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
        )
        terms = wae_mmd_loss(x, lambda x: encode(x)[0], decode, key=key, weight=self.mmd_weight)
        every = lambda value: jnp.broadcast_to(value, (len(x),))
        return {
            "loss": every(terms.loss),
            "mmd": every(terms.mmd),
            "reconstruction_mse": terms.reconstruction / self.pixels,
        }

    def encode(self, state, x, *, key):
        """e(x)."""
        mean, _ = self.network("encoder", state.params, state.variables, train=False)(x)
        return Encoded(mean, jnp.zeros_like(mean), x)
