"""Digests: the same files have the same name wherever they are, and any change of content another one."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ple_data.common import digests
from ple_data.common.digests import (
    digests_of,
    ids_digest,
    json_digest,
    model_digest,
    policy_name,
    sha256_of_weights,
    text_digest,
)
from schemas.files import sha256_file


def test_text_and_json() -> None:
    """echo -n hello | sha256sum"""
    assert text_digest("hello") == "2cf24dba5fb0"
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({"a": 1, "b": [3]})
    assert ids_digest([1, 23]) != ids_digest([12, 3])


def test_a_model_is_what_its_files_are(policy: Path, adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(policy, tmp_path / "other-name"))
    assert model_digest(copy) == model_digest(policy)
    (copy / "README.md").write_text("says nothing about the weights")
    assert model_digest(copy) == model_digest(policy)
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        changed = Path(shutil.copytree(policy, tmp_path / name))
        content = bytearray((changed / name).read_bytes())
        content[-2] ^= 1
        (changed / name).write_bytes(content)
        assert model_digest(changed) != model_digest(policy)
    assert policy_name(policy) == f"tiny@{model_digest(policy)}"
    assert policy_name(policy, adapter) == f"tiny@{model_digest(policy)}+adapter@{model_digest(adapter)}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model files"):
        model_digest(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny@0123456789ab", "0123456789ab"),
        ("a+b@0123456789ab+round=004@ba9876543210", "0123456789ab+ba9876543210"),
        ("owner/model@main+round=004@ba9876543210", "owner/model@main+ba9876543210"),
    ],
)
def test_the_digests_in_a_name(name: str, expected: str) -> None:
    assert digests_of(name) == expected


def test_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_pretrained(name: str, revision: str | None, *, trust_remote_code: bool) -> Any:
        asked.append((name, revision, trust_remote_code))
        return SimpleNamespace(_commit_hash="0123456789abcdef")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    assert policy_name("owner/model", revision="main") == "owner/model@0123456789ab"
    assert asked == [("owner/model", "main", False)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Counts how often the bytes of a file are read; every file counts as large."""
    read = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "KEPT_FROM", 1)
    monkeypatch.setattr(digests, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    return read


def old(path: Path) -> Path:
    """As if nobody had touched it for a minute; its inode's own time cannot be set."""
    os.utime(path, ns=(time.time_ns() - 60 * 10**9,) * 2)
    return path


def test_the_hash_of_a_large_file_is_computed_once(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -(10**9))  # its inode is as young as this test
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    expected = sha256_file(old(path))
    assert [sha256_of_weights(path) for _ in range(3)] == [expected] * 3
    assert len(kept) == 1
    path.write_bytes(b"two")  # of the same size
    assert sha256_of_weights(old(path)) == sha256_file(path) != expected
    assert sha256_of_weights(path) == sha256_file(path)
    assert len(kept) == 2
    path.write_bytes(b"old")
    replaced = old(path).stat()
    other = old(tmp_path / "other") if (tmp_path / "other").write_bytes(b"new") else path
    os.utime(other, ns=(replaced.st_mtime_ns,) * 2)
    sha256_of_weights(path)
    other.replace(path)  # of the same size and time
    assert sha256_of_weights(path) == sha256_file(path)
    (record,) = (tmp_path / "cache").rglob("*.json")
    record.write_text("damaged")
    assert sha256_of_weights(path) == sha256_file(path)


def test_the_hash_of_a_file_that_was_just_written_is_not_relied_on(tmp_path, kept):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    sha256_of_weights(path)
    sha256_of_weights(path)
    assert len(kept) == 2


def test_without_a_place_for_them_hashes_are_computed_each_time(tmp_path, kept, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert sha256_of_weights(path) == sha256_file(path)
