"""`make docs`: what is wrong with a link or the menu is said; the project's own pages make a site."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import website

PAGES = {
    "README.md": "# Home\n\n[docs](docs/README.md), [elsewhere](https://example.com/x)\n",
    "CHANGELOG.md": "# Changes\n",
    "CONTRIBUTING.md": "# Contributing\n",
    "docs/README.md": "# Docs\n\n## Start\n\n| [a.md](a.md) | the first |\n",
    "docs/a.md": "# Page `a`\n\n[home](../README.md#home), [a script](../run.sh)\n",
    "run.sh": "echo\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name, text in PAGES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_pages_and_what_they_link_to_are_staged(project: Path, tmp_path: Path) -> None:
    website.stage(project, tmp_path / "stage")
    staged = {path.relative_to(tmp_path / "stage").as_posix() for path in (tmp_path / "stage").rglob("*.*")}
    assert staged == PAGES.keys()


def test_a_link_that_leads_nowhere_is_named(project: Path, tmp_path: Path) -> None:
    (project / "docs" / "a.md").write_text("# A\n\n![](gone.png)\n")
    with pytest.raises(SystemExit, match=r"docs/a\.md: the link to gone\.png leads nowhere"):
        website.stage(project, tmp_path / "stage")


def test_a_page_that_no_menu_names_is_named(project: Path, tmp_path: Path) -> None:
    (project / "docs" / "b.md").write_text("# B\n")
    with pytest.raises(SystemExit, match=r"docs/b\.md: no section of docs/README\.md names it"):
        website.stage(project, tmp_path / "stage")


def test_a_heading_that_is_not_there_is_found(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "docs" / "a.md").write_text("# A\n\n[home](../README.md#nothing)\n")
    with pytest.raises(SystemExit, match="the site was not built"):
        website.build(project, tmp_path / "site")
    assert "anchor does not exist" in capfd.readouterr().err


def test_the_docs_are_a_site(tmp_path: Path) -> None:
    website.build(ROOT, tmp_path)
    search = json.loads((tmp_path / "search.json").read_text())
    assert any("trust region" in item["text"] for item in search["items"])
    assert 'href="recipe.html"' in (tmp_path / "docs" / "hub.html").read_text()
    assert "googleapis" not in (tmp_path / "index.html").read_text()
