"""Result tables on disk: a Parquet file of a known kind, written whole or not at all. Stores are `ple_data.store`'s."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.files import write_atomic
from schemas.tables import SCHEMAS, metadata_bytes


def save_rows(path: Path, kind: str, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write rows of `kind` with their metadata, replacing an older file in one step. Raises PleError."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMAS[kind])
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(metadata_bytes(kind, provenance)),
        sink,
        compression="zstd",
        write_page_checksum=True,
    )
    write_atomic(path, sink.getvalue().to_pybytes())
