"""`SpreadICA` and `SpreadPCA`: the deterministic linear models as scikit-learn estimators.

They take and give NumPy arrays in the dtype of the data, work in pipelines and searches, and need scikit-learn
(`pip install "spread-jax[eval]"`).
"""

from __future__ import annotations

import math
import numbers
import warnings

import jax
import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_array, check_is_fitted
except ImportError as error:
    raise ImportError('spread_jax.linear.sklearn needs scikit-learn: pip install "spread-jax[eval]".') from error
try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn 1.5 has it as a method

    def validate_data(estimator, X, **checks):
        return estimator._validate_data(X, **checks)


from spread_jax.linear import ica, pca
from spread_jax.linear._moments import host_moments

__all__ = ["SpreadICA", "SpreadPCA"]

_DTYPES = (np.float64, np.float32)
_CHUNK = 8192


class _LinearModel(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """x = mixing z + mean, with z = components (x - mean) up to scale: what both estimators share."""

    def transform(self, X):
        """Latents of samples.

        Args:
          X: [n_samples, n_features].

        Returns:
          [n_samples, n_components], in the dtype of X and of the fit.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        return (X - self.mean_) @ self._unmixing.T

    def inverse_transform(self, X):
        """Samples of latents, X mixing_^T + mean_.

        Args:
          X: [n_samples, n_components].

        Returns:
          [n_samples, n_features].
        """
        check_is_fitted(self)
        X = check_array(X, dtype=_DTYPES)
        if X.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {X.shape[1]} features, but the inverse of {type(self).__name__} is expecting "
                f"{self._n_features_out} features as input."
            )
        return X @ self.mixing_.T + self.mean_

    @property
    def _n_features_out(self):
        return self.mixing_.shape[1]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check_parameters(self):
        name = type(self).__name__
        _check_integer(name, "n_components", self.n_components, optional=True)
        _check_integer(name, "max_iter", self.max_iter, optional=True)
        if self.noise_scale != "auto":
            _check_positive(name, "noise_scale", self.noise_scale, "'auto' or ")
        if self.tol is not None:
            _check_positive(name, "tol", self.tol, "None or ")

    def _count_components(self, rank, shape, *, overcomplete=False):
        """n_components, the rank of the data if None; more than that is refused unless the model is overcomplete."""
        if rank == 0:
            raise ValueError(f"X has no variance: its {shape[1]} feature(s) are constant over {shape[0]} samples.")
        if self.n_components is None:
            return rank
        if self.n_components > rank and not overcomplete:
            raise ValueError(
                f"n_components={self.n_components} must be between 1 and the rank of X, which is {rank} for "
                f"n_samples={shape[0]}, n_features={shape[1]}: constant or linearly dependent features and few samples "
                "lower it. Use n_components=None to take all of it."
            )
        return self.n_components

    def _warn_unless(self, converged):
        if not converged:
            warnings.warn(
                f"{type(self).__name__} did not converge in {self.n_iter_} iterations. Increase max_iter or tol, or "
                "lower n_components.",
                ConvergenceWarning,
                stacklevel=3,
            )


class SpreadICA(_LinearModel):
    r"""Independent component analysis by the spread likelihood, x = A z + m with independent sources z.

    The model has no noise and, with fewer sources than features, no likelihood; with noise added to data and model
    it has one. Sources have unit variance; the scale of the data is in `mixing_`.

    The data are whitened in their own precision, so that offsets, scales and nearly dependent features cost no
    digits, and the rotation is found in float32.

    Args:
      n_components: number of sources; the rank of the data if None. More than the rank needs method "gibbs", and
        `transform` is then the least-norm solution.
      method: as in `spread_jax.linear.ica.fit`, for the whitened data; "auto" is its closed form.
      source: law of the sources, as in `spread_jax.linear.ica.fit`; "auto" assumes none.
      noise_scale: standard deviation of the spread noise, in whitened coordinates (of unit variance), or "auto".
      max_iter: iterations at most; the method's default if None.
      tol: tolerance of convergence; the method's default if None.
      n_restarts: random starts, of which the best is kept; with method "gibbs" they vote on the columns.
      random_state: None, an int or a RandomState: where the random starts come from.

    Attributes:
      mixing_: A, [n_features, n_components].
      components_: unmixing, [n_components, n_features]: z = components_ (x - mean_).
      mean_: [n_features].
      noise_scale_: spread noise used, in whitened coordinates.
      n_iter_: iterations taken.
      n_features_in_: number of features seen in fit.
      feature_names_in_: their names, if X had any.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic ICA.

    Example:
      >>> import numpy as np
      >>> from spread_jax.linear import mixing_error
      >>> rng = np.random.default_rng(0)
      >>> mixing = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
      >>> X = rng.laplace(scale=0.5**0.5, size=(4000, 2)) @ mixing.T
      >>> model = SpreadICA(random_state=0).fit(X)
      >>> bool(mixing_error(model.mixing_, mixing) < 0.1), model.transform(X).shape
      (True, (4000, 2))
    """

    def __init__(
        self,
        n_components=None,
        *,
        method="auto",
        source="auto",
        noise_scale="auto",
        max_iter=None,
        tol=None,
        n_restarts=1,
        random_state=None,
    ):
        self.n_components = n_components
        self.method = method
        self.source = source
        self.noise_scale = noise_scale
        self.max_iter = max_iter
        self.tol = tol
        self.n_restarts = n_restarts
        self.random_state = random_state

    def fit(self, X, y=None):
        """Finds the mixing matrix.

        Args:
          X: [n_samples, n_features], at least two of each.
          y: ignored.

        Returns:
          self.

        Raises:
          ValueError: if a parameter or X is out of range: the message says which.
        """
        self._check_parameters()
        _check_integer("SpreadICA", "n_restarts", self.n_restarts)
        X = validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2, ensure_min_features=2)
        mean, axes, deviations = _principal_axes(X)
        num_sources = self._count_components(len(deviations), X.shape, overcomplete=self.method == "gibbs")
        axes, deviations = axes[:, :num_sources], deviations[:num_sources]
        # Float32 from here on, also for float64 data: an error of 1e-6 in a rotation is far below the statistical
        # error, 1 / sqrt(n_samples), and it halves time and memory. Whitened data lose nothing by it.
        white = np.empty((len(X), len(deviations)), np.float32)
        for start in range(0, len(X), _CHUNK):
            white[start : start + _CHUNK] = (X[start : start + _CHUNK] - mean) @ (axes / deviations)
        result = ica.fit(
            white,
            num_sources,
            method=self.method,
            source=self.source,
            noise_scale=None if self.noise_scale == "auto" else self.noise_scale,
            max_iterations=self.max_iter,
            tolerance=self.tol,
            num_restarts=self.n_restarts,
            key=_key(self.random_state),
        )
        rotation, inverse = np.asarray(result.mixing, X.dtype), np.asarray(result.unmixing, X.dtype)
        if not (np.isfinite(rotation).all() and np.isfinite(inverse).all()):
            raise ValueError(
                f"SpreadICA found no finite mixing of {num_sources} sources with n_samples={X.shape[0]}. Lower "
                "n_components."
            )
        self.mean_ = mean
        self.mixing_ = (axes * deviations) @ rotation
        self.components_ = inverse @ (axes / deviations).T
        self.noise_scale_ = np.asarray(result.noise_scale)[()]
        self.n_iter_ = max(int(result.num_iterations), 1)
        self._warn_unless(result.converged)
        return self

    @property
    def _unmixing(self):
        return self.components_


class SpreadPCA(_LinearModel):
    r"""Principal component analysis as a deterministic model, x = F z + m, z ~ N(0, I), by its spread likelihood.

    The fit keeps the variances of the data whatever the noise; a probabilistic PCA, which noises the model only,
    subtracts the noise from them. Latents have unit variance, so `transform` whitens.

    Args:
      n_components: Z; the rank of the data if None.
      noise_scale: sigma, standard deviation of the spread noise, in units of X; "auto" is the root of the mean
        variance of a feature. The closed form does not depend on it; `score` does, and the pace of EM.
      method: "closed_form" or "em".
      max_iter: EM steps at most; 1000 if None.
      tol: EM stops where the likelihood is stationary to this relative residual; 1e-5 if None.
      random_state: None, an int or a RandomState: where EM starts.

    Attributes:
      mixing_: F, [n_features, n_components], longest column first.
      components_: principal axes, [n_components, n_features]: the columns of F with length one.
      mean_: [n_features].
      explained_variance_: [n_components], squared length of the columns of F (divided by n_samples, not by
        n_samples - 1).
      noise_scale_: sigma.
      n_iter_: EM steps taken; 1 for the closed form.
      n_features_in_: number of features seen in fit.
      feature_names_in_: their names, if X had any.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic PCA.

    Example:
      >>> import numpy as np
      >>> X = np.random.default_rng(0).normal(size=(100, 2)) @ np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
      >>> model = SpreadPCA().fit(X)
      >>> model.n_components, model.mixing_.shape, bool(np.allclose(model.inverse_transform(model.transform(X)), X))
      (None, (3, 2), True)
    """

    def __init__(
        self,
        n_components=None,
        *,
        noise_scale="auto",
        method="closed_form",
        max_iter=None,
        tol=None,
        random_state=None,
    ):
        self.n_components = n_components
        self.noise_scale = noise_scale
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X, y=None):
        """Finds the loadings.

        Args:
          X: [n_samples, n_features], at least two samples.
          y: ignored.

        Returns:
          self.

        Raises:
          ValueError: if a parameter or X is out of range: the message says which.
        """
        self._check_parameters()
        if self.method not in ("closed_form", "em"):
            raise ValueError(
                f"The 'method' parameter of SpreadPCA must be a str among {{'closed_form', 'em'}}. Got "
                f"{self.method!r} instead."
            )
        X = validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2)
        mean, axes, deviations = _principal_axes(X)
        num_components = self._count_components(len(deviations), X.shape)
        if self.noise_scale == "auto":
            noise_scale = math.sqrt(np.square(deviations).sum() / X.shape[1])
        else:
            noise_scale = float(self.noise_scale)
        converged, num_iterations = True, 1
        if self.method == "closed_form":
            axes, deviations = axes[:, :num_components], deviations[:num_components]
        else:
            # The model has the precision of the data: double needs x64, for this call only.
            with jax.enable_x64(X.dtype == np.float64):
                result = pca.fit(
                    X,
                    num_components,
                    noise_scale,
                    method="em",
                    max_iterations=1000 if self.max_iter is None else self.max_iter,
                    tolerance=1e-5 if self.tol is None else self.tol,
                    key=_key(self.random_state),
                )
                converged, num_iterations = bool(result.converged), int(result.num_iterations)
                loadings = np.array(result.loadings)
            deviations = np.linalg.norm(loadings, axis=0)
            axes = loadings / np.where(deviations > 0, deviations, 1)
        self.mean_ = mean
        self.components_ = axes.T
        self.mixing_ = axes * deviations
        self.explained_variance_ = np.square(deviations)
        self.noise_scale_ = noise_scale
        self.n_iter_ = num_iterations
        self._warn_unless(converged)
        return self

    def score_samples(self, X):
        """Expected log-density of each sample under the spread model, over its noise: E log p~(x + sigma epsilon).

        Args:
          X: [n_samples, n_features].

        Returns:
          [n_samples], nats.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        noise, variance = self.noise_scale_**2, self.explained_variance_
        centred = X - self.mean_
        along = centred @ self.components_.T
        # C = U (Lambda + sigma^2) U^T + sigma^2 (I - U U^T); the noise adds sigma^2 tr C^-1 to the square.
        rest = np.square(centred - along @ self.components_).sum(axis=1) / noise + X.shape[1] - len(variance)
        square = rest + ((np.square(along) + noise) / (variance + noise)).sum(axis=1)
        log_det = np.log(variance + noise).sum() + (X.shape[1] - len(variance)) * math.log(noise)
        return -0.5 * (X.shape[1] * math.log(2 * math.pi) + log_det + square)

    def score(self, X, y=None):
        """Mean of `score_samples`, in nats: comparable between models of the same `noise_scale` only."""
        return float(self.score_samples(X).mean())

    @property
    def _unmixing(self):
        deviations = np.sqrt(self.explained_variance_)
        return self.components_ / np.where(deviations > 0, deviations, 1)[:, None]


def _principal_axes(X):
    """Mean [n_features], axes [n_features, rank] and standard deviations [rank] along them, largest first."""
    eps = np.finfo(X.dtype).eps
    if X.shape[0] < X.shape[1]:
        mean = X.mean(axis=0)
        _, lengths, axes = np.linalg.svd(X - mean, full_matrices=False)
        deviations, axes = lengths / math.sqrt(len(X)), axes.T
        floor = max(X.shape) * eps
    else:
        mean, covariance = host_moments(X, _CHUNK)
        variances, axes = np.linalg.eigh(covariance)
        deviations, axes = np.sqrt(np.maximum(variances[::-1], 0)), axes[:, ::-1]
        # Squares keep half the digits of double precision.
        floor = max(math.sqrt(X.shape[1] * np.finfo(np.float64).eps), 4 * eps)
    # A constant or a dependent feature far from zero has the variance of its rounding.
    floor = max(floor * deviations[0], 4 * eps * np.abs(mean).max())
    rank = int((deviations > floor).sum())
    axes = axes[:, :rank]
    signs = np.where(axes[np.abs(axes).argmax(axis=0), np.arange(rank)] < 0, -1, 1)
    return tuple(part.astype(X.dtype, copy=False) for part in (mean, axes * signs, deviations[:rank]))


def _key(random_state):
    """A JAX key drawn from a scikit-learn random state."""
    return jax.random.key(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _check_integer(estimator, name, value, *, optional=False):
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"The {name!r} parameter of {estimator} must be an int in the range [1, inf)"
            f"{' or None' if optional else ''}. Got {value!r} instead."
        )


def _check_positive(estimator, name, value, alternative):
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
            f"The {name!r} parameter of {estimator} must be {alternative}a float in the range (0.0, inf). Got "
            f"{value!r} instead."
        )
