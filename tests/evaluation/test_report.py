"""A report is one file that needs nothing else, escapes what it shows, and holds back real images when asked."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from spread_jax.evaluation import save_image, write_report
from spread_jax.training import RunDirectory

VOID = {"meta", "img", "input"}
NASTY = "<script>alert('x')</script> & \"quotes\""


class Page(html.parser.HTMLParser):
    """What a browser would see: balanced elements, addresses, sections, text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.sections, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def picture(path, level, size=(40, 60)):
    path.parent.mkdir(exist_ok=True)
    save_image(np.full((*size, 3), level, np.uint8), path)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run, every picture of one grey level of its own."""
    config = {"preset": "demo", "seed": 3, "width": 16, "data": NASTY, "cache_dir": None, "quiet": False}
    results = {
        "experiment": "celeba",
        "preset": "demo",
        "seed": 3,
        "held_out_elbo_nats": -800.5,
        "held_out_elbo_standard_error": 6.494,
        "train_images": 162770,
        "at_point": {"KL": 0.5},
        "table": [{"method": "both"}],
        "images_per_second": 367.8,
        "device": "cpu",
        "evaluation": {"frechet_distance": 12.25, "kernel_distance": 0.5, "kernel_distance_standard_error": 0.125},
        "versions": {"jax": "0.10.2"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "results.json").write_text(json.dumps(results))
    table = f"| method | error → 0 |\n|---|---|\n| *{NASTY}* | 1.5 ± 0.25 |\n| fixed |  |\n\nMeans over seeds.\n"
    (tmp_path / "table.md").write_text(table, encoding="utf-8")
    figures = {
        "samples.png": {"caption": "Samples x = g(z).", "section": "Samples", "grid": True, "real_images": False},
        "curves.png": {"caption": "Metrics against the step.", "section": "Curves"},
        "reconstructions.png": {"caption": "x, y, g.", "section": "Reconstructions", "grid": True, "real_images": True},
        "interpolations.png": {"caption": NASTY, "section": "Interpolations", "grid": True},
        "neighbours.png": {"section": "Nearest training images", "grid": True, "real_images": True},
        "noise.png": {"caption": "What it does.", "section": "Learned noise", "grid": True},
        "gone.png": {"caption": "A picture that is not there.", "section": "Gone"},
    }
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    names = ("curves", "samples", "reconstructions", "interpolations", "neighbours", "noise", "points_of_interest")
    for level, name in enumerate(names):
        picture(tmp_path / f"{name}.png", 10 + 20 * level, size=(20, 60))
    for step in range(20):
        picture(tmp_path / f"samples/step_{100 * step:06d}.png", 150 + 2 * step)
    return tmp_path


def levels(page):
    """The grey level of each picture, decoded from the page."""
    found = []
    for image in page.all("img"):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
            assert decoded.format.lower() == kind
            assert decoded.size == (int(image["width"]), int(image["height"]))
            found.append(round(np.asarray(decoded.convert("L")).mean()))
    return found


def test_everything_is_there_and_nothing_comes_from_outside(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.sections == [
        "key-numbers", "tables", "evaluation", "figures", "samples", "curves", "reconstructions", "interpolations",
        "nearest-training-images", "learned-noise", "speed", "configuration", "versions",
    ]  # fmt: skip
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in page.sections]
    source = path.read_text()
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<link|<iframe", re.sub(r'src="data:[^"]*"', "", source))
    assert "width=device-width" in source
    assert "prefers-color-scheme: dark" in source
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    steps = [int(figure["data-step"]) for figure in page.all("figure") if "data-step" in figure]
    assert steps[0] == 0
    assert steps[-1] == 1900
    assert len(steps) == 12
    assert steps == sorted(set(steps))
    expected = [130, *(150 + s // 50 for s in steps), 10, 50, 70, 90, 110]
    np.testing.assert_allclose(levels(page), expected, atol=1)
    for shown in ("-800.5 ± 6.494", "162,770", "at point KL 0.5", "kernel distance 0.5 ± 0.125", "not given", "no"):
        assert shown in page.text
    assert f"method error → 0 {' '.join(NASTY.split())} 1.5 ± 0.25 fixed Means over seeds." in page.text
    assert [a["scope"] for a in page.all("th") if a.get("scope") == "col"] == ["col", "col"]
    assert "standard error" not in page.text  # it stands behind its number
    assert "points of interest" in page.text
    assert page.text.count("celeba demo seed 3") == 2  # title and heading
    assert [p.name for p in run.glob(".*")] == []


def test_what_is_shown_is_escaped(run):
    page = Page(write_report(run, title=NASTY))
    assert len(page.all("script")) == 1
    assert NASTY in page.text


def test_figures_of_a_run_folder_are_shown_as_it_was_told(tmp_path):
    with RunDirectory.open(tmp_path, {"seed": 0}, tensorboard=False) as run:
        for _ in range(2):
            picture(run.save_figure_path("b", caption="Plot.", section="Second"), 10)
            picture(run.save_figure_path("a", caption="Faces.", section="First", grid=True, real_images=True), 30)
        picture(run.save_figure_path("untold"), 50)
    page = Page(write_report(tmp_path))
    assert page.sections == ["state", "figures", "second", "first", "configuration"]
    assert [image["alt"] for image in page.all("img")] == ["untold", "Plot.", "Faces."]
    assert levels(page) == [50, 10, 30]
    assert levels(Page(write_report(tmp_path, real_images=False))) == [50, 10]


def test_what_cannot_be_read_is_named_and_no_link_is_followed(run, tmp_path_factory):
    """Garbled and deep JSON, text that is no UTF-8, stray pictures, links and pipes: a sentence each, no traceback."""
    outside = tmp_path_factory.mktemp("outside")
    secret = outside / "secret"
    secret.write_text("| secret | words |\n|---|---|\n| a | b |\n")
    picture(outside / "secret.png", 250)

    (run / "stray.png").write_text("no picture")
    (run / "cut.png").write_bytes((run / "curves.png").read_bytes()[:70])
    (run / "linked.png").symlink_to(outside / "secret.png")
    os.mkfifo(run / "pipe.png")
    (run / "folder.png").mkdir()
    (run / "table.md").write_bytes(b"| m\xe9thode | b |\n|---|---|\n| 1 | 2 |\n")
    (run / "interpolations").symlink_to(outside)
    picture(outside / "step_1.png", 250)
    picture(outside / "step_2.png", 250)
    page = Page(write_report(run))
    for name in ("stray", "cut", "linked", "pipe", "folder"):
        assert f"{name}.png cannot be shown: " in page.text
    assert "m\ufffdthode" in page.text
    assert 250 not in levels(page)

    deep = "[" * 50_000
    for text in ("", "{", "[1]", "\0", deep, '{"a":' * 400 + "1" + "}" * 400, b"\xff\xfe"):
        for name in ("config.json", "results.json", "figures.json"):
            (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        page = Page(write_report(run))
        for name in ("config.json", "results.json", "figures.json"):
            assert f"{name} cannot be read: " in page.text
    for name in ("config.json", "results.json", "figures.json", "table.md"):
        (run / name).unlink()
        (run / name).symlink_to(secret)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(secret)
    text = secret.read_text()
    page = Page(write_report(run))
    assert "secret words" not in page.text
    assert page.text.count("it is a symbolic link.") == 5
    assert secret.read_text() == text  # the link was replaced, what it points to was not
    assert not (run / "report.html").is_symlink()


def test_results_from_elsewhere_may_be_of_any_type(run):
    (run / "results.json").write_text(json.dumps({"evaluation": "good", "versions": [1], "seed": {"a": 1}}))
    assert "Configuration" in write_report(run).read_text()


def test_real_images_are_left_out_when_asked(run):
    page = Page(write_report(run, real_images=False))
    found = levels(page)
    assert 50 not in found
    assert 90 not in found
    assert len(found) == 16
    assert page.text.count("Left out: the picture shows images of the data set.") == 2


def test_an_unfinished_run_and_one_without_pictures(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    page = Page(write_report(tmp_path))
    assert page.sections == ["state", "configuration"]
    assert "not finished" in page.text
    (tmp_path / "results.json").write_text('{"error": "nan", "sizes": [1, 2], "ok": true}')
    page = Page(write_report(tmp_path))
    assert page.sections == ["key-numbers", "configuration"]
    for shown in ("error nan", "sizes 1, 2", "ok yes"):
        assert shown in page.text
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "none")


def test_a_browser_shows_it(run, tmp_path_factory):
    """Light, and on a narrow screen: the page is drawn, and its heading is dark on light."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    path, shot = write_report(run), tmp_path_factory.mktemp("shot") / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,1500"]
    profile = f"--user-data-dir={shot.parent / 'profile'}"
    done = subprocess.run(
        [chromium, *flags, profile, f"--screenshot={shot}", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    if not shot.exists():
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (1500, 500)
    assert pixels[5, 5] > 200
    assert pixels[:120].min() < 80
    dom = subprocess.run([chromium, *flags, profile, "--dump-dom", path.as_uri()], capture_output=True, text=True)
    assert dom.stdout.count("<figure data-step") == 12
    assert len(re.findall(r"<figure data-step=\"\d+\" hidden", dom.stdout)) == 11  # the slider shows the last
