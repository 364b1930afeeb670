"""README.md and the other pages against what they describe: files, links, commands, arguments."""

import importlib.util
import re
from pathlib import Path

import pytest

from hosts.launch.readme import ARGUMENTS, README, arguments_page, with_generated_parts
from hosts.launch.settings import options

ROOT = README.parent
PAGES = [README, ROOT / "SECURITY.md", ROOT / "demo" / "README.md", *ROOT.glob("docs/*.md")]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
TOP = "hosts|backends|clients|demo|deploy|tests|docs|benchmarks"
OWN_ARGUMENTS = {"features", "help", "port", "url", "out"}
"""Of launcher.py itself and its commands; those of the settings are asked of them."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the page's headings."""
    without_code = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_matrix_and_tables_of_arguments_equal_their_sources() -> None:
    assert with_generated_parts(TEXT[README]) == TEXT[README], "run `make docs`"
    assert TEXT[ARGUMENTS] == arguments_page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for path in re.findall(rf"`((?:{TOP})/[\w/.-]+)`", TEXT[page]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ((?:\w+/)*\w+\.py)", TEXT[page]):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", TEXT[page]):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_and_targets_of_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}(?:\w+=\S+ )*make (\w+)", TEXT[page], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"-m ((?:demo|benchmarks)[\w.]*)", TEXT[page]):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_arguments_in_command_lines_of_the_launcher_exist(page: Path) -> None:
    known = set(options()) | OWN_ARGUMENTS
    known |= {alias for option in options().values() for alias in option.aliases}
    for line in re.findall(r"python launcher\.py (?!generate|status)(.+)", TEXT[page]):
        for argument in re.findall(r"(?<!\S)--(\w+)", line.split(" # ")[0]):
            assert argument in known, f"--{argument} in: {line}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    for page in ROOT.glob("docs/*.md"):
        assert page == index or f"({page.name})" in TEXT[index], page.name
