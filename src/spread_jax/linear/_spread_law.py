"""The density of a fitted linear model under spread noise, its sources having the law of the training data."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_STEP, _REACH = 0.02, 30.0
_GRID = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
_SCALE = 0.1  # of the noise, in standard deviations of a source and of a feature


@dataclasses.dataclass(frozen=True)
class SpreadLaw:
    """x = m + A z with independent z, spread by s A A^T and, at right angles to A, by sigma^2 I.

    The law of source i is that of N training values; spread by N(0, s^2) it is smooth: a kernel density. One more
    value has a wide Cauchy law, so that no density is zero.

    Args:
      counts: [Z, points], of training values of each source on a grid of u.
      log_volume: log |A^T A|^(1/2).
      noise: sigma, in units of x.
      others: X - Z, the dimensions at right angles to A.
    """

    counts: np.ndarray
    log_volume: float
    noise: float
    others: int

    @classmethod
    def of(cls, u: np.ndarray, mixing: np.ndarray, deviation: float) -> SpreadLaw:
        """From sources u [Z, N] of training data, A [X, Z] and the root-mean-square deviation of a feature."""
        size, points = len(u), len(_GRID)
        index = np.clip(np.rint((u + _REACH) * (1 / _STEP)), 0, points - 1).astype(np.int32)
        index += points * np.arange(size, dtype=np.int32)[:, None]
        counts = np.bincount(index.ravel(), minlength=size * points).reshape(size, points)
        lengths = np.linalg.norm(mixing, axis=0)
        log_volume = np.log(lengths).sum() + 0.5 * np.linalg.slogdet((mixing / lengths).T @ (mixing / lengths))[1]
        return cls(counts, float(log_volume), _SCALE * float(deviation), len(mixing) - size)

    def log_densities(self) -> np.ndarray:
        """E log p~_i(u + s epsilon) on the grid: [Z, points]."""
        reach = round(6 * _SCALE / _STEP)
        kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) * _STEP / _SCALE))
        kernel /= kernel.sum()
        wide = 1 / (math.pi * (1 + np.square(_GRID)))
        rows = []
        for counts in self.counts:
            density = (np.convolve(counts / _STEP, kernel, mode="same") + wide) / (counts.sum() + 1)
            # The data are spread too.
            rows.append(np.convolve(np.pad(np.log(density), reach, mode="edge"), kernel, mode="valid"))
        return np.array(rows)

    def log_density(self, u: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """E log p~(x + noise) in nats, [N], for x with sources u [N, Z] and what is outside of their span [N, X]."""
        along = sum(np.interp(column, _GRID, row) for column, row in zip(u.T, self.log_densities(), strict=True))
        variance = self.noise**2
        square = np.square(outside).sum(axis=1) / variance + self.others * (1 + math.log(2 * math.pi * variance))
        return along - self.log_volume - (0.5 * square if self.others else 0)
