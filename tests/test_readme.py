"""The README is short and does what it says: its targets and pictures exist; `test_docs.py` runs its code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_begins_with_what_a_newcomer_looks_for():
    assert len(README.split()) <= 700
    headings = re.findall(r"^## (.+)$", README, flags=re.M)
    assert headings[0] == "Install"
    assert README.index("pip install") < README.index("make demo     #") < README.index("import jax\n")
    assert "Citing" in headings


def test_make_targets_exist_and_are_explained():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "train-celeba"} <= targets
    for target in targets - {"help"}:
        assert re.search(rf"^{target}:.*## \S", makefile, flags=re.M), target


def test_pictures_and_links_exist():
    paths = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    for path in paths:
        assert path.startswith("https://") or (ROOT / path).is_file(), path
    assert any(path.endswith(".png") for path in paths)
