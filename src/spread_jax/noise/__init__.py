"""Spread noises p(y|x): what is added to data and model alike."""

from spread_jax.noise._protocol import SpreadNoise, spread
from spread_jax.noise.discrete import DiscreteNoise
from spread_jax.noise.gaussian import GaussianNoise
from spread_jax.noise.laplace import LaplaceNoise
from spread_jax.noise.learned import (
    FixedGaussian,
    FixedLaplace,
    LearnedCovariance,
    LearnedLocation,
    LearnedNoise,
    NoiseCollapseError,
    NoiseModel,
    check_noise_range,
)
from spread_jax.noise.logistic import LogisticNoise
from spread_jax.noise.low_rank import LowRankGaussianNoise
from spread_jax.noise.scales import (
    GridScales,
    LogUniformScales,
    SampledScales,
    ScaleLaw,
)
from spread_jax.noise.student_t import CauchyNoise, StudentTNoise
from spread_jax.noise.transformed import TransformedNoise
from spread_jax.noise.uniform import UniformNoise
from spread_jax.noise.validity import SpreadCondition, SpreadValidity, check_valid_spread

__all__ = [
    "CauchyNoise",
    "DiscreteNoise",
    "FixedGaussian",
    "FixedLaplace",
    "GaussianNoise",
    "GridScales",
    "LaplaceNoise",
    "LearnedCovariance",
    "LearnedLocation",
    "LearnedNoise",
    "LogUniformScales",
    "LogisticNoise",
    "LowRankGaussianNoise",
    "NoiseCollapseError",
    "NoiseModel",
    "SampledScales",
    "ScaleLaw",
    "SpreadCondition",
    "SpreadNoise",
    "SpreadValidity",
    "StudentTNoise",
    "TransformedNoise",
    "UniformNoise",
    "check_noise_range",
    "check_valid_spread",
    "spread",
]
