"""Small networks in place of those for 28x28 images, which take long to compile and are tested where they are."""

from typing import Any

import flax.linen as nn
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import _generator, _launch

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
QUICK = "jax_disable_most_optimizations"  # such small programs take longer to compile than to run


class Encoder(nn.Module):
    """Stands for `Encoder28`."""

    latent_dim: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, y, *, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(y.reshape(len(y), -1)))
        return nn.Dense(self.latent_dim)(h), nn.Dense(self.latent_dim)(h)


class Generator(nn.Module):
    """Stands for `Generator28`."""

    width: int
    channels: int
    dtype: Any
    native_gradients: bool = False

    @nn.compact
    def __call__(self, z, *, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(z))
        return nn.sigmoid(nn.Dense(28 * 28)(nn.tanh(h))).reshape(-1, 28, 28, 1)


class Discriminator(nn.Module):
    """Stands for `Discriminator28`; does not start at 0, so that the generator's gradient does not vanish."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, y):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(y.reshape(len(y), -1))))[:, 0]


@pytest.fixture(scope="module")
def small_networks(tmp_path_factory):
    """These networks, quick compilation, caches of its own: of images, and of programs compiled by several tests."""
    before = {name: getattr(jax.config, name) for name in CACHE} | {QUICK: jax.config.read(QUICK)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "configure_jax", lambda: None)
        patch.setattr(_generator, "Encoder28", Encoder)
        patch.setattr(_generator, "Generator28", Generator)
        patch.setattr(_generator, "Discriminator28", Discriminator)
        patch.setenv("SPREAD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            for name, value in zip((*CACHE, QUICK), (str(tmp_path_factory.mktemp("xla")), 0.05, True), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
