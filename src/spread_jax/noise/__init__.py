"""Spread noises p(y|x): what is added to data and model alike."""

from spread_jax.noise._protocol import SpreadNoise
from spread_jax.noise.gaussian import GaussianNoise

__all__ = ["GaussianNoise", "SpreadNoise"]
