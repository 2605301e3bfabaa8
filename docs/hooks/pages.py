"""Pages that write themselves: one API page for each namespace from its __all__, and every page of results."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "spread_jax"
ORDER = ("noise", "divergences", "objectives", "linear", "nn", "data", "training", "evaluation", "models")


def public_names(path: Path) -> list[str]:
    """__all__ of a module, without importing it; empty if it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            return sorted(ast.literal_eval(node.value), key=str.lower)
    return []


def namespaces() -> Iterator[tuple[str, list[str]]]:
    """(dotted name, public names): the package, its folders, and modules that are namespaces of their own."""
    yield "spread_jax", public_names(PACKAGE / "__init__.py")
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli"}  # --help documents that
    for folder in (*(name for name in ORDER if name in folders), *sorted(folders - set(ORDER))):
        names = public_names(PACKAGE / folder / "__init__.py")
        if names:
            yield f"spread_jax.{folder}", names
        for module in sorted((PACKAGE / folder).glob("[!_]*.py")):
            own = public_names(module)
            if own and (module.stem in set(names) - set(own) or not set(own) & set(names)):
                yield f"spread_jax.{folder}.{module.stem}", own
    for module in sorted(PACKAGE.glob("[!_]*.py")):
        if names := public_names(module):
            yield f"spread_jax.{module.stem}", names


def homes() -> dict[str, str]:
    """Where each name that `spread_jax` re-exports is documented."""
    return {name: space for space, names in reversed(list(namespaces())[1:]) for name in names}


def api_pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of each page of the API reference."""
    spaces = dict(namespaces())
    where = homes()
    for space, names in spaces.items():
        intro = f"# `{space}`\n\n::: {space}\n    options:\n      members: false\n      show_root_heading: false\n"
        if space == "spread_jax":
            lines = [f"- [`{name}`][{where[name]}.{name}]" for name in names]
        else:
            lines = []
            for name in names:
                if f"{space}.{name}" in spaces:
                    lines.append(f"## `{name}`\n\nA namespace of its own: [`{space}.{name}`]({page(space, name)}).\n")
                else:
                    lines.append(f"::: {space}.{name}\n")
        yield f"api/{space}.md", "\n".join([intro, *lines]) + "\n"


def page(space: str, name: str) -> str:
    """The page of a namespace, from a page beside it."""
    return f"{space}.{name}.md"


def on_config(config):
    """Adds to the navigation what is found: the API reference, results, benchmarks."""
    found = lambda folder: [f"{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).glob("*.md"))]
    for title, pages in (("Results", found("results")), ("Benchmarks", found("benchmarks"))):
        if pages:
            config.nav.append({title: pages})
    config.nav.append({"API reference": [{Path(path).stem: path} for path, _ in api_pages()]})
    return config


def on_files(files, config):
    """Adds the pages of the API reference."""
    for path, text in api_pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output, page, config):
    """Takes out mkdocs-jupyter's loader of MathJax: KaTeX typesets notebooks too."""
    return re.sub(r"<script data-mkdocs-jupyter-mathjax=.*?</script>", "", output, flags=re.S)
