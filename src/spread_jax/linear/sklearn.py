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


from spread_jax.linear import _closed_form, ica, pca
from spread_jax.linear._host import normal_draws, some_columns
from spread_jax.linear._order import stable_order
from spread_jax.linear._spread_law import SpreadLaw
from spread_jax.linear._whiten import principal_axes, principal_components, whiten
from spread_jax.linear.sources import LaplaceSource

__all__ = ["SpreadICA", "SpreadPCA"]

_DTYPES = (np.float64, np.float32)
# Components whose predicted share in each other reaches this are called impossible to tell apart.
_UNTOLD = 0.3
# Training examples that make the law of a source in `score`.
_LAW_EXAMPLES = 5000


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
        if not _is_share(self.n_components):
            _check_integer(name, "n_components", self.n_components, optional=True, more=", a float in (0, 1)")
        _check_integer(name, "max_iter", self.max_iter, optional=True)
        if not _is_auto(self.noise_scale):
            _check_positive(name, "noise_scale", self.noise_scale, "'auto' or ")
        if self.tol is not None:
            _check_positive(name, "tol", self.tol, "None or ")

    def _count_components(self, axes, X, *, overcomplete=False):
        """n_components, the rank of the data if None; more than that is refused unless the model is overcomplete."""
        rank = axes.rank
        if rank == 0:
            raise ValueError(f"X has no variance: its {X.shape[1]} feature(s) are constant over {X.shape[0]} samples.")
        if self.n_components is None:
            if rank < X.shape[1]:
                warnings.warn(self._rank_message(axes, X), UserWarning, stacklevel=3)
            return rank
        if _is_share(self.n_components):
            variances = np.square(principal_components(axes, rank)[2])
            return int(np.searchsorted(np.cumsum(variances) / variances.sum(), self.n_components) + 1)
        if self.n_components > rank and not overcomplete:
            raise ValueError(
                f"n_components={self.n_components} must be between 1 and the rank of X, which is {rank} for "
                f"n_samples={X.shape[0]}, n_features={X.shape[1]}: constant or linearly dependent features and few "
                "samples lower it. Use n_components=None to take all of it."
            )
        return int(self.n_components)

    def _rank_message(self, axes, X):
        count, size = X.shape
        text = f"{type(self).__name__} keeps {axes.rank} components of {size} features: X has no more dimensions."
        if count <= size:
            return f"{text} It has only {count} samples."
        names = getattr(self, "feature_names_in_", range(size))
        constant, dependent = ([str(names[j]) for j in found] for found in axes.redundant())
        for what, found in (("Constant", constant), ("Linearly dependent on features before them", dependent)):
            if found:
                more = ", ..." if len(found) > 10 else ""
                text += f" {what}: {', '.join(found[:10])}{more}."
        return f"{text} Give n_components={axes.rank} to keep them without this warning."

    def _warn_unless(self, converged):
        if not converged:
            warnings.warn(
                f"{type(self).__name__} did not converge in {self.n_iter_} iterations. Increase max_iter or tol, or "
                "lower n_components.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def score(self, X, y=None):
        """Mean of `score_samples`, in nats: comparable between models of the same `noise_scale` only."""
        return float(self.score_samples(X).mean())


class SpreadICA(_LinearModel):
    r"""Independent component analysis by the spread likelihood, x = A z + m with independent sources z.

    The model has no noise and, with fewer sources than features, no likelihood; with noise added to data and model
    it has one. Sources have unit variance; the scale of the data is in `mixing_`.

    The data are whitened in their own precision, so that units, offsets and nearly dependent features cost no digits,
    and the rotation is found in float32.

    Args:
      n_components: number of sources; the rank of the data if None, the fewest principal components that explain that
        share of the variance if a float. With fewer than the rank, the data are first projected onto their principal
        components, in the units of X. More than the rank needs method "gibbs", and `transform` is then the least-norm
        solution.
      method: as in `spread_jax.linear.ica.fit`, for the whitened data; "auto" is its closed form.
      source: law of the sources, as in `spread_jax.linear.ica.fit`; "auto" assumes none.
      noise_scale: standard deviation of the spread noise, in whitened coordinates (of unit variance), or "auto".
      whiten: False if X is white already, with mean zero and covariance I: nothing is subtracted or scaled.
      max_iter: iterations at most; the method's default if None.
      tol: tolerance of convergence, in standard errors; the method's default if None.
      w_init: where the closed form starts, [n_components, n_components] in whitened coordinates; random if None.
      n_restarts: random starts, of which the best is kept; with method "gibbs" they vote on the columns. For two
        components the closed form needs none: it looks at all angles.
      random_state: None, an int or a RandomState: where the random starts come from.

    Attributes:
      mixing_: A, [n_features, n_components]. Components come in the order of the variance that they explain, the
        squared length of their column; those within a twentieth of each other in a fixed order that rounding does not
        change. The first entry of a column within a twentieth of its largest is positive.
      components_: unmixing, [n_components, n_features]: z = components_ (x - mean_).
      mean_: [n_features].
      whitening_: [n_components, n_features], before the rotation: components_ = rotation whitening_. Not for "gibbs".
      leakage_: [n_components, n_components], how much of source j is predicted to be in component i: standard
        deviation, of sources with unit variance; 1 for two components that cannot be told apart. Closed form only.
      column_errors_: [n_components], the predicted error of the columns of `mixing_`, relative to their length. Closed
        form only.
      noise_scale_: spread noise used, in whitened coordinates.
      n_iter_: iterations taken.
      n_features_in_: number of features seen in fit.
      feature_names_in_: their names, if X had any.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic ICA.

    Example:
      >>> import numpy as np
      >>> from spread_jax.linear import mixing_error
      >>> rng = np.random.default_rng(0)
      >>> mixing = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -2.0]])
      >>> X = rng.laplace(scale=0.5**0.5, size=(4000, 2)) @ mixing.T
      >>> model = SpreadICA(2, random_state=0).fit(X)
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
        whiten=True,
        max_iter=None,
        tol=None,
        w_init=None,
        n_restarts=1,
        random_state=None,
    ):
        self.n_components = n_components
        self.method = method
        self.source = source
        self.noise_scale = noise_scale
        self.whiten = whiten
        self.max_iter = max_iter
        self.tol = tol
        self.w_init = w_init
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
        X = self._checked(X)
        # Float32 from here on, also for float64 data: an error of 1e-6 in a rotation is far below the statistical
        # error, 1 / sqrt(n_samples), and it halves time and memory. Whitened data lose nothing by it.
        if self.whiten:
            axes = principal_axes(X)
            mean, size = axes.mean, self._count_components(axes, X, overcomplete=self.method == "gibbs")
            v, from_white, to_white, _ = whiten(X, axes, min(size, axes.rank), dtype=np.float32)
        else:
            mean, size = np.zeros(X.shape[1]), X.shape[1]
            if self.n_components not in (None, size):
                raise ValueError(f"n_components must be None or {size}, the features of X, with whiten=False.")
            v, from_white, to_white = np.ascontiguousarray(X.T, np.float32), np.eye(size), np.eye(size)
        noise_scale = None if _is_auto(self.noise_scale) else self.noise_scale
        if self.method in ("auto", "closed_form") and size == len(v):
            source = ica.source_of(self.source)
            found = _closed_form.fit(
                v,
                self._starts(size),
                LaplaceSource() if source is None and noise_scale is not None else source,
                noise_scale,
                None,
                likelihood=source is not None,
                max_iterations=self.max_iter or 200,
                tolerance=self.tol or 0.1,
            )
            rotation, leakage = found["rotation"], found["leakage"]
            self.noise_scale_, num_iterations = found["noise_scale"], found["num_iterations"]
            converged, inverse = found["residual"] <= (self.tol or 0.1), rotation
            rotation = np.linalg.inv(rotation) if np.isfinite(rotation).all() else rotation
        else:
            result = ica.fit(
                v.T,
                size,
                method=self.method,
                source=self.source,
                noise_scale=noise_scale,
                max_iterations=self.max_iter,
                tolerance=self.tol,
                num_restarts=self.n_restarts,
                key=_key(self.random_state),
            )
            rotation, inverse = np.asarray(result.mixing, np.float64), np.asarray(result.unmixing, np.float64)
            converged, leakage, num_iterations = result.converged, None, result.num_iterations
            self.noise_scale_ = np.asarray(result.noise_scale)[()]
        if not (np.isfinite(rotation).all() and np.isfinite(inverse).all()):
            raise ValueError(
                f"SpreadICA found no finite mixing of {size} sources with n_samples={X.shape[0]}. Lower n_components."
            )
        mixing = from_white @ rotation
        order, signs = stable_order(mixing)
        self.mean_ = mean.astype(X.dtype)
        self.mixing_ = (mixing * signs)[:, order].astype(X.dtype)
        self.components_ = ((inverse * signs[:, None])[order] @ to_white).astype(X.dtype)
        self.n_iter_ = max(int(num_iterations), 1)
        if size == len(v):
            self.whitening_ = to_white.astype(X.dtype)
        if leakage is not None:
            self.noise_scale_ = self.noise_scale_[order]
            self.leakage_ = leakage[order][:, order].astype(X.dtype)
            self._warn_of_untold()
        self._warn_unless(converged)
        self._law_examples = None
        if size <= len(v):
            u = inverse.astype(v.dtype) @ some_columns(v, _LAW_EXAMPLES)
            self._law_examples = u[order] * signs[:, None].astype(v.dtype)
            self._deviation = np.sqrt(np.square(from_white).sum() / X.shape[1])
        return self

    @property
    def column_errors_(self):
        """[n_components], the predicted error of each column of `mixing_`, relative to its length."""
        squares = np.square(self.mixing_).sum(axis=0)
        return np.sqrt(squares @ np.square(self.leakage_) / squares)

    def score_samples(self, X):
        """Expected log-density of each sample under the spread model, over its noise: E log p~(x + noise).

        The noise is Gaussian: 0.1 standard deviations of each source along the columns of A, and 0.1 root-mean-square
        standard deviations of a feature at right angles to them. The law of a source is that of the training data.

        Args:
          X: [n_samples, n_features].

        Returns:
          [n_samples], nats.
        """
        check_is_fitted(self)
        if self._law_examples is None:
            raise ValueError("score needs n_components to be at most the rank of the data it was fitted to.")
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        u = (X - self.mean_) @ self.components_.T
        law = SpreadLaw.of(self._law_examples, self.mixing_.astype(float), self._deviation)
        return law.log_density(u, X - self.mean_ - u @ self.mixing_.T)

    def _checked(self, X):
        """X, checked; scikit-learn looks long for data frames, where there is but an array."""
        plain = type(X) is np.ndarray and X.dtype in _DTYPES and X.ndim == 2 and min(X.shape) > 1
        if not plain or not np.isfinite(X).all():
            return validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2, ensure_min_features=2)
        self.n_features_in_ = X.shape[1]
        vars(self).pop("feature_names_in_", None)
        return X

    def _starts(self, size):
        """Orthogonal matrices to start from, [restarts, Z, Z]."""
        if self.w_init is None:
            random, shape = self.random_state, (self.n_restarts, size, size)
            if size == 2:  # all angles are looked at
                return np.eye(2)[None]
            if isinstance(random, numbers.Integral) and 0 <= random < 2**32:
                starts = normal_draws(int(random), shape)
            else:
                starts = check_random_state(random).normal(size=shape)
        else:
            starts = check_array(self.w_init, dtype=np.float64)[None]
            if starts.shape[1:] != (size, size):
                raise ValueError(f"w_init must have shape ({size}, {size}), got {starts.shape[1:]}.")
        return _closed_form.polar(starts)

    def _warn_of_untold(self):
        if self.leakage_.max() > _UNTOLD:
            untold = np.flatnonzero((self.leakage_ > _UNTOLD).any(axis=1))
            warnings.warn(
                f"SpreadICA cannot tell components {', '.join(map(str, untold))} apart: they look Gaussian, or the "
                f"samples are too few. They span the right subspace; leakage_ says how sure the others are.",
                ConvergenceWarning,
                stacklevel=3,
            )

    @property
    def _unmixing(self):
        return self.components_


class SpreadPCA(_LinearModel):
    r"""Principal component analysis as a deterministic model, x = F z + m, z ~ N(0, I), by its spread likelihood.

    The fit keeps the variances of the data whatever the noise; a probabilistic PCA, which noises the model only,
    subtracts the noise from them. Latents have unit variance, so `transform` whitens.

    Args:
      n_components: Z; the rank of the data if None, the fewest that explain that share of the variance if a float.
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
      >>> model = SpreadPCA(2).fit(X)
      >>> model.mixing_.shape, bool(np.allclose(model.inverse_transform(model.transform(X)), X))
      ((3, 2), True)
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
        axes = principal_axes(X)
        num_components = self._count_components(axes, X)
        loadings, _, deviations = principal_components(axes, axes.rank)
        if _is_auto(self.noise_scale):
            noise_scale = math.sqrt(np.square(deviations).sum() / X.shape[1])
        else:
            noise_scale = float(self.noise_scale)
        converged, num_iterations = True, 1
        loadings = loadings[:, :num_components]
        if self.method == "em":
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
        loadings = loadings.astype(X.dtype, copy=False)
        deviations = np.linalg.norm(loadings, axis=0)
        self.mean_ = axes.mean.astype(X.dtype)
        self.components_ = (loadings / np.where(deviations > 0, deviations, 1)).T
        self.mixing_ = loadings
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

    @property
    def _unmixing(self):
        deviations = np.sqrt(self.explained_variance_)
        return self.components_ / np.where(deviations > 0, deviations, 1)[:, None]


def _key(random_state):
    """A JAX key drawn from a scikit-learn random state."""
    return jax.random.key(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _is_auto(value):
    return isinstance(value, str) and value == "auto"


def _is_share(value):
    """Whether `n_components` is a share of the variance."""
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0 < value < 1


def _check_integer(estimator, name, value, *, optional=False, more=""):
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"The {name!r} parameter of {estimator} must be an int in the range [1, inf){more}"
            f"{' or None' if optional else ''}. Got {value!r} instead."
        )


def _check_positive(estimator, name, value, alternative):
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
            f"The {name!r} parameter of {estimator} must be {alternative}a float in the range (0.0, inf). Got "
            f"{value!r} instead."
        )
