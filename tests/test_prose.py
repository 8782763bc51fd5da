"""README and docs as pages to read: short lines, a short README, links that lead somewhere, an index of all pages."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BESIDE = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "recipes").glob("*/README.md"))]
INDEX = ROOT / "docs" / "README.md"
WIDTH = 120
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

every_page = pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: str(page.relative_to(ROOT)))


def unfenced(page: Path) -> list[tuple[int, str]]:
    """The numbered lines outside fenced code."""
    lines, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    assert not fenced, f"{page} ends inside a code block"
    return lines


def is_prose(line: str) -> bool:
    """Not a table, a heading that holds a link, or a line that is a link and nothing else."""
    return not (
        line.startswith("|") or (line.startswith("#") and LINK.search(line)) or not LINK.sub("", line).strip("!-* .")
    )


def targets(page: Path) -> list[str]:
    """Where the page's relative links lead."""
    text = re.sub(r"`[^`]*`", "", "\n".join(line for _, line in unfenced(page)))
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    found: list[str] = []
    for _, line in unfenced(page):
        if heading := re.match(r"#+ +(.+)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            found.append(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return {name if not found[:at].count(name) else f"{name}-{found[:at].count(name)}" for at, name in enumerate(found)}


@every_page
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert [number for number, line in lines if len(line) > WIDTH and is_prose(line)] == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target in targets(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_index_names_every_page() -> None:
    linked = {(INDEX.parent / target.partition("#")[0]).resolve() for target in targets(INDEX)}
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in linked | {INDEX}] == []


def test_what_counts_as_prose() -> None:
    assert not any(map(is_prose, ["| a | b |", "## [a](b.md)", "- [a](b.md)", "![a](b.png)"]))
    assert all(map(is_prose, ["See [a](b.md).", "## a", "- a"]))


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# `ple purity`: does it rank?\n\n## At [8](a.md) billion\n\n```\n# not this\n```\n\n## At 8 billion\n"
    )
    assert anchors(page) == {"ple-purity-does-it-rank", "at-8-billion", "at-8-billion-1"}
