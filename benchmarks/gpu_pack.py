"""What a machine with a GPU and no network must be brought for benchmarks/gpu.py: wheels, and their size.

    python benchmarks/gpu_pack.py --output wheels
    python benchmarks/gpu_pack.py --output wheels --without trl,datasets     # smaller
    python benchmarks/gpu_pack.py --output wheels --ray                      # with what section g needs

It gathers wheels of what such a machine lacks beside torch, transformers and peft, for its Python and not for this one,
and one of this project. Versions are those of constraints.txt, and of what a gathered wheel itself pins. It installs
nothing, and knows of no package index but pip's own settings. Exit code 1 where all that must be brought, the working
tree too, is over the limit.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LACKING = (
    "polars", "polars-runtime-32", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "typing-extensions", "click", "trl", "datasets", "multiprocess", "dill", "liger-kernel", "gguf",
)  # fmt: skip
"""Each one behind those that need it, so that what they ask for is known."""
FOR_RAY = ("ray", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "attrs")
"""Its wheel alone is over the limit: it goes in pieces."""
INSTEAD = {"trl": "1.16.0"}
"""Other versions than those of constraints.txt: the peer of the benchmarks."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MIB = 2**20


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the wheels")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="the machine's; %(default)s")
    parser.add_argument("--limit-mib", type=float, default=64, metavar="N", help="of all together; %(default)s")
    parser.add_argument("--without", default="", metavar="A,B", help="packages that it has, or that are not wanted")
    parser.add_argument("--ray", action="store_true", help="Ray too, for section g; its wheel alone is over the limit")
    options = parser.parse_args(words)
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob("*.whl"):
        old.unlink()
    wanted = [name for name in (*LACKING, *(FOR_RAY if options.ray else ())) if name not in options.without.split(",")]
    gather(wanted, pinned((ROOT / "constraints.txt").read_text()) | INSTEAD, options.python, options.output)
    tree = [name for name in working_tree() if options.output.resolve() not in (ROOT / name).parents]
    build_own(tree, options.output)
    sizes = {file.name: file.stat().st_size for file in sorted(options.output.glob("*.whl"))}
    sizes["the working tree"] = sum((ROOT / file).stat().st_size for file in tree)
    print(listing(sizes))
    if over := over_limit(sizes, options.limit_mib):
        print(f"error: {over}", file=sys.stderr)
        return 1
    return 0


def pinned(constraints: str) -> dict[str, str]:
    """Package → version, of lines NAME==VERSION."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", constraints, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def gather(wanted: list[str], versions: dict[str, str], python: str, output: Path) -> None:
    """Download a wheel of each. What a wheel asks of the others goes before constraints.txt where they disagree."""
    asked: dict[str, SpecifierSet] = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            download(request(name, versions.get(name), asked.get(name)), python, Path(folder))
            [wheel] = Path(folder).iterdir()
            for other, more in requirements(metadata(wheel), wanted, python).items():
                asked[other] = asked.get(other, SpecifierSet()) & more
            shutil.move(wheel, output / wheel.name)


def request(name: str, version: str | None, asked: SpecifierSet | None) -> str:
    """What pip is asked for."""
    asked = asked or SpecifierSet()
    if version and asked.contains(version, prereleases=True):
        return f"{name}=={version}"
    return f"{name}{asked}"


def requirements(lines: Iterable[str], known: Iterable[str], python: str) -> dict[str, SpecifierSet]:
    """What a package's Requires-Dist ask, on Linux and without extras, of those that are known."""
    known, found = set(known), dict[str, SpecifierSet]()
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in known and (requirement.marker is None or requirement.marker.evaluate(environment)):
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def metadata(wheel: Path) -> list[str]:
    """Its Requires-Dist."""
    with zipfile.ZipFile(wheel) as archive:
        [file] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        headers = HeaderParser().parsestr(archive.read(file).decode())
    return headers.get_all("Requires-Dist") or []


def download(what: str, python: str, folder: Path) -> None:
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    target = ["--python-version", python, "--implementation", "cp", *platforms]
    pip("download", "--no-deps", "--only-binary=:all:", *target, "--dest", str(folder), what)


def working_tree() -> list[str]:
    """Files that git knows or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in sorted(set(names)) if (ROOT / name).is_file()]


def build_own(tree: list[str], output: Path) -> None:
    """A wheel of this project, from a copy, so that nothing is left in the tree."""
    with tempfile.TemporaryDirectory() as folder:
        for name in tree:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        pip("wheel", "--no-deps", "--wheel-dir", str(output), folder)


def pip(*words: str) -> None:
    """Raises CalledProcessError after pip's own words."""
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"], check=True)


def listing(sizes: dict[str, int]) -> str:
    lines = [f"{size / MIB:8.2f} MiB  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()) / MIB:8.2f} MiB  in all"])


def over_limit(sizes: dict[str, int], limit_mib: float) -> str:
    """One sentence where they are too large, else nothing."""
    total = sum(sizes.values()) / MIB
    if total <= limit_mib:
        return ""
    largest = max(sizes, key=lambda name: sizes[name])
    return f"{total:.1f} MiB are over the limit of {limit_mib:g} MiB ({largest} is the largest): use --without"


if __name__ == "__main__":
    raise SystemExit(main())
