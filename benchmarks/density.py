"""Streaming mixture densities against the dense form, scikit-learn and the matrix products they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks import _measure
from benchmarks._report import Table

TITLE = "log_spread_density of a Gaussian spread"
NOTES = """\
N points y and N atoms in 64 dimensions, all standard normal (seed 0), sigma 0.5, float32. Calls of the sides
alternate in one process; times are medians. The floor is one N x N x 64 matrix product in blocks and nothing else:
log_spread_density computes N x N exponentials besides, and forms three products where the data lie many sigma apart,
to keep the digits of near pairs. "differences" forms every y - x; "matrix product" is |y|^2 + |x|^2 - 2 <y, x>, with
all pairs in memory. MiB is what the compiled program allocates besides its inputs; errors are against double
precision."""
OURS, GRADIENT = "log_spread_density", "its gradient to y"
FLOOR = "one product"
KERNEL_DENSITY = "scikit-learn KernelDensity"
SCALE = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    size: int = 20_000
    """N, points and atoms, of the comparison with the floor."""
    small_size: int = 2000
    """N of the comparison with the dense forms and scikit-learn."""
    dimensions: int = 64
    """Dimensions of an event."""
    repeats: int = 5
    """Calls of each side."""


def problem(size: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """y and atoms, each [size, dimensions]."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(size, dimensions)).astype(np.float32) for _ in range(2))


def sides(names: Sequence[str], size: int, dimensions: int) -> dict:
    """{name: (a call that computes log p~(y) and waits for it, MiB that it allocates)}."""
    import jax
    import jax.numpy as jnp

    from spread_jax import GaussianNoise, log_spread_density

    noise = GaussianNoise(SCALE)
    y, atoms = map(jnp.asarray, problem(size, dimensions))

    def differences(y, atoms):
        pairs = jax.vmap(lambda row: noise.log_prob(jnp.broadcast_to(row, atoms.shape), atoms))(y)
        return jax.nn.logsumexp(pairs, axis=1) - jnp.log(len(atoms))

    def product(y, atoms):
        squares = [jnp.square(x).sum(axis=1) for x in (y, atoms)]
        distances = squares[0][:, None] + squares[1] - 2 * jnp.matmul(y, atoms.T, precision="highest")
        constant = dimensions * (0.5 * np.log(2 * np.pi) + np.log(SCALE)) + np.log(len(atoms))
        return jax.nn.logsumexp(-0.5 * distances / SCALE**2, axis=1) - constant

    edge = min(1024, size)

    def floor(y, atoms):
        blocks = lambda x: jnp.resize(x, (-(-size // edge), edge, dimensions))

        def one_block(rows):
            def add(total, columns):
                # The barrier has every entry of the product computed, and costs nothing itself.
                block = jax.lax.optimization_barrier(jnp.matmul(rows, columns.T, precision="highest"))
                return total + block[:, 0], None

            return jax.lax.scan(add, jnp.zeros(edge), blocks(atoms))[0]

        return jax.lax.map(one_block, blocks(y))

    functions = {
        OURS: lambda y, atoms: log_spread_density(y, atoms, noise),
        GRADIENT: jax.grad(lambda y, atoms: log_spread_density(y, atoms, noise).sum()),
        "differences": differences,
        "matrix product": product,
        FLOOR: floor,
    }
    found = {}
    for name in names:
        if name == KERNEL_DENSITY:
            found[name] = _kernel_density(*problem(size, dimensions)), None
            continue
        compiled = jax.jit(functions[name]).lower(y, atoms).compile()
        allocated = compiled.memory_analysis().temp_size_in_bytes / 2**20
        found[name] = (lambda compiled=compiled: np.asarray(compiled(y, atoms))), allocated
    return found


def _kernel_density(y, atoms):
    from sklearn.neighbors import KernelDensity

    fitted = KernelDensity(bandwidth=SCALE).fit(atoms)
    return lambda: fitted.score_samples(y)


def run(config: Config) -> list[Table]:
    """Times against the floor and against peers."""
    return [
        Table(f"N = {config.size:,} against the floor", _rows((OURS, GRADIENT, FLOOR), config.size, config)),
        Table(
            f"N = {config.small_size:,} against peers",
            _rows((OURS, "differences", "matrix product", KERNEL_DENSITY), config.small_size, config),
        ),
    ]


def _rows(names, size, config):
    found = sides(names, size, config.dimensions)
    seconds = _measure.interleaved({name: call for name, (call, _) in found.items()}, config.repeats)
    reference = _exact(size, config.dimensions) if KERNEL_DENSITY in names else None
    base = FLOOR if FLOOR in names else OURS
    rows = []
    for name, (call, allocated) in found.items():
        ratio = _measure.ratio(seconds[name], seconds[base])
        row = {
            "side": name,
            "s": float(np.median(seconds[name])),
            f"side / {base}": ratio["ratio"],
            "lowest": ratio["lowest"],
            "highest": ratio["highest"],
        }
        row["MiB"] = allocated
        if reference is not None:
            row["largest error, nats"] = float(np.abs(call() - reference).max())
        rows.append(row)
    return rows


def _exact(size, dimensions):
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    y, atoms = (part.astype(float) for part in problem(size, dimensions))
    joint = -0.5 * cdist(y, atoms, "sqeuclidean") / SCALE**2
    return logsumexp(joint, axis=1) - dimensions * (0.5 * np.log(2 * np.pi) + np.log(SCALE)) - np.log(size)
