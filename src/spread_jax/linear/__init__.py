"""Deterministic linear models x = A z: independent component analysis with spread noise."""
