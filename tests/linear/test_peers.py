"""What `benchmarks.ica` compares with: a peer written there, the bound, and the page."""

import numpy as np
import pytest

from spread_jax.linear import mixing_error

ica = pytest.importorskip("benchmarks.ica")


@pytest.mark.parametrize("laws", [("Laplace", "uniform"), ("gamma", "t5", "signs")])
def test_jade_finds_the_mixing(laws):
    x, mixing = ica.mixed_set(0, 20_000, laws)
    found = ica.jade(x, len(laws), 0)
    assert mixing_error(found, mixing, kind="direction") < 0.05
    np.testing.assert_allclose(found @ found.T, np.cov(x.T, bias=True), rtol=1e-6, atol=1e-9)
    # The same sources, whatever the units: their fourth-order cumulants are nearly diagonal.
    z = (x - x.mean(axis=0)) @ np.linalg.inv(found).T
    cross = (z[:, 0] ** 3 * z[:, 1]).mean()
    assert abs(cross) < 0.2


def test_the_bound_of_two_laplace_sources():
    """Var e_ij = 2 / (3 N); the part of a_i at right angles to a_j is 0.6 / 1.25^(1/2) long."""
    mixing = np.array([[1.0, 0.5], [0.5, 1.0]])
    across = 0.75 / 1.25 * np.array([0.5, 1.0])  # entries of a_1 - a_2 (a_1 a_2) / (a_2 a_2), in size
    expected = np.sqrt(2 / np.pi * 2 / 3 / 1000) * 2 * across.sum() / np.abs(mixing).sum()
    assert ica.bound(1000, ("Laplace", "Laplace"), mixing) == pytest.approx(expected)
    assert ica.bound(1000, ("Laplace", "uniform"), mixing) is None


def test_the_page_says_where_another_method_is_better():
    rows = [
        {
            "laws": ["Laplace", "t3"],
            "count": 1000,
            "seeds": 2,
            "method": name,
            "mean": mean,
            "failures": 0,
            "bound": 0.01,
        }
        for name, mean in {**dict.fromkeys(ica.MIXED, 0.03), "SpreadICA": 0.02, "JADE": 0.015}.items()
    ]
    page = "\n".join(ica.mixes_as_markdown(rows))
    assert "| **0.0150** |" in page
    assert "better by more than 5 % in 1 of 1 mixes" in page
    assert "over the bound: median 2.00, most 2.00" in page
