"""ICA of recordings: a function shaped as Picard's, and MNE-Python's `ICA` fitted by it."""

from __future__ import annotations

import numpy as np

from spread_jax.linear import _closed_form
from spread_jax.linear._order import stable_order
from spread_jax.linear._whiten import principal_axes
from spread_jax.linear._whiten import whiten as whiten_rows

__all__ = ["fit_mne", "spread_ica"]


def spread_ica(
    X: np.ndarray,
    n_components: int | None = None,
    *,
    whiten: bool = True,
    return_X_mean: bool = False,
    return_n_iter: bool = False,
    max_iter: int = 200,
    tol: float = 0.1,
    w_init: np.ndarray | None = None,
    random_state: int | np.random.RandomState | None = None,
):
    r"""Independent components of a recording, with the arguments and the results of `picard.picard`.

      Y = W K (X - mean)

    Args:
      X: [features, samples], such as channels and times; any units.
      n_components: how many to find; the rank of X if None.
      whiten: False if X is white already, as PCA with whitening leaves it: then K is None.
      return_X_mean: whether the mean of X, [features], is returned too.
      return_n_iter: whether the number of iterations is returned too.
      max_iter: iterations at most.
      tol: the longest last step, in standard errors of what it changes.
      w_init: W to start from, [n_components, n_components]; random if None.
      random_state: None, an int or a RandomState.

    Returns:
      (K [n_components, features], W [n_components, n_components], Y [n_components, samples], and the mean and the
      number of iterations where they are asked for). Components have unit variance and come in the order of the
      variance of X that they explain.

    Raises:
      ValueError: if X is not [features, samples] or not finite, or has a lower rank than n_components.

    Example:
      >>> import numpy as np
      >>> X = np.array([[1.0, 0.5], [0.5, 1.0]]) @ np.random.default_rng(0).laplace(size=(2, 3000))
      >>> K, W, Y = spread_ica(X, random_state=0)
      >>> print(np.sort(np.abs(W @ K @ np.array([[1.0, 0.5], [0.5, 1.0]])).round(1), axis=0))
      [[0.  0. ]
       [0.7 0.7]]
    """
    X = np.asarray(X)
    if X.ndim != 2 or X.shape[1] < 2 or not np.issubdtype(X.dtype, np.floating):
        raise ValueError(f"X must be a floating-point array [features, samples], got {X.dtype} of shape {X.shape}.")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite, got NaN or infinity.")
    if whiten:
        axes = principal_axes(X.T)
        size = axes.rank if n_components is None else n_components
        if size > axes.rank or size < 1:
            raise ValueError(f"n_components must be between 1 and the rank of X, which is {axes.rank}, got {size}.")
        v, from_white, K, _ = whiten_rows(X.T, axes, size, dtype=np.float32)
        mean = axes.mean
    else:
        size, mean, K = len(X), X.mean(axis=1), None
        if n_components not in (None, size):
            raise ValueError(f"n_components must be None or {size}, the rows of X, with whiten=False.")
        v, from_white = (X - mean[:, None]).astype(np.float32), np.eye(size)
    random = random_state if isinstance(random_state, np.random.RandomState) else np.random.RandomState(random_state)
    start = random.normal(size=(size, size)) if w_init is None else np.asarray(w_init, np.float64)
    found = _closed_form.fit(
        v,
        _closed_form.polar(start)[None],
        None,
        None,
        None,
        likelihood=False,
        max_iterations=max_iter,
        tolerance=tol,
    )
    order, signs = stable_order(np.linalg.solve(found["rotation"].T, from_white.T).T)
    W = (found["rotation"] * signs[:, None])[order]
    unmixing = W if K is None else W @ K
    Y = unmixing @ X - (unmixing @ mean)[:, None]
    more = ((mean,) if return_X_mean else ()) + ((int(found["num_iterations"]),) if return_n_iter else ())
    return K, W, Y, *more


def fit_mne(ica, inst, *, random_state=None, max_iter: int = 200, tol: float = 0.1, **fit):
    """Fits `mne.preprocessing.ICA` by `spread_ica`; whatever MNE does with a fitted ICA works as ever.

    MNE scales, projects and whitens the data, and its own Infomax, allowed no iteration, makes a fitted ICA of them;
    its sources are then turned into independent ones. Through MNE's public methods alone.

    Args:
      ica: an `mne.preprocessing.ICA` that is not fitted; its method and iterations do not matter.
      inst: Raw or Epochs.
      random_state: as in `spread_ica`.
      max_iter: as in `spread_ica`.
      tol: as in `spread_ica`.
      **fit: as in `ica.fit`, such as `picks`, `decim` or `reject`; samples that it rejects do not count here either.

    Returns:
      ica.

    Usage:
      ica = fit_mne(mne.preprocessing.ICA(n_components=20), raw, random_state=0)
      ica.plot_components()
    """
    ica.method, ica.fit_params = "infomax", {"max_iter": 0}
    ica.fit(inst, **fit)
    sources = _fitted_sources(ica, inst, **fit)
    K, W, _, num_iterations = spread_ica(
        sources, return_n_iter=True, random_state=random_state, max_iter=max_iter, tol=tol
    )
    unmixing = W @ K @ ica.unmixing_matrix_
    mixing = np.linalg.pinv(unmixing)
    order, signs = stable_order(mixing)
    ica.unmixing_matrix_ = (unmixing * signs[:, None])[order]
    ica.mixing_matrix_ = (mixing * signs)[:, order]
    ica.n_iter_, ica.method = num_iterations, "spread"
    return ica


def _fitted_sources(ica, inst, *, start=None, stop=None, decim=None, reject_by_annotation=True, **_):
    """Sources [components, times] at the samples that MNE's fit has looked at, not those that it was told to reject."""
    if hasattr(inst, "events"):  # epochs
        return np.hstack(ica.get_sources(inst).get_data()[:, :, ::decim])
    sources = ica.get_sources(inst, start=start, stop=stop)
    sources = sources.get_data(reject_by_annotation="omit" if reject_by_annotation else None)[:, ::decim]
    kept = np.ones(sources.shape[1], bool)
    for first, last in getattr(ica, "drop_inds_", ()):
        kept[first:last] = False
    return sources[:, kept][:, : ica.n_samples_]  # MNE leaves out what remains after segments of equal length
