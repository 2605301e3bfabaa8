"""Objectives: callables in, named per-example terms in nats out."""

from spread_jax._random import example_keys
from spread_jax.objectives.adversarial import GanLosses, spread_gan_losses
from spread_jax.objectives.density_ratio import (
    DensityRatioLosses,
    density_ratio_generator_loss,
    density_ratio_losses,
    non_saturating,
    spread_over_scales,
)
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
from spread_jax.objectives.score_difference import (
    ScoreDifferenceTerms,
    denoising_loss,
    preconditioned,
    score_difference_loss,
)
from spread_jax.objectives.wae import WaeTerms, wae_mmd_loss

__all__ = [
    "BoundTerms",
    "DensityRatioLosses",
    "ElboTerms",
    "GanLosses",
    "ScoreDifferenceTerms",
    "WaeTerms",
    "denoising_loss",
    "density_ratio_generator_loss",
    "density_ratio_losses",
    "elbo",
    "example_keys",
    "fisher_information",
    "gaussian_fisher_information",
    "gaussian_mle_variance",
    "mle_covariance",
    "non_saturating",
    "preconditioned",
    "sandwich_covariance",
    "score_difference_loss",
    "spread_elbo",
    "spread_fisher_information",
    "spread_gan_losses",
    "spread_importance_bound",
    "spread_over_scales",
    "wae_mmd_loss",
]
