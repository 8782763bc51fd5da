"""A real headless Chromium, and axe-core in it, for the tests of pages. Skips with a word where one is missing."""

import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE, AXE_SHA256 = "4.14.1", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no chromium on this machine: the page cannot be tried out in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


def axe_script() -> str:
    """axe-core as npm has it, kept in the user's cache; its bytes are those that were looked at."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ple-tests"
    kept = cache / f"axe-core-{AXE}.js"
    if not kept.exists():
        if shutil.which("npm") is None:
            pytest.skip("no npm on this machine: axe-core, which looks for what keeps people out, cannot be fetched")
        cache.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(
            ["npm", "pack", "--silent", f"axe-core@{AXE}"], cwd=cache, capture_output=True, timeout=120, check=False
        )
        packed = cache / f"axe-core-{AXE}.tgz"
        if fetched.returncode or not packed.exists():
            pytest.skip(f"npm cannot fetch axe-core here: {fetched.stderr.decode(errors='replace')[-200:]}")
        with tarfile.open(packed) as archive:
            content = archive.extractfile("package/axe.min.js").read()
        packed.unlink()
        own = cache / f"{kept.name}.{os.getpid()}"
        own.write_bytes(content)
        own.replace(kept)
    script = kept.read_bytes()
    assert hashlib.sha256(script).hexdigest() == AXE_SHA256, f"{kept}: other bytes than expected: remove it"
    return script.decode()


def violations(page: Any) -> list[str]:
    """The serious and critical faults that axe finds, each with the places it is at."""
    page.evaluate(axe_script())
    found = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{one['impact']} {one['id']}: {one['help']}: {[node['target'] for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
