"""Data sets and errors that the tests of ICA share."""

import jax.numpy as jnp
import numpy as np

LAWS = {
    "laplace": lambda rng, shape: rng.laplace(scale=np.sqrt(0.5), size=shape),
    "logistic": lambda rng, shape: rng.logistic(scale=np.sqrt(3) / np.pi, size=shape),
    "student_5": lambda rng, shape: rng.standard_t(5, size=shape) * np.sqrt(3 / 5),
    "uniform": lambda rng, shape: rng.uniform(-np.sqrt(3), np.sqrt(3), shape),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "gauss": lambda rng, shape: rng.normal(size=shape),
    "gamma": lambda rng, shape: (rng.gamma(4, size=shape) - 4) / 2,
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.2) / np.sqrt(0.2),
}


def signs_matrix(rng, rows, columns):
    """Entries +-1, columns of full rank that do not repeat."""
    while True:
        mixing = rng.choice([-1.0, 1.0], (rows, columns))
        overlap = np.abs(mixing.T @ mixing - rows * np.eye(columns)).max()
        if np.linalg.matrix_rank(mixing) == min(rows, columns) and overlap < rows:
            return mixing


def laplace_data(seed, count, rows, columns):
    """x [N, X], a NumPy array in float32, and A."""
    rng = np.random.default_rng(seed)
    mixing = signs_matrix(rng, rows, columns)
    return (LAWS["laplace"](rng, (count, columns)) @ mixing.T).astype(np.float32), mixing


def mixed_data(seed, count, laws):
    """x [N, Z] in float64 and A [Z, Z], for one source of each law."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(len(laws), len(laws)))
    return np.stack([LAWS[law](rng, count) for law in laws], axis=1) @ mixing.T, mixing


def on_device(data):
    """x as a JAX array, and A."""
    return jnp.asarray(data[0], jnp.float32), data[1]


def direction_error(estimate, truth):
    """Mean relative error of the entries, each column compared with the most parallel one of the estimate."""
    estimate = np.asarray(estimate, np.float64)
    estimate = estimate / np.linalg.norm(estimate, axis=0)
    length = np.linalg.norm(truth, axis=0)
    cosines = estimate.T @ (truth / length)
    best = np.abs(cosines).argmax(axis=0)
    assert len(set(best)) == truth.shape[1]
    matched = estimate[:, best] * np.sign(cosines[best, np.arange(truth.shape[1])]) * length
    return np.abs(matched - truth).mean() / np.abs(truth).mean()


def scale_error(result, truth):
    """The largest relative error of a column's length, for a truth whose columns have one length."""
    lengths = np.sort(np.linalg.norm(np.asarray(result.mixing), axis=0) / np.linalg.norm(truth, axis=0)[0])
    return np.abs(lengths - 1).max()
