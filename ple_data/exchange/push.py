"""`ple push`: a store, an adapter or the newest policy of a run goes to a repository on the hub, with a card.

Only what was committed and verified is sent, without the paths of this machine. The token is the hub client's own
business (HF_TOKEN, `hf auth login`): it is never read here. Nothing local changes.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ple_data.common.terminal import printable
from ple_data.exchange.cards import dataset_card, hub_id, model_card, start_on_hub
from ple_data.inputs.readers import FORMATS
from ple_data.storage.store import OWNER, Store
from ple_data.storage.verify import check
from schemas.errors import DamagedError, PleError, UsageError, first_line
from schemas.files import read_file, refuse_outside, sha256_file
from schemas.json_text import parse_json
from schemas.options import Push
from schemas.records import TRAINED, read_record
from schemas.reports import EvalReport
from schemas.tables import STORED
from schemas.training import Trained

CARD = "README.md"
ROWS_AND_WEIGHTS = (".parquet", ".safetensors", ".bin")
ADAPTER = "adapter_config.json"
_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]{1,96}")
_ROUND = re.compile(r"round=(\d+)")


@dataclass(frozen=True)
class Parcel:
    """What goes: the kind of repository, and each file's name there with where it lies, or its bytes."""

    kind: Literal["dataset", "model"]
    files: dict[str, Path | bytes]

    def size(self, name: str) -> int:
        """Bytes of one of the files."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def push(options: Push) -> str | None:
    """Send `source` to the repository `to`; with `dry_run` give the text of what would go, and send nothing.

    Raises UsageError for a source that is none or a repository with other rows or weights, DamagedError where the store
    or a file of the training is not what was written, PleError for what the hub refuses.
    """
    if not _REPO.fullmatch(options.to):
        raise UsageError(f"--to {options.to} is no OWNER/NAME of a repository on the hub")
    parcel = pack(options)
    if options.license is None:
        _say("note: the card names no licence; say which with --license")
    if options.dry_run:
        return _shown(parcel, options)
    where, private = _send(parcel, options)
    _say(f"{where}: {len(parcel.files)} files, {'private' if private else 'public'}")
    return None


def pack(options: Push) -> Parcel:
    """The files that go, checked, and their card."""
    source = options.source
    if (source / TRAINED).is_file():
        return _of_training(source, options, options.eval)
    if (source / ADAPTER).is_file() or (source / "config.json").is_file():
        raise UsageError(f"{source} has no {TRAINED}: it is unfinished, or was not trained by ple")
    if (source / "policy").is_dir() or (source / "recipe.yaml").is_file():
        rounds = {path: _ROUND.fullmatch(path.name) for path in (source / "policy").glob("round=*")}
        finished = {path: int(n[1]) for path, n in rounds.items() if n and (path / TRAINED).is_file()}
        if not finished:
            raise UsageError(f"{source} has no finished policy yet; its rows are in {source / 'data'}: give that")
        newest = max(finished, key=finished.__getitem__)
        own = source / "eval"
        return _of_training(newest, options, options.eval or (own if (own / "eval.json").is_file() else None))
    if options.eval or options.base_model:
        raise UsageError("--eval and --base-model are for the card of a model; leave them out for a store")
    return _of_store(Store(source), options)


def _of_store(store: Store, options: Push) -> Parcel:
    for problem in check(store.root):
        if problem.severity == "error":
            _say(str(problem))
    shards = [shard for kind in STORED for shard in store.shards(kind)]
    if not shards:
        raise UsageError(f"{store.root} has no committed rows to push")
    files: dict[str, Path | bytes] = {}
    for shard in shards:
        for path in (shard.path, store.record_path(shard.kind, shard.round, shard.unit)):
            files[path.relative_to(store.root).as_posix()] = path
    for path in store.manifest_paths():
        manifest = store.read_manifest(path)
        queries = str(manifest.notes.get("queries"))
        known = {
            "model": start_on_hub(manifest.settings.get("policy")),
            "queries": None if Path(queries).suffix in FORMATS else hub_id(queries),
        }
        notes = {name: value for name, value in known.items() if value}
        files[path.relative_to(store.root).as_posix()] = manifest.model_copy(update={"notes": notes}).to_json().encode()
    more = [*(store.root / ".ple" / "finished").glob("*"), *(store.root / ".ple" / "rounds").glob("probe-*.json")]
    more += [store.root / OWNER] if (store.root / OWNER).exists() else []
    files |= {path.relative_to(store.root).as_posix(): path for path in more}
    return Parcel("dataset", {CARD: dataset_card(store, options.to, options.license).encode(), **files})


def _of_training(folder: Path, options: Push, evaluation: Path | None) -> Parcel:
    trained = read_record(Trained, folder / TRAINED, "restore it from a copy")
    files: dict[str, Path | bytes] = {}
    for name, expected in trained.files.items():
        path = folder / name
        refuse_outside(folder, path)
        if not path.is_file() or sha256_file(path) != expected:
            raise DamagedError(f"{path}: missing, or changed since it was trained: restore it from a copy")
        files[name] = path
    evals = []
    if evaluation is not None:
        if not (evaluation / "eval.json").is_file():
            raise UsageError(f"--eval {evaluation}: it has no eval.json; give a folder of ple eval")
        evals = [read_record(EvalReport, evaluation / "eval.json", "run ple eval again")]
    if options.base_model and not hub_id(options.base_model):
        raise UsageError(f"--base-model {options.base_model} is no OWNER/NAME of a model on the hub")
    if ADAPTER in files:
        config = parse_json(read_file(folder / ADAPTER).decode())
        base = options.base_model or start_on_hub(trained.settings.get("weights"))
        files[ADAPTER] = (json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n").encode()
        if base is None:
            _say("note: the base model lies on this machine; name it with --base-model where it is on the hub")
    card = model_card(trained, options.to, options.license, options.base_model, evals)
    return Parcel("model", files | {CARD: card.encode()})


def _shown(parcel: Parcel, options: Push) -> str:
    sizes = {name: parcel.size(name) for name in sorted(parcel.files)}
    where = f"{options.to}, a {'private' if options.private else 'public'} {parcel.kind} repository"
    lines = [f"nothing is sent; {len(sizes)} files, {sum(sizes.values()):,} bytes, would go to {where}:"]
    lines += [f"{size:>14,}  {name}" for name, size in sizes.items()]
    card = parcel.files[CARD]
    assert isinstance(card, bytes)
    return printable("\n".join([*lines, "", card.decode()]))


def _send(parcel: Parcel, options: Push) -> tuple[str, bool]:
    """The address of the commit, and whether the repository is private."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="ple-align")
    where: dict[str, Any] = {"repo_id": options.to, "repo_type": parcel.kind}
    operations = [CommitOperationAdd(name, content) for name, content in parcel.files.items()]
    _asked(options, lambda: api.create_repo(**where, private=options.private, exist_ok=True))
    found = _asked(options, lambda: api.repo_info(**where))
    if options.private and not found.private:
        raise UsageError(f"{options.to} is there already and is public: say --no-private, or give another --to")
    others = [name for name in _names(found) if name not in parcel.files and name.endswith(ROWS_AND_WEIGHTS)]
    if others:
        raise UsageError(
            f"{options.to} holds {len(others)} files that are not of {options.source}, e.g. {others[0]}, and would be "
            "read with it: give another --to, or remove them there"
        )
    message = f"ple push: {options.source.absolute().name}"
    commit = _asked(options, lambda: api.create_commit(**where, operations=operations, commit_message=message))
    return str(commit), bool(found.private)


def _names(found: Any) -> Sequence[str]:
    return [file.rfilename for file in found.siblings or []]


def _asked(options: Push, ask: Callable[[], Any]) -> Any:
    """What the hub answers. Raises PleError in one sentence, whatever the client raises."""
    try:
        return ask()
    except Exception as error:
        cause = error.__cause__ or error  # the client wraps what went wrong with a file
        status = getattr(getattr(cause, "response", None), "status_code", None)
        advice = "run the same command again: what is there already is not sent twice"
        if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        raise PleError(f"--to {options.to}: the hub said no ({first_line(cause)}): {advice}") from error


def _say(message: str) -> None:
    print(f"push: {message}", file=sys.stderr, flush=True)
