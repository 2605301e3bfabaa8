"""Ways to train a generator x = g(z), each a value; `fit` trains any of them, and the rest works on what it returns."""

from spread_jax.models.delta_vae import DeltaVae
from spread_jax.models.importance import ImportanceWeighted
from spread_jax.models.method import Encoded, Method, SettingError
from spread_jax.models.noises import NOISES, InvertibleLocation
from spread_jax.models.spread_gan import SpreadGan
from spread_jax.models.vae import Vae
from spread_jax.models.wae import WaeMmd

METHODS: dict[str, Method] = {m.name: m for m in (DeltaVae, Vae, ImportanceWeighted, WaeMmd, SpreadGan)}

__all__ = [
    "METHODS",
    "NOISES",
    "DeltaVae",
    "Encoded",
    "ImportanceWeighted",
    "InvertibleLocation",
    "Method",
    "SettingError",
    "SpreadGan",
    "Vae",
    "WaeMmd",
]
