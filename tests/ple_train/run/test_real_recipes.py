"""recipes/real: what its scripts make of files in the form of the real ones."""

import runpy
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import ROOT


def test_preferences_are_parted_by_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pl.DataFrame({"prompt": ["a:"] * 4, "chosen": ["b", " c", "d", "e"], "rejected": ["f", "c ", "g", "h"]})
    rows = rows.with_columns(id=pl.lit("an id"), split=pl.Series(["train", "train", "test", "train"]))
    hh = rows.with_columns(subset=pl.Series(["helpful-base", "helpful-base", "harmless-base", "helpful-online"]))
    hh.write_parquet(tmp_path / "hh.parquet")
    rows.write_parquet(tmp_path / "tldr.parquet")
    words = ["--hh", tmp_path / "hh.parquet", "--tldr", tmp_path / "tldr.parquet", "--output", tmp_path / "found"]
    monkeypatch.setattr("sys.argv", ["preferences.py", *map(str, words)])
    runpy.run_path(str(ROOT / "recipes" / "real" / "preferences.py"), run_name="__main__")
    found = {path.stem: pl.read_parquet(path) for path in (tmp_path / "found").iterdir()}
    assert {name: own["chosen"].to_list() for name, own in found.items()} == {
        "base-train": [" b"],
        "base-test": [],
        "helpful-train": [" b", " e"],
        "helpful-test": [],
        "hh-train": [" b", " e"],
        "hh-test": [" d"],
        "tldr-train": [" b", " e"],
        "tldr-test": [" d"],
    }
    assert found["hh-test"]["group"].to_list() == ["harmless-base"]
