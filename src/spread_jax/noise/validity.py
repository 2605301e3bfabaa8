"""Is a noise a valid spread noise? Each condition by name, with its reason."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from spread_jax.noise.discrete import DiscreteNoise
from spread_jax.noise.gaussian import GaussianNoise
from spread_jax.noise.laplace import LaplaceNoise
from spread_jax.noise.logistic import LogisticNoise
from spread_jax.noise.low_rank import LowRankGaussianNoise
from spread_jax.noise.student_t import CauchyNoise, StudentTNoise
from spread_jax.noise.transformed import TransformedNoise
from spread_jax.noise.uniform import UniformNoise

__all__ = ["SpreadCondition", "SpreadValidity", "check_valid_spread"]

_POSITIVE = "the density is positive everywhere, so p~ and q~ share their support"
_TRANSFORMS = {
    GaussianNoise: "the Fourier transform exp(-sigma^2 |omega|^2 / 2) is positive everywhere",
    LowRankGaussianNoise: "the Fourier transform is a Gaussian, positive everywhere",
    LaplaceNoise: "the Fourier transform prod 1 / (1 + b^2 omega^2) is positive everywhere",
    LogisticNoise: "the Fourier transform prod pi s omega / sinh(pi s omega) is positive everywhere",
    CauchyNoise: "the Fourier transform exp(-b |omega|_1) is positive everywhere",
    StudentTNoise: "the Fourier transform, a mixture of Gaussians, is positive everywhere",
}


class SpreadCondition(NamedTuple):
    """One condition of validity.

    Attributes:
      name: "scale", "support", "injective" (p~ = q~ implies p = q), or "transform".
      holds: True, False, or None where no program can decide.
      reason: one sentence.
    """

    name: str
    holds: bool | None
    reason: str


class SpreadValidity(NamedTuple):
    """What `check_valid_spread` found.

    Attributes:
      valid: True if all conditions hold, False if one fails, None if none fails but some cannot be decided.
      conditions: the conditions, each with its reason.
    """

    valid: bool | None
    conditions: tuple[SpreadCondition, ...]

    def __str__(self) -> str:
        words = {True: "holds", False: "FAILS", None: "undecided"}
        lines = [f"{c.name}: {words[c.holds]}: {c.reason}" for c in self.conditions]
        return "\n".join([{True: "valid", False: "not valid", None: "undecided"}[self.valid], *lines])


def check_valid_spread(noise) -> SpreadValidity:
    """Explains whether D(p~||q~) with this noise is a divergence between p and q.

    Two conditions: p~ and q~ share their support, and p~ = q~ implies p = q. For stationary noise
    p(y|x) = K(y - x), K > 0 gives the first, and a Fourier transform of K that vanishes on a countable set at
    most gives the second. For discrete noise they are a positive and an invertible matrix.

    Args:
      noise: any noise with concrete (not traced) numbers. Of a noise that is not part of this library nothing
        can be decided from its methods alone, and both conditions come back None.

    Returns:
      SpreadValidity, which prints as one line for each condition.

    Source: Zhang et al., Spread Divergence, ICML 2020, sections 2 and 3.

    Example:
      >>> from spread_jax import UniformNoise
      >>> print(check_valid_spread(UniformNoise(1.0)))
      not valid
      scale: holds: positive and finite
      support: FAILS: the support is bounded, so p~ and q~ need not share theirs
      injective: holds: the Fourier transform prod sin(h omega) / (h omega) has isolated zeros only
    """
    conditions = tuple(_conditions(noise))
    held = [condition.holds for condition in conditions]
    valid = False if False in held else None if None in held else True
    return SpreadValidity(valid, conditions)


def _conditions(noise):
    if isinstance(noise, TransformedNoise):
        yield from _conditions(noise.base)
        yield SpreadCondition(
            "transform", None, "f must be injective, which its code cannot show; make it so by design"
        )
    elif isinstance(noise, DiscreteNoise):
        yield from _discrete_conditions(np.asarray(_concrete(noise.matrix), np.float64))
    elif isinstance(noise, UniformNoise):
        yield _scale_condition(noise)
        yield SpreadCondition("support", False, "the support is bounded, so p~ and q~ need not share theirs")
        yield SpreadCondition(
            "injective", True, "the Fourier transform prod sin(h omega) / (h omega) has isolated zeros only"
        )
    elif type(noise) in _TRANSFORMS:
        yield _scale_condition(noise)
        yield SpreadCondition("support", True, _POSITIVE)
        yield SpreadCondition("injective", True, _TRANSFORMS[type(noise)])
    else:
        name = type(noise).__name__
        yield SpreadCondition("support", None, f"{name} must have a density that is positive everywhere")
        yield SpreadCondition(
            "injective", None, f"the Fourier transform of {name} may vanish on a countable set at most"
        )


def _scale_condition(noise):
    leaves = [np.asarray(_concrete(leaf), np.float64) for leaf in jax.tree_util.tree_leaves(noise)]
    finite = all(np.isfinite(leaf).all() for leaf in leaves)
    if finite and (np.asarray(noise.scale) > 0).all():
        return SpreadCondition("scale", True, "positive and finite")
    return SpreadCondition("scale", False, "every scale must be positive and every number finite")


def _discrete_conditions(matrix):
    smallest = matrix.min()
    if smallest > 0:
        yield SpreadCondition("support", True, f"every entry is positive, the smallest is {smallest:.3g}")
    else:
        row, column = np.unravel_index(matrix.argmin(), matrix.shape)
        yield SpreadCondition("support", False, f"p(y={row}|x={column}) is zero, so supports can differ")
    singular = np.linalg.svd(matrix, compute_uv=False)
    condition_number = singular[0] / max(singular[-1], np.finfo(np.float64).tiny)
    if singular[-1] > singular[0] * len(matrix) * np.finfo(np.float32).eps:
        yield SpreadCondition("injective", True, f"the matrix is invertible, condition number {condition_number:.3g}")
    else:
        yield SpreadCondition("injective", False, "the matrix is singular, so different p spread to the same p~")


def _concrete(value):
    if isinstance(value, jax.core.Tracer):
        raise TypeError("check_valid_spread needs concrete numbers, got a traced array; call it outside of jit.")
    return value
