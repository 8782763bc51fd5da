"""Small tables in the form of the store, for the tests of everything that reads or writes it."""

from typing import Any

import pyarrow as pa

from schemas.tables import SCHEMAS


def table(kind: str, rows: list[dict[str, Any]], round: int = 0) -> pa.Table:
    """One row for each dict of `rows`; what a dict does not say is filled in, and keys differ row by row."""
    columns = SCHEMAS[kind].names
    filled = [{**_default(index, round), **row} for index, row in enumerate(rows)]
    return pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in filled], schema=SCHEMAS[kind])


def _default(index: int, round: int) -> dict[str, Any]:
    return {
        "query_id": f"q{index}",
        "round": round,
        "sample": 0,
        "x": f"query {index}",
        "y": "so so",
        "y_prompt": "very good",
        "x_ids": [5, 6, 7],
        "y_ids": [8, 9, 1],
        "y_prompt_ids": [10, 11, 12, 1],
        "y_finish": "stop",
        "y_prompt_finish": "stop",
        "y_empty": False,
        "y_prompt_empty": False,
        "principle": "Be kind.",
        "policy": "tiny@0123456789ab",
        "seed": 7,
        "s": 0.25,
        "s_prompt": 1.0,
        "reward_model": "judge@0123456789ab",
    }
