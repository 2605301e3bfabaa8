"""ICA against scikit-learn's FastICA and Picard on the same data sets: error, failures and time.

  python -m benchmarks.ica                          all tables, a few data sets for each row: about 5 minutes
  python -m benchmarks.ica --full                   the published tables: half an hour on 2 cores
  python -m benchmarks.ica --part mixes             sources of different laws: all pairs of eight, and five at once
  python -m benchmarks.ica --part hum               hum of the mains beside a signal
  python -m benchmarks.ica --part times             CPU seconds, warm, and of a first fit in a new process

In the tables of one law data are x = A z with A of entries +-1, X = 20, Z = 10, no noise, sources of unit variance.
Errors are means over entries of |A_est - A| / |A| after matching signs and order ("raw"), and after giving columns the
right lengths ("direction"). A fit that misses a source, with a cosine below 0.9, counts as failed. Every method sees
each data set in turn, in one process; times are CPU seconds of warm fits, those of a first fit are listed apart.

Writes ica.json and ica.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
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

from benchmarks._jade import jade
from spread_jax._files import write_atomically
from spread_jax.linear import ica, match_columns, mixing_error
from spread_jax.linear.sklearn import SpreadICA


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    seeds: int = 4
    """Data sets for each row."""
    overcomplete_seeds: int = 1
    """Data sets for the overcomplete rows."""
    large_seeds: int = 2
    """Data sets for each row of 100,000 examples in the table of mixes."""
    full: bool = False
    """As published: 20 data sets for each row, 10 for those that take long."""
    part: Literal["all", "square", "overcomplete", "mixes", "hum", "times"] = "all"
    """What to run; the tables of the other parts are kept from an earlier run."""
    others: bool = True
    """Whether others than the closed form run too; if not, their errors are kept from an earlier run of these seeds."""
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


KNOWN = {
    "closed form, Laplace": spread(source="laplace"),
    "closed form, source='auto'": spread(),
    "natural gradient": spread(method="natural_gradient"),
    "FastICA": fast_ica,
    "Picard, tanh": picard_tanh,
}


def worst_cosine(mixing: np.ndarray, truth: np.ndarray) -> float:
    """The least cosine of a true column with its estimate."""
    matched = match_columns(mixing, truth, kind="direction")
    return float(((matched * truth).sum(axis=0) / (truth**2).sum(axis=0)).min())


def measure(methods: dict[str, Callable], seeds: int, count: int, law: str, known: list[dict]) -> list[dict]:
    """A row for each method, over the same data sets; those of methods in `known` are taken from there."""
    kept = {row["method"]: row for row in known if (row["law"], row["count"], row["seeds"]) == (law, count, seeds)}
    found: dict[str, list] = {name: [] for name in methods if name not in kept}
    for seed in range(seeds):
        x, truth = data_set(seed, count, 20, 10, law)
        for name in found:
            mixing = methods[name](x, 10, seed)
            errors = [mixing_error(mixing, truth, kind=kind) for kind in ("raw", "direction")]
            found[name].append((*errors, worst_cosine(mixing, truth)))
    rows = []
    for name, runs in found.items():
        raw, direction, cosine = np.array(runs).T
        rows.append({
            "law": law,
            "count": count,
            "seeds": seeds,
            "method": name,
            "raw": raw.mean(),
            "direction": direction.mean(),
            "direction_median": np.median(direction),
            "direction_standard_error": direction.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else 0.0,
            "failures": int((cosine < 0.9).sum()),
        })  # fmt: skip
        print(
            {name: value if isinstance(value, (str, int)) else round(value, 4) for name, value in rows[-1].items()},
            flush=True,
        )
    rows = {row["method"]: row for row in (*rows, *kept.values())}
    return [rows[name] for name in methods]


# Laws of the mixes, of unit variance, with the information J = E psi^2 where it is finite.
EIGHT: dict[str, tuple[Callable, float | None]] = {
    "Laplace": (LAWS["Laplace"], 2.0),
    "logistic": (LAWS["logistic"], np.pi**2 / 9),
    "t3": (LAWS["Student 3"], 2.0),
    "t5": (LAWS["Student 5"], 1.25),
    "uniform": (LAWS["uniform"], None),
    "signs": (lambda rng, shape: rng.choice([-1.0, 1.0], shape), None),
    "Gauss": (lambda rng, shape: rng.normal(size=shape), 1.0),
    "gamma": (lambda rng, shape: (rng.gamma(4, size=shape) - 4) / 2, 2.0),
}
FIVES = (
    ("Gauss", "t5", "uniform", "Laplace", "gamma"),
    ("Laplace", "logistic", "t3", "signs", "gamma"),
    ("uniform", "signs", "Gauss", "logistic", "t5"),
)


def picard_extended(x, columns, seed):
    """Picard-O with its extended density, for heavy and light tails."""
    whitening, rotation, _ = picard(x.T, n_components=columns, ortho=True, extended=True, random_state=seed)
    return np.linalg.pinv(rotation @ whitening)


def spread_ica(x, columns, seed):
    """This library's estimator with its defaults."""
    return SpreadICA(columns, random_state=seed).fit(x).mixing_


