"""The README does what it says: its code runs, its targets and pictures exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 32
        done = subprocess.run([sys.executable, "-W", "error", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        missed = float(re.search(r"missed: ([\d.]+)", done.stdout).group(1))
        assert missed < 0.05


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
