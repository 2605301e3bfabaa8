"""The page that `make chaos` writes is that of the present kinds of fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.kinds import FAULTS

PAGE = Path(__file__).parents[2] / "docs/benchmarks/faults.md"


def test_the_page_has_a_row_for_each_kind_and_all_cases_survived(chaos):
    if chaos:
        pytest.skip("the page is being written")
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) of ([\d,]+) \|$", PAGE.read_text().split("Other faults")[1], re.M)
    assert [name for name, *_ in rows] == sorted(FAULTS), "run `make chaos` on an idle machine: it writes the page"
    assert [name for name, survived, tried in rows if survived != tried or tried == "0"] == []


def test_a_kind_that_no_row_is_for_is_not_counted(tally):
    with pytest.raises(ValueError, match=r"'a comet' is not among the FAULTS of tests/faults/kinds\.py"):
        tally("a comet", lambda: None)
