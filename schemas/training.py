"""The JSON records that a training leaves for other processes: forms only, nothing computed.

`ple.json` stands in the output of every training command, `state.json` in a checkpoint, `snapshot.json` says which
shards a training sees, `stages.json` what `ple run` has done.
"""

from typing import Literal

from pydantic import Field, JsonValue

from schemas.records import Count, FileName, Record, Round, Settings, Sha256, Strict, UnitName

METRICS = {"kind": "train_metrics", "version": 1}
"""In the metadata of a file of metrics: one row a step, numbers only; a training's columns are its objective's."""


class Trained(Record):
    """`ple.json`, written last: where it is, the training is finished.

    settings: what the result depends on (`ple_data.common.settings`). machine: what was chosen for the machine. cost:
    `ple_train.engine.output.training_cost`. files: SHA-256 by name.
    """

    version: Literal[1] = 1
    kind: Literal["ple", "sft", "reward", "baseline"]
    settings: Settings
    steps: Count
    machine: dict[str, JsonValue] = Field(default_factory=dict)
    cost: dict[str, int | float] = Field(default_factory=dict)
    files: dict[FileName, Sha256]
    packages: dict[str, str] = Field(default_factory=dict)


class CheckpointState(Record):
    """`state.json` of a checkpoint: after which step, with which settings, and whose (None in files of 0.1.0)."""

    version: Literal[1] = 1
    command: str | None = None
    step: Count
    settings: Settings
    machine: dict[str, JsonValue] = Field(default_factory=dict)


class SnapshotPart(Strict):
    """One shard of pairs; `rows` of it are trained on. `store` is where it lay."""

    store: str
    round: Round
    unit: UnitName
    sha256: Sha256
    rows: Count


class Snapshot(Record):
    """`snapshot.json`: the shards that a training sees, frozen when it first started."""

    version: Literal[1] = 1
    settings: Settings
    shards: list[SnapshotPart]


class StageRecord(Strict):
    """One start of a stage. exit_code None: it did not end, or its `ple run` was killed. *_bytes: what it held at most,
    of the host's memory and of each GPU's."""

    stage: str
    round: Round | None
    command: list[str]
    start: str
    end: str | None = None
    seconds: float | None = None
    exit_code: int | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: dict[str, int] = Field(default_factory=dict)


class Stages(Record):
    """`stages.json`: every start of every stage of a run, in order."""

    version: Literal[1] = 1
    stages: list[StageRecord] = Field(default_factory=list)
