"""Tables as Parquet files with their metadata. Which rows belong where, others know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.files import write_atomic
from schemas.tables import SCHEMAS, as_written, metadata_bytes


def parquet_bytes(kind: str, table: pa.Table, provenance: Mapping[str, Any], row_group: int | None = None) -> bytes:
    """The file of a table of `kind`: zstd, page checksums, `provenance` (JSON values) in its metadata.

    In memory, so that a full disk meets one plain write.
    """
    sink = pa.BufferOutputStream()
    table, version = as_written(kind, table)
    pq.write_table(
        table.replace_schema_metadata(metadata_bytes(kind, provenance, version)),
        sink,
        row_group_size=row_group,
        compression="zstd",
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def save_rows(path: Path, kind: str, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write rows of `kind` with their metadata, replacing an older file in one step. Raises PleError.

    A column that a row lacks is null there.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMAS[kind])
    write_atomic(path, parquet_bytes(kind, table, provenance))
