"""The noises that a method can be given by name, and the one that needs a network."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from spread_jax.nn import InvertibleResidual, check_invertible
from spread_jax.noise import FixedGaussian, FixedLaplace, LearnedCovariance, LearnedLocation, NoiseModel

__all__ = ["NOISES", "InvertibleLocation"]


@dataclasses.dataclass(frozen=True)
class InvertibleLocation(LearnedLocation):
    """Gaussian noise around a learned invertible map f(x) = x + r(x), Lip(r) < 1: a residual block of convolutions.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on a learned mean transform; Behrmann et al., Invertible
    Residual Networks, ICML 2019.

    Example:
      >>> InvertibleLocation(transform_features=4).learned
      True
    """

    name: ClassVar[str] = "transformed"

    transform_features: int = 8
    """Channels inside the invertible residual block (published: 32)."""
    transform_coefficient: float = 0.9
    """Operator norm of each of its convolutions, below 1 (published: 0.1)."""

    def validate(self, event_shape: tuple[int, ...]) -> None:
        """Refuses a block that cannot be."""
        super().validate(event_shape)
        if not self.transform_features >= 1:
            raise ValueError(f"transform_features must be at least 1, got {self.transform_features}.")
        if not 0 < self.transform_coefficient < 1:
            raise ValueError(f"transform_coefficient must be between 0 and 1, got {self.transform_coefficient}.")

    def transform(self) -> InvertibleResidual:
        """The block as a Flax module."""
        return InvertibleResidual(self.transform_features, coefficient=self.transform_coefficient, num_iterations=5)

    def check(self, params: Any, state: Any) -> None:
        """Refuses a map that may no longer be injective."""
        check_invertible(self.transform(), {"params": params, "spectral_stats": state})


NOISES: dict[str, NoiseModel] = {
    noise.name: noise for noise in (FixedGaussian(), FixedLaplace(), LearnedCovariance(), InvertibleLocation())
}
