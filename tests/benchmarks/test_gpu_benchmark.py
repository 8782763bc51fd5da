"""benchmarks/gpu.py on the CPU: every section runs to its end, and a limit costs no more than what it must.

What it measures is not tested, and nothing here needs a GPU or a network.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from benchmarks import gpu_pack
from benchmarks.on_gpu.sections import SECTIONS, NotHere, Results
from benchmarks.on_gpu.worlds import pieces
from tests.conftest import ROOT

NEEDS_GPU = "needs a GPU"
LONG = "a,g"
BUSY = ("--limit", "a=280", "--limit", "g=280")
"""Limits for a machine that has other things to do."""
STEPS_OF_A = (
    "machine",
    "llama: one step, bf16",
    "llama: train as on the CPU",
    "llama: score as on the CPU",
    "llama: eval as on the CPU",
    "llama: purity as on the CPU",
    "llama: train, bf16, trust region, gradient checkpointing",
    "llama: ple-train resumed as if never killed",
    "llama: ple run killed and resumed",
    "qwen2: train, float32",
)


def measure(output: Path, *words: str, cpu: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *(["--cpu"] if cpu else []), "--output", output, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def results(output: Path) -> dict[str, Any]:
    files = {section.name: section.file(output, "json") for section in SECTIONS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Every section that is over in seconds."""
    output = tmp_path_factory.mktemp("gpu")
    return output, measure(output, "--skip", LONG)


def assert_whole(output: Path, ended: subprocess.CompletedProcess[str], letters: str) -> None:
    """Those sections ran to their end, and no part of one failed."""
    found = results(output)
    wrong = {
        part: values["traceback"]
        for result in found.values()
        for part, values in result["parts"].items()
        if "traceback" in values
    }
    assert not wrong, "\n".join(wrong.values())
    assert ended.returncode == 0, ended.stderr
    assert list(found) == [section.name for section in SECTIONS if section.letter in letters]
    assert all(result["complete"] for result in found.values())
    assert (output / "summary.txt").read_text() in ended.stdout


