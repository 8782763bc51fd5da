"""What every section is given and what it leaves behind. Knows their names and limits, and measures nothing."""

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """`seconds` is its limit where no other is given."""

    letter: str
    name: str
    seconds: float
    what: str

    @property
    def module(self) -> str:
        return f"benchmarks.on_gpu.{self.name}"

    def file(self, output: Path, suffix: str) -> Path:
        return output / f"{self.letter}-{self.name}.{suffix}"


SECTIONS = (
    Section("a", "runs", 200, "every command on small models, beside the CPU's results; kill and resume"),
    Section("b", "training", 170, "tokens a second and peak memory of training, ours and TRL's"),
    Section("c", "head", 40, "the output layer and its loss: time and peak memory of five ways"),
    Section("d", "attention", 50, "attention over packed sequences: our two forms and flash-attention"),
    Section("e", "sampling", 60, "tokens a second of the engines, and what a seed on every request costs"),
    Section("g", "scale", 90, "workers of Ray, training in parts and a server, beside one process"),
    Section("f", "profile", 50, "where the time of a training step and of a sampling step goes"),
)
"""In the order of their worth."""


@dataclass(frozen=True)
class Setting:
    """cpu: small sizes, and no GPU even where there is one; ends: when the section is stopped (time.monotonic)."""

    cpu: bool
    output: Path
    ends: float
    model: Path | None = None

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()


class NotHere(Exception):
    """Something that this machine or environment lacks: said in one line, and no failure."""


class Results:
    """The numbers of a section, by part; the file is written anew, whole, after every part."""

    def __init__(self, path: Path, section: str) -> None:
        self._path, self._began = path, time.monotonic()
        self.data: dict[str, Any] = {"section": section, "complete": False, "failed": [], "parts": {}}
        self._write()

    def say(self, **values: Any) -> None:
        """Keep what concerns the whole section."""
        self.data |= values
        self._write()

    def keep(self, part: str, **values: Any) -> None:
        """Keep numbers of one part, beside what it has already."""
        self.data["parts"].setdefault(part, {}).update(values)
        print(line_of(part, values), flush=True)
        self._write()

    def attempt(self, part: str, work: Callable[[], dict[str, Any] | None]) -> bool:
        """Keep what `work` gives, or its traceback; whether it went through."""
        print(f"-- {part}", flush=True)
        began = time.monotonic()
        try:
            values = work() or {}
        except NotHere as reason:
            self.keep(part, not_here=str(reason))
            return True
        except BaseException as error:
            self.data["failed"].append(part)
            self.keep(part, traceback=traceback.format_exc(), seconds=round(time.monotonic() - began, 2))
            print(traceback.format_exc(), flush=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            return False
        self.keep(part, **values, seconds=round(time.monotonic() - began, 2))
        return True

    def end(self) -> None:
        self.say(complete=True)

    def _write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._began, 1)
        writing = self._path.with_suffix(".writing")
        writing.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(writing, self._path)


def line_of(part: str, values: dict[str, Any], width: int = 200) -> str:
    """A part in one line: short numbers and words, and of a traceback its end."""
    words = []
    for name, value in values.items():
        if name == "traceback":
            value = f"FAILED {value.strip().splitlines()[-1]}"
        if isinstance(value, float):
            value = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        if not isinstance(value, list | dict) and "\n" not in str(value):
            words.append(str(value) if name in ("traceback", "not_here") else f"{name} {value}")
    line = f"  {part}: {', '.join(words)}"
    return line if len(line) <= width else line[: width - 1] + "…"


PLACES = (Path("/dev/shm"), Path(tempfile.gettempdir()))
"""Where a section may have room: in memory first."""


def room_prefix(group: int) -> str:
    """Of the folders of one section, by its process group."""
    return f"ple-benchmark-{group}-"


def remove_rooms(group: int) -> None:
    """What a section that was killed has left."""
    for place in PLACES:
        for folder in place.glob(f"{room_prefix(group)}*"):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def room_for(gib: float) -> Iterator[Path]:
    """A temporary folder with that much room, in memory where it can be. Raises NotHere where there is none."""
    for place in PLACES:
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > (gib + 1) * 2**30:
            with tempfile.TemporaryDirectory(dir=place, prefix=room_prefix(os.getpgid(0))) as folder:
                yield Path(folder)
            return
    raise NotHere(f"no {gib:.1f} GiB of room in /dev/shm or {tempfile.gettempdir()}")


def no_progress_bars() -> None:
    """Bars of other packages fill the log."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
