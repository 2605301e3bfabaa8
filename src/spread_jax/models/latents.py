"""Densities of the latents fitted after training, to draw z from in place of the prior.

Samples g(z), z ~ N(0, I), suffer where the aggregate posterior q(z), the mean over images of q(z|y), is not N(0, I).
A density fitted to draws of q(z) removes that part of the loss and leaves the generator as it is. Ghosh et al., From
Variational to Deterministic Autoencoders, ICLR 2020 (a mixture fitted after training).
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spread_jax._files import UNREADABLE_ARRAYS, open_regular, refuse_packed
from spread_jax.nn import CouplingFlow

__all__ = ["LatentDensity", "LatentMixture", "Posteriors", "fit_flow", "fit_mixture", "standard_normal"]


class Posteriors(NamedTuple):
    """q(z|y) of a number of images: means and standard deviations, each float32 [n, Z]."""

    mean: np.ndarray
    std: np.ndarray

    def draw(self, key: jax.Array) -> np.ndarray:
        """One z [n, Z] for each image: draws of the aggregate posterior."""
        return self.mean + self.std * _host(key).standard_normal(self.mean.shape, np.float32)


class LatentDensity(NamedTuple):
    """A density of z.

    Attributes:
      sample: (number, key) -> z [number, Z].
      log_density: z [n, Z] -> log p(z) [n], in nats.
    """

    sample: Callable[[int, jax.Array], np.ndarray]
    log_density: Callable[[np.ndarray], np.ndarray]


def standard_normal(dim: int) -> LatentDensity:
    """The prior N(0, I) on `dim` coordinates.

    Args:
      dim: Z, how many.

    Returns:
      Its sampler and density.

    Example:
      >>> standard_normal(2).log_density(np.zeros((1, 2))).round(3).tolist()
      [-1.838]
    """
    return LatentDensity(
        lambda num, key: np.asarray(jax.random.normal(key, (num, dim))),
        lambda z: -0.5 * (np.square(z).sum(axis=1) + dim * math.log(2 * math.pi)),
    )


class LatentMixture(NamedTuple):
    """A mixture of K Gaussians, sum_k w_k N(m_k, L_k L_k^T), a `LatentDensity` that can be kept in a file.

    Attributes:
      weights: w [K], which sum to 1.
      means: m [K, Z].
      roots: L [K, Z, Z], lower triangles.
    """

    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    def sample(self, num: int, key: jax.Array) -> np.ndarray:
        """z [num, Z], float32; the first ones are the same whatever the number drawn."""
        chance = _host(key)
        which = np.searchsorted(np.cumsum(self.weights)[:-1], chance.random(num), side="right")
        u = _host(jax.random.fold_in(key, 1)).standard_normal((num, self.means.shape[1]))
        return (self.means[which] + np.einsum("nij,nj->ni", self.roots[which], u)).astype(np.float32)

    def log_density(self, z: np.ndarray) -> np.ndarray:
        """log p(z) [n] of z [n, Z], in nats."""
        from scipy.linalg import solve_triangular

        z = np.asarray(z, np.float64)
        terms = []
        for weight, mean, root in zip(self.weights, self.means, self.roots, strict=True):
            squares = np.square(solve_triangular(root, (z - mean).T, lower=True)).sum(axis=0)
            volume = np.log(np.diag(root)).sum() + 0.5 * len(mean) * math.log(2 * math.pi)
            terms.append(math.log(weight) - volume - 0.5 * squares)
        return np.logaddexp.reduce(terms, axis=0)

    def narrowed(self, factor: float) -> LatentMixture:
        """With all standard deviations multiplied by a factor in (0, 1]: fewer odd samples, and less variety.

        Source: Brock, Donahue and Simonyan, BigGAN, ICLR 2019, section 3.1, the truncation trick, by a factor.

        Example:
          >>> mixture = LatentMixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
          >>> float(mixture.narrowed(0.5).sample(1000, jax.random.key(0)).std().round(1))
          0.5
        """
        if not 0 < factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {factor}.")
        return self._replace(roots=factor * self.roots)

    def to_bytes(self) -> bytes:
        """The three arrays as the content of an .npz file, without pickle."""
        content = io.BytesIO()
        np.savez(content, **self._asdict())
        return content.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatentMixture:
        """Reads a file of what `to_bytes` gave, which may come from anywhere.

        Raises:
          OSError: the file cannot be read.
          ValueError: it holds something else.
        """
        with open_regular(path) as file:
            try:
                refuse_packed(file)
                arrays = np.load(file, allow_pickle=False)
                found = cls(*(np.asarray(arrays[name], np.float64) for name in cls._fields))
            except UNREADABLE_ARRAYS as error:
                raise ValueError(f"{path} holds no mixture of latents: {error}.") from None
        shapes, sizes = [array.shape for array in found], (len(found.weights), *found.means.shape[1:])
        if shapes != [sizes[:1], sizes, (*sizes, sizes[-1])] or found.weights.ndim != 1 or found.means.ndim != 2:
            raise ValueError(f"{path} holds no mixture of latents: its arrays have shapes {shapes}.")
        sound = all(np.isfinite(array).all() for array in found) and (found.weights > 0).all()
        sound = sound and (np.diagonal(found.roots, axis1=1, axis2=2) > 0).all()
        if not sound or abs(found.weights.sum() - 1) > 1e-6:
            raise ValueError(f"{path} holds no mixture of latents: its weights or Gaussians are none.")
        return found


def fit_mixture(found: Posteriors, *, components: int, seed: int) -> LatentMixture:
    """A mixture of Gaussians with full covariances, by scikit-learn's EM on one draw for each image.

    Args:
      found: the posteriors of the training images.
      components: Gaussians in the mixture, at most as many as there are images.
      seed: of the draws and of EM's start.

    Returns:
      The mixture, with its sampler and density.

    Raises:
      ValueError: there are more components than images.

    Source: Ghosh et al., From Variational to Deterministic Autoencoders, ICLR 2020, section 4.

    Example:
      >>> found = Posteriors(np.zeros((50, 2), np.float32), np.ones((50, 2), np.float32))
      >>> fit_mixture(found, components=1, seed=0).sample(3, jax.random.key(0)).shape
      (3, 2)
    """
    from sklearn.mixture import GaussianMixture

    if not 1 <= components <= len(found.mean):
        raise ValueError(f"components must be from 1 to {len(found.mean)}, the number of images, got {components}.")
    draws = found.draw(jax.random.key(seed)).astype(np.float64)
    fitted = GaussianMixture(components, covariance_type="full", reg_covar=1e-4, random_state=seed, max_iter=200)
    with warnings.catch_warnings():  # EM that stops at its last iteration is still a mixture
        warnings.simplefilter("ignore")
        fitted.fit(draws)
    return LatentMixture(fitted.weights_, fitted.means_, np.linalg.cholesky(fitted.covariances_))


def fit_flow(
    train: Posteriors,
    validation: Posteriors,
    *,
    seed: int,
    steps: int,
    couplings: int = 8,
    width: int = 64,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    evaluations: int = 10,
) -> LatentDensity:
    """A flow of couplings, by Adam on draws that are new at every step; the best of its evaluations is kept.

    It starts from the means and standard deviations of the draws: what is left to learn is the shape.

    Args:
      train: what it is fitted to.
      validation: what decides which of `evaluations` equally spaced steps is kept.
      seed: of the initial parameters, the batches and the draws.
      steps: Adam steps, the learning rate falling on a cosine to zero.
      couplings: of the flow.
      width: of its networks.
      batch_size: draws in a step.
      learning_rate: at the start.
      evaluations: looks at `validation`.
    """
    dim = train.mean.shape[1]
    flow = CouplingFlow(dim, num_couplings=couplings, width=width)
    init_key, run_key, validation_key = jax.random.split(jax.random.key(seed), 3)
    between = max(1, round(steps / evaluations))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, between * evaluations))
    data = {"mean": train.mean, "std": train.std, "held_out": validation.draw(validation_key)}
    data = {name: jnp.asarray(values, jnp.float32) for name, values in data.items()}

    @jax.jit
    def log_density(variables, z):
        return flow.apply(variables, z, method="log_density")

    @jax.jit
    def start(key, centre, spread):
        variables = flow.init(key, jnp.zeros((1, dim)))
        variables = {"params": {**variables["params"], "shift": centre, "log_scale": jnp.log(spread)}}
        return variables, optimizer.init(variables)

    # What differs between seeds is passed in, so that they share one compilation.
    @jax.jit
    def advance(variables, opt_state, data, key, first):
        def step(carry, index):
            variables, opt_state = carry
            row_key, draw_key = jax.random.split(jax.random.fold_in(key, index))
            rows = jax.random.randint(row_key, (batch_size,), 0, len(data["mean"]))
            z = data["mean"][rows] + data["std"][rows] * jax.random.normal(draw_key, (batch_size, dim))
            gradient = jax.grad(lambda v: -log_density(v, z).mean())(variables)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(variables, updates), opt_state), None

        (variables, opt_state), _ = jax.lax.scan(step, (variables, opt_state), first + jnp.arange(between))
        return variables, opt_state, log_density(variables, data["held_out"]).mean()

    variables, opt_state = start(init_key, *_moments(train))
    best, best_score = variables, float(log_density(variables, data["held_out"]).mean())
    for evaluation in range(evaluations):
        variables, opt_state, score = advance(variables, opt_state, data, run_key, evaluation * between)
        if float(score) > best_score:
            best, best_score = variables, float(score)

    forward = jax.jit(lambda variables, u: flow.apply(variables, u)[0])
    return LatentDensity(
        lambda num, key: np.asarray(forward(best, jax.random.normal(key, (num, dim)))),
        lambda z: np.asarray(log_density(best, jnp.asarray(z, jnp.float32))),
    )


def _moments(found: Posteriors) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each coordinate of the aggregate posterior, float32 [Z]."""
    variance = found.mean.var(axis=0) + np.square(found.std).mean(axis=0)
    return found.mean.mean(axis=0), np.sqrt(variance)


def _host(key: jax.Array) -> np.random.Generator:
    """NumPy's generator, seeded by a JAX key: nothing to compile for each shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
