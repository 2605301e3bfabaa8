"""The delta-VAE trained by its importance-weighted bound."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from spread_jax.models.delta_vae import DeltaVae
from spread_jax.objectives import spread_importance_bound

__all__ = ["ImportanceWeighted"]


@dataclasses.dataclass(frozen=True)
class ImportanceWeighted(DeltaVae):
    r"""A delta-VAE whose bound is importance-weighted, tighter with every draw.

      max over encoder and generator of  E log (1/K) sum_k p(y|g(z_k)) p(z_k) / q(z_k|y),   z_k ~ q(z|y).

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, equation 8.

    Example:
      >>> ImportanceWeighted(importance_samples=5).name
      'importance'
    """

    name: ClassVar[str] = "importance"
    title: ClassVar[str] = "delta-VAE by its importance-weighted bound"
    headlines: ClassVar = {"importance_bound": "bound {:.0f} nats"}
    summaries: ClassVar = {"importance_bound_nats": "importance-weighted bound {:.1f} nats", **DeltaVae.summaries}
    curves: ClassVar = {
        "nats per example": {
            "importance_bound": "importance-weighted bound, training batch",
            "validation_importance_bound_nats": "importance-weighted bound, validation",
            "validation_elbo_nats": "ELBO, validation",
        },
        **{label: series for label, series in DeltaVae.curves.items() if "nats per example" not in label},
    }
    best_metric: ClassVar = ("importance_bound_nats", "max")
    bounds: ClassVar = ("elbo_nats", "importance_bound_nats")

    importance_samples: int = 8
    """K, latent draws of the importance-weighted bound."""
    num_latent_samples: ClassVar[int] = 1
    low_variance: ClassVar[bool] = False

    def validate(self) -> None:
        """Refuses settings that cannot work; see `Method.validate`."""
        super().validate()
        self.require_at_least(1, "importance_samples")

    def terms(self, params, variables, noise, x, key, *, see=lambda y: y):
        """The importance-weighted bound of images x, and the networks' new variables."""
        encoder = self.network("encoder", params, variables, train=True)
        return spread_importance_bound(
            x,
            lambda y: encoder(see(y)),
            self.network("generator", params, variables, train=True),
            noise,
            key=key,
            num_samples=self.importance_samples,
            num_spread_samples=self.num_spread_samples,
            has_aux=True,
        )

    def bound(self, terms):
        """(the mean bound, metrics)."""
        bound = terms.bound.mean()
        return bound, {"importance_bound": bound, "effective_sample_size": terms.effective_sample_size.mean()}

    def evaluate(self, state, x, *, key):
        """What `DeltaVae` measures, and the importance-weighted bound, on which that of the spread KL then rests."""
        noise = self.noise_of(state)
        encode, decode = (
            self.network(part, state.params, state.variables, train=False) for part in ("encoder", "generator")
        )
        spread_key, latent_key = jax.random.split(key)
        y = noise.sample(x, key=spread_key)
        terms = spread_importance_bound(
            x, encode, decode, noise, key=latent_key, num_samples=self.importance_samples, spread_samples=y
        )
        found = super().evaluate(state, x, key=key)
        return {
            **found,
            "importance_bound_nats": terms.bound,
            "spread_kl_bound_nats": -terms.bound - self.entropy(noise),
        }
