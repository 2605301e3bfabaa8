"""ICA against scikit-learn's FastICA and Picard on the same data sets: error, failures and time.

  python -m benchmarks.ica                          all tables, about 8 minutes on 2 cores
  python -m benchmarks.ica --seeds 3 --out /tmp/b   a quick look

Data are x = A z with A of entries +-1, X = 20, Z = 10, no noise, sources of unit variance. Errors are means over
entries of |A_est - A| / |A| after matching signs and order ("raw"), and after giving columns the right lengths
("direction"). A fit that misses a source, with a cosine below 0.9, counts as failed. Every method sees each data set in
turn, in one process; times are warm (the second fit of the same shapes), the first fit is listed apart.

Writes ica.json and ica.md.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from picard import picard
from sklearn.decomposition import FastICA

from spread_jax._files import write_atomically
from spread_jax.linear import ica, match_columns, mixing_error


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    seeds: int = 20
    """Data sets for each row."""
    overcomplete_seeds: int = 10
    """Data sets for the overcomplete rows."""
    part: Literal["all", "square", "overcomplete"] = "all"
    """What to run; the tables of the other part are kept from an earlier run."""
    out: Path = Path("docs/benchmarks")
    """Folder for ica.json and ica.md."""


LAWS: dict[str, Callable] = {
    "Laplace": lambda rng, shape: rng.laplace(scale=np.sqrt(0.5), size=shape),
    "logistic": lambda rng, shape: rng.logistic(scale=np.sqrt(3) / np.pi, size=shape),
    "Student 5": lambda rng, shape: rng.standard_t(5, size=shape) * np.sqrt(3 / 5),
    "Student 3": lambda rng, shape: rng.standard_t(3, size=shape) * np.sqrt(1 / 3),
    "Bernoulli-Gauss": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.2) / np.sqrt(0.2),
    "uniform": lambda rng, shape: rng.uniform(-np.sqrt(3), np.sqrt(3), size=shape),
}


STARTS = {0: "the true A", 1: "random", 3: "random, `num_restarts=3`", 6: "random, `num_restarts=6`"}


def data_set(seed: int, count: int, rows: int, columns: int, law: str) -> tuple[np.ndarray, np.ndarray]:
    """x [N, X] in double precision and A [X, Z], no column of which repeats another."""
    rng = np.random.default_rng(seed)
    while True:
        mixing = rng.choice([-1.0, 1.0], (rows, columns))
        overlap = np.abs(mixing.T @ mixing - rows * np.eye(columns)).max()
        if np.linalg.matrix_rank(mixing) == min(rows, columns) and overlap < rows:
            return LAWS[law](rng, (count, columns)) @ mixing.T, mixing


def spread(**options) -> Callable:
    """A method of this library."""
    return lambda x, columns, seed: np.asarray(
        ica.fit(x.astype(np.float32), columns, key=jax.random.key(seed), **options).mixing, np.float64
    )


def fast_ica(x, columns, seed):
    """FastICA with its defaults."""
    return FastICA(columns, whiten="unit-variance", random_state=seed).fit(x).mixing_


def picard_tanh(x, columns, seed):
    """Picard with its tanh density, not constrained to orthogonal rotations; sources scaled to unit variance."""
    whitening, rotation, _ = picard(x.T, n_components=columns, ortho=False, extended=False, random_state=seed)
    unmixing = rotation @ whitening
    return np.linalg.pinv(unmixing) * ((x - x.mean(axis=0)) @ unmixing.T).std(axis=0)


def worst_cosine(mixing: np.ndarray, truth: np.ndarray) -> float:
    """The least cosine of a true column with its estimate."""
    matched = match_columns(mixing, truth, kind="direction")
    return float(((matched * truth).sum(axis=0) / (truth**2).sum(axis=0)).min())


def measure(methods: dict[str, Callable], seeds: int, count: int, law: str) -> list[dict]:
    """A row for each method, over the same data sets."""
    found: dict[str, list] = {name: [] for name in methods}
    compile_seconds = {}
    for seed in range(seeds):
        x, truth = data_set(seed, count, 20, 10, law)
        for name, method in methods.items():
            if not seed:
                began = time.perf_counter()
                method(x, 10, seed)
                compile_seconds[name] = time.perf_counter() - began
            began = time.perf_counter()
            mixing = method(x, 10, seed)
            seconds = time.perf_counter() - began
            errors = [mixing_error(mixing, truth, kind=kind) for kind in ("raw", "direction")]
            found[name].append((*errors, worst_cosine(mixing, truth), seconds))
    rows = []
    for name, runs in found.items():
        raw, direction, cosine, seconds = np.array(runs).T
        rows.append({
            "law": law,
            "count": count,
            "method": name,
            "raw": raw.mean(),
            "direction": direction.mean(),
            "direction_median": np.median(direction),
            "direction_standard_error": direction.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else 0.0,
            "failures": int((cosine < 0.9).sum()),
            "seconds": np.median(seconds),
            "first_seconds": compile_seconds[name],
        })  # fmt: skip
        print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict) -> str:
    """One line."""
    errors = f"raw {row['raw']:.4f} direction {row['direction']:.4f} median {row['direction_median']:.4f}"
    seconds = f"warm {row['seconds']:.3f} s first {row['first_seconds']:.1f} s"
    return f"{row['law']:16s} N={row['count']:6d} {row['method']:28s} {errors} failures {row['failures']} {seconds}"


def overcomplete(seeds: int) -> list[dict]:
    """Rows for more sources than dimensions, which the peers cannot fit; the last starts where the truth is."""
    rows = []
    for columns, count, runs in ((15, 5000, 1), (15, 5000, 3), (20, 10_000, 1), (20, 10_000, 6), (20, 10_000, 0)):
        errors, found, seconds = [], 0, []
        for seed in range(seeds):
            x, truth = data_set(seed, count, 10, columns, "Laplace")
            began = time.process_time()
            if runs:
                mixing = spread(method="gibbs", num_restarts=runs)(x, columns, seed)
            else:
                mixing = from_truth(x.astype(np.float32), truth.astype(np.float32), seed)
            seconds.append(time.process_time() - began)
            errors.append(mixing_error(mixing, truth, kind="direction"))
            found += worst_cosine(mixing, truth) > 0.9
        rows.append({
            "sources": columns,
            "count": count,
            "runs": runs,
            "median_direction": float(np.median(errors)),
            "all_columns_found": found,
            "seeds": seeds,
            "cpu_seconds": float(np.median(seconds)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def from_truth(x: np.ndarray, truth: np.ndarray, seed: int, steps: int = 1000) -> np.ndarray:
    """The mean of A over the last steps of chains that began at the true A: no search, only the likelihood's error."""
    scale = 0.1  # of the root-mean-square entry of A

    @jax.jit
    def run(x, start, key):
        noise_key, key = jax.random.split(key)
        y = x - x.mean(axis=0) + scale * jax.random.normal(noise_key, x.shape)

        def step(carry, t):
            mixing, z, mean = carry
            size = jnp.where(t < 0.4 * steps, 0.5, 0.1)
            mixing, z = ica.gibbs_step(mixing, z, y, noise_scale=scale, step_size=size, key=jax.random.fold_in(key, t))
            return (mixing, z, mean + jnp.where(t < 0.4 * steps, 0, mixing / (0.6 * steps))), None

        carry = (start, y @ jnp.linalg.pinv(start).T, jnp.zeros_like(start))
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][2]

    return np.asarray(run(x, truth, jax.random.key(seed)), np.float64)


