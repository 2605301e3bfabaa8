"""Small networks for 28x28 images, in place of those that take long to compile and are tested where they are."""

import flax.linen as nn
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from spread_jax import runtime

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
QUICK = "jax_disable_most_optimizations"  # such small programs take longer to compile than to run


class Encoder(nn.Module):
    """Stands for `DenseEncoder`."""

    latent_dim: int = 3

    @nn.compact
    def __call__(self, y, *, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(y.reshape(len(y), -1)))
        return nn.Dense(self.latent_dim)(h), nn.Dense(self.latent_dim)(h)


class Generator(nn.Module):
    """Stands for `DenseGenerator`."""

    native_gradients: bool = False

    @nn.compact
    def __call__(self, z, *, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(z))
        return nn.sigmoid(nn.Dense(28 * 28)(nn.tanh(h))).reshape(-1, 28, 28, 1)


@pytest.fixture(scope="session")
def networks():
    """An encoder and a generator of 3 latents."""
    return {"encoder": Encoder(), "generator": Generator()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Quick compilation, and caches of its own: of images, and of programs that several tests compile."""
    before = {name: getattr(jax.config, name) for name in CACHE} | {QUICK: jax.config.read(QUICK)}
    with pytest.MonkeyPatch.context() as patch:
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


@pytest.fixture(autouse=True, scope="module")
def no_global_settings():
    """The compiler's flags and cache belong to a program, not to a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "configure", lambda: None)
        yield
