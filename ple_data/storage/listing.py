"""Commit records read quickly, some ten thousand a second. Whatever is odd about one is left to whoever asks."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas import files
from schemas.records import SHA256, UNIT_NAME, seal_of

_LONGEST = 2**14
_SHA256, _UNIT_NAME = re.compile(SHA256), re.compile(UNIT_NAME)


def rounds_of(folder: Path) -> list[tuple[int | None, Path]]:
    """The folders of a kind's commit records with their rounds, None where the name says none."""
    found: list[tuple[int | None, Path]] = []
    for path in sorted(folder.glob("round=*")):
        number = path.name.removeprefix("round=")
        known = number.isdecimal() and number == f"{int(number):03d}"
        found.append((int(number) if known else None, path))
    return found


def read_quickly(root: Path, folder: Path, data: Path, kind: str, round: int) -> Iterator[tuple[str, Any]]:
    """Each record in the folder, with the unit, file, rows, bytes and SHA-256 that it tells.

    None for those where it, or the file in `data`, is anything but what its writer leaves. Raises DamagedError where
    links lead out of `root`.
    """
    for place in (folder, data):
        files.refuse_outside(root, place)
    links = {entry.name for entry in os.scandir(data) if entry.is_symlink()} if data.is_dir() else set()
    expected, inside = {"version": 2, "kind": kind, "round": round}, data.relative_to(root).as_posix()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        unit, ended = os.path.splitext(entry.name)
        if ended == ".json":
            name = f"part-{unit}.parquet"
            plain = entry.is_file(follow_symlinks=False) and name not in links and _UNIT_NAME.fullmatch(unit)
            told = _told(entry.path, expected | {"unit": unit, "file": f"{inside}/{name}"}) if plain else None
            yield entry.path, told and (unit, data / name, *told)


def _told(path: str, expected: dict[str, Any]) -> tuple[int, int, str] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = json.loads(os.read(fd, _LONGEST).decode())
        finally:
            os.close(fd)
        seal = fields.pop("seal")
        numbers = fields["rows"], fields["bytes"]
        whole = expected | {"rows": numbers[0], "bytes": numbers[1], "sha256": fields["sha256"]}
        sound = fields == whole and seal == seal_of(fields) and _SHA256.fullmatch(fields["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not sound or any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or not numbers[1]:
        return None
    return (*numbers, fields["sha256"])
