"""A normalizing flow of affine couplings: a density on few dimensions with an exact inverse and determinant."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_count

__all__ = ["CouplingFlow"]

# No coupling stretches by more than e^2, however wrong its network is away from the data.
_LARGEST_LOG_SCALE = 2.0


class _Conditioner(nn.Module):
    """Shift and log scale [batch, dim] from the coordinates that a coupling keeps; both zero at the start."""

    dim: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = kept
        for _ in range(2):
            h = nn.relu(nn.Dense(self.width, dtype=self.dtype)(h))
        out = nn.Dense(2 * self.dim, kernel_init=nn.initializers.zeros_init(), dtype=self.dtype)(h)
        shift, raw = jnp.split(out, 2, axis=-1)
        return shift, _LARGEST_LOG_SCALE * jnp.tanh(raw / _LARGEST_LOG_SCALE)


class CouplingFlow(nn.Module):
    r"""z = f(u), u ~ N(0, I), an invertible map of affine couplings (Real NVP) and a last affine map of each axis.

    Each coupling keeps the coordinates of a mask m and moves the others by networks of the kept ones,

      z' = m z + (1 - m) (z exp(s(m z)) + t(m z)),

    so its inverse is as cheap as itself and log |det| is the sum of s over the moved coordinates. Masks are the bits
    of the coordinate's index, each in both polarities: any two coordinates are on different sides of one of them.
    With fewer than 2 ceil(log2 dim) couplings some bits have no turn. At initialisation f is the identity.

    Attributes:
      dim: Z, coordinates of z. A single one has nothing to depend on, so its density is a Gaussian.
      num_couplings: how many.
      width: of the two hidden layers of each coupling's network.
      dtype: compute dtype; None infers it from the input and the parameters.

    Source: Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, ICLR 2017, equations 4 to 9.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> flow, u = CouplingFlow(dim=2, num_couplings=2, width=4), jnp.ones((3, 2))
      >>> variables = flow.init(jax.random.key(0), u)
      >>> z, _ = flow.apply(variables, u)
      >>> flow.apply(variables, z, method="log_density").shape
      (3,)
    """

    dim: int
    num_couplings: int = 8
    width: int = 64
    dtype: Any = None

    def setup(self):
        check_count("dim", self.dim)
        check_count("num_couplings", self.num_couplings)
        check_count("width", self.width)
        self.coupling = [_Conditioner(self.dim, self.width, self.dtype) for _ in range(self.num_couplings)]
        self.shift = self.param("shift", nn.initializers.zeros_init(), (self.dim,))
        self.log_scale = self.param("log_scale", nn.initializers.zeros_init(), (self.dim,))

    def __call__(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same as `forward`."""
        return self.forward(u)

    def forward(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(f(u) [batch, dim], log |det df/du| [batch]) of u [batch, dim]."""
        z = self._check("u", u)
        log_determinant = jnp.zeros(z.shape[0], z.dtype)
        for conditioner, mask in zip(self.coupling, self._masks(z.dtype), strict=True):
            shift, log_scale = ((1 - mask) * part for part in conditioner(mask * z))
            z = z * jnp.exp(log_scale) + shift
            log_determinant += log_scale.sum(axis=1)
        return z * jnp.exp(self.log_scale) + self.shift, log_determinant + self.log_scale.sum()

    def inverse(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(u with f(u) = z [batch, dim], log |det du/dz| [batch]) of z [batch, dim]."""
        u = (self._check("z", z) - self.shift) * jnp.exp(-self.log_scale)
        log_determinant = jnp.broadcast_to(-self.log_scale.sum(), u.shape[:1])
        for conditioner, mask in reversed(list(zip(self.coupling, self._masks(u.dtype), strict=True))):
            shift, log_scale = ((1 - mask) * part for part in conditioner(mask * u))
            u = (u - shift) * jnp.exp(-log_scale)
            log_determinant -= log_scale.sum(axis=1)
        return u, log_determinant

    def log_density(self, z: jax.Array) -> jax.Array:
        """log p(z) [batch] in nats of z [batch, dim], the density of f(u) with u ~ N(0, I)."""
        u, log_determinant = self.inverse(z)
        return log_determinant - 0.5 * (jnp.square(u) + math.log(2 * math.pi)).sum(axis=1)

    def _masks(self, dtype: Any) -> list[np.ndarray]:
        bits = max(1, (self.dim - 1).bit_length())
        index = np.arange(self.dim)
        return [((index >> (layer // 2 % bits) & 1) ^ (layer & 1)).astype(dtype) for layer in range(self.num_couplings)]

    def _check(self, name: str, value: jax.Array) -> jax.Array:
        value = check_batch(name, value)
        if value.ndim != 2 or value.shape[1] != self.dim:
            raise ValueError(f"{name} must have shape [batch, {self.dim}], got {value.shape}.")
        return value
