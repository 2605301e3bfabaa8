"""The report of a run: one HTML file that needs nothing else, to be read on a screen or a phone."""

from __future__ import annotations

import base64
import errno
import html
import io
import itertools
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spread_jax._files import read_json, read_regular, reason, write_atomically

__all__ = ["write_report"]

_MOST_STEPS = 12
_MOST_BYTES = 2**26
_MOST_PIXELS = 2**26
_SPEED = ("images_per_second", "waiting_share", "seconds", "cpu_seconds", "device", "devices", "parameters")
# Told in the title, in sections of their own, or shown as pictures.
_ELSEWHERE = ("experiment", "preset", "seed", "versions", "evaluation", *_SPEED)


class _Figure(NamedTuple):
    caption: str
    section: str = "Figures"
    grid: bool = False  # made of small images, against a plot
    real_images: bool = False


def write_report(run_dir: str | os.PathLike, *, title: str | None = None, real_images: bool = True) -> Path:
    """Writes report.html into a run's folder from what lies there: config, results, tables, pictures.

    The file is whole in itself: pictures are embedded, nothing is fetched. What a run does not have is left out: an
    unfinished run has no numbers yet. What cannot be read is named in its place, so a folder may come from anywhere;
    links in it are not followed.

    Args:
      run_dir: the folder, with config.json and any of results.json, table.md (pipe tables and plain paragraphs) and
        *.png, with what `RunDirectory.save_figure_path` was told of them. Of a picture name.png those at other steps,
        name/step_*.png, are shown too.
      title: the heading; experiment, preset and seed if not given.
      real_images: show pictures that hold images of the data set. False leaves them out, and those of which the run
        was not told, for data that must not be passed on; the numbers stay.

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
    if not os.path.lexists(folder / "config.json"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(folder / "config.json"))
    problems: list[str] = []
    config, results = (_read(folder / name, problems) for name in ("config.json", "results.json"))
    # Results may come from elsewhere, with anything under the names of the two tables.
    results = {k: v for k, v in results.items() if k not in ("evaluation", "versions") or isinstance(v, Mapping)}
    parts = {k: results.get(k, config.get(k)) for k in ("experiment", "preset", "seed")}
    title = title or " ".join(
        filter(None, [str(parts["experiment"] or folder.name), str(parts["preset"] or ""),
                      "" if parts["seed"] is None else f"seed {parts['seed']}"])
    )  # fmt: skip

    sections: dict[str, str] = {}
    numbers = {k: v for k, v in results.items() if k not in _ELSEWHERE}
    if numbers:
        sections["Key numbers"] = _table(numbers)
    if tables := _markdown(folder / "table.md", problems):
        sections["Tables"] = tables
    if results.get("evaluation"):
        sections["Evaluation"] = _table(results["evaluation"])
    sections |= _pictures(folder, real_images, problems)
    if speed := {k: results[k] for k in _SPEED if results.get(k) is not None}:
        sections["Speed"] = _table(speed)
    sections["Configuration"] = _table(config)
    if results.get("versions"):
        sections["Versions"] = _table(results["versions"])
    if not results:
        problems.insert(0, "The run is not finished: there are no results yet.")
    if problems:
        sections = {"State": "".join(f"<p>{_text(sentence)}</p>" for sentence in problems)} | sections

    path = folder / "report.html"
    write_atomically(path, _page(title, sections))
    return path


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {reason(error)}")
        return {}


# --- pictures


def _pictures(folder: Path, real_images: bool, problems: list[str]) -> dict[str, str]:
    figures = {name: _figure_of(name, told) for name, told in _read(folder / "figures.json", problems).items()}
    found: dict[str, list[str]] = {section: [] for section in ("Figures", *(f.section for f in figures.values()))}
    for path in sorted(folder.glob("*.png")):
        figure = figures.get(path.name, _Figure(_words(path.stem)))
        shown = found[figure.section]
        if not real_images and (figure.real_images or path.name not in figures):
            may = "shows" if figure.real_images else "may show"
            shown.append(f"<p>Left out: the picture {_text(path.name)} {may} images of the data set.</p>")
            continue
        try:
            steps = _over_time(folder / path.stem)
            shown.append(_slider(steps, figure) if len(steps) > 1 else _show(path, figure))
        except Exception as error:  # Pillow raises almost anything on a damaged file
            problems.append(f"{path.name} cannot be shown: {reason(error)}")
    return {name: "\n".join(shown) for name, shown in found.items() if shown}


def _figure_of(name: str, told: Any) -> _Figure:
    """What a run says of a figure; of a run from elsewhere, only what has the right type."""
    fields = {"caption": str, "section": str, "grid": bool, "real_images": bool}
    told = told if isinstance(told, Mapping) else {}
    known = {field: told[field] for field, kind in fields.items() if isinstance(told.get(field), kind)}
    return _Figure(**{"caption": _words(Path(name).stem), **known})


def _over_time(folder: Path) -> list[tuple[int, Path]]:
    """At most so many pictures of other steps, evenly spread over them, the first and the last among them."""
    steps = []
    if not folder.is_symlink():
        for path in folder.glob("step_*.png"):
            if match := re.fullmatch(r"step_(\d+)", path.stem):
                steps.append((int(match[1]), path))
    steps.sort()
    if len(steps) > _MOST_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (_MOST_STEPS - 1))] for i in range(_MOST_STEPS)]
    return steps


def _show(path: Path, figure: _Figure, extra: str = "") -> str:
    source, (width, height) = _embed(path, figure.grid)
    caption = _text(figure.caption)
    image = f'<img width="{width}" height="{height}" alt="{caption}" src="{source}"'
    if figure.grid:
        image += ' class="pixels">'
    else:  # a row of panels stays readable on a phone: it scrolls
        wide = " row" if width > 2 * height else ""
        image = f'<div class="wide">{image} class="plot{wide}"></div>'
    return f"<figure{extra}>{image}<figcaption>{caption}</figcaption></figure>"


def _slider(pictures: Sequence[tuple[int, Path]], figure: _Figure) -> str:
    """Pictures over time; the last is shown, and all of them where scripts are off."""
    shown = [
        _show(path, figure._replace(caption=f"After step {step}. {figure.caption}"), f' data-step="{step}"')
        for step, path in pictures
    ]
    last = len(pictures) - 1
    return (
        '<div class="slides"><label class="slider" hidden>step <output></output>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step"></label>'
        + "".join(shown)
        + "</div>"
    )


def _embed(path: Path, grid: bool) -> tuple[str, tuple[int, int]]:
    """A data URL and the size; grids of images become JPEG, a fifth of the bytes."""
    from PIL import Image

    data, kind = read_regular(path, _MOST_BYTES), "png"
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        size = image.size
        if size[0] * size[1] > _MOST_PIXELS:
            raise ValueError(f"it has {size[0]}x{size[1]} pixels")
        image.load()
        if grid:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
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


def _markdown(path: Path, problems: list[str]) -> str:
    """The pipe tables of a file and the lines between them as HTML; nothing else of Markdown is known."""
    try:
        lines = read_regular(path, _MOST_BYTES).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {reason(error)}")
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
    anchor = lambda name: re.sub(r"[^a-z0-9]+", "-", name.lower())  # a name may be untrusted
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
