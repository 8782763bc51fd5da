"""Digests that name what a row was made with: texts, models, adapters. Never loads a model.

A digest is the first 12 hex digits of a SHA-256: enough to tell models and texts apart, short enough for a name.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ple_data.common.loading import loading
from schemas.errors import PleError
from schemas.files import sha256_file, write_atomic

DIGEST_DIGITS = 12
KEPT_FROM = 16 * 2**20
"""Bytes from which on a file's hash is kept."""
SETTLED = 2 * 10**9
"""Nanoseconds that a file must have been left alone before its hash was taken."""
_DIGEST = re.compile(rf"(?:^|(?<=\+))[^@]*@([0-9a-f]{{{DIGEST_DIGITS}}})(?=\+|$)")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""What makes a model or an adapter the one it is: weights, configuration, tokenizer, chat template."""


def text_digest(text: str) -> str:
    """Digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def json_digest(value: Any) -> str:
    """Digest of a JSON value; the order of keys does not matter."""
    return text_digest(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")))


def model_digest(model: str | Path, revision: str | None = None) -> str:
    """Digest of a model or adapter directory (names and bytes of its files), or `id@commit` of a hub id.

    The same files in another directory have the same digest. Raises FileNotFoundError for a directory without
    any model file, and what the hub client raises where a hub id cannot be resolved.
    """
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{_resolve_commit(str(model), revision)}"
    files = model_files(directory)
    if not files:
        raise FileNotFoundError(f"{directory} holds no model files")
    with ThreadPoolExecutor() as pool:
        return json_digest(
            list(zip((_as_utf8(path.name) for path in files), pool.map(sha256_of_weights, files), strict=True))
        )


def model_files(directory: Path) -> list[Path]:
    """The files of a model or adapter directory that make it the one it is, in order of their names."""
    return sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern) if path.is_file()})


def sha256_of_weights(path: Path) -> str:
    """The SHA-256 of a file. Of a large one it is kept in the user's cache, beside what the system says of the file:
    size, time, inode. Where any of that is another, or was so young that a change would not show, it is computed anew.
    """
    found = path.stat()
    if found.st_size < KEPT_FROM:
        return sha256_file(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ple-align", "sha256")
    kept = cache / f"{json_digest(_as_utf8(str(path.resolve())))}.json"
    told = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(kept.read_bytes())
        if record["file"] == told and max(told[1:3]) < record["at"] - SETTLED and len(record["sha256"]) == 64:
            return str(record["sha256"])
    at = time.time_ns()
    digest = sha256_file(path)
    with suppress(OSError, PleError):
        if cache.is_absolute():  # else there is no home
            write_atomic(kept, json.dumps({"file": told, "at": at, "sha256": digest}))
    return digest


def policy_name(model: str | Path, adapter: str | Path | None = None, revision: str | None = None) -> str:
    """Name of a policy in rows and metadata: `base@digest`, and `+adapter@digest` where there is one."""
    parts = [_named(model, revision)]
    if adapter is not None:
        parts.append(_named(adapter, None))
    return "+".join(parts)


def digests_of(policy: str) -> str:
    """The digests in a policy's name: the same for the same files, wherever their directories lie or move.

    A hub id whose commit is not known stays whole.
    """
    return _DIGEST.sub(r"\1", policy)


def _named(model: str | Path, revision: str | None) -> str:
    digest = model_digest(model, revision)
    return f"{_as_utf8(Path(model).resolve().name)}@{digest}" if Path(model).is_dir() else digest


def _as_utf8(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _resolve_commit(model: str, revision: str | None) -> str:
    from transformers import AutoConfig

    with loading(f"the configuration of {model}"):
        commit = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)._commit_hash
    return commit[:DIGEST_DIGITS] if commit else (revision or "main")


def ids_digest(ids: Iterable[int]) -> str:
    """Digest of a sequence of token ids."""
    return text_digest(" ".join(map(str, ids)))
