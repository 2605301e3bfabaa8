"""The report of a run: one HTML file that needs nothing else, to be read on a screen or a phone."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spread_jax._files import write_atomically

__all__ = ["write_report"]

_MOST_SAMPLE_GRIDS = 12
_SPEED = ("images_per_second", "waiting_share", "seconds", "cpu_seconds", "device", "devices", "parameters")
# Told in the title, in sections of their own, or shown as pictures.
_ELSEWHERE = ("experiment", "preset", "seed", "versions", "evaluation", *_SPEED)


class _Figure(NamedTuple):
    section: str
    caption: str
    real: bool = False  # shows images of the data set
    pixels: bool = True  # a grid of small images, against a plot


_FIGURES = {
    "samples.png": _Figure("Samples", "Samples x = g(z), z from the prior; none is selected."),
    "curves.png": _Figure("Curves", "Metrics against the step.", pixels=False),
    "reconstructions.png": _Figure(
        "Reconstructions", "Held-out images x, the noisy y that the encoder sees, and g of its mean.", real=True
    ),
    "interpolations.png": _Figure("Interpolations", "Each row: along the arc from one latent to another."),
    "neighbours.png": _Figure(
        "Nearest training images",
        "First in each row a sample, then the training images nearest in features.",
        real=True,
    ),
    "noise.png": _Figure("Learned noise", "What the learned spread noise does."),
}
_ORDER = (
    "Figures",
    "Samples",
    "Curves",
    "Reconstructions",
    "Interpolations",
    "Nearest training images",
    "Learned noise",
)


def write_report(run_dir: str | os.PathLike, *, title: str | None = None, real_images: bool = True) -> Path:
    """Writes report.html into a run's folder from what lies there: config, results, tables, pictures.

    The file is whole in itself: pictures are embedded, nothing is fetched. What a run does not have is left out: an
    unfinished run has no numbers yet.

    Args:
      run_dir: the folder, with config.json and any of results.json, table.md (pipe tables and plain paragraphs),
        *.png and samples/*.png.
      title: the heading; experiment, preset and seed if not given.
      real_images: show pictures that hold images of the data set (reconstructions, nearest training images). False
        leaves them out, for data that must not be passed on; the numbers stay.

    Returns:
      The path of report.html.

    Raises:
      FileNotFoundError: the folder has no config.json.
      OSError: the report cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "config.json").write_text('{"preset": "small"}')
      >>> write_report(folder).name
      'report.html'
    """
    folder = Path(run_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = _read_results(folder)
    parts = {k: results.get(k, config.get(k)) for k in ("experiment", "preset", "seed")}
    title = title or " ".join(
        filter(None, [str(parts["experiment"] or folder.name), str(parts["preset"] or ""),
                      "" if parts["seed"] is None else f"seed {parts['seed']}"])
    )  # fmt: skip

    sections: dict[str, str] = {}
    numbers = {k: v for k, v in results.items() if k not in _ELSEWHERE}
    if numbers:
        sections["Key numbers"] = _table(numbers)
    if tables := _markdown(folder / "table.md"):
        sections["Tables"] = tables
    if results.get("evaluation"):
        sections["Evaluation"] = _table(results["evaluation"])
    sections |= _pictures(folder, real_images)
    if speed := {k: results[k] for k in _SPEED if results.get(k) is not None}:
        sections["Speed"] = _table(speed)
    sections["Configuration"] = _table(config)
    if results.get("versions"):
        sections["Versions"] = _table(results["versions"])
    if not results:
        sections = {"State": "<p>The run is not finished: there are no results yet.</p>"} | sections

    path = folder / "report.html"
    write_atomically(path, _page(title, sections))
    return path


def _read_results(folder: Path) -> dict[str, Any]:
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(results, dict):
        return {}
    # Results may come from elsewhere, with anything under the names of the two tables.
    return {k: v for k, v in results.items() if k not in ("evaluation", "versions") or isinstance(v, Mapping)}


# --- pictures


def _pictures(folder: Path, real_images: bool) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.png")):
        figure = _FIGURES.get(path.name, _Figure("Figures", _words(path.stem), pixels=False))
        if figure.real and not real_images:
            found.setdefault(figure.section, []).append("<p>Left out: the picture shows images of the data set.</p>")
        elif path.name == "samples.png" and len(grids := _over_time(folder)) > 1:
            found.setdefault(figure.section, []).append(_slider(grids, figure.caption))
        else:
            found.setdefault(figure.section, []).append(_figure(path, figure))
    return {name: "\n".join(found[name]) for name in _ORDER if name in found}


def _over_time(folder: Path) -> list[tuple[int, Path]]:
    """At most so many grids of samples, evenly spread over the steps, the first and the last among them."""
    steps = []
    for path in folder.glob("samples/step_*.png"):
        if match := re.fullmatch(r"step_(\d+)", path.stem):
            steps.append((int(match[1]), path))
    steps.sort()
    if len(steps) > _MOST_SAMPLE_GRIDS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (_MOST_SAMPLE_GRIDS - 1))] for i in range(_MOST_SAMPLE_GRIDS)]
    return steps


def _figure(path: Path, figure: _Figure, extra: str = "") -> str:
    source, (width, height) = _embed(path, figure.pixels)
    caption = _text(figure.caption)
    image = f'<img width="{width}" height="{height}" alt="{caption}" src="{source}"'
    if figure.pixels:
        image += ' class="pixels">'
    else:  # a row of panels stays readable on a phone: it scrolls
        wide = " row" if width > 2 * height else ""
        image = f'<div class="wide">{image} class="plot{wide}"></div>'
    return f"<figure{extra}>{image}<figcaption>{caption}</figcaption></figure>"


def _slider(grids: Sequence[tuple[int, Path]], caption: str) -> str:
    """Grids over time; the last is shown, and all of them where scripts are off."""
    figures = [
        _figure(path, _Figure("", f"After step {step}. {caption}"), f' data-step="{step}"') for step, path in grids
    ]
    last = len(grids) - 1
    return (
        '<div class="slides"><label class="slider" hidden>step <output></output>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step"></label>'
        + "".join(figures)
        + "</div>"
    )


def _embed(path: Path, pixels: bool) -> tuple[str, tuple[int, int]]:
    """A data URL and the size; grids of images become JPEG, a fifth of the bytes."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        size = image.size
        if pixels:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
        else:
            data, kind = path.read_bytes(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size


# --- tables


def _table(values: Mapping[str, Any]) -> str:
    flat = _flat(values)
    # held_out_elbo_nats goes with held_out_elbo_standard_error: a unit may stand where the error's name ends.
    error_of = {}
    for name in flat:
        for candidate in (f"{name}_standard_error", re.sub(r"_(nats|value)$", "_standard_error", name)):
            if candidate != name and candidate in flat:
                error_of[name] = candidate
    rows = []
    for name, value in flat.items():
        if name in error_of.values():
            continue
        shown = _number(value) + (f" ± {_number(flat[error_of[name]])}" if name in error_of else "")
        rows.append(f'<tr><th scope="row">{_text(_words(name))}</th><td>{_text(shown)}</td></tr>')
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            continue  # a table of its own, in table.md or in the figures
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _markdown(path: Path) -> str:
    """The pipe tables of a file and the lines between them as HTML; nothing else of Markdown is known."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = []
    for is_table, group in itertools.groupby(lines, lambda line: line.startswith("|")):
        block = list(group)
        if not is_table or len(block) < 3:
            found += [f"<p>{_text(line)}</p>" for line in block if line.strip()]
            continue
        cells = [[cell.strip() for cell in line[1:].removesuffix("|").split("|")] for line in block]
        head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in cells[0])
        body = ""
        for first, *rest in cells[2:]:
            numbers = "".join(f"<td>{_text(cell)}</td>" for cell in rest)
            body += f'<tr><th scope="row">{_text(first.strip("*"))}</th>{numbers}</tr>'
        found.append(f'<div class="wide"><table class="many"><tr>{head}</tr>{body}</table></div>')
    return "\n".join(found)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not given"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return str(value)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


# --- the page


def _page(title: str, sections: Mapping[str, str]) -> str:
    anchor = lambda name: name.lower().replace(" ", "-")
    links = "".join(f'<a href="#{anchor(name)}">{_text(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{anchor(name)}"><h2>{_text(name)}</h2>{content}</section>' for name, content in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{_text(title)}</h1><nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5c656e; --page: #fbfbfc; --card: #fff; --line: #dfe3e7;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --soft: #a0a8b0; --page: #15181b; --card: #1d2125;
  --line: #343a40; --link: #7db7f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
nav a { color: var(--link); padding: .25rem 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1.5rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: normal; color: var(--soft); }
table.many { white-space: nowrap; margin-bottom: 1rem; }
table.many th[scope="col"] { white-space: normal; }
figure { margin: 0 0 1rem; }
figure:last-child { margin-bottom: 0; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .35rem; }
img { display: block; max-width: 100%; height: auto; border-radius: .25rem; }
img.plot { background: #fff; }
img.row { min-width: 44rem; }
img.pixels { width: 100%; max-width: 40rem; }
.slider { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: center; margin-bottom: .75rem; }
.slider[hidden], figure[hidden] { display: none; }
.slider input { flex: 1 1 12rem; max-width: 34rem; min-height: 2rem; }
@media print { nav, .slider { display: none; } section { break-inside: avoid; } }
"""

_SCRIPT = """
for (const box of document.querySelectorAll('.slides')) {
  const figures = [...box.querySelectorAll('figure')], input = box.querySelector('input');
  const show = () => {
    figures.forEach((figure, i) => { figure.hidden = i !== Number(input.value); });
    box.querySelector('output').textContent = figures[input.value].dataset.step;
  };
  input.addEventListener('input', show);
  box.querySelector('label').hidden = false;
  show();
}
"""