@pytest.mark.long
def test_quick_sections_run_to_their_end_on_a_cpu(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert_whole(*quick, "bcdef")


@pytest.mark.long
def test_long_sections_run_to_their_end_on_a_cpu(tmp_path: Path) -> None:
    assert_whole(tmp_path, measure(tmp_path, "--only", LONG, *BUSY), LONG)
    parts = results(tmp_path)["runs"]["parts"]
    assert set(STEPS_OF_A) <= set(parts)
    assert parts["llama: ple run killed and resumed"]["killed_after_step"] >= 1


@pytest.mark.long
def test_what_only_a_gpu_can_do_is_named_and_is_no_failure(quick: tuple[Path, Any]) -> None:
    found = results(quick[0])
    assert found["profile"]["parts"]["small: training step waits"]["not_here"] == NEEDS_GPU
    one_call = [part for part in found["attention"]["parts"] if part.endswith(": one call")]
    assert one_call
    assert {found["attention"]["parts"][part]["not_here"] for part in one_call} == {NEEDS_GPU}


def test_without_a_gpu_it_falls_back_to_small_sizes_on_the_cpu(tmp_path: Path) -> None:
    ended = measure(tmp_path, "--only", "c", cpu=False)
    assert ended.returncode == 0, ended.stdout
    assert results(tmp_path)["head"]["vocabulary"] < 10_000
    assert "torch finds no GPU: small sizes on the CPU" in (tmp_path / "c-head.log").read_text()


@pytest.mark.long
def test_a_limit_that_is_too_short_costs_one_section_and_keeps_what_it_measured(tmp_path: Path) -> None:
    ended = measure(tmp_path, "--only", "a,c", "--limit", "a=12", "--archive", tmp_path / "all.tar.gz")
    assert ended.returncode == 1
    found = results(tmp_path)
    assert list(found) == ["runs", "head"]
    assert not found["runs"]["complete"]
    assert "machine" in found["runs"]["parts"]
    assert found["head"]["complete"]
    assert "a runs: STOPPED" in (tmp_path / "summary.txt").read_text()
    with tarfile.open(tmp_path / "all.tar.gz") as kept:
        assert {f"{tmp_path.name}/{name}" for name in ("a-runs.json", "c-head.log")} <= set(kept.getnames())


def test_a_section_without_results_is_said_to_have_none(tmp_path: Path) -> None:
    ended = measure(tmp_path, "--only", "c", "--limit", "c=0.1")
    assert ended.returncode == 1
    assert "c head: NOTHING" in (tmp_path / "summary.txt").read_text()


def test_unknown_section_is_refused(tmp_path: Path) -> None:
    ended = measure(tmp_path, "--only", "x")
    assert ended.returncode == 2
    assert "'x' is none of a, b, c, d, e, g, f" in ended.stderr


def test_results_keep_a_traceback_and_go_on(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such thing")

    def lack() -> None:
        raise NotHere("needs a fairy")

    kept = Results(tmp_path / "a.json", "a")
    assert not kept.attempt("wrong", fail)
    assert kept.attempt("lacking", lack)
    assert kept.attempt("right", lambda: {"found": 1.5})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["failed"] == ["wrong"]
    assert "ValueError: no such thing" in found["parts"]["wrong"]["traceback"]
    assert found["parts"]["lacking"] == {"not_here": "needs a fairy"}
    assert found["parts"]["right"]["found"] == 1.5
    assert not found["complete"]


def test_pieces_of_a_model_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("m.gguf.01", "m.gguf.00", "notes.txt"):
        (tmp_path / name).touch()
    assert [piece.name for piece in pieces(tmp_path)] == ["m.gguf.00", "m.gguf.01"]
    assert list(pieces(tmp_path / "m.gguf.01")) == [tmp_path / "m.gguf.01"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a model folder"):
        next(pieces(tmp_path / "nothing"))


def test_pack_follows_what_wheels_ask_of_one_another(tmp_path: Path) -> None:
    wheel = tmp_path / "pydantic-2.0-py3-none-any.whl"
    lines = [
        "Name: pydantic",
        "Requires-Dist: pydantic_core==2.50.4",
        "Requires-Dist: typing-extensions>=4.6; python_version < '3.13'",
        "Requires-Dist: annotated-types>=0.6; python_version < '3.9'",
        "Requires-Dist: click; extra == 'cli'",
        "Requires-Dist: elsewhere",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pydantic-2.0.dist-info/METADATA", "\n".join(lines) + "\n")
    asked = gpu_pack.requirements(gpu_pack.metadata(wheel), gpu_pack.LACKING, "3.12")
    assert asked == {"pydantic-core": SpecifierSet("==2.50.4"), "typing-extensions": SpecifierSet(">=4.6")}
    assert gpu_pack.request("pydantic-core", "2.50.5", asked["pydantic-core"]) == "pydantic-core==2.50.4"
    assert gpu_pack.request("typing-extensions", "4.16.0", asked["typing-extensions"]) == "typing-extensions==4.16.0"
    assert gpu_pack.request("dill", None, None) == "dill"


def test_pack_takes_versions_of_constraints() -> None:
    assert gpu_pack.pinned("# a\npolars==2.1.0\nPydantic_Core==2.5 ; python_version > '3'\nx>=1\n") == {
        "polars": "2.1.0",
        "pydantic-core": "2.5",
    }


def test_pack_refuses_more_than_the_limit() -> None:
    sizes = {"small.whl": 2**20, "large.whl": 3 * 2**20}
    assert not gpu_pack.over_limit(sizes, 4)
    assert "large.whl" in gpu_pack.over_limit(sizes, 3.9)
    assert "4.00 MiB  in all" in gpu_pack.listing(sizes)


def test_every_package_is_packed_after_those_that_need_it() -> None:
    order = {name: at for at, name in enumerate(gpu_pack.LACKING)}
    for parent, child in (("polars", "polars-runtime-32"), ("pydantic", "pydantic-core"), ("datasets", "dill")):
        assert order[parent] < order[child]
