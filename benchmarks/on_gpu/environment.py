"""An environment of its own for wheels that were brought along; it sees the packages of the calling one too.

The project's commands then lie beside that interpreter, where `ple run` looks for them. Never changes the calling
environment and never asks a package index.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

MARK = "PLE_BENCHMARK_ENVIRONMENT"
"""Set in a process that runs in such an environment."""


def enter(wheels: Path, folder: Path, words: list[str]) -> None:
    """Install the wheels below `folder` and start this program anew there, with the same words. Does not return."""
    python = make(wheels, folder)
    print(f"the wheels of {wheels} are in {folder}", flush=True)
    os.environ[MARK] = str(folder)
    os.execv(python, [str(python), *words])


def leave() -> None:
    """Remove the environment that this program was started in, where `enter` made it."""
    if folder := os.environ.get(MARK):
        shutil.rmtree(folder, ignore_errors=True)


def make(wheels: Path, folder: Path) -> Path:
    """→ its interpreter. Raises FileNotFoundError where there are no wheels, CalledProcessError after pip's words."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheels}: no wheels there; benchmarks/gpu_pack.py gathers them")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "calling.pth").write_text(calling(), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
    install = ["install", "--no-index", "--no-deps", "--no-compile", "--force-reinstall"]
    subprocess.run([*map(str, pip), *install, *map(str, found)], check=True)
    return python


def calling() -> str:
    """A .pth file that adds the calling interpreter's packages behind the environment's own.

    `--system-site-packages` would add those of the base that the calling environment itself was made from.
    """
    own = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return "".join(f"import site; site.addsitedir({path!r})\n" for path in own)
