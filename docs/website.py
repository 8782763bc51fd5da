"""The docs as a searchable site, from the same Markdown that is read on a code host.

    python docs/website.py build/site

The menu is that of docs/README.md. A link that leads nowhere, or a page that no menu names, ends it with exit code 1.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MENU = Path("docs", "README.md")
ENDS = {"Home": [Path("README.md"), MENU], "Project": [Path("CHANGELOG.md"), Path("CONTRIBUTING.md")]}
"""Pages of the menu that docs/README.md does not list: in front of its sections, and behind them."""
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
THEME = {
    "variant": "classic",
    "font": False,  # fetched from nowhere
    "features": ["navigation.sections", "navigation.footer", "content.code.copy", "search.highlight"],
    "palette": [
        {
            "media": "(prefers-color-scheme: light)",
            "scheme": "default",
            "toggle": {"icon": "material/weather-sunny", "name": "dark"},
        },
        {
            "media": "(prefers-color-scheme: dark)",
            "scheme": "slate",
            "toggle": {"icon": "material/weather-night", "name": "light"},
        },
    ],
}
EXTENSIONS = ["attr_list", "md_in_html", "pymdownx.superfences", "tables", {"toc": {"permalink": True}}]


def menu(root: Path = ROOT) -> dict[str, list[Path]]:
    """Pages, relative to `root`, by section of docs/README.md."""
    sections: dict[str, list[Path]] = {}
    text = (root / MENU).read_text()
    for part in text.split("\n## ")[1:]:
        title, _, rows = part.partition("\n")
        sections[title] = [
            page for page in links(root, MENU, rows) if page.suffix == ".md" and page != Path("README.md")
        ]
    return {"Home": ENDS["Home"], **sections, "Project": ENDS["Project"]}


def links(root: Path, page: Path, text: str) -> Iterator[Path]:
    """Files of the project that a page links to, relative to `root`; SystemExit where there is none."""
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            file = (root / page.parent / target).resolve()
            if not file.exists():
                raise SystemExit(f"{page}: the link to {target} leads nowhere")
            yield file.relative_to(root)


def stage(root: Path, place: Path) -> None:
    """Copy the pages, and every file that they link to, to the same relative paths in `place`."""
    pages = [page for own in menu(root).values() for page in own]
    every = {path.relative_to(root) for path in (root / "docs").rglob("*.md")}
    if lost := sorted(map(str, every - set(pages))):
        raise SystemExit(f"{', '.join(lost)}: no section of {MENU} names it")
    for page in pages:
        for file in (page, *links(root, page, (root / page).read_text())):
            if (root / file).is_file():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, place / file)


def heading(root: Path, page: Path) -> str:
    return next(line for line in (root / page).read_text().splitlines() if line.startswith("# ")).removeprefix("# ")


def build(root: Path, site: Path) -> None:
    """Make the site anew in `site`."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        stage(root, place / "pages")
        nav = [
            {title: [{heading(root, page).replace("`", ""): str(page)} for page in own]}
            for title, own in menu(root).items()
        ]
        settings = {
            "site_name": "PLE",
            "docs_dir": "pages",
            "site_dir": "site",
            "use_directory_urls": False,
            "nav": nav,
            "theme": THEME,
            "markdown_extensions": EXTENSIONS,
        }
        (place / "mkdocs.yml").write_text(json.dumps(settings))  # JSON is YAML
        command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"]
        if subprocess.run(command, cwd=place).returncode:
            raise SystemExit("the site was not built; what is wrong is above")
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(place / "site", site)


if __name__ == "__main__":
    build(ROOT, Path(sys.argv[1]))
    print(f"{sys.argv[1]}/index.html; to search, serve it: python -m http.server --directory {sys.argv[1]}")
