"""Digests: the same files have the same name wherever they are, and any change of content another one."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ple_data.common.digests import digests_of, ids_digest, json_digest, model_digest, policy_name, text_digest


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
