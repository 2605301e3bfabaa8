"""The hook that `--on-log` names, found in a module or a file or refused in a sentence; compilation, memory."""

import dataclasses
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _generator, _launch
from spread_jax.data import Dataset

HOOK = """from __future__ import annotations
import dataclasses


@dataclasses.dataclass
class Sent:
    step: int
    metrics: dict

sent: list[Sent] = []

def log(step, metrics):
    sent.append(Sent(step, metrics))

number = 3
"""


def test_a_hook_is_found_in_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "tracking_for_test.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)
    for text in (f"{tmp_path}/tracking_for_test.py:log", "tracking_for_test:log"):
        hook = _launch.load_hook(text)
        _launch.prefixed(hook, "fixed-0")(3, {"elbo": 0.5})
        hook(4, {})
        sent = [(record.step, record.metrics) for record in hook.__globals__["sent"]]
        assert sent == [(3, {"fixed-0/elbo": 0.5}), (4, {})]
    assert _launch.load_hook(None) is None
    assert _launch.prefixed(None, "fixed-0") is None


def test_what_is_no_hook_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('no\\nserver')")
    (tmp_path / "sound.py").write_text(HOOK)
    refused = {
        "no_such_module:log": "ModuleNotFoundError: No module named 'no_such_module'",
        f"{tmp_path}/none.py:log": "No such file",
        f"{tmp_path}/broken.py:log": "OSError: no server",
        f"{tmp_path}/sound.py:lgo": "no attribute 'lgo'",
        f"{tmp_path}/sound.py:number": "that is a int",
        f"{tmp_path}/sound.py": "cannot be used",
        "json": "that is a module",
        ":": "cannot be used",
        "": "cannot be used",
    }
    for text, why in refused.items():
        with pytest.raises(
            _launch.UsageError, match=r"package\.module:function or path/to/file\.py:function"
        ) as caught:
            _launch.load_hook(text)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_saved_run_names_no_hook(monkeypatch):
    config = _generator.GeneratorConfig(on_log="tracking:log")
    images = Dataset.__new__(Dataset)
    monkeypatch.setattr(Dataset, "fingerprint", "f", raising=False)
    monkeypatch.setattr(Dataset, "image_shape", (28, 28, 1), raising=False)
    saved = _generator.saved_config(config, images)
    assert "on_log" not in saved
    for given in (saved, {**saved, "on_log": "os:abort"}):  # of a stranger
        assert _generator.load_config(given)[0] == dataclasses.replace(config, on_log=None)


def test_what_runs_a_few_times_is_compiled_quickly_and_can_be_traced(monkeypatch):
    function = lambda x, tree: x + tree["a"]
    arguments = jnp.ones(3), {"a": jnp.arange(3.0)}
    monkeypatch.setenv("XLA_FLAGS", "")
    call = _launch.jit_for_few_calls(function)
    np.testing.assert_array_equal(call(*arguments), [1, 2, 3])
    # Options of a jit inside another are refused by JAX.
    np.testing.assert_array_equal(jax.jit(call)(*arguments), [1, 2, 3])
    assert jax.eval_shape(call, *arguments).shape == (3,)

    options = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **given: options.append(given) or jit(f, **given))
    _launch.jit_for_few_calls(function)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    _launch.jit_for_few_calls(function)
    assert options == [{"compiler_options": {"xla_backend_optimization_level": 1}}, {}]


FAULTS = """
import resource
from experiments import _launch
_launch.configure_jax()
import jax, jax.numpy as jnp
block = jax.jit(lambda x, y: jax.lax.optimization_barrier(x @ y).sum())  # 100 MiB between product and sum
arguments = jnp.ones((25600, 4)), jnp.ones((4, 1024))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block(*arguments).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_memory_of_a_program_is_kept_unless_the_user_has_set_it(own, tmp_path):
    environment = {**os.environ, "SPREAD_JAX_CACHE": str(tmp_path), **own}
    faults = int(subprocess.check_output([sys.executable, "-c", FAULTS], env=environment, text=True))
    pages = 100 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults > pages / 2 if own else faults < pages / 10
