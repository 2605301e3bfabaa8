"""The documentation does what it says: its code runs, its links lead somewhere, its reference is complete."""

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TUTORIALS = sorted(DOCS.glob("tutorials/*.py"))
SNIPPET = re.compile(r'^\s*--8<-- "(.+)"$', flags=re.M)

spec = importlib.util.spec_from_file_location("pages", DOCS / "hooks" / "pages.py")


@pytest.fixture(scope="module")
def reference():
    """The module that writes the API pages; it needs MkDocs' `File`."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("math_core")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(path):
    return str(path.relative_to(ROOT))


def python_blocks(text):
    """The fenced Python blocks of a page."""
    blocks = re.findall(r"^([ ]*)```python\n(.*?)^\1```", text, flags=re.M | re.S)
    return [textwrap.dedent(block) for _, block in blocks]


def slug(heading):
    """The anchor that MkDocs gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for packages that a guide sends metrics to: what it may call of each, with what."""

    def wandb_init(*, project: str, id: str, resume: str): ...
    def wandb_log(data, step=None, commit=None): ...
    def mlflow_start_run(run_id=None, *, run_name=None): ...
    def mlflow_log_metrics(metrics, step=None): ...

    known = {
        "wandb": {"init": wandb_init, "log": wandb_log},
        "mlflow": {"start_run": mlflow_start_run, "log_metrics": mlflow_log_metrics, "active_run": lambda: None},
    }
    for name, functions in known.items():
        module = types.SimpleNamespace(**{n: mock.create_autospec(f, return_value=None) for n, f in functions.items()})
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["wandb"].run = None
    return types.SimpleNamespace(**{name: sys.modules[name] for name in known})


def test_hooks_of_the_guide_send_every_number(trackers):
    blocks = python_blocks((DOCS / "guides" / "track_runs.md").read_text(encoding="utf-8"))
    for block in blocks[:2]:
        namespace = {}
        exec(block, namespace)
        namespace["log"](20, {"elbo": -1.5})
    trackers.wandb.init.assert_called_once()
    trackers.wandb.log.assert_called_once_with({"trained steps": 20, "elbo": -1.5})
    trackers.mlflow.start_run.assert_called_once()
    trackers.mlflow.log_metrics.assert_called_once_with({"elbo": -1.5}, step=20)


@pytest.mark.parametrize("path", [p for p in PAGES if python_blocks(p.read_text(encoding="utf-8"))], ids=name_of)
def test_python_blocks_run(path, capsys, trackers):
    """Blocks of a page share a namespace, as for a reader who types them one after another."""
    namespace = {"__name__": "__main__" if path.stem == "first_hour" else "page"}
    for number, block in enumerate(python_blocks(path.read_text(encoding="utf-8"))):
        exec(compile(block, f"{name_of(path)}, block {number + 1}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed
    for missed in re.findall(r"missed: ([\d.]+)", printed):
        assert float(missed) < 0.05


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "index.md"], ids=name_of)
def test_the_first_example_is_short(path):
    for block in python_blocks(path.read_text(encoding="utf-8")):
        assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 32


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_tutorials_run_and_find_what_they_say(path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    namespace = {"__name__": "tutorial"}
    try:
        exec(compile(path.read_text(encoding="utf-8"), name_of(path), "exec"), namespace)
        assert len(pyplot.get_fignums()) == path.read_text(encoding="utf-8").count("plt.subplots(")
    finally:
        pyplot.close("all")
    CLAIMS[path.stem](capsys.readouterr().out)


def claims_of_why_zero_likelihood(printed):
    for angle in re.findall(r"smallest at angle ([\d.]+)", printed):
        assert abs(float(angle) - 0.5) < 0.02
    estimate, error = map(float, re.search(r"^kl +([\d.]+) ± ([\d.]+)", printed, flags=re.M).groups())
    assert abs(estimate - 2) < 6 * error
    to_data, to_samples = (float(number) for number in re.findall(r"mean distance .*: ([\d.]+)", printed))
    assert to_data < 0.2
    assert to_samples < 0.1


def claims_of_learn_the_spread(printed):
    entropies = re.findall(r"^entropy of .*: ([\d.]+) nats", printed, flags=re.M)
    assert len(entropies) == 2
    assert len(set(entropies)) == 1
    isotropic, best, worst = (
        float(re.search(rf"{name}.*? sees? ([\d.]+)", printed)[1])
        for name in ("isotropic noise", "best direction", "worst direction")
    )
    assert best > 5 * isotropic > 25 * worst
    steps = dict(re.findall(r"^(\w+): (.+) steps to an error", printed, flags=re.M))
    assert steps["across"] == "over 60"
    assert 0 < int(steps["learned"]) < 0.7 * int(steps["isotropic"])
    assert abs(float(re.search(r"learned the direction ([\d.]+)", printed)[1]) - 0.5) < 0.2
    # Of the angle of a line: (spread variance along it times that across it) to the power -1.
    information = {
        name: float(value) for name, value in re.findall(r"^(\w+): information ([\d.]+)", printed, flags=re.M)
    }
    assert information["isotropic"] == pytest.approx(1 / (1.25 * 0.25), abs=0.01)
    assert information["across"] == pytest.approx(1 / (1.04 * 1.5625), abs=0.01)
    assert information["learned"] > 2.5 * information["isotropic"]
    for name, error in re.findall(r"^(\w+): measured standard error ([\d.]+)", printed, flags=re.M):
        deviation = float(error) * (1000 * information[name]) ** 0.5 - 1
        assert abs(deviation) < 5 / 400**0.5, name  # five standard errors of a standard deviation of 200


def claims_of_ica_without_noise(printed):
    number = lambda pattern: float(re.search(pattern + r".*?error ([\d.]+)", printed)[1])
    start = float(re.search(r"random rotation .*: ([\d.]+)", printed)[1])
    for name in ("EM, true noise", "spread EM, sigma"):
        assert number(f"{name} 0.01") > 0.95 * start
        assert number(f"{name} 1:") < 0.15 * start
    limit = number("Cramer-Rao limit")
    for method in ("closed form", "natural gradient"):
        assert number(f"{method}:") < 3 * limit
        assert re.search(rf"{method}: .*converged: True", printed)
    assert re.search(r"stalled: .*converged: False", printed)
    assert number("uniform and Student sources") < 0.05
    assert number("three sources from two measurements") < 0.15  # rounding decides a chain's course: 0.09, 0.11


def claims_of_one_sigma_or_many(printed):
    steps = dict(re.findall(r"^(.+?) {2,}(never|\d+)$", printed, flags=re.M))
    assert steps["sigma = 0.05"] == "never"
    assert int(steps["log-uniform on [0.05, 2]"]) < int(steps["sigma = 2"]) / 3


CLAIMS = {
    "one_sigma_or_many": claims_of_one_sigma_or_many,
    "why_zero_likelihood": claims_of_why_zero_likelihood,
    "learn_the_spread": claims_of_learn_the_spread,
    "ica_without_noise": claims_of_ica_without_noise,
}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_included_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for included in SNIPPET.findall(text):
        assert (ROOT / included).is_file(), included
    text = re.sub(r"^([ ]*)```.*?^\1```", "", text, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`", "", text, flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        file = path if not target else (path.parent / target).resolve()
        if file.parent == DOCS / "api":  # generated
            importlib.import_module(file.stem)
            continue
        if file == DOCS / "gallery.md":  # generated too
            continue
        assert file.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in map(slug, headings), link


def test_the_site_builds_without_a_warning_and_holds_every_public_name(tmp_path, reference):
    """The tutorial is not run here: it has a test of its own."""
    for library in ("material", "mkdocstrings", "mkdocs_jupyter", "math_core", "ziamath"):
        pytest.importorskip(library)
    environment = {**os.environ, "DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href|mathjax)=[^>]*http[^>]*>", path.read_text())
        assert not [tag for tag in loaded if 'rel="canonical"' not in tag], path
        code = r'<(pre|code|script)\b.*?</\1>|<div class="clipboard-copy-txt".*?</div>'
        text = re.sub(code, "", path.read_text(encoding="utf-8"), flags=re.S)
        assert "arithmatex" not in text, path  # formulas are typeset, in notebooks too
        assert not re.search(r"\$[^$<>]*\\\w+[^$<>]*\$", text), path
    assert "<math" in (tmp_path / "site" / "mathematics.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "assets" / "math.ttf").stat().st_size > 100_000
    objectives = (tmp_path / "site" / "api" / "spread_jax.objectives.html").read_text(encoding="utf-8")
    assert 'href="../mathematics.html#spread-kl-and-the-evidence-lower-bound"' in objectives
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()  # the search of pages opened from the disk
    spaces = dict(reference.namespaces())
    for space, names in spaces.items():
        page = (tmp_path / "site" / "api" / f"{space}.html").read_text(encoding="utf-8")
        for name in names:
            place = f'.{name}"' if space == "spread_jax" else f'id="{space}.{name}"'
            assert place in page or f"{space}.{name}" in spaces, f"{space}.{name}"


def test_every_function_of_the_theory_stands_on_the_mathematics_page():
    """From there the API reference takes its links: see docs/hooks/docstrings.py."""
    page = (DOCS / "mathematics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", page))
    for space in ("noise", "divergences", "objectives"):
        module = importlib.import_module(f"spread_jax.{space}")
        public = {name: getattr(module, name) for name in module.__all__}
        theory = {name for name, value in public.items() if inspect.isfunction(value) or hasattr(value, "log_prob")}
        plumbing = {"SpreadNoise", "ScaleLaw", "check_noise_range", "example_keys"}
        assert theory - named <= plumbing, space


def test_the_gallery_holds_every_picture_with_its_command(reference):
    figures = reference.figures()
    files = [figure["file"] for figure in figures]
    assert sorted(files) == sorted(path.name for path in (DOCS / "images").iterdir() if path.suffix != ".toml")
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for figure in figures:
        assert figure["file"] in (DOCS / figure["page"]).read_text(encoding="utf-8"), figure
        assert figure["caption"].endswith(".")
        program, name = re.match(r"(make|python -m) ([\w.-]+)", figure["command"]).groups()
        assert name in targets if program == "make" else importlib.util.find_spec(name), figure
        assert f"](images/{figure['file']})" in reference.gallery()


def test_names_in_pages_lead_to_the_reference(reference):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="guides/page.md"))
    text = (
        "Use `spread_elbo`, `nobody`, `encode`, [`mmd_squared`](x.md).\n\n## `elbo`\n\n```python\n`spread_elbo`\n```\n"
    )
    linked = text.replace("`spread_elbo`,", "[`spread_elbo`][spread_jax.objectives.spread_elbo],")
    assert reference.on_page_markdown(text, page, None, None) == linked


def test_every_public_name_has_a_place_in_the_reference(reference):
    pages = dict(reference.api_pages())
    for space, names in reference.namespaces():
        module = importlib.import_module(space)
        assert set(names) == set(module.__all__), space
        for name in names:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                assert re.search(
                    rf"(^::: {space}|\[spread_jax\.[\w.]+)\.{name}\b", pages[f"api/{space}.md"], flags=re.M
                )


# These take minutes or a download, or a trained generator, which the Example of `fit` has.
WITHOUT_EXAMPLE = {
    "draw_pictures", "encode", "evaluate", "find_features", "fit_flow", "fitted_latents", "held_out",
    "inception_features", "open_run", "open_splits", "posteriors", "reconstruct", "sample", "train_and_save_features",
    "train_features",
}  # fmt: skip


def test_public_names_have_a_summary_and_an_example_or_formula(reference):
    for space, names in reference.namespaces():
        module = importlib.import_module(space)
        for name in names:
            value = getattr(module, name)
            if inspect.ismodule(value) or not callable(value):
                continue
            text = inspect.getdoc(value) or ""
            summary = text.split("\n\n")[0]
            assert 0 < len(summary) <= 120, f"{space}.{name} has no summary of one line"
            assert "\n" not in summary, f"{space}.{name} has a summary of several lines"
            # What others return, raise or fulfil is shown where they do.
            passive = inspect.isclass(value) and ("Attributes:" in text or issubclass(value, Exception))
            record = inspect.isclass(value) and (hasattr(value, "_fields") or getattr(value, "_is_protocol", False))
            tree = inspect.isclass(value) and hasattr(value, "__dataclass_fields__")
            if not (passive or record or tree or name in WITHOUT_EXAMPLE):
                formula = re.search(r"^  +.*[=∫]|∫|exp\(", text, flags=re.M)
                assert ">>>" in text or formula, f"{space}.{name} has neither Example nor formula"


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    module_spec = importlib.util.spec_from_file_location("docstrings", DOCS / "hooks" / "docstrings.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    text = inspect.cleandoc(
        """Spreads x [n, *event] so that <x, y> is finite, as `*` is not.

          D = E f(t) * 2

        Args:
          x: [n, *event].

        Source: Someone,
          1999, page 3.

        Example:
          >>> 2 * 3
          6
        """
    )
    want = [
        r"Spreads x [n, \*event] so that &lt;x, y> is finite, as `*` is not.",
        "",
        "```text",
        "D = E f(t) * 2",
        "```",
        "",
        "Args:",
        r"  x: [n, \*event].",
        "",
        "**Source:** Someone, 1999, page 3.",
        "",
        "Examples:",
        "  >>> 2 * 3",
        "  6",
    ]
    assert module.to_markdown(text).splitlines() == want
