"""Is a noise a valid spread noise? Each condition by name, with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

__all__ = ["SpreadCondition", "SpreadValidity", "check_valid_spread", "positive_everywhere", "scale_condition"]


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
      noise: any noise with concrete (not traced) numbers. One without a method `spread_conditions` cannot be
        decided from its other methods, and both conditions come back None.

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
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(noise)):
        raise TypeError("check_valid_spread needs concrete numbers, got a traced array; call it outside of jit.")
    name = type(noise).__name__
    unknown = (
        SpreadCondition("support", None, f"{name} must have a density that is positive everywhere"),
        SpreadCondition("injective", None, f"the Fourier transform of {name} may vanish on a countable set at most"),
    )
    conditions = tuple(noise.spread_conditions()) if hasattr(noise, "spread_conditions") else unknown
    held = [condition.holds for condition in conditions]
    return SpreadValidity(False if False in held else None if None in held else True, conditions)


def positive_everywhere(noise, transform: str) -> Iterator[SpreadCondition]:
    """The conditions of a noise with positive density, whose Fourier transform is what the sentence says."""
    yield scale_condition(noise)
    yield SpreadCondition("support", True, "the density is positive everywhere, so p~ and q~ share their support")
    yield SpreadCondition("injective", True, f"the Fourier transform {transform}")


def scale_condition(noise) -> SpreadCondition:
    """Whether every scale is positive and every number finite."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree_util.tree_leaves(noise)]
    if all(np.isfinite(leaf).all() for leaf in leaves) and (np.asarray(noise.scale) > 0).all():
        return SpreadCondition("scale", True, "positive and finite")
    return SpreadCondition("scale", False, "every scale must be positive and every number finite")
