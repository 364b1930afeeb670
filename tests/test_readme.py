"""The README against what it describes."""

import re
from pathlib import Path

from hosts.launch.readme import ARGUMENTS, README, arguments_page, with_generated_parts

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")


def test_matrix_and_tables_of_arguments_equal_their_sources() -> None:
    assert with_generated_parts(TEXT) == TEXT, "run `make docs`"
    assert ARGUMENTS.read_text(encoding="utf-8") == arguments_page(), "run `make docs`"


def test_every_file_that_the_readme_and_the_architecture_name_exists() -> None:
    for page in (README, ROOT / "docs" / "architecture.md"):
        for name in re.findall(
            r"`((?:hosts|backends|clients|demo|tests|docs)/[\w/.]+\.\w+)`",
            page.read_text(encoding="utf-8"),
        ):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"


def test_links_lead_somewhere() -> None:
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_makefile_has_the_commands_of_the_readme() -> None:
    makefile = Path(ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
