"""The estimators: scikit-learn's own checks, agreement with the core and with peers, and what users get wrong."""

import inspect
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from sklearn.base import clone
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from spread_jax.linear import mixing_error, pca
from spread_jax.linear.sklearn import SpreadICA, SpreadPCA

BOTH = [SpreadICA, SpreadPCA]


@pytest.fixture(autouse=True)
def quick_compilation():
    """These tests fit many shapes once: compiling them well would take most of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the checks fit noise
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([SpreadICA(), SpreadPCA()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def mixed():
    """Three Laplace sources in five features, far from the origin: (X, mixing, sources)."""
    rng = np.random.default_rng(0)
    mixing = np.array([[1.0, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1], [-1, 1, 1]])
    sources = rng.laplace(scale=0.5**0.5, size=(3000, 3))
    return sources @ mixing.T + rng.normal(size=5), mixing, sources


def test_ica_finds_the_mixing_in_unit_variance_sources(mixed):
    X, mixing, sources = mixed
    model = SpreadICA(3, random_state=0)  # the rank of X
    z = model.fit_transform(X)
    assert model.mixing_.shape == (5, 3)
    # Cramer-Rao: each entry of A has variance (2 (Z - 1) / 3 + 1) / N for Z sources; twice the mean of its size.
    bound = np.sqrt(2 / np.pi * (2 * 2 / 3 + 1) / len(X))
    assert 0.3 * bound < mixing_error(model.mixing_, mixing) < 2 * bound
    peer = FastICA(3, whiten="unit-variance", random_state=0).fit(X)
    assert mixing_error(model.mixing_, mixing) < 1.1 * mixing_error(peer.mixing_, mixing)
    np.testing.assert_allclose(model.inverse_transform(z), X, atol=1e-5)
    np.testing.assert_allclose(model.components_ @ model.mixing_, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.1)
    correlation = np.abs(np.corrcoef(z.T, sources.T)[:3, 3:])
    assert np.sort(correlation.max(axis=0))[0] > 0.99


def test_the_score_is_that_of_quadrature(mixed):
    X, _, _ = mixed
    model = SpreadICA(3, random_state=0).fit(X)
    rng = np.random.default_rng(1)
    points = np.concatenate([X[:20], X[:10] + rng.normal(size=(10, 5)), 3 * X[:5]])
    # The law of a source: a kernel at each training value and, with the weight of one, a Cauchy law.
    s, nodes, weights = 0.1, *np.polynomial.hermite_e.hermegauss(41)
    u, training = (points - model.mean_) @ model.components_.T, model.transform(X)
    spread = u[:, :, None] + s * nodes
    kernels = scipy.stats.norm.pdf(spread[:, :, None], training.T[None, :, :, None], s).sum(axis=2)
    log_density = np.log((kernels + scipy.stats.cauchy.pdf(spread)) / (len(X) + 1))
    along = (log_density @ weights / weights.sum()).sum(axis=1)
    # At right angles to A: a Gaussian, whose argument is spread by it too.
    A = model.mixing_
    outside = points - model.mean_ - u @ A.T
    sigma = 0.1 * np.sqrt(X.var(axis=0).mean())
    across = scipy.stats.norm.logpdf(outside, scale=sigma).sum(axis=1) - 1  # two dimensions, half a nat for each
    across += 3 * np.log(sigma * np.sqrt(2 * np.pi))  # three of the five are not there
    expected = along - 0.5 * np.linalg.slogdet(A.T @ A)[1] + across
    np.testing.assert_allclose(model.score_samples(points), expected, rtol=1e-3, atol=0.03)
    assert model.score(points) == pytest.approx(expected.mean(), abs=0.01)


def test_the_score_prefers_independent_sources_on_data_not_seen(mixed):
    X = mixed[0]
    model = SpreadICA(3, random_state=1).fit(X[:2000])
    with pytest.warns(ConvergenceWarning):
        early = SpreadICA(3, random_state=1, max_iter=1).fit(X[:2000])
    assert model.score(X[2000:]) > early.score(X[2000:]) + 0.002


def test_a_fit_starts_where_it_is_told(mixed):
    X = mixed[0]
    found = SpreadICA(3, random_state=0).fit(X)
    rotation = found.components_ @ np.linalg.pinv(found.whitening_)
    again = SpreadICA(3, w_init=rotation, random_state=1).fit(X)
    np.testing.assert_allclose(again.mixing_, found.mixing_, atol=1e-2)
    assert again.n_iter_ < found.n_iter_
    errors = []
    for start in ({"w_init": rotation}, *({"random_state": seed} for seed in range(4))):
        with pytest.warns(ConvergenceWarning):
            model = SpreadICA(3, max_iter=1, **start).fit(X)
        errors.append(mixing_error(model.mixing_, found.mixing_))
    assert errors[0] < 0.7 * np.median(errors[1:])
    with pytest.raises(ValueError, match=r"w_init must have shape \(3, 3\), got \(2, 2\)"):
        SpreadICA(3, w_init=np.eye(2)).fit(X)


def test_white_data_are_not_whitened_again(mixed):
    X = mixed[0]
    white = SpreadICA(3, random_state=0).fit(X)
    V = (X - white.mean_) @ white.whitening_.T
    model = SpreadICA(whiten=False, random_state=0).fit(V)
    np.testing.assert_array_equal(model.whitening_, np.eye(3))
    np.testing.assert_array_equal(model.mean_, 0)
    together = np.abs(model.transform(V).T @ white.transform(X)) / len(X)
    np.testing.assert_allclose(np.sort(together.max(axis=1)), 1, atol=1e-2)
    with pytest.raises(ValueError, match="n_components must be None or 3, the features of X, with whiten=False"):
        SpreadICA(2, whiten=False).fit(V)


def test_pca_is_the_core_and_scikit_learns(mixed):
    X = mixed[0]
    rest = X + 0.1 * np.random.default_rng(1).normal(size=X.shape)
    model, peer = SpreadPCA(3, noise_scale=0.3).fit(rest), PCA(3, whiten=True).fit(rest)
    np.testing.assert_allclose(np.abs(model.components_), np.abs(peer.components_), rtol=1e-8)
    np.testing.assert_allclose(model.explained_variance_, peer.explained_variance_ * (1 - 1 / len(X)))
    signs = np.sign((model.components_ * peer.components_).sum(axis=1))
    expected = signs * peer.transform(rest) / np.sqrt(1 - 1 / len(X))
    np.testing.assert_allclose(model.transform(rest), expected, atol=1e-8)
    core = pca.fit(rest, 3, 0.3)
    np.testing.assert_allclose(model.mixing_, core.loadings, atol=1e-4)
    assert model.score(rest) == pytest.approx(float(core.log_likelihood), rel=1e-5)
    em = SpreadPCA(3, noise_scale=2.0, method="em", tol=1e-9, random_state=0).fit(rest)
    np.testing.assert_allclose(em.mixing_, model.mixing_, atol=1e-7)  # beyond float32: it ran in double precision
    assert em.n_iter_ > 1


@pytest.mark.parametrize("Estimator", BOTH)
def test_dtypes_are_kept_and_offsets_and_scales_cost_no_digits(Estimator, mixed):
    X = mixed[0]
    for dtype in (np.float32, np.float64):
        model = Estimator(3, random_state=0).fit(X.astype(dtype))
        for value in (model.mixing_, model.components_, model.mean_, model.transform(X.astype(dtype))):
            assert value.dtype == dtype
    far = Estimator(3, random_state=0).fit(1e-30 * (X + 1e6))
    assert mixing_error(1e30 * far.mixing_, model.mixing_) < 1e-3
    assert Estimator(3).fit((100 * X).astype(int)).mixing_.dtype == np.float64


@pytest.mark.parametrize("Estimator", BOTH)
def test_rank_deficient_data_use_their_rank_or_say_so(Estimator, mixed):
    X = np.hstack([mixed[0], mixed[0][:, :2], np.full((3000, 1), 7.7)])  # duplicated and constant features
    for value in (X, X.astype(np.float32)):
        with pytest.warns(
            UserWarning, match="3 components of 8 features.* Constant: 7.* Linearly dependent .*: 3, 4, 5, 6"
        ):
            model = Estimator().fit(value)
        assert model.mixing_.shape == (8, 3)
        assert np.isfinite(model.mixing_).all()
        assert np.isfinite(model.transform(value)).all()
        np.testing.assert_allclose(model.mixing_[7], 0, atol=1e-5)
    with pytest.raises(ValueError, match=r"n_components=4 must be between 1 and the rank of X, which is 3 for"):
        Estimator(4).fit(X)
    with pytest.raises(ValueError, match=r"X has no variance: its 4 feature\(s\) are constant over 9 samples"):
        Estimator().fit(np.full((9, 4), 0.1))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # three sources of 6 samples
@pytest.mark.parametrize("Estimator", BOTH)
def test_fewer_samples_than_features(Estimator):
    X = np.random.default_rng(0).normal(size=(6, 9))
    model = Estimator(3, random_state=0).fit(X)
    assert np.isfinite(model.mixing_).all()
    np.testing.assert_allclose(np.cov(model.transform(X).T, bias=True), np.eye(3), atol=0.6)
    with pytest.raises(ValueError, match="the rank of X, which is 5"):
        Estimator(6).fit(X)


GOOD = np.random.default_rng(0).laplace(size=(50, 3))
BAD = [
    ({}, np.where(GOOD > 3, np.nan, GOOD), "Input X contains NaN"),
    ({}, np.where(GOOD > 3, np.inf, GOOD), "Input X contains infinity"),
    ({}, GOOD[:1], r"Found array with 1 sample\(s\) \(shape=\(1, 3\)\) while a minimum of 2 is required"),
    ({}, GOOD[:, 0], "Expected 2D array, got 1D array instead"),
    (
        {"n_components": 0},
        GOOD,
        r"The 'n_components' parameter of \w+ must be an int in the range \[1, inf\), a float in",
    ),
    ({"n_components": 1.5}, GOOD, "Got 1.5 instead"),
    ({"n_components": 4}, GOOD, "n_components=4 must be between 1 and the rank of X, which is 3"),
    ({"noise_scale": -1}, GOOD, "must be 'auto' or a float in the range"),
    ({"tol": 0}, GOOD, "must be None or a float in the range"),
    ({"max_iter": True}, GOOD, "must be an int in the range"),
    ({"method": "magic"}, GOOD, "method"),
]


@pytest.mark.parametrize("Estimator", BOTH)
@pytest.mark.parametrize(("parameters", "X", "sentence"), BAD)
def test_bad_input_gets_scikit_learns_sentence(Estimator, parameters, X, sentence):
    with pytest.raises(ValueError, match=sentence):
        Estimator(**parameters).fit(X)


@pytest.mark.parametrize("Estimator", BOTH)
def test_other_bad_input(Estimator, mixed):
    with pytest.raises(TypeError, match="Sparse data was passed"):
        Estimator().fit(scipy.sparse.csr_array(GOOD))
    with pytest.raises(NotFittedError, match=f"This {Estimator.__name__} instance is not fitted yet"):
        Estimator().transform(GOOD)
    model = Estimator(3).fit(mixed[0])
    with pytest.raises(ValueError, match="X has 3 features, but"):
        model.transform(GOOD)
    with pytest.raises(ValueError, match=r"X has 5 features, but the inverse of .* is expecting 3"):
        model.inverse_transform(mixed[0])


def test_other_bad_input_of_ica():
    with pytest.raises(ValueError, match=r"Found array with 1 feature\(s\) .* while a minimum of 2 is required"):
        SpreadICA().fit(GOOD[:, :1])
    with pytest.raises(ValueError, match="The 'n_restarts' parameter of SpreadICA must be an int"):
        SpreadICA(n_restarts=0).fit(GOOD)


UNFINISHED = [
    SpreadICA(max_iter=1),
    SpreadICA(4, method="gibbs", max_iter=2),  # more sources than features
    SpreadPCA(2, method="em", noise_scale=0.01, max_iter=2),
]


@pytest.mark.parametrize("model", UNFINISHED)
def test_no_convergence_warns(model):
    name = type(model).__name__
    X = np.random.default_rng(3).normal(size=(200, 3))
    with pytest.warns(ConvergenceWarning, match=f"{name} did not converge in .* Increase max_iter"):
        model.fit(X)
    assert model.mixing_.shape == (3, model.n_components or 3)
    assert np.isfinite(model.transform(X)).all()


def test_random_state_is_int_instance_or_none(mixed):
    X = mixed[0]
    fit = lambda state: SpreadICA(3, random_state=state).fit(X).mixing_
    np.testing.assert_array_equal(fit(3), fit(3))
    np.testing.assert_array_equal(fit(3), fit(np.random.RandomState(3)))
    assert np.abs(fit(3) - fit(4)).max() > 0
    state = np.random.RandomState(3)
    before = state.get_state()[2]
    fit(state)
    assert state.get_state()[2] != before  # an instance moves on
    assert mixing_error(fit(None), mixed[1]) < 0.09


@pytest.mark.parametrize("Estimator", BOTH)
def test_pipeline_search_clone_and_pickle(Estimator, mixed):
    X = mixed[0]
    model = make_pipeline(StandardScaler(), Estimator(3, random_state=0)).fit(X)
    again = pickle.loads(pickle.dumps(clone(model).fit(X)))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    names = model.get_feature_names_out()
    assert list(names) == [f"{Estimator.__name__.lower()}{i}" for i in range(3)]


def test_grid_search(mixed):
    X = mixed[0]
    # By its own score, an expected log-likelihood.
    search = GridSearchCV(SpreadPCA(noise_scale=0.5), {"n_components": [1, 2, 3]}, cv=2).fit(X)
    assert search.best_params_ == {"n_components": 3}
    kurtosis = lambda model, X, y=None: (model.transform(X) ** 4).mean()
    everything = np.arange(len(X))
    search = GridSearchCV(SpreadICA(3), {"random_state": [0, 1]}, scoring=kurtosis, cv=[(everything, everything)]).fit(
        X
    )
    assert search.best_score_ > 4  # 3 for a Gaussian, 6 for a Laplace source


@pytest.mark.parametrize("Estimator", BOTH)
def test_pandas_in_and_out(Estimator, mixed):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(mixed[0], columns=list("abcde"))
    model = Estimator(3, random_state=0).set_output(transform="pandas").fit(frame)
    out = model.transform(frame)
    assert list(out.columns) == list(model.get_feature_names_out())
    assert list(model.feature_names_in_) == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(frame.rename(columns={"a": "z"}))


def test_no_copy_of_the_data_in_double_precision_nor_a_change_to_them(mixed):
    X = mixed[0].copy()
    X.flags.writeable = False
    for Estimator in BOTH:
        Estimator(3).fit(X).transform(X)
    np.testing.assert_array_equal(X, mixed[0])


def test_parameters_are_what_the_signature_says():
    for Estimator in BOTH:
        parameters = inspect.signature(Estimator).parameters
        assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "n_components")
        assert set(Estimator().get_params()) == set(parameters)


def test_scikit_learn_is_optional():
    program = """
import sys
sys.modules["sklearn"] = None
import spread_jax.linear
try:
    import spread_jax.linear.sklearn
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == 'spread_jax.linear.sklearn needs scikit-learn: pip install "spread-jax[eval]".\n'
