"""Settings for faces and photographs by name: flat, a setting applies to whichever part of a run has it.

`demo` and `small` train what gives the best pictures in their time; --objective spread_elbo is the paper's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["PRESETS", "with_preset"]

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    # Sized for two CPU cores and minutes, on synthetic faces.
    "demo": {"objective": "density_ratio", "steps": 3500, "mirrored": True, "sample_every": 1400, "save_every": 1400},
    # On photographs what is made of an image's own latents is compared with it, which keeps few from being all alike.
    "small": {
        "objective": "density_ratio_vae",
        "mirrored": True,
        "lowest_noise_scale": 0.03,
        "data": "celeb_a",
        "steps": 8000,
        "latent_dim": 64,
        "width": 24,
        "final_noise_scale": 0.4,
        "learning_rate": 1e-3,
        "noise_decay_every": 1000,
        "record_every": 100,
        "sample_every": 1000,
        "save_every": 1000,
    },
    # The networks, settings and objective of the paper, for a GPU.
    "published": {
        "data": "celeb_a",
        "steps": 81_400,  # 50 epochs of 162,770 images
        "batch_size": 100,
        "latent_dim": 64,
        "width": 128,
        "noise_scale": 0.5,
        "final_noise_scale": 0.5,
        "learning_rate": 1e-4,
        "final_learning_rate_fraction": 1.0,
        "warmup_steps": 0,
        "ema_decay": 0.999,
        "transform_features": 32,
        "transform_coefficient": 0.1,
        "descent_steps": 16_280,  # 10 epochs
        "ascent_steps": 1000,
        "noise_learning_rate": 1e-5,
        "critic_learning_rate": 2e-4,  # of DCGAN, both
        "generator_learning_rate": 2e-4,
        "record_every": 100,
        "sample_every": 2000,
        "save_every": 2000,
        "held_out_examples": 10_000,
    },
}


def with_preset(value: T, preset: Mapping[str, Any]) -> T:
    """A method, a noise or settings with those of a preset's settings that it has; a noise in it likewise.

    Args:
      value: a frozen dataclass.
      preset: setting -> value; others are passed over.

    Returns:
      The changed value.

    Example:
      >>> from spread_jax.models import DeltaVae
      >>> with_preset(DeltaVae(), PRESETS["published"]).width
      128
    """
    changes = {}
    for field in dataclasses.fields(value):
        of_field = getattr(value, field.name)
        if field.name in preset:
            changes[field.name] = preset[field.name]
        elif dataclasses.is_dataclass(of_field):
            changes[field.name] = with_preset(of_field, preset)
    return dataclasses.replace(value, **changes)
