"""mmd_squared and its gradient against the forms one writes first."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks import _measure
from benchmarks._report import Table

TITLE = "mmd_squared, unbiased, Gaussian kernel"
NOTES = """\
N samples on each side in 64 dimensions (seed N), value and gradient to x, float32. Calls of the sides alternate in
one process; times are medians, and a ratio above 1 means that mmd_squared is faster. "differences" forms every x_i -
x_j; "matrix product" is |x|^2 + |y|^2 - 2 <x, y>; both keep whole kernel matrices in memory. MiB is what the compiled
program allocates besides its inputs. The error is that of the value, relative to a sum in double precision."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    sizes: tuple[int, ...] = (1000, 4000)
    """Samples on each side."""
    largest_differences: int = 1000
    """The size up to which differences fit the memory."""
    dimensions: int = 64
    """Dimensions of an event."""
    repeats: int = 7
    """Calls of each side."""


def run(config: Config) -> list[Table]:
    """Time, memory and error at each size."""
    import jax
    import jax.numpy as jnp

    from spread_jax import GaussianKernel, mmd_squared

    bandwidth = float(np.sqrt(config.dimensions))

    def by_differences(x, y):
        return jnp.square(x[:, None] - y[None]).sum(axis=2)

    def by_product(x, y):
        squares = [jnp.square(v).sum(axis=1) for v in (x, y)]
        return squares[0][:, None] + squares[1] - 2 * jnp.matmul(x, y.T, precision="highest")

    def naive(distances):
        def mmd(x, y):
            kernel = lambda a, b: jnp.exp(-distances(a, b) / (2 * bandwidth**2))
            within = lambda k: (k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1))
            return within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()

        return mmd

    rows = []
    for size in config.sizes:
        rng = np.random.default_rng(size)
        x, y = (rng.normal(shift, 1, (size, config.dimensions)).astype(np.float32) for shift in (0, 0.1))
        functions = {
            "mmd_squared": lambda x, y: mmd_squared(x, y, GaussianKernel(bandwidth)),
            "matrix product": naive(by_product),
            "differences": naive(by_differences),
        }
        if size > config.largest_differences:
            del functions["differences"]
        compiled = {name: jax.jit(jax.value_and_grad(f)).lower(x, y).compile() for name, f in functions.items()}
        calls = {name: (lambda f=f, x=x, y=y: jax.block_until_ready(f(x, y))) for name, f in compiled.items()}
        seconds = _measure.interleaved(calls, config.repeats)
        exact = _exact(x.astype(float), y.astype(float), bandwidth)
        for name, f in compiled.items():
            found = _measure.ratio(seconds[name], seconds["mmd_squared"])
            rows.append({
                "N": size,
                "side": name,
                "ms": 1e3 * float(np.median(seconds[name])),
                "side / mmd_squared": found["ratio"],
                "lowest": found["lowest"],
                "highest": found["highest"],
                "MiB": f.memory_analysis().temp_size_in_bytes / 2**20,
                "relative error": abs(float(calls[name]()[0]) / exact - 1),
            })  # fmt: skip
    return [Table("Value and gradient", rows)]


def _exact(x, y, bandwidth):
    from scipy.spatial.distance import cdist

    kernel = lambda a, b: np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2))
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()
