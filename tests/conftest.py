"""What every test shares: deterministic CPU, double precision on request."""

from __future__ import annotations

import contextlib
import os

# Set before jax is imported: the tests compare numbers, and a stray accelerator would change them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once, so LLVM's optimiser costs more than it gives: a fifth of the suite's time.
# `XLA_FLAGS= make test` runs it with the optimiser on.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs a test in both precisions."""
    context = jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext()
    with context:
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
