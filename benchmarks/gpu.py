"""Everything worth knowing of this product on a GPU, in one command and at most ten minutes, without a network.

    python benchmarks/gpu.py                         # in an environment where the project is installed
    python benchmarks/gpu.py --wheels wheels         # elsewhere, with what gpu_pack.py has gathered
    python benchmarks/gpu.py --only b,f --minutes 4  # some sections, in less time
    python benchmarks/gpu.py --cpu                   # a rehearsal in small, as where there is no GPU

Sections run in the order of their worth, each in a process of its own with a limit of its own; what one leaves of its
time the next ones may use. OUTPUT/a-runs.json and so on hold what each has measured, written after every measurement,
OUTPUT/a-runs.log what it printed, OUTPUT/summary.txt a few lines of each. A stop costs the measurement in work.

Exit code: 0 where every section ran to its end and no step of one failed, 1 where not, 2 where nothing could start.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose names are other packages' too

from benchmarks.on_gpu import environment  # noqa: E402
from benchmarks.on_gpu.sections import SECTIONS, Section, line_of, remove_rooms  # noqa: E402

LETTERS = [section.letter for section in SECTIONS]
LEAST_SECONDS = 2.0
"""A section with less time left is not started."""


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    sections = "\n".join(f"  {s.letter}  {s.name:10} {s.what}; {s.seconds:.0f} s" for s in SECTIONS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sections, with their limits:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), metavar="DIR", help="where results go; %(default)s"
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="keep all results in one .tar.gz too, up to date after each section",
    )
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU; what needs a GPU says so")
    parser.add_argument("--only", type=letters, default=LETTERS, metavar="A,B", help="these sections: a,c")
    parser.add_argument("--skip", type=letters, default=[], metavar="A,B", help="not these sections: b,e")
    parser.add_argument("--minutes", type=float, default=9.5, help="limit of the whole; %(default)s")
    parser.add_argument(
        "--limit", type=limit, action="append", default=[], metavar="A=SECONDS", help="of one section; may be repeated"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="first install these, in an environment of its own")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="a model for section a too: a folder, a .gguf file or its pieces"
    )
    return parser.parse_args(words)


def letters(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [letter for letter in found if letter not in LETTERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(LETTERS)}")
    return found


def limit(text: str) -> tuple[str, float]:
    letter, _, seconds = text.partition("=")
    if letter not in LETTERS or not seconds.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not like a=60")
    return letter, float(seconds)


def main() -> int:
    options = parse_options()
    began = float(os.environ.setdefault("PLE_BENCHMARK_BEGAN", str(time.monotonic())))  # before the wheels
    options.output.mkdir(parents=True, exist_ok=True)
    if options.wheels and environment.MARK not in os.environ:
        try:
            folder = Path(tempfile.mkdtemp(prefix="ple-benchmark-"))
            environment.enter(options.wheels.resolve(), folder, [__file__, *sys.argv[1:]])
        except (OSError, subprocess.CalledProcessError) as error:
            return refuse(f"the wheels could not be installed: {error}")
    if not (Path(sys.executable).parent / "ple").exists():
        where = Path(sys.executable).parent
        return refuse(f"there is no `ple` in {where}: install the project there (pip install -e .), or give --wheels")
    chosen = [s for s in SECTIONS if s.letter in options.only and s.letter not in options.skip]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no section outlives this
    try:
        run_all(chosen, options, began)
    finally:
        print(write_summary(chosen, options.output, began), flush=True)
        environment.leave()
    return 0 if all(is_good(result) for result in map(read, files(chosen, options.output))) else 1


def refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def run_all(sections: list[Section], options: argparse.Namespace, began: float) -> None:
    """One after another; time that is not used goes to the later ones, but for those with a --limit of their own."""
    given = dict(options.limit)
    spare = 0.0
    for section in sections:
        allowed = given.get(section.letter, section.seconds + spare)
        allowed = min(allowed, began + 60 * options.minutes - time.monotonic())
        if allowed < LEAST_SECONDS and section.letter not in given:
            print(f"{section.letter} {section.name}: no time left", flush=True)
            continue
        print(f"{section.letter} {section.name}: at most {allowed:.0f} s", flush=True)
        took = run_section(section, options, allowed)
        write_summary(sections, options.output, began)
        if options.archive:
            write_archive(options.output, options.archive)
        if section.letter not in given:
            spare = max(0.0, allowed - took)


def run_section(section: Section, options: argparse.Namespace, seconds: float) -> float:
    """In a process group of its own, ended as a whole when its time is over → seconds that it took."""
    section.file(options.output, "json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.on_gpu", section.letter, str(options.output.resolve()), str(seconds)]
    command += ["--cpu"] if options.cpu else []
    command += ["--model", str(options.model.resolve())] if options.model else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    more = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with section.file(options.output, "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | more, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            remove_rooms(process.pid)
    print(f"{section.letter} {section.name}: {code if code else 'done'}", flush=True)
    return time.monotonic() - began


def files(sections: list[Section], output: Path) -> Iterator[Path]:
    return (section.file(output, "json") for section in sections)


def read(path: Path) -> dict[str, Any]:
    """A section's results; of one that left none, that it is not complete."""
    if not path.exists():
        return {"complete": False, "failed": [], "parts": {}, "seconds": 0}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def is_good(result: dict[str, Any]) -> bool:
    return result["complete"] and not result["failed"]


def write_summary(sections: list[Section], output: Path, began: float) -> str:
    text = summary(sections, output, time.monotonic() - began)
    (output / "summary.txt").write_text(text, encoding="utf-8")
    return text


def write_archive(output: Path, archive: Path) -> None:
    writing = archive.with_name(f"{archive.name}.writing")
    with tarfile.open(writing, "w:gz") as packed:
        packed.add(output, output.name)
    os.replace(writing, archive)


def summary(sections: list[Section], output: Path, seconds: float) -> str:
    """Machine and versions, then a line a part; the parts that have only passed share one."""
    results = {section: read(section.file(output, "json")) for section in sections}
    made_with = next((result["made_with"] for result in results.values() if "made_with" in result), "nothing ran")
    lines = [made_with]
    for section, result in results.items():
        how = "complete" if result["complete"] else "STOPPED" if result["parts"] else "NOTHING"
        failed = f", {len(result['failed'])} FAILED" if result["failed"] else ""
        lines.append(f"\n{section.letter} {section.name}: {how} in {result['seconds']:.0f} s{failed}")
        if about := {name: value for name, value in result.items() if name not in KNOWN}:
            lines.append(line_of("about", about))
        passed = [name for name, values in result["parts"].items() if set(values) <= {"seconds"}]
        lines += [line_of(name, drop(values)) for name, values in result["parts"].items() if name not in passed]
        if passed:
            lines.append(f"  passed: {'; '.join(passed)}")
    lines.append(f"\n{seconds:.0f} s in all; everything is in {output}")
    return "\n".join(lines) + "\n"


KNOWN = ("section", "complete", "failed", "parts", "seconds", "made_with")


def drop(values: dict[str, Any]) -> dict[str, Any]:
    """Without the seconds that a part took, beside what it measured."""
    return {name: value for name, value in values.items() if name not in ("seconds", "file")}


if __name__ == "__main__":
    raise SystemExit(main())
