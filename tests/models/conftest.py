"""Small networks of the caller's own, and quick compilation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.data import Dataset

IMAGE = (8, 8, 1)
QUICK = "jax_disable_most_optimizations"  # such small programs take longer to compile than to run


class Encoder(nn.Module):
    """With batch statistics."""

    latent_dim: int = 3

    @nn.compact
    def __call__(self, y, *, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(y.reshape(len(y), -1)))
        return nn.Dense(self.latent_dim)(h), nn.Dense(self.latent_dim)(h)


class Generator(nn.Module):
    """Without any, and without a `train` to tell."""

    @nn.compact
    def __call__(self, z):
        return nn.sigmoid(nn.Dense(64)(nn.tanh(nn.Dense(4)(z)))).reshape(-1, *IMAGE)


class Critic(nn.Module):
    """Does not start at 0, so that the generator's gradient does not vanish."""

    @nn.compact
    def __call__(self, y, sigma):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(y.reshape(len(y), -1) / (1 + jnp.reshape(sigma, (-1, 1))))))[:, 0]


NETWORKS = {"encoder": Encoder(), "generator": Generator(), "critic": Critic()}


def images(number, size=4, shape=IMAGE):
    return np.random.default_rng(number).integers(0, 256, (size, *shape), np.uint8)


def splits(size=24, shape=IMAGE):
    names = ("train", "validation", "test")
    return {name: Dataset.from_array(images(i, size, shape), split=name) for i, name in enumerate(names)}


@pytest.fixture(autouse=True, scope="module")
def quick():
    before = jax.config.read(QUICK)
    jax.config.update(QUICK, True)
    yield
    jax.config.update(QUICK, before)
