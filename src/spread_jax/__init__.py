"""Spread divergences: likelihood training for models that have zero likelihood.

Add the same noise p(y|x) to data and model, and bounds, EM and KL are defined again. This namespace needs
only jax; `spread_jax.nn`, `spread_jax.data` and `spread_jax.training` need the extras that name them.
"""

from spread_jax.noise import (
    CauchyNoise,
    DiscreteNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    LowRankGaussianNoise,
    SpreadCondition,
    SpreadNoise,
    SpreadValidity,
    StudentTNoise,
    TransformedNoise,
    UniformNoise,
    check_valid_spread,
)
from spread_jax.objectives import ElboTerms, elbo, spread_elbo

__version__ = "0.1.0"

__all__ = [
    "CauchyNoise",
    "DiscreteNoise",
    "ElboTerms",
    "GaussianNoise",
    "LaplaceNoise",
    "LogisticNoise",
    "LowRankGaussianNoise",
    "SpreadCondition",
    "SpreadNoise",
    "SpreadValidity",
    "StudentTNoise",
    "TransformedNoise",
    "UniformNoise",
    "check_valid_spread",
    "elbo",
    "spread_elbo",
]