def as_markdown(config: Config, results: dict) -> str:
    """The tables, with the command and the machine."""
    lines = [
        "# ICA against FastICA and Picard",
        "",
        f"`python -m benchmarks.ica --seeds {config.seeds} --overcomplete-seeds {config.overcomplete_seeds}`, seeds 0 "
        f"to {config.seeds - 1}, {results['cores']} CPU cores, jax {results['versions']['jax']}, scikit-learn "
        f"{results['versions']['scikit-learn']}, python-picard {results['versions']['python-picard']}. X = 20, Z = 10, "
        "no noise. Errors are means over data sets; where a ratio to FastICA exceeds 1, FastICA is better. Seconds are "
        "medians of warm fits; the first fit compiles.",
        "",
        "| sources | N | method | raw | direction | direction / FastICA | failed | warm s | warm / FastICA | first s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = {(row["law"], row["count"]): row for row in results["square"] if row["method"] == "FastICA"}
    for row in results["square"]:
        peer = base[row["law"], row["count"]]
        lines.append(
            f"| {row['law']} | {row['count']:,} | {row['method']} | {row['raw']:.4f} | {row['direction']:.4f} ± "
            f"{row['direction_standard_error']:.4f} | {row['direction'] / peer['direction']:.2f} "
            f"({row['direction_median'] / peer['direction_median']:.2f} of medians) | {row['failures']} | "
            f"{row['seconds']:.3f} | {row['seconds'] / peer['seconds']:.2f} | {row['first_seconds']:.1f} |"
        )
    if results["overcomplete"]:
        lines += [
            "",
            'More sources than dimensions, X = 10, `method="gibbs"`; FastICA and Picard have no such fit. A run that '
            "starts at the true A shows what the likelihood leaves to find: the error of its maximum, with no search.",
            "",
            "| Z | N | start | median direction error | every column found | CPU seconds |",
            "|---|---|---|---|---|---|",
        ]
        for row in results["overcomplete"]:
            lines.append(
                f"| {row['sources']} | {row['count']:,} | {STARTS[row['runs']]} | {row['median_direction']:.3f} | "
                f"{row['all_columns_found']} of {row['seeds']} | {row['cpu_seconds']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Runs every comparison and writes the tables."""
    warnings.simplefilter("ignore")  # of peers that did not converge: their errors are in the table
    known = {
        "closed form, Laplace": spread(source="laplace"),
        "closed form, source='auto'": spread(),
        "natural gradient": spread(method="natural_gradient"),
        "FastICA": fast_ica,
        "Picard, tanh": picard_tanh,
    }
    unknown = {name: known[name] for name in ("closed form, source='auto'", "FastICA", "Picard, tanh")}
    path = config.out / "ica.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    square, more = earlier.get("square", []), earlier.get("overcomplete", [])
    if config.part != "overcomplete":
        square = [row for count in (20_000, 5000, 1000) for row in measure(known, config.seeds, count, "Laplace")]
        for law in list(LAWS)[1:]:
            square += [row for count in (20_000, 1000) for row in measure(unknown, config.seeds, count, law)]
    if config.part != "square":
        more = overcomplete(config.overcomplete_seeds)
    packages = ("jax", "jaxlib", "numpy", "scikit-learn", "python-picard")
    results = {
        "square": square,
        "overcomplete": more,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=2, default=float) + "\n")
    text = as_markdown(config, results)
    write_atomically(config.out / "ica.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
