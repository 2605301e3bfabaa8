"""A process before its first array: what its environment says, compilation, memory, the default cache."""

import os
import platform
import pwd
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import runtime
from spread_jax.data import DatasetError, open_dataset
from spread_jax.errors import UsageError

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "node1:12345"}
SETTINGS = {"num_processes": 4, "process_id": 3}  # JAX reads the address from the environment


@pytest.mark.parametrize(
    ("environment", "index", "count", "settings"),
    [
        ({**ADDRESS, "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, 3, 4, SETTINGS),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}, 3, 4, SETTINGS),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, 3, 4, {}),
        ({**ADDRESS, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, 3, 4, {}),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "4", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, 3, 4, SETTINGS),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_hnp_uri": "1.0;tcp"}, 3, 4, {}),
        (
            {**ADDRESS, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            3,
            4,
            {**SETTINGS, "local_device_ids": 1},
        ),
        ({**ADDRESS, "PMI_SIZE": "4", "PMI_RANK": "3"}, 3, 4, SETTINGS),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, 1, None, {}),
        ({"SPREAD_JAX_DISTRIBUTED": "1"}, None, None, {}),
    ],
)
def test_launchers(environment, index, count, settings):
    assert runtime.process_of_environment(environment) == (index, count, settings)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in a batch script, outside of srun
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_one_process_is_left_alone(environment):
    assert runtime.process_of_environment(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two': it must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2"}, "There are 2 processes: set JAX_PROCESS_ID"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "set JAX_COORDINATOR_ADDRESS to the host name of process 0",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_is_missing_is_said(environment, message):
    with pytest.raises(UsageError, match=message):
        runtime.process_of_environment(environment)


# --- compilation and memory


def test_what_runs_a_few_times_is_compiled_quickly_and_can_be_traced(monkeypatch):
    function = lambda x, tree: x + tree["a"]
    arguments = jnp.ones(3), {"a": jnp.arange(3.0)}
    monkeypatch.setenv("XLA_FLAGS", "")
    call = runtime.jit_for_few_calls(function)
    np.testing.assert_array_equal(call(*arguments), [1, 2, 3])
    # Options of a jit inside another are refused by JAX.
    np.testing.assert_array_equal(jax.jit(call)(*arguments), [1, 2, 3])
    assert jax.eval_shape(call, *arguments).shape == (3,)

    options = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **given: options.append(given) or jit(f, **given))
    runtime.jit_for_few_calls(function)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    runtime.jit_for_few_calls(function)
    assert options == [{"compiler_options": {"xla_backend_optimization_level": 1}}, {}]


FAULTS = """
import resource
from spread_jax import runtime
from spread_jax.data import DatasetError, open_dataset
runtime.configure()
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


# --- the cache


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPREAD_JAX_CACHE", str(tmp_path / "own"))
    assert runtime.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPREAD_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.default_cache_dir() == tmp_path / "spread_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runtime.default_cache_dir() == tmp_path / "home/.cache/spread_jax"


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "SPREAD_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(UsageError, match=r"no home folder .* SPREAD_JAX_CACHE"):
        runtime.default_cache_dir()
    with pytest.raises(DatasetError, match="SPREAD_JAX_CACHE"):
        open_dataset("faces", "test", max_examples=1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is of this processor")
def test_only_a_whole_answer_about_the_flag_is_believed(monkeypatch, tmp_path):
    """A torn file, or a probe that failed for another reason, once made every later run slower, with other bits."""
    asked = []

    def probe(returncode, stderr=b""):
        def run(*_, **__):
            asked.append(returncode)
            return subprocess.CompletedProcess([], returncode, b"", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setenv("XLA_FLAGS", "--own")
        runtime._set_cpu_flag(tmp_path)
        return runtime._CPU_FLAG in os.environ["XLA_FLAGS"]

    (file,) = [tmp_path / f"xla-flag-{runtime.versions()['jaxlib']}"]
    assert not probe(-9)  # killed: not remembered
    assert not file.exists()
    assert not probe(-6, b"Unknown flags in XLA_FLAGS: Unknown flag ...")
    assert file.read_bytes() == b"no"
    for torn in (b"", b"ye", b"n"):
        file.write_bytes(torn)
        assert probe(0)
        assert file.read_bytes() == b"yes"
    file.unlink()
    file.symlink_to("/dev/zero")
    assert probe(0)
    assert not file.is_symlink()
    assert len(asked) == 6
    assert probe(1)  # as remembered
    assert len(asked) == 6


def test_what_bits_depend_on_is_named(monkeypatch):
    before = runtime.numerics()
    assert set(before["XLA_FLAGS"].split()) == set(os.environ.get("XLA_FLAGS", "").split())
    monkeypatch.setenv("XLA_FLAGS", "--b=1 --a=1")
    assert runtime.numerics() == {**before, "XLA_FLAGS": "--a=1 --b=1"}
    assert before["device"]
