"""What every test shares: deterministic CPU, double precision on request."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from pathlib import Path

# Set before jax is imported: the tests compare numbers, and a stray accelerator would change them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once, so LLVM's optimiser costs more than it gives: a fifth of the suite's time. The older
# emitter takes as much again off; its flag ends a program whose jaxlib does not know it, so only where it is known.
# `XLA_FLAGS= make test` runs the suite as users run the library.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

SLOW = Path(__file__).with_name("slow_tests.txt")


def pytest_collection_modifyitems(items):
    """Marks what is listed as slow; a test whose parameters are many is listed once."""
    slow = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid.split("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


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
