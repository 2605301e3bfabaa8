"""Objectives: callables in, named per-example terms in nats out."""

from spread_jax.objectives.elbo import ElboTerms, elbo, spread_elbo

__all__ = ["ElboTerms", "elbo", "spread_elbo"]
