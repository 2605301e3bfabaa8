"""Invertible residual networks f(x) = x + g(x), Lip(g) < 1, by spectrally normalised convolutions.

They are the learned location of spread noise, p(y|x) = K(y - f(x)): f has to be injective, and neither its
inverse nor its Jacobian is needed to train. The norm that matters is that of the convolution as an operator on
images, zero padding included, and not that of its kernel reshaped to a matrix, which can be smaller by a factor
of up to the kernel's side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_count, check_positive
from spread_jax.nn.convolutions import conv

__all__ = [
    "Inverse",
    "InvertibleResidual",
    "SpectralConv",
    "check_invertible",
    "convolution_norm",
    "convolution_norm_bound",
    "invert",
    "lipschitz_bound",
]

STATS = "spectral_stats"
# Enough for four digits of the norm from a random start; one step a training step keeps up afterwards.
_INITIAL_ITERATIONS = 100


class SpectralConv(nn.Module):
    r"""SAME convolution of stride 1 whose operator norm is held at `coefficient` or below.

      w <- w * min(1, c / sigma),   sigma = |K u|,

    K being the convolution by w on images of the size it was initialised with, and u a unit image close to its
    leading right singular vector, kept in the collection "spectral_stats" and moved by the power iteration
    u <- K^T K u / |K^T K u| when `train` is true. sigma approaches the norm from below; `lipschitz_bound`
    tells what holds for certain. The gradient flows through sigma with u and v = K u / |K u| held fixed.

    Attributes:
      features: output channels.
      coefficient: c, > 0.
      kernel_size: taps along height and width.
      num_iterations: power iterations for each call with `train=True`.
      dtype: compute dtype; None infers it from the input and the parameters.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: Gouk et al., Regularisation of Neural Networks by Enforcing Lipschitz Continuity, 2018 (the
    operator's norm by power iteration); Behrmann et al., Invertible Residual Networks, ICML 2019 (min(1, c/sigma)).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer, x = SpectralConv(features=2, coefficient=0.5), jnp.ones((1, 6, 6, 1))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, update = layer.apply(variables, x, train=True, mutable=["spectral_stats"])
      >>> y.shape, update["spectral_stats"]["u"].shape
      ((1, 6, 6, 2), (1, 6, 6, 1))
    """

    features: int
    coefficient: float = 0.1
    kernel_size: tuple[int, int] = (3, 3)
    num_iterations: int = 1
    dtype: Any = None
    native_gradients: bool = False
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        check_positive("coefficient", self.coefficient)
        event = (1, *x.shape[1:])
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))

        def random_image():
            return _unit(jax.random.normal(self.make_rng("params"), event, kernel.dtype))

        stored = self.variable(STATS, "u", random_image)
        if stored.value.shape != event:
            name = "/".join(self.path) or "SpectralConv"
            raise ValueError(
                f"x must be images of shape {stored.value.shape[1:]}, for which {name} knows its norm, "
                f"got {event[1:]}; initialise again for another size."
            )
        x, kernel, bias, u = nn.dtypes.promote_dtype(x, kernel, bias, stored.value, dtype=self.dtype)
        if train or self.is_initializing():
            steps = _INITIAL_ITERATIONS if self.is_initializing() else self.num_iterations
            u = _power_iteration(jax.lax.stop_gradient(kernel), u, steps)
            stored.value = u.astype(stored.value.dtype)
        kernel = kernel * _shrinkage(kernel, u, self.coefficient)
        return conv(x, kernel, native=self.native_gradients) + bias[None, None, None]


class _Residual(nn.Module):
    """g of one block: three convolutions with ELU between, whose Lipschitz constant is 1."""

    features: int
    coefficient: float
    num_iterations: int
    dtype: Any
    native_gradients: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        h = x
        for index, channels in enumerate((self.features, self.features, x.shape[-1])):
            layer = SpectralConv(
                channels,
                coefficient=self.coefficient,
                num_iterations=self.num_iterations,
                dtype=self.dtype,
                native_gradients=self.native_gradients,
                name=f"conv_{index}",
            )
            h = layer(nn.elu(h) if index else h, train=train)
        return h


class InvertibleResidual(nn.Module):
    r"""An injective map of images, f = f_B o ... o f_1, each f_b(x) = x + g_b(x) with Lip(g_b) < 1.

    g is 3x3 convolutions C -> features -> features -> C with ELU between, each of operator norm at most
    `coefficient`, so Lip(g) <= coefficient^3 and

      (1 - coefficient^3)^B |x - x'|  <=  |f(x) - f(x')|  <=  (1 + coefficient^3)^B |x - x'|.

    With the published 0.1 that is within a thousandth of the identity for each block; a coefficient near 1 gives
    f room to act.

    Attributes:
      features: channels between the convolutions (published: 32).
      blocks: B, residual blocks (published: 1).
      coefficient: norm of each convolution, in (0, 1) (published: 0.1).
      num_iterations: power iterations for each call with `train=True`.
      dtype: compute dtype; None infers it from the input and the parameters.
      native_gradients: XLA's own convolution gradients, for forward-mode differentiation.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on learning the mean transformation; Behrmann et
    al., Invertible Residual Networks, ICML 2019.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise, TransformedNoise
      >>> f, x = InvertibleResidual(features=4), jnp.ones((2, 6, 6, 1))
      >>> variables = f.init(jax.random.key(0), x)
      >>> noise = TransformedNoise(GaussianNoise(0.5), jax.tree_util.Partial(f.apply, variables))
      >>> noise.sample(x, key=jax.random.key(1)).shape
      (2, 6, 6, 1)
    """

    features: int = 32
    blocks: int = 1
    coefficient: float = 0.1
    num_iterations: int = 1
    dtype: Any = None
    native_gradients: bool = False

    def setup(self):
        check_count("blocks", self.blocks)
        if not 0 < self.coefficient < 1:
            raise ValueError(f"coefficient must be between 0 and 1, got {self.coefficient}.")
        self.block = [
            _Residual(self.features, self.coefficient, self.num_iterations, self.dtype, self.native_gradients)
            for _ in range(self.blocks)
        ]

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """f(x) for images [batch, height, width, channels]; `train=True` also moves the power iteration."""
        check_batch("x", x)
        if x.ndim != 4:
            raise ValueError(f"x must be images [batch, height, width, channels], got shape {x.shape}.")
        for residual in self.block:
            x = x + residual(x, train=train)
        return x

    def residual(self, x: jax.Array, index: int) -> jax.Array:
        """g of block `index`."""
        return self.block[index](x, train=False)


def convolution_norm(kernel: jax.Array, height: int, width: int) -> jax.Array:
    """The exact operator norm of a SAME convolution on images of one size, from its dense matrix.

    The matrix has (height width)^2 in out entries: for small images.

    Args:
      kernel: [kernel_height, kernel_width, in, out].
      height: of the images.
      width: of the images.

    Returns:
      The largest singular value, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> print(convolution_norm(jnp.ones((1, 1, 1, 1)), 4, 4))
      1.0
    """
    size = height * width * kernel.shape[2]
    basis = jnp.eye(size, dtype=kernel.dtype).reshape(size, height, width, kernel.shape[2])
    return jnp.linalg.norm(conv(basis, kernel).reshape(size, -1), 2)


def convolution_norm_bound(kernel: jax.Array, height: int, width: int) -> jax.Array:
    """An upper bound on the operator norm of a SAME convolution on images of one size, by Fourier transform.

    A zero-padded convolution is a part of the circular one on a torus larger by the kernel's reach: its inputs
    are zero on the margin and its outputs there are dropped. The circular one is block diagonal in the Fourier
    basis, so its norm, which is the bound, is the largest singular value of an [in, out] matrix over
    frequencies. On large images it is close.

    Args:
      kernel: [kernel_height, kernel_width, in, out].
      height: of the images.
      width: of the images.

    Returns:
      The bound, a scalar.

    Source: Sedghi et al., The Singular Values of Convolutional Layers, ICLR 2019 (the circular norm).

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{convolution_norm_bound(jnp.ones((1, 1, 1, 1)), 4, 4):.3f}")
      1.000
    """
    size = (height + kernel.shape[0] - 1, width + kernel.shape[1] - 1)
    transfer = jnp.fft.fft2(kernel, s=size, axes=(0, 1))
    return jnp.linalg.norm(transfer, 2, axis=(2, 3)).max()


def lipschitz_bound(module: InvertibleResidual, variables: Any) -> dict[str, dict[str, jax.Array]]:
    """Upper bounds on the Lipschitz constants of g and of its layers, true whatever the power iteration missed.

    Args:
      module: the network.
      variables: its "params" and "spectral_stats".

    Returns:
      {block: {layer: bound, ..., "g": the product of the layers' bounds}}, scalars. A layer's is the
      `convolution_norm_bound` of its normalised kernel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = InvertibleResidual(features=4, coefficient=0.9)
      >>> bounds = lipschitz_bound(f, f.init(jax.random.key(0), jnp.ones((1, 8, 8, 1))))
      >>> sorted(bounds["block_0"]), bool(bounds["block_0"]["g"] < 1)
      (['conv_0', 'conv_1', 'conv_2', 'g'], True)
    """
    bounds = {}
    for block, layers in variables["params"].items():
        bounds[block] = {}
        for layer, params in layers.items():
            kernel, u = params["kernel"], variables[STATS][block][layer]["u"]
            kernel = kernel * _shrinkage(kernel, u, module.coefficient)
            bounds[block][layer] = convolution_norm_bound(kernel, *u.shape[1:3])
        bounds[block]["g"] = functools.reduce(jnp.multiply, bounds[block].values())
    return bounds


def check_invertible(module: InvertibleResidual, variables: Any) -> None:
    """Refuses a transform that is not certain to be injective.

    Args:
      module: the network.
      variables: its "params" and "spectral_stats", concrete.

    Raises:
      ValueError: the bound on Lip(g) of a block is not below 1; the message names the block's worst layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = InvertibleResidual(features=4)
      >>> check_invertible(f, f.init(jax.random.key(0), jnp.ones((1, 8, 8, 1))))
    """
    compiled = jax.jit(lipschitz_bound, static_argnums=0)
    for block, bounds in jax.device_get(compiled(module, variables)).items():
        total = bounds.pop("g")
        if not total < 1:
            # A bound that is no number is the worst.
            layer = max(bounds, key=lambda name: math.inf if math.isnan(bounds[name]) else bounds[name])
            raise ValueError(
                f"{block}/{layer} has an operator norm of up to {bounds[layer]:.4g} where {module.coefficient} is "
                f"allowed, so g of {block} may have a Lipschitz constant of {total:.4g} and x + g(x) need not be "
                f"injective; run more power iterations (num_iterations) or lower the learning rate."
            )


class Inverse(NamedTuple):
    """What `invert` found.

    Attributes:
      x: [batch, height, width, channels].
      converged: [batch], whether f(x) is y within the tolerance, every pixel.
      error: [batch], the largest |f(x) - y| of the image.
    """

    x: jax.Array
    converged: jax.Array
    error: jax.Array


def invert(
    module: InvertibleResidual,
    variables: Any,
    y: jax.Array,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 200,
) -> Inverse:
    r"""Solves f(x) = y by the fixed-point iteration x <- y - g(x), block by block from the last.

    The error falls by Lip(g) in each iteration, and x is then within error / (1 - Lip(g)) of the inverse for one
    block. Gradients with respect to `variables` and `y` are implicit: they solve (I + J_g)^T w = v in the same
    way and do not depend on the iterations taken.

    Args:
      module: the network.
      variables: its "params" and "spectral_stats".
      y: [batch, height, width, channels].
      tolerance: on |f(x) - y| of each pixel, in units of y.
      max_iterations: for each block.

    Returns:
      Inverse(x, converged, error). `converged` is judged by f(x) itself at the end, not by the iteration.

    Raises:
      TypeError: `y` is not floating point.
      ValueError: `tolerance` is not positive.

    Source: Behrmann et al., Invertible Residual Networks, ICML 2019, algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f, x = InvertibleResidual(features=4), jnp.ones((1, 6, 6, 1))
      >>> variables = f.init(jax.random.key(0), x)
      >>> bool(invert(f, variables, f.apply(variables, x)).converged.all())
      True
    """
    y = check_batch("y", y)
    check_positive("tolerance", tolerance)
    x = y
    for index in reversed(range(module.blocks)):
        g = functools.partial(module.apply, index=index, method="residual")
        x = _fixed_point(g, tolerance, max_iterations, variables, x)
    error = jax.lax.stop_gradient(jnp.abs(module.apply(variables, x) - y).max(axis=(1, 2, 3)))
    return Inverse(x, error <= tolerance, error)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(g, tolerance, max_iterations, variables, y):
    """x = y - g(x)."""
    return _iterate(lambda x: y - g(variables, x), y, tolerance, max_iterations)


def _fixed_point_forward(g, tolerance, max_iterations, variables, y):
    x = _fixed_point(g, tolerance, max_iterations, variables, y)
    return x, (variables, x)


def _fixed_point_backward(g, tolerance, max_iterations, residuals, cotangent):
    variables, x = residuals
    pull_back = jax.vjp(g, variables, x)[1]
    # Relative to the cotangent: its units are not those of y.
    scale = jnp.maximum(jnp.abs(cotangent).max(), jnp.finfo(cotangent.dtype).tiny)
    w = _iterate(lambda w: cotangent - pull_back(w)[1], cotangent, tolerance * scale, max_iterations)
    return jax.tree.map(jnp.negative, pull_back(w)[0]), w


_fixed_point.defvjp(_fixed_point_forward, _fixed_point_backward)


def _iterate(step, x, tolerance, max_iterations):
    def unfinished(carry):
        count, _, change = carry
        return (count < max_iterations) & (change > 0.5 * tolerance)

    def advance(carry):
        count, x, _ = carry
        new = step(x)
        return count + 1, new, jnp.abs(new - x).max()

    return jax.lax.while_loop(unfinished, advance, (0, x, jnp.asarray(jnp.inf, x.dtype)))[1]


def _unit(image):
    return image / jnp.maximum(jnp.linalg.norm(image), jnp.finfo(image.dtype).tiny)


def _power_iteration(kernel, u, num_iterations):
    """u after steps of u <- K^T K u, normalised."""

    def step(_, u):
        v, transpose = jax.vjp(lambda image: conv(image, kernel), u)
        return _unit(transpose(_unit(v))[0])

    return jax.lax.fori_loop(0, num_iterations, step, u)


def _shrinkage(kernel, u, coefficient):
    """min(1, c / sigma) with sigma = <v, K u>, u and v fixed."""
    image = conv(jax.lax.stop_gradient(u.astype(kernel.dtype)), kernel)
    sigma = (jax.lax.stop_gradient(_unit(image)) * image).sum()
    return coefficient / jnp.maximum(sigma, coefficient)