MIXED = {
    "SpreadICA": spread_ica,
    "FastICA": fast_ica,
    "FastICA, cube": lambda x, columns, seed: FastICA(
        columns, fun="cube", whiten="unit-variance", random_state=seed
    ).fit(x).mixing_,
    "Picard, tanh": picard_tanh,
    "Picard-O, extended": picard_extended,
    "JADE": jade,
}  # fmt: skip


CLOSED_FORM = {"SpreadICA", "closed form, Laplace", "closed form, source='auto'"}


def mixed_set(seed: int, count: int, laws: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One source of each law, mixed by [[1, .5], [.5, 1]] if two and by a Gaussian matrix if more."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[1.0, 0.5], [0.5, 1.0]]) if len(laws) == 2 else rng.normal(size=(len(laws),) * 2)
    return np.stack([EIGHT[law][0](rng, count) for law in laws], axis=1) @ mixing.T, mixing


def bound(count: int, laws: tuple[str, ...], mixing: np.ndarray) -> float | None:
    """The Cramer-Rao bound of the direction error, Var e_ij = J_j / ((J_i J_j - 1) N); None where J is infinite."""
    information = [EIGHT[law][1] for law in laws]
    if None in information:
        return None
    total = 0.0
    for j, column in enumerate(mixing.T):
        cover = 0.0
        for i, other in enumerate(mixing.T):
            if i != j:
                product = information[i] * information[j] - 1
                across = other - column * (other @ column) / (column @ column)
                cover = cover + np.square(across) * information[j] / (product * count)
        total += np.sqrt(2 / np.pi * cover).sum()
    return float(total / np.abs(mixing).sum())


def mixes(config: Config, known: list[dict]) -> list[dict]:
    """A row for each mix of laws, number of examples and method; those of methods in `known` are taken from there."""
    pairs = [pair for pair in itertools.combinations_with_replacement(EIGHT, 2) if pair != ("Gauss", "Gauss")]
    rows = []
    for count in (1000, 10_000, 100_000):
        seeds = config.large_seeds if count == 100_000 else config.seeds
        for laws in (*pairs, *FIVES):
            what = {"laws": list(laws), "count": count, "seeds": seeds}
            kept = {row["method"]: row for row in known if what.items() <= row.items()}
            errors = {name: [] for name in MIXED if name not in kept}
            failed = dict.fromkeys(errors, 0)
            bounds = []
            for seed in range(seeds):
                x, truth = mixed_set(seed, count, laws)
                bounds.append(bound(count, laws, truth))
                for name in errors:
                    mixing = MIXED[name](x, len(laws), seed)
                    if worst_cosine(mixing, truth) < 0.9:
                        failed[name] += 1
                    else:
                        errors[name].append(mixing_error(mixing, truth, kind="direction"))
            limit = None if bounds[0] is None else float(np.mean(bounds))
            means = {name: float(np.mean(errors[name])) if errors[name] else float("nan") for name in errors}
            for name in MIXED:
                rows.append(kept[name] if name in kept else {
                    **what,
                    "method": name,
                    "mean": means[name],
                    "standard_error": float(np.std(errors[name]) / max(len(errors[name]), 1) ** 0.5),
                    "failures": failed[name],
                    "bound": limit,
                })  # fmt: skip
            shown = ", ".join(f"{name} {means[name]:.4f} ({failed[name]})" for name in errors)
            print(f"{' + '.join(laws)} N={count}: {shown}; bound {limit}", flush=True)
    return rows


def hum(seeds: int) -> dict:
    """Direction errors on 50,000 examples of a logistic source and the hum of the mains, sampled at 1 kHz."""
    mixing, errors = np.array([[1.0, 0.5], [0.5, 1.0]]), {name: [] for name in MIXED}
    for seed in range(seeds):
        noise = LAWS["logistic"](np.random.default_rng(seed), 50_000)
        wave = np.sqrt(2) * np.sin(2 * np.pi * 50 * np.arange(50_000) / 1000)
        x = np.stack([noise, wave], axis=1) @ mixing.T
        for name, method in MIXED.items():
            errors[name].append(mixing_error(method(x, 2, seed), mixing, kind="direction"))
    print(errors, flush=True)
    return errors


SIZES = (
    *((count, size, size) for count in (300, 1000, 10_000, 100_000) for size in (2, 4, 16)),
    *((count, size, size) for count in (1000, 10_000, 100_000) for size in (64,)),
    *((count, 64, 16) for count in (300, 1000, 10_000, 100_000)),
    (10_000, 128, 128),
    *((1_000_000, size, size) for size in (2, 4, 16)),
)

FIRST_SIZES = ((300, 4), (5000, 16), (100_000, 16), (1_000_000, 16))

FIRST_FIT = """
import time
import numpy as np
x = np.random.default_rng(0).laplace(size=({count}, {size})) @ np.random.default_rng(1).normal(size=({size}, {size}))
began = time.process_time()
{imports}
imported = time.process_time()
{fit}
print(imported - began, time.process_time() - imported)
"""
FIRST_FITS = {
    "SpreadICA": (
        "from spread_jax.linear.sklearn import SpreadICA",
        "SpreadICA(random_state=0).fit(x)",
    ),
    "FastICA": (
        "from sklearn.decomposition import FastICA",
        "FastICA(whiten='unit-variance', random_state=0).fit(x)",
    ),
    "Picard, tanh": ("from picard import picard", "picard(x.T, ortho=False, extended=False, random_state=0)"),
}


def cpu_seconds(*calls: Callable, most: int = 200) -> list[float]:
    """The least CPU time of many calls of each in turn, of fewer where they take long: 0.3 s for all of one."""
    found = [[] for _ in calls]
    while len(found[0]) < most and sum(map(sum, found)) < 0.3 * len(calls):
        for times, call in zip(found, calls, strict=True):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
    return [min(times) for times in found]


def fit_double(x, columns, seed):
    """`ica.fit` of data in double precision."""
    return ica.fit(x, columns, key=KEYS[seed]).mixing


KEYS = [jax.random.key(0)]
TIMED = {
    "SpreadICA": spread_ica,
    "ica.fit": fit_double,
    "FastICA": fast_ica,
    "Picard-O, extended": picard_extended,
}


def times() -> dict:
    """Warm CPU seconds by size, five recordings of different lengths, and first fits in new processes."""
    warm = []
    for count, size, columns in SIZES:
        rng = np.random.default_rng(0)
        z = LAWS["Laplace"](rng, (count, columns))
        z[:, ::2] = LAWS["uniform"](rng, z[:, ::2].shape)
        x = z @ rng.normal(size=(columns, size))
        names = [name for name in TIMED if count * size < 1e7 or name != "Picard-O, extended"]
        seconds = cpu_seconds(*(functools.partial(TIMED[name], x, columns, 0) for name in names))
        warm.append({"count": count, "size": size, "columns": columns, **dict(zip(names, seconds, strict=True))})
        print(warm[-1], flush=True)
    known = []
    for count in (20_000, 5000, 1000):
        x, _ = data_set(0, count, 20, 10, "Laplace")
        names = [name for name in KNOWN if name != "natural gradient" or count == 20_000]
        calls = [functools.partial(KNOWN[name], x, 10, 0) for name in names]
        for call in calls:
            call()  # compiles
        for name, seconds in zip(names, cpu_seconds(*calls), strict=True):
            known.append({"count": count, "method": name, "seconds": seconds})
            print(known[-1], flush=True)
    recordings = dict.fromkeys(TIMED, 0.0)
    for index in range(5):
        rng = np.random.default_rng(index)
        x = LAWS["Laplace"](rng, (20_000 + 37 * index, 24)) @ rng.normal(size=(24, 24))
        for name, method in TIMED.items():
            recordings[name] += cpu_seconds(functools.partial(method, x, 24, 0), most=1)[0]
    print(recordings, flush=True)
    first = []
    for count, size in FIRST_SIZES:
        for name, (imports, fit) in FIRST_FITS.items():
            if name != "Picard, tanh" or count <= 100_000:
                program = FIRST_FIT.format(imports=imports, fit=fit, count=count, size=size)
                done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
                import_seconds, fit_seconds = map(float, done.stdout.split())
                row = {"count": count, "size": size, "method": name, "importing": import_seconds, "fit": fit_seconds}
                first.append(row)
                print(row, flush=True)
    return {"warm": warm, "known": known, "recordings": recordings, "first": first}


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


def as_markdown(results: dict) -> str:
    """The tables, with the command and the machine."""
    lines = [
        "# ICA against FastICA and Picard",
        "",
        f"`python -m benchmarks.ica --part square --seeds {results['square'][0]['seeds']}`, seeds from 0, "
        f"{results['cores']} CPU cores, jax {results['versions']['jax']}, scikit-learn "
        f"{results['versions']['scikit-learn']}, python-picard {results['versions']['python-picard']}. X = 20, Z = 10, "
        "no noise. Errors are means over data sets; where a ratio to FastICA exceeds 1, FastICA is better.",
        "",
        "| sources | N | method | raw | direction | direction / FastICA | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {(row["law"], row["count"]): row for row in results["square"] if row["method"] == "FastICA"}
    for row in results["square"]:
        peer = base[row["law"], row["count"]]
        lines.append(
            f"| {row['law']} | {row['count']:,} | {row['method']} | {row['raw']:.4f} | {row['direction']:.4f} ± "
            f"{row['direction_standard_error']:.4f} | {row['direction'] / peer['direction']:.2f} "
            f"({row['direction_median'] / peer['direction_median']:.2f} of medians) | {row['failures']} |"
        )
    if results["overcomplete"]:
        seeds = results["overcomplete"][0]["seeds"]
        lines += [
            "",
            f"`python -m benchmarks.ica --part overcomplete --overcomplete-seeds {seeds}`: "
            'more sources than dimensions, X = 10, `method="gibbs"`; FastICA and Picard have no such fit. A run that '
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
    for name, as_lines in (("mixes", mixes_as_markdown), ("hum", hum_as_markdown), ("times", times_as_markdown)):
        lines += as_lines(results[name]) if results[name] else []
    return "\n".join(lines) + "\n"


def mixes_as_markdown(rows: list[dict]) -> list[str]:
    """Mean errors of every mix, and in how many the best of the others is better."""
    others = [name for name in MIXED if name != "SpreadICA"]
    lines = [
        "",
        "## Sources of different laws",
        "",
        f"`python -m benchmarks.ica --part mixes --seeds {rows[0]['seeds']} --large-seeds {rows[-1]['seeds']}`. Mean "
        "direction errors of the fits that find every source; in brackets how many do not. The bound is "
        "Cramér and Rao's for the laws, where their information is finite. In bold what is better than SpreadICA by "
        "more than 5 %: of two sources the error is one number, so that each mean is known to 10 to 20 %.",
    ]
    for count in dict.fromkeys(row["count"] for row in rows):
        here = [row for row in rows if row["count"] == count]
        lines += ["", f"N = {count:,}, seeds 0 to {here[0]['seeds'] - 1}:", ""]
        lines += [f"| sources | bound | {' | '.join(MIXED)} |", "|---|---|" + "---|" * len(MIXED)]
        lost = 0
        for laws in dict.fromkeys(tuple(row["laws"]) for row in here):
            cells = {row["method"]: row for row in here if tuple(row["laws"]) == laws}
            best = min(cells[name]["mean"] for name in others if cells[name]["failures"] < cells[name]["seeds"])
            limit = cells["SpreadICA"]["bound"]
            text = {
                name: f"{row['mean']:.4f}" + (f" ({row['failures']})" if row["failures"] else "")
                for name, row in cells.items()
            }
            if cells["SpreadICA"]["mean"] > 1.05 * best:
                lost += 1
                text = {name: f"**{value}**" if cells[name]["mean"] == best else value for name, value in text.items()}
            shown = "-" if limit is None else f"{limit:.4f}"
            lines.append(f"| {' + '.join(laws)} | {shown} | {' | '.join(text[name] for name in MIXED)} |")
        failures = ", ".join(f"{name} {sum(r['failures'] for r in here if r['method'] == name)}" for name in MIXED)
        regular = [r["mean"] / r["bound"] for r in here if r["method"] == "SpreadICA" and r["bound"]]
        lines += [
            "",
            f"Another method is better by more than 5 % in {lost} of {len(here) // len(MIXED)} mixes. Fits that miss a "
            f"source: {failures}. SpreadICA over the bound: median {np.median(regular):.2f}, most {max(regular):.2f}.",
        ]
    return lines


def hum_as_markdown(found: dict) -> list[str]:
    """The first error and the mean."""
    values = ", ".join(f"{name} {errors[0]:.4f} ({np.mean(errors):.4f})" for name, errors in found.items())
    seeds = len(found["SpreadICA"])
    return [
        "",
        "## Hum of the mains",
        "",
        f"`python -m benchmarks.ica --part hum --seeds {seeds}`: 50,000 examples at 1 kHz of a logistic source and of "
        "sin(2 pi 50 t), mixed by [[1, .5], [.5, 1]]. Direction error of seed 0, in brackets the mean of seeds 0 to "
        f"{seeds - 1}: {values}.",
    ]


def times_as_markdown(found: dict) -> list[str]:
    """CPU seconds."""
    lines = [
        "",
        "## CPU seconds",
        "",
        "`python -m benchmarks.ica --part times`, seed 0: Laplace and uniform sources in turn, double precision, all "
        "methods in turn in one process, the least of up to 200 fits of each.",
        "",
        f"| N | X | Z | {' | '.join(TIMED)} | SpreadICA / FastICA | ica.fit / FastICA |",
        "|---|---|---|" + "---|" * (len(TIMED) + 2),
    ]
    for row in found["warm"]:
        values = [f"{row[name]:.5f}" if name in row else "-" for name in TIMED]
        values += [f"{row[name] / row['FastICA']:.2f}" for name in ("SpreadICA", "ica.fit")]
        lines.append(f"| {row['count']:,} | {row['size']} | {row['columns']} | {' | '.join(values)} |")
    lines += [
        "",
        "Ten Laplace sources in 20 dimensions, as in the first table:",
        "",
        "| N | method | CPU seconds | / FastICA |",
        "|---|---|---|---|",
    ]
    peers = {row["count"]: row["seconds"] for row in found["known"] if row["method"] == "FastICA"}
    for row in found["known"]:
        ratio = row["seconds"] / peers[row["count"]]
        lines.append(f"| {row['count']:,} | {row['method']} | {row['seconds']:.4f} | {ratio:.2f} |")
    recordings = ", ".join(f"{name} {found['recordings'][name]:.2f}" for name in TIMED)
    lines += [
        "",
        f"Five recordings of 20,000 + 37 i examples of 24 columns, one after another: {recordings}.",
        "",
        "A first fit in a new process, Laplace sources, X = Z:",
        "",
        "| N | X | method | importing | first fit |",
        "|---|---|---|---|---|",
    ]
    for row in found["first"]:
        lines.append(
            f"| {row['count']:,} | {row['size']} | {row['method']} | {row['importing']:.2f} | {row['fit']:.3f} |"
        )
    return lines


def main(config: Config) -> None:
    """Runs every comparison and writes the tables."""
    if config.full:
        config = dataclasses.replace(config, seeds=20, overcomplete_seeds=10, large_seeds=10)
    warnings.simplefilter("ignore")  # of peers that did not converge: their errors are in the table
    unknown = {name: KNOWN[name] for name in ("closed form, source='auto'", "FastICA", "Picard, tanh")}
    path = config.out / "ica.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    square, more, mixed = (earlier.get(name, []) for name in ("square", "overcomplete", "mixes"))
    of_others = lambda rows: [] if config.others else [row for row in rows if row["method"] not in CLOSED_FORM]
    if config.part in ("all", "square"):
        known, square = of_others(square), []
        for law in LAWS:
            for count in (20_000, 5000, 1000) if law == "Laplace" else (20_000, 1000):
                square += measure(KNOWN if law == "Laplace" else unknown, config.seeds, count, law, known)
    if config.part in ("all", "overcomplete"):
        more = overcomplete(config.overcomplete_seeds)
    packages = ("jax", "jaxlib", "numpy", "scikit-learn", "python-picard")
    results = {
        "square": square,
        "overcomplete": more,
        "mixes": mixes(config, of_others(mixed)) if config.part in ("all", "mixes") else mixed,
        "hum": hum(config.seeds) if config.part in ("all", "hum") else earlier.get("hum", {}),
        "times": times() if config.part in ("all", "times") else earlier.get("times", {}),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=2, default=float) + "\n")
    text = as_markdown(results)
    write_atomically(config.out / "ica.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
