"""Objectives: callables in, named per-example terms in nats out."""

from spread_jax._random import example_keys
from spread_jax.objectives.adversarial import GanLosses, spread_gan_losses
from spread_jax.objectives.elbo import ElboTerms, elbo, spread_elbo
from spread_jax.objectives.importance import BoundTerms, spread_importance_bound
from spread_jax.objectives.maximum_likelihood import (
    fisher_information,
    gaussian_fisher_information,
    gaussian_mle_variance,
    mle_covariance,
    sandwich_covariance,
    spread_fisher_information,
)
from spread_jax.objectives.wae import WaeTerms, wae_mmd_loss

__all__ = [
    "BoundTerms",
    "ElboTerms",
    "GanLosses",
    "WaeTerms",
    "elbo",
    "example_keys",
    "fisher_information",
    "gaussian_fisher_information",
    "gaussian_mle_variance",
    "mle_covariance",
    "sandwich_covariance",
    "spread_elbo",
    "spread_fisher_information",
    "spread_gan_losses",
    "spread_importance_bound",
    "wae_mmd_loss",
]
