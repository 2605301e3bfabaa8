"""The function shaped as Picard's against Picard's, and MNE's ICA on a simulated recording, where MNE is installed."""

import numpy as np
import pytest

from spread_jax.linear import match_columns, mixing_error
from spread_jax.linear.eeg import fit_mne, spread_ica
from tests.linear._data import mixed_data

LAWS = ("laplace", "uniform", "student_5", "gamma")


def test_results_have_the_shapes_and_the_meaning_of_picards():
    from picard import picard

    x, mixing = mixed_data(0, 4000, LAWS)
    X = x.T + 3.0
    arguments = {"n_components": 4, "return_X_mean": True, "return_n_iter": True, "random_state": 0}
    for ours, theirs in zip(spread_ica(X, **arguments), picard(X, **arguments), strict=True):
        assert np.shape(ours) == np.shape(theirs)
    K, W, Y, mean, num_iterations = spread_ica(X, **arguments)
    np.testing.assert_allclose(Y, W @ K @ (X - mean[:, None]), atol=1e-9)
    np.testing.assert_allclose(np.cov(K @ X, bias=True), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(Y.std(axis=1), 1, atol=0.05)
    assert mixing_error(np.linalg.inv(W @ K), mixing, kind="direction") < 0.05
    assert 1 < num_iterations < 100


def test_white_data_are_only_turned():
    x, mixing = mixed_data(1, 4000, LAWS)
    K, _, _ = spread_ica(x.T, random_state=0)
    white = K @ x.T
    nothing, W, Y = spread_ica(white, whiten=False, random_state=0)
    assert nothing is None
    np.testing.assert_allclose(Y, W @ (white - white.mean(axis=1, keepdims=True)), atol=1e-9)
    assert mixing_error(np.linalg.inv(W @ K), mixing, kind="direction") < 0.05
    again = spread_ica(white, whiten=False, w_init=W)[1]
    np.testing.assert_allclose(again, W, atol=0.01)


@pytest.mark.parametrize(
    ("X", "arguments", "message"),
    [
        (np.zeros(5), {}, r"X must be a floating-point array \[features, samples\]"),
        (np.full((2, 9), np.nan), {}, "X must be finite"),
        (np.ones((2, 9)) * np.arange(9.0), {"n_components": 2}, "the rank of X, which is 1, got 2"),
        (np.eye(3), {"n_components": 2, "whiten": False}, "n_components must be None or 3"),
    ],
)
def test_bad_input_gets_a_sentence(X, arguments, message):
    with pytest.raises(ValueError, match=message):
        spread_ica(X, **arguments)


def recording(mne, seed=0, seconds=60, rate=200):
    """Raw of 16 channels in volts with an average reference and a bad channel, and the blinks alone, [16, times]."""
    rng = np.random.default_rng(seed)
    count = seconds * rate
    brain = np.stack([
        *rng.laplace(size=(6, count)),
        *rng.standard_t(5, size=(4, count)),
        np.sin(2 * np.pi * 10 * np.arange(count) / rate) * (1 + np.sin(np.arange(count) / 300)),
        np.sin(2 * np.pi * 50 * np.arange(count) / rate),
    ])  # fmt: skip
    blinks = np.zeros(count)
    for at in rng.choice(count - 80, 25, replace=False):
        blinks[at : at + 60] += np.hanning(60)
    volts = 1e-5 * rng.normal(size=(16, 12)) @ brain + 1e-7 * rng.normal(size=(16, count))
    eye = 1e-4 * np.outer(np.exp(-np.arange(16) / 3), blinks)
    data = volts + eye
    data[7] += 1e-3 * rng.normal(size=count)
    info = mne.create_info([f"EEG{i:02d}" for i in range(16)], rate, "eeg")
    raw = mne.io.RawArray(data, info, verbose="error")
    raw.info["bads"] = ["EEG07"]
    raw.set_eeg_reference("average", verbose="error")
    good = np.arange(16) != 7
    return raw, eye[good] - eye[good].mean(axis=0)


@pytest.mark.filterwarnings("ignore:The data has not been high-pass filtered:RuntimeWarning")
@pytest.mark.parametrize("case", ["raw", "epochs", "annotated", "rejected"])
def test_mne_takes_the_blinks_out(case):
    mne = pytest.importorskip("mne")
    raw, blinks = recording(mne)
    fitted, options = raw.copy(), {}
    if case == "epochs":
        fitted = mne.make_fixed_length_epochs(raw, 2.0, preload=True, proj=False, verbose="error")
    elif case in ("annotated", "rejected"):  # a quarter of the recording is nothing but movement
        fitted._data[:, :3000] += 5e-3 * np.random.default_rng(5).normal(size=(16, 3000))
    if case == "annotated":
        fitted.set_annotations(mne.Annotations([0.0], [15.0], ["BAD_movement"]))
    elif case == "rejected":
        options = {"reject": {"eeg": 2e-3}, "tstep": 1.7, "decim": 3}
    ica = mne.preprocessing.ICA(n_components=13, random_state=0, verbose="error")
    ica = fit_mne(ica, fitted, random_state=0, verbose="error", **options)
    sources = ica.get_sources(raw).get_data()
    np.testing.assert_allclose(sources.std(axis=1), 1, rtol=0.15)
    correlation = np.abs(np.corrcoef(np.vstack([sources, blinks[:1]]))[-1, :-1])
    assert np.sort(correlation)[-2:].tolist() == pytest.approx([0, 1], abs=0.1)
    ica.exclude = [int(correlation.argmax())]
    clean = ica.apply(raw.copy(), verbose="error")
    picks = [name for name in raw.ch_names if name not in raw.info["bads"]]
    removed = (raw.get_data(picks) - clean.get_data(picks)).T
    left = np.linalg.norm(removed - removed.mean(axis=0) - (blinks - blinks.mean(axis=1, keepdims=True)).T)
    assert left < 0.15 * np.linalg.norm(blinks)
    matched = match_columns(ica.mixing_matrix_, np.linalg.pinv(ica.unmixing_matrix_))
    np.testing.assert_allclose(matched, np.linalg.pinv(ica.unmixing_matrix_), atol=1e-8)


class Recorded:
    """As much of MNE's ICA, and of a recording, as `fit_mne` calls: sources of white data, turned."""

    def __init__(self, sources, turn):
        self.sources, self.turn = sources, turn

    def fit(self, inst, **fit):
        self.unmixing_matrix_, self.fitted, self.n_samples_ = self.turn.copy(), fit, self.sources.shape[1]

    def get_sources(self, inst, start, stop):
        return self

    def get_data(self, reject_by_annotation):
        return self.turn @ self.sources


def test_components_of_a_recording_come_in_the_order_of_what_they_explain():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 4.0, 2.0])
    independent = rng.laplace(size=(3, 6000)) / np.sqrt(2)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    ica = fit_mne(Recorded(scales[:, None] * independent, turn), None, random_state=0, picks="eeg")
    assert (ica.fitted, ica.method) == ({"picks": "eeg"}, "spread")
    lengths = np.linalg.norm(ica.mixing_matrix_, axis=0)
    np.testing.assert_allclose(lengths, [4, 2, 1], rtol=0.1)
    np.testing.assert_allclose(ica.unmixing_matrix_ @ ica.mixing_matrix_, np.eye(3), atol=1e-9)
    assert (ica.mixing_matrix_[np.abs(ica.mixing_matrix_).argmax(axis=0), range(3)] > 0).all()
