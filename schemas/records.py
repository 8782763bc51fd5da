"""The JSON records beside the tables: what was committed, and what a round of generation was asked to do.

Only their form and how they are read: `ple_data.storage.store` writes them.
"""

import codecs
import hashlib
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from schemas.errors import DamagedError, NewerError
from schemas.files import read_file

TRAINED = "ple.json"
VERIFY = "run `ple verify` on its data directory"
"""The record in the directory of a training command. It is written last: where it is, the training is finished."""

Round = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
SHA256, UNIT_NAME = "^[0-9a-f]{64}$", "^[0-9A-Za-z][0-9A-Za-z_-]{0,150}$"
Sha256 = Annotated[str, Field(pattern=SHA256)]
UnitName = Annotated[str, Field(pattern=UNIT_NAME)]
"""A unit's name stands in names of files: it never leads to another folder."""
FileName = Annotated[str, Field(pattern=r"^\w[\w.+ -]{0,200}$")]
"""A file's name, without a folder."""


def _readable(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if (day := settings.get("template_date")) is not None:
        date.fromisoformat(str(day))
    if wrong := [name for name in ("sampling", "reward_options") if not isinstance(settings.get(name) or {}, dict)]:
        raise ValueError(f"{wrong[0]} is no mapping")
    return settings


Settings = Annotated[dict[str, JsonValue], AfterValidator(_readable)]
"""What a round or a result depends on, by name."""


class Strict(BaseModel):
    """A part of a file: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(Strict):
    """A versioned JSON file: unknown fields are refused, and so is a newer version."""

    def to_json(self) -> str:
        """The record as it stands in its file."""
        return self.model_dump_json(indent=1) + "\n"


class Sealed(Record):
    """A record whose file also holds, as `seal`, the SHA-256 of its other fields; those of version 1 had none."""

    def to_json(self) -> str:
        """The record as it stands in its file, with its seal."""
        fields = self.model_dump(mode="json")
        return json.dumps({**fields, "seal": seal_of(fields)}, indent=1, ensure_ascii=False) + "\n"

    @model_validator(mode="before")
    @classmethod
    def _unsealed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and ("seal" in fields or fields.get("version", 1) != 1):
            seal, fields = fields.get("seal"), {name: value for name, value in fields.items() if name != "seal"}
            if seal != seal_of(fields) and fields.get("version") in (1, cls.model_fields["version"].default):
                raise ValueError("changed since it was written: its seal is not that of its fields")
        return fields


_SORTED = json.JSONEncoder(sort_keys=True)


def seal_of(fields: dict[str, Any]) -> str:
    """The SHA-256 of a record's fields."""
    return hashlib.sha256(_SORTED.encode(fields).encode()).hexdigest()


Kind = Literal["responses", "pairs", "answers", "rewards"]
"""The tables that a data directory holds."""


class Commit(Sealed):
    """One committed shard. `file` is relative to the data directory; `bytes` and `sha256` are of the whole file."""

    version: Literal[1, 2] = 2
    kind: Kind
    round: Round
    unit: UnitName
    file: str
    rows: Count
    bytes: int = Field(gt=0, lt=2**63)
    sha256: Sha256


class RoundManifest(Sealed):
    """What one round of generation was asked to do, frozen when it first starts.

    `settings` decide the rows: two starts of a round must agree on each. `counts` (queries read, kept,
    dropped) and `notes` (machine, versions) are for people.
    """

    version: Literal[1, 2] = 2
    round: Round
    settings: Settings
    counts: dict[str, Count] = Field(default_factory=dict)
    notes: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Rows of the whole round; None where the record does not say."""
        queries, samples = self.counts.get("queries_taken"), self.settings.get("samples")
        return queries * samples if queries is not None and isinstance(samples, int) else None

    def differences(self, other: "RoundManifest", defaults: Mapping[str, JsonValue]) -> list[str]:
        """Each setting that differs, as 'name: this value, there that value'. One that is missing is its default."""
        names = sorted(self.settings.keys() | other.settings.keys())
        ours, theirs = ({**defaults, **manifest.settings} for manifest in (self, other))
        return [
            f"{name}: {ours.get(name)!r}, there {theirs.get(name)!r}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]


class Probe(Sealed):
    """What told a round's policy on its first server: log-probabilities, in nats, of the likeliest tokens (by id) after
    some short texts."""

    version: Literal[1] = 1
    round: Round
    logps: list[dict[str, float]]


R = TypeVar("R", bound=Record)


def read_record(model: type[R], path: Path, advice: str = VERIFY) -> R:
    """The record in a JSON file. Raises DamagedError that lists every fault and ends with the advice; PleError if it
    cannot be read.
    """
    try:
        return model.model_validate_json(read_file(path).removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        known = model.model_fields["version"].default
        for fault in error.errors():
            if fault["loc"] == ("version",) and isinstance(fault["input"], int) and fault["input"] > known:
                raise NewerError(f"{path} has version {fault['input']}; this ple reads {known}: update it") from error
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc'])) or 'text'}: {f['msg'].removeprefix('Value error, ')}"
            for f in error.errors()
        )
        what = f"not a readable {model.__name__} record ({faults})"
        raise DamagedError(f"{path}: {what}: {advice}") from error
