"""What the networks for images share: their compute settings, the layer to one real number, checks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spread_jax._checks import check_count

MOST = 8  # times the width: the channels of the published networks' deepest layer, and of larger networks' too


class Network(nn.Module, kw_only=True):
    """How all compute: the dtype of the convolutions, and whether their gradients are XLA's own."""

    dtype: Any = jnp.float32
    native_gradients: bool = False

    def layer(self, kind: type, features: int, **settings) -> nn.Module:
        """A convolution, or another layer of that kind."""
        return kind(features, dtype=self.dtype, native=self.native_gradients, **settings)

    def normalised(self, norm: nn.Module, h: jax.Array) -> jax.Array:
        """`norm(h)`, with Flax's promotion of half precision to float32, whatever the caller has forbidden."""
        with jax.numpy_dtype_promotion("standard"):
            return norm(h)


def score_head(h: jax.Array) -> jax.Array:
    """One number for each example, 0 at the start; float32 whatever the compute dtype."""
    h = h.astype(jnp.float32).reshape(h.shape[0], -1)
    return nn.Dense(1, kernel_init=nn.initializers.zeros_init(), name="score")(h)[:, 0]


def check_width(width: int, *, even: bool = False) -> None:
    """Raises ValueError unless it is a positive number, and even where channels are half of it."""
    if check_count("width", width) % 2 and even:
        raise ValueError(f"width must be an even number, since the layer beside x has width / 2 channels; got {width}.")
