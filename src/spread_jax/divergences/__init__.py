"""Spread divergences: closed forms, and estimates from samples."""

from spread_jax.divergences.closed_form import (
    spread_chi_squared_deltas,
    spread_hellinger_deltas,
    spread_hellinger_gaussians,
    spread_kl_deltas,
    spread_kl_gaussians,
    spread_total_variation_deltas,
)
from spread_jax.divergences.estimators import Estimate, spread_divergence, spread_kl
from spread_jax.divergences.f_divergences import (
    FDivergence,
    chi_squared,
    f_divergence,
    jensen_shannon,
    kl,
    reverse_kl,
    squared_hellinger,
    total_variation,
)
from spread_jax.divergences.mixtures import log_spread_density
from spread_jax.divergences.mmd import (
    GaussianKernel,
    InverseMultiquadricKernel,
    LaplaceKernel,
    MixtureKernel,
    mmd_squared,
    spread_l1,
    spread_l2_squared,
)
from spread_jax.divergences.scales import (
    divergence_over_scales,
    spread_divergence_over_scales,
)

__all__ = [
    "Estimate",
    "FDivergence",
    "GaussianKernel",
    "InverseMultiquadricKernel",
    "LaplaceKernel",
    "MixtureKernel",
    "chi_squared",
    "divergence_over_scales",
    "f_divergence",
    "jensen_shannon",
    "kl",
    "log_spread_density",
    "mmd_squared",
    "reverse_kl",
    "spread_chi_squared_deltas",
    "spread_divergence",
    "spread_divergence_over_scales",
    "spread_hellinger_deltas",
    "spread_hellinger_gaussians",
    "spread_kl",
    "spread_kl_deltas",
    "spread_kl_gaussians",
    "spread_l1",
    "spread_l2_squared",
    "spread_total_variation_deltas",
    "squared_hellinger",
    "total_variation",
]
