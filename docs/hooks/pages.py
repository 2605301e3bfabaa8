"""Pages that write themselves (the API reference, results, the gallery), links between pages and API, and formulas.

Formulas become MathML when the site is built, so that a page needs neither the network nor JavaScript to show them.
"""

from __future__ import annotations

import ast
import html
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
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


def figures() -> list[dict[str, str]]:
    """File, caption, command and page of every picture."""
    return tomllib.loads((ROOT / "docs" / "images" / "captions.toml").read_text(encoding="utf-8"))["figure"]


def gallery() -> str:
    """The gallery as Markdown."""
    cards = (
        f"[![{figure['caption']}](images/{figure['file']})](images/{figure['file']})\n\n{figure['caption']}\n\n"
        f"`{figure['command']}` · [more]({figure['page']})"
        for figure in figures()
    )
    card = '<div class="card" markdown>\n\n{}\n\n</div>\n'
    intro = "# Gallery\n\nEvery figure of this site, with the command that makes it. A click shows it in full size.\n"
    return "\n".join([intro, '<div class="gallery" markdown>\n', *map(card.format, cards), "</div>\n"])


def on_config(config: Any) -> Any:
    """Adds to the navigation what is found: the API reference, results, benchmarks."""
    found = lambda folder: [f"{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).glob("*.md"))]
    config.nav.append({"Results": sorted(found("results"), key=lambda path: not path.endswith("/index.md"))})
    config.nav.append({"Gallery": "gallery.md"})
    config.nav.append({"Benchmarks": found("benchmarks")})
    config.nav.append({"API reference": [{Path(path).stem: path} for path, _ in api_pages()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the API reference, the gallery and the font of the formulas."""
    for path, text in (*api_pages(), ("gallery.md", gallery())):
        files.append(File.generated(config, path, content=text))
    fonts = Path(importlib.util.find_spec("ziamath").origin).parent / "fonts"
    font = next(fonts.glob("STIXTwoMath*.ttf"))
    files.append(File.generated(config, "assets/math.ttf", content=font.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links every public name that a page mentions in `code` to the API reference."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    where = homes()

    def link(match: re.Match) -> str:
        text, name = match[0], match["name"]
        return f"[{text}][{where[name]}.{name}]" if name in where else text

    # Short lower-case names, such as `encode`, are arguments as often as they are functions.
    names = r"(?<![`\[])`(?:spread_jax\.|sj\.)?(?P<name>\w*[A-Z_]\w*)`(?![`\]])"
    parts = re.split(r"(^ *```.*?^ *```|^#.*?$|\[[^\]]*\]\()", markdown, flags=re.M | re.S)  # code, headings, links
    parts[::2] = (re.sub(names, link, part) for part in parts[::2])
    return "".join(parts)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Typesets the formulas of pages and of notebooks, and takes out mkdocs-jupyter's loader of MathJax."""
    output = re.sub(r"<script data-mkdocs-jupyter-mathjax=.*?</script>", "", output, flags=re.S)
    output = re.sub(
        r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
        lambda match: typeset(match[3], display=match[2] == "["),
        output,
        flags=re.S,
    )
    cell = r'(<div class="[^"]*jp-RenderedMarkdown.*?</div>)'
    return re.sub(cell, lambda match: typeset_dollars(match[0]), output, flags=re.S)


def typeset_dollars(text: str) -> str:
    """Typesets what stands between dollars."""
    text = re.sub(r"\$\$(.*?)\$\$", lambda match: typeset(match[1], display=True), text, flags=re.S)
    return re.sub(r"\$([^$]+)\$", lambda match: typeset(match[1], display=False), text)


def typeset(latex: str, *, display: bool) -> str:
    """LaTeX, as it stands in HTML, to MathML; what math_core does not know is an error of the build."""
    mathml = LatexToMathML().convert_with_local_state(html.unescape(latex).strip(), displaystyle=display)
    # Browsers lower what is marked as an accent until it touches its letter.
    mathml = mathml.replace('<mover accent="true">', '<mover class="accent">')
    return f'<div class="formula">{mathml}</div>' if display else mathml
