"""JADE, with which `benchmarks.ica` compares."""

from __future__ import annotations

import itertools

import numpy as np


def jade(x, columns, seed, sweeps=100):
    """JADE: the rotation of white data that makes all their fourth-order cumulant matrices most nearly diagonal.

    Source: J.-F. Cardoso and A. Souloumiac, Blind beamforming for non-Gaussian signals, IEE Proceedings F 140, 1993.
    """
    centred = x - x.mean(axis=0)
    left, lengths, right = np.linalg.svd(centred, full_matrices=False)
    v = left[:, :columns] * np.sqrt(len(x))
    eye = np.eye(columns)
    cumulants = []
    for i, j in itertools.combinations_with_replacement(range(columns), 2):
        both = np.outer(eye[i], eye[j])
        cumulant = (v * (v[:, i] * v[:, j])[:, None]).T @ v / len(v) - eye[i, j] * eye - both - both.T
        cumulants.append(cumulant * (1 if i == j else np.sqrt(2)))
    cumulants, rotation = np.array(cumulants), eye.copy()
    for _ in range(sweeps):
        turned = False
        for p, q in itertools.combinations(range(columns), 2):
            h = np.stack([cumulants[:, p, p] - cumulants[:, q, q], cumulants[:, p, q] + cumulants[:, q, p]])
            gram = h @ h.T
            on, off = gram[0, 0] - gram[1, 1], 2 * gram[0, 1]
            angle = 0.5 * np.arctan2(off, on + np.hypot(on, off))
            if abs(angle) > 1e-3 / np.sqrt(len(x)):
                turned = True
                turn = eye.copy()
                turn[np.ix_([p, q], [p, q])] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
                cumulants, rotation = turn.T @ cumulants @ turn, rotation @ turn
        if not turned:
            break
    return (right[:columns].T * lengths[:columns] / np.sqrt(len(x))) @ rotation
