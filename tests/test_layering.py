"""The import rules, read from the sources; and what `import spread_jax` costs and needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spread_jax

ROOT = Path(spread_jax.__file__).parent
REPOSITORY = Path(__file__).parents[1]
EXTRAS = ("flax", "optax", "orbax", "tensorflow_datasets", "matplotlib", "PIL", "rich", "tyro", "sklearn", "scipy")

# What each folder may import from the others. Foundations (files at the top) are open to all.
ALLOWED = {
    "noise": set(),
    "divergences": {"noise"},
    "objectives": {"noise", "divergences"},
    "linear": {"noise", "divergences", "objectives"},
    "nn": set(),
    "data": set(),
    "training": set(),
    "evaluation": {"noise", "divergences", "objectives", "linear"},
    "models": {"noise", "divergences", "objectives", "nn", "data", "training", "evaluation"},
    "cli": {"noise", "divergences", "objectives", "nn", "data", "training", "evaluation", "models"},
}
# The folders that `import spread_jax` reaches: no package beyond jax and numpy; a bar on a terminal asks for rich.
CORE = {"", "noise", "divergences", "objectives"}


def imports_of(path, top_level_only=False):
    """Full names of the modules a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_import_only_what_comes_before_them(path):
    folder = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
    names = set(imports_of(path))
    assert not {n for n in names if n.split(".")[0] == "experiments"}
    if folder:
        used = {n.split(".")[1] for n in names if n.startswith("spread_jax.") and not n.split(".")[1].startswith("_")}
        folders = {p.name for p in ROOT.iterdir() if p.is_dir()}
        assert used & folders <= ALLOWED[folder] | {folder}
    if folder in CORE:
        names = set(imports_of(path, top_level_only=path.name == "_progress.py"))
        outside = {n.split(".")[0] for n in names} - {"jax", "numpy", "spread_jax"} - set(sys.stdlib_module_names)
        assert not outside - {"__future__"}


def test_every_folder_has_a_rule():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(ALLOWED)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "experiments").glob("*.py")), ids=lambda p: p.name)
def test_experiments_use_public_names_only(path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "spread_jax" and path.name != "_launch.py":
            assert len(parts) <= 4  # package, folder, module, name
            assert not any(part.startswith("_") for part in parts)


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_import_needs_only_jax_and_numpy():
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in EXTRAS)
    assert "GaussianNoise" in run(f"import sys\n{blocked}import spread_jax\nprint(spread_jax.__all__)")


def test_import_is_light():
    """Under 0.3 s beyond jax: the best of three, so that a busy machine does not fail it."""
    program = """
import time, jax, jax.numpy
start = time.perf_counter()
import spread_jax
print(time.perf_counter() - start)
"""
    assert min(float(run(program)) for _ in range(3)) < 0.3


def test_import_leaves_jax_and_logging_alone():
    program = """
import logging, os, jax
before = dict(jax.config.values), dict(os.environ), list(logging.getLogger().handlers)
import spread_jax, spread_jax.data, spread_jax.evaluation  # nn and training: flax and orbax do change some
assert before == (dict(jax.config.values), dict(os.environ), list(logging.getLogger().handlers))
"""
    run(program)


@pytest.mark.parametrize(
    "module", ["spread_jax", *(f"spread_jax.{name}" for name in ALLOWED if (ROOT / name).is_dir())]
)
def test_public_names_exist_and_are_documented(module):
    namespace = __import__(module, fromlist=["__all__"])
    assert namespace.__doc__
    for name in namespace.__all__:
        value = getattr(namespace, name)
        if callable(value):
            assert value.__doc__, f"{module}.{name} has no docstring"
            assert "Dataclass" not in value.__doc__
