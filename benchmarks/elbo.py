"""What spreading costs: the spread ELBO against the plain one of a variational autoencoder, with the same networks."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from benchmarks import _measure, step
from benchmarks._report import Table

TITLE = "The spread ELBO against the plain ELBO"
NOTES = """\
Loss and gradient of the CelebA networks on one batch (seed 0). Calls of the sides alternate in one process; times are
medians. Spreading draws one normal number for each pixel; nothing else differs, and the low-variance form costs the
same."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    width: int = 32
    """Channels of the encoder's first convolution."""
    batch_size: int = 32
    """Images in a batch."""
    repeats: int = 15
    """Calls of each side."""


def losses(width: int) -> dict:
    """{name: (params, variables, images, key) -> loss}."""
    import jax.numpy as jnp

    from spread_jax import GaussianNoise, elbo, spread_elbo

    model = step.build(width)

    def loss(bound, params, variables, batch, key):
        networks = (model.method.network(part, params, variables, train=True) for part in ("encoder", "generator"))
        terms, _ = bound(batch.astype(jnp.float32) / 255.0, *networks, GaussianNoise(0.5), key=key, has_aux=True)
        return -terms.elbo.mean()

    bounds = {
        "plain ELBO": elbo,
        "spread ELBO": spread_elbo,
        "spread ELBO, low variance": functools.partial(spread_elbo, low_variance=True),
    }
    return {name: functools.partial(loss, bound) for name, bound in bounds.items()}


def run(config: Config) -> list[Table]:
    """Times of the three losses with their gradients."""
    import jax

    state = step.build(config.width).initial_state()
    arguments = state.params, state.variables, jax.device_put(step.images(config.batch_size)), jax.random.key(0)
    compiled = {name: jax.jit(jax.value_and_grad(f)) for name, f in losses(config.width).items()}
    calls = {name: (lambda f=f: jax.block_until_ready(f(*arguments))) for name, f in compiled.items()}
    seconds = _measure.interleaved(calls, config.repeats)
    rows = []
    for name, found in seconds.items():
        ratio = _measure.ratio(found, seconds["plain ELBO"])
        rows.append({
            "side": name,
            "ms": 1e3 * float(np.median(found)),
            "side / plain": ratio["ratio"],
            "lowest": ratio["lowest"],
            "highest": ratio["highest"],
        })  # fmt: skip
    return [Table(f"Loss and gradient, width {config.width}, batch {config.batch_size}", rows)]
