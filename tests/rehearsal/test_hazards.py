"""docs/gpu.md names a test or a rehearsed case for each hazard, and all that it names exist."""

import re
from pathlib import Path

import pytest

from tests.rehearsal.cases import FAILING_LONG, FAILING_SHORT, LONG, SHORT

ROOT = Path(__file__).parents[2]
HAZARDS = [
    f"{part}{number}"
    for part, count in (("A", 11), ("B", 12), ("C", 12), ("D", 9))
    for number in range(1, count + 1)
]
NOT_CHANGED = ("C12",)
LABELS = {case.label for case in (*SHORT, *LONG, *FAILING_SHORT, *FAILING_LONG)}
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
TESTS = "\n".join(
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("hazard", HAZARDS)
def test_each_hazard_has_a_line_with_what_shows_it(hazard):
    lines = re.findall(rf"^- \*\*{hazard}\*\* .*?(?=^- |^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert len(lines) == 1
    names = re.findall(r"`([^`]+)`", lines[0].replace("\n  ", " "))
    tests = [name for name in names if name.startswith("test_")]
    missing = [name for name in tests if not re.search(f"^{name.rstrip('*')}", TESTS, re.MULTILINE)]
    assert not missing
    assert (
        tests
        or LABELS & set(names)
        or "in every rehearsed case" in lines[0].replace("\n  ", " ")
        or hazard in NOT_CHANGED
    )
