"""Tables, records and atomic files: versions, refusals that list everything, and what survives a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import files, tables
from schemas.errors import DamagedError, LockedError, NewerError, PleError, UsageError
from schemas.holders import this_process
from schemas.recipe import load_recipe
from schemas.records import Commit, RoundManifest, read_record
from tests.conftest import FIXTURES, ROOT
from tests.run_dir import judge_report, purity_report
from tests.tables import table


def write(path: Path, rows: pa.Table, metadata: dict[bytes, bytes] | None) -> Path:
    pq.write_table(rows.replace_schema_metadata(metadata), path)
    return path


def test_exit_codes():
    assert [e.exit_code for e in (PleError, UsageError, DamagedError, LockedError)] == [1, 2, 3, 4]


# Tables


@pytest.mark.parametrize("kind", tables.SCHEMAS)
def test_later_columns_are_nullable_and_versions_cover_them(kind):
    for field in tables.SCHEMAS[kind]:
        assert 1 <= tables.since(field) <= tables.VERSIONS[kind]
        assert field.nullable or tables.since(field) == 1


def test_a_file_of_version_1_still_reads():
    """`reference` came with version 2 and reads as null.

    The file was written once, by version 1 of the schema, and never changes:

        rows = [
            {"y_logps": [-1.0, -0.5, -0.25], "y_prompt_logps": [-2.0, -1.0, -0.5, -0.125]},
            {"s": -3.5, "s_prompt": -3.5, "y_finish": "length"},
            {"y": "", "y_ids": [1], "y_empty": True, "s": 2.0, "s_prompt": -1.0, "x": "Grüße, 世界"},
        ]
        store.commit("pairs", 0, "00000-0123456789ab", tests.tables.table("pairs", rows), {"seed": 7})
    """
    path = FIXTURES / "pairs_v1.parquet"
    assert tables.read_metadata(path, "pairs")["version"] == 1
    rows = tables.read_table(path, "pairs")
    assert rows.schema.equals(tables.PAIRS)
    assert rows["query_id"].to_pylist() == ["q0", "q1", "q2"]
    assert rows["s"].to_pylist() == [0.25, -3.5, 2.0]
    assert rows["x"].to_pylist()[2] == "Grüße, 世界"
    assert rows["y_logps"].to_pylist() == [[-1.0, -0.5, -0.25], None, None]
    assert rows["reference"].to_pylist() == [None, None, None]
    some = tables.read_table(path, "pairs", ["reference", "s"])
    assert some.column_names == ["reference", "s"]


@pytest.mark.parametrize(
    ("report", "added"),
    [(purity_report("p"), "precision"), (judge_report("p"), "orders_disagree")],
    ids=["purity", "judge"],
)
def test_a_report_of_version_1_still_reads(report, added, tmp_path):
    """Version 2 added one field, which such a file says nothing of."""
    old = {name: value for name, value in json.loads(report.to_json()).items() if name != added}
    (tmp_path / "old.json").write_text(json.dumps(old | {"version": 1}))
    found = read_record(type(report), tmp_path / "old.json")
    assert found == report.model_copy(update={"version": 1, added: None})


def test_a_newer_version_is_refused(tmp_path):
    metadata = {b"ple": b'{"kind": "pairs", "version": 99}'}
    path = write(tmp_path / "new.parquet", table("pairs", [{}]), metadata)
    with pytest.raises(DamagedError, match=r"pairs version 99, this program knows up to 3: update the program"):
        tables.read_table(path, "pairs")


def test_a_wrong_file_is_refused_with_every_mismatch(tmp_path):
    wrong = table("pairs", [{}]).drop_columns(["s", "y_ids"])
    wrong = wrong.set_column(0, "query_id", pa.array([3])).append_column("mine", pa.array([True]))
    path = write(tmp_path / "wrong.parquet", wrong, None)
    with pytest.raises(DamagedError) as caught:
        tables.read_table(path, "pairs")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for fault in (
        "no `ple` metadata",
        "column `s` (float) is missing",
        "column `y_ids` (list<item: int32>) is missing",
        "column `query_id` is int64 instead of string",
        "column `mine` is unknown",
    ):
        assert fault in message
    assert "\n" not in message


def test_another_kind_is_refused(tmp_path):
    metadata = tables.metadata_bytes("responses", {})
    path = write(tmp_path / "r.parquet", table("responses", [{}]), metadata)
    with pytest.raises(DamagedError, match="holds a responses table, not a pairs table"):
        tables.read_table(path, "pairs")


@pytest.mark.parametrize("metadata", [b"", b"[]", b"{}", b'{"kind": "pairs", "version": "x"}', b"\xff"])
def test_broken_metadata_is_refused(tmp_path, metadata):
    path = write(tmp_path / "m.parquet", table("pairs", [{}]), {b"ple": metadata})
    with pytest.raises(DamagedError, match="no `ple` metadata"):
        tables.read_table(path, "pairs")


def test_nulls_in_a_required_column_are_refused(tmp_path):
    loose = pa.schema([field.with_nullable(True) for field in tables.PAIRS])
    rows = table("pairs", [{}]).cast(loose).set_column(1, "round", pa.nulls(1, pa.int32()))
    path = write(tmp_path / "n.parquet", rows, tables.metadata_bytes("pairs", {}))
    with pytest.raises(DamagedError, match="round"):
        tables.read_table(path, "pairs")


def test_a_missing_an_empty_and_a_foreign_file_are_damaged_not_tracebacks(tmp_path):
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "text.parquet").write_text("not parquet at all")
    for name, what in [("none", "is missing"), ("empty", "not a whole Parquet"), ("text", "not a whole Parquet")]:
        with pytest.raises(DamagedError, match=what) as caught:
            tables.read_table(tmp_path / f"{name}.parquet", "pairs")
        assert "ple verify" in str(caught.value)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=8)


@st.composite
def rows(draw):
    row = {"query_id": draw(TEXTS), "x": draw(TEXTS), "s": draw(st.floats(width=32, allow_nan=False))}
    row |= {"seed": draw(st.integers(0, 2**63 - 1)), "reference": draw(st.none() | TEXTS)}
    for arm in ("y", "y_prompt"):
        ids = draw(IDS)
        logps = st.lists(st.floats(max_value=0, width=32), min_size=len(ids), max_size=len(ids))
        row |= {arm: draw(TEXTS), f"{arm}_ids": ids, f"{arm}_logps": draw(st.none() | logps)}
    return row


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), max_size=6))
def test_rows_come_back_as_they_went(tmp_path_factory, drawn):
    before = table("pairs", drawn)
    path = tmp_path_factory.mktemp("round") / "t.parquet"
    write(path, before, tables.metadata_bytes("pairs", {"seed": 1}))
    assert tables.read_table(path, "pairs").equals(before)


def test_row_faults_name_the_rows():
    odd = [
        {},
        {"y_finish": "eos", "round": 4},
        {"y_logps": [-1.0]},
        {"s_prompt": float("nan")},
        {"s": float("-inf"), "query_id": "q0"},
    ]
    assert tables.row_faults("pairs", table("pairs", odd), 0) == [
        "another round in rows 1",
        "y_finish is neither stop nor length in rows 1",
        "y_logps has not one value an id in rows 2",
        "s is not finite in rows 4",
        "s_prompt is not finite in rows 3",
        "the key query_id='q0', round=0, sample=0 stands there twice",
    ]
    many = tables.row_faults("pairs", table("pairs", [{"y_finish": ""}] * 9), 0)
    assert many == ["y_finish is neither stop nor length in rows 0, 1, 2, 3, 4 and 4 more"]


# Records

COMMIT = Commit(kind="pairs", round=0, unit="u", file="pairs/u", rows=1, bytes=10, sha256="0" * 64)


def test_a_record_comes_back(tmp_path):
    (tmp_path / "c.json").write_text(COMMIT.to_json())
    assert read_record(Commit, tmp_path / "c.json") == COMMIT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "rows": -1, "more": 1}'])
def test_a_broken_record_is_refused_with_every_fault(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(DamagedError, match=r"not a readable Commit record") as caught:
        read_record(Commit, path)
    if "rows" in text:
        assert all(name in str(caught.value) for name in ("version", "rows", "more", "unit", "sha256"))


def test_manifests_name_what_differs():
    one = RoundManifest(round=0, settings={"seed": 0, "model": "m", "top_p": 1.0}, notes={"host": "a"})
    two = RoundManifest(round=0, settings={"seed": 1, "model": "m", "stop": []}, counts={"read": 3})
    assert one.differences(one, {}) == []
    assert one.differences(two, {}) == ["seed: 0, there 1", "stop: None, there []", "top_p: 1.0, there None"]
    assert one.differences(two, {"stop": [], "top_p": 1.0}) == ["seed: 0, there 1"], "what is missing is its default"


def test_a_record_of_a_newer_version_is_whole_but_not_ours(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(COMMIT.to_json().replace('"version": 2', '"version": 3'))
    with pytest.raises(NewerError, match=r"c.json has version 3; this ple reads 2: update it"):
        read_record(Commit, path)


# Files


def test_write_atomic_replaces_and_makes_directories(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_atomic(path, "one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_write_atomic_removes_what_a_killed_writer_of_the_same_file_left(tmp_path):
    dead = f"{this_process().machine}-999999999-1-{'0' * 32}.tmp"
    for name in ("b.txt", "other.txt"):
        (tmp_path / f".{name}.{dead}").write_text("half")
    files.write_atomic(tmp_path / "b.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".other.txt.{dead}", "b.txt"]


def test_write_new_and_link_new_never_overwrite(tmp_path):
    path = tmp_path / "once"
    assert files.write_new(path, "first", tmp_path)
    assert not files.write_new(path, "second", tmp_path)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["once"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    code = (
        "import sys; from schemas import files; from pathlib import Path\n"
        "with files._temporary(Path(sys.argv[1]), 'x.'):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        [leftover] = tmp_path.iterdir()
        assert not files.is_stale(leftover)
        assert files.remove_stale(tmp_path) == 0
    finally:
        writer.kill()
        writer.communicate()
    assert files.is_stale(leftover)
    assert files.remove_stale(tmp_path, "other.") == 0
    assert files.remove_stale(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [95, 1, 38], ids=["EOPNOTSUPP", "EPERM", "ENOSYS"])
def test_a_file_system_without_links_is_named(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PleError, match=r"no hard link possible .* use a local or NFS disk"):
        files.write_new(tmp_path / "f", "text", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PleError, match=r"file/sub/x: cannot write .* move it away"):
        files.write_atomic(tmp_path / "file" / "sub" / "x", "text")


def test_a_file_of_a_user_is_read_whole_without_its_mark_and_never_if_it_may_not_end(tmp_path):
    (tmp_path / "given").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfa")
    assert files.read_given(tmp_path / "given") == b"\xef\xbb\xbfa"
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "recipe .*pipe is no regular file"),
        (tmp_path, "no regular file but a folder"),
        (tmp_path / "none", "none cannot be read: No such file"),
    ]:
        with pytest.raises(UsageError, match=message):
            files.read_given(path, "recipe")
    (tmp_path / "latin").write_bytes(b"\xe4")
    with pytest.raises(UsageError, match=r"template .*latin is not UTF-8 text"):
        files.read_given_text(tmp_path / "latin", "template")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 10**5, "nested too deep"),
        ("rounds: " + "9" * 5000, "longer than 4,096 characters"),
        ("model: 2024-99-99", "not valid YAML: month must be"),
    ],
)
def test_a_recipe_that_python_cannot_take_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(path)
    path.write_text("\ufeffmodel: m\nqueries: q\nprinciples: hh\nreward_model: r\nrun_dir: d\n")
    assert load_recipe(path).model == "m"
    with pytest.raises(UsageError, match=message):
        load_recipe(path, [f"model={text.partition(': ')[2]}"])


@pytest.mark.parametrize("write", [files.write_atomic, lambda path, data: files.write_new(path, data, path.parent)])
def test_a_write_that_the_disk_loses_is_noticed(tmp_path, monkeypatch, write):
    with monkeypatch.context() as losing:
        losing.setattr("os.fstat", lambda fd: os.stat_result((0o100644, 0, 0, 1, 0, 0, 3, 0, 0, 0)))
        with pytest.raises(PleError, match="Input/output error"):
            write(tmp_path / "record.json", "{}")
    assert list(tmp_path.iterdir()) == []
