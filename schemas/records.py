"""The JSON records beside the tables: what was committed, and what a round of generation was asked to do.

Only their form and how they are read: `ple_data.storage.store` writes them.
"""

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from schemas.errors import DamagedError, NewerError, PleError

TRAINED = "ple.json"
"""The record in the directory of a training command. It is written last: where it is, the training is finished."""


class Strict(BaseModel):
    """A part of a file: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(Strict):
    """A versioned JSON file: unknown fields are refused, and so is a newer version."""

    def to_json(self) -> str:
        """The record as it stands in its file."""
        return self.model_dump_json(indent=1) + "\n"


class Commit(Record):
    """One committed shard. `file` is relative to the data directory; `bytes` and `sha256` are of the whole file."""

    version: Literal[1] = 1
    kind: Literal["responses", "pairs", "answers"]
    round: int = Field(ge=0)
    unit: str = Field(min_length=1)
    file: str
    rows: int = Field(ge=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class RoundManifest(Record):
    """What one round of generation was asked to do, frozen when it first starts.

    `settings` decide the rows: two starts of a round must agree on each. `counts` (queries read, kept,
    dropped) and `notes` (machine, versions) are for people.
    """

    version: Literal[1] = 1
    round: int = Field(ge=0)
    settings: dict[str, JsonValue]
    counts: dict[str, int] = Field(default_factory=dict)
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


R = TypeVar("R", bound=Record)


def read_record(model: type[R], path: Path, advice: str = "run `ple verify` on its data directory") -> R:
    """The record in a JSON file. Raises DamagedError that lists every fault and ends with the advice; PleError if it
    cannot be read.
    """
    try:
        return model.model_validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise PleError(f"{path}: cannot read ({error.strerror}): check its permissions and the disk") from error
    except ValidationError as error:
        known = model.model_fields["version"].default
        for fault in error.errors():
            if fault["loc"] == ("version",) and isinstance(fault["input"], int) and fault["input"] > known:
                raise NewerError(f"{path} has version {fault['input']}; this ple reads {known}: update it") from error
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or 'text'}: {f['msg']}" for f in error.errors())
        what = f"not a readable {model.__name__} record ({faults})"
        raise DamagedError(f"{path}: {what}: {advice}") from error
