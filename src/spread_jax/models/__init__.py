"""Ways to train a generator x = g(z), each a value; `fit` trains any of them, and the rest works on what it returns."""

from spread_jax.models.delta_vae import DeltaVae
from spread_jax.models.density_ratio import DensityRatio
from spread_jax.models.density_ratio_vae import DensityRatioVae
from spread_jax.models.evaluate import EvaluateSettings, evaluate, fitted_latents, posteriors
from spread_jax.models.fit import RESUMABLE, evaluation_key, fit, parameters, shown_latents
from spread_jax.models.importance import ImportanceWeighted
from spread_jax.models.latents import (
    LatentDensity,
    LatentMixture,
    Posteriors,
    fit_flow,
    fit_mixture,
    standard_normal,
)
from spread_jax.models.method import Encoded, Method, SettingError
from spread_jax.models.noises import NOISES, InvertibleLocation
from spread_jax.models.presets import PRESETS, with_preset
from spread_jax.models.run import Programs, Trained, encode, held_out, open_run, reconstruct, sample
from spread_jax.models.score_difference import ScoreDifference
from spread_jax.models.settings import DataSettings, FitSettings, open_splits
from spread_jax.models.spread_gan import SpreadGan
from spread_jax.models.vae import Vae
from spread_jax.models.verify import best_of, log_ratios, rejection_sample
from spread_jax.models.wae import WaeMmd

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (DeltaVae, Vae, ImportanceWeighted, WaeMmd, SpreadGan, DensityRatio, DensityRatioVae, ScoreDifference)
}

__all__ = [
    "METHODS",
    "NOISES",
    "PRESETS",
    "RESUMABLE",
    "DataSettings",
    "DeltaVae",
    "DensityRatio",
    "DensityRatioVae",
    "Encoded",
    "EvaluateSettings",
    "FitSettings",
    "ImportanceWeighted",
    "InvertibleLocation",
    "LatentDensity",
    "LatentMixture",
    "Method",
    "Posteriors",
    "Programs",
    "ScoreDifference",
    "SettingError",
    "SpreadGan",
    "Trained",
    "Vae",
    "WaeMmd",
    "best_of",
    "encode",
    "evaluate",
    "evaluation_key",
    "fit",
    "fit_flow",
    "fit_mixture",
    "fitted_latents",
    "held_out",
    "log_ratios",
    "open_run",
    "open_splits",
    "parameters",
    "posteriors",
    "reconstruct",
    "rejection_sample",
    "sample",
    "shown_latents",
    "standard_normal",
    "with_preset",
]
