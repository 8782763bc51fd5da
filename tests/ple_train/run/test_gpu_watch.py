"""`ple_train.run.gpu_watch` beside a stand-in for `nvidia-smi`: a script that says what a file says, as the real one
does (no GPU here; `benchmarks/gpu.py` runs the real one)."""

import time

import pytest

from ple_train.run import gpu_watch
from ple_train.run.gpu_watch import GpuWatch

MIB = 2**20
STAND_IN = """#!/bin/sh
[ "$1" = --query-gpu=index,uuid,memory.used ] || exit 1
while cat {file}; do sleep 0.02; done
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Sets MiB in use by GPU, all at once."""
    said = tmp_path / "said"

    def say(*used: int) -> None:
        lines = "".join(f"{gpu}, GPU-{gpu}abc, {mib}\n" for gpu, mib in enumerate(used))
        (tmp_path / "new").write_text(lines)
        (tmp_path / "new").rename(said)

    say(0)
    program = tmp_path / "nvidia-smi"
    program.write_text(STAND_IN.format(file=said))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return say


def test_the_most_of_a_stage_is_kept_and_what_it_leaves_is_told(driver, monkeypatch):
    monkeypatch.setattr(gpu_watch, "RELEASE_SECONDS", 0.3)
    driver(500, 0)
    with GpuWatch() as watch:
        watch.begin()
        driver(61_000, 10)
        watch._await_news()
        driver(500, 10)
        assert watch.end() == ({0: 61_000 * MIB}, {})
        watch.begin()
        driver(500, 9_000)
        assert watch.end() == ({1: 9_000 * MIB}, {1: 8_990 * MIB})


def test_a_stage_ends_when_the_driver_has_freed_what_it_held(driver, monkeypatch):
    with GpuWatch() as watch:
        watch.begin()
        driver(40_000)
        watch._await_news()
        released = iter([None, None])
        waiting = watch._await_news

        def later() -> None:
            waiting()
            if next(released, "now") == "now":
                driver(0)

        monkeypatch.setattr(watch, "_await_news", later)
        assert watch.end() == ({0: 40_000 * MIB}, {})


@pytest.mark.parametrize("named", ["1", "GPU-1abc", "GPU-1"])
def test_only_visible_gpus_count(driver, monkeypatch, named):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    driver(0, 0)
    with GpuWatch() as watch:
        watch.begin()
        driver(70_000, 30_000)
        watch._await_news()
        driver(70_000, 0)
        assert watch.end() == ({1: 30_000 * MIB}, {})


def test_a_driver_that_dies_leaves_nothing_to_wait_for(driver):
    with GpuWatch() as watch:
        watch.begin()
        driver(40_000)
        watch._await_news()
        watch._process.kill()
        watch._process.wait()
        began = time.monotonic()
        assert watch.end() == ({0: 40_000 * MIB}, {})
        assert time.monotonic() - began < gpu_watch.RELEASE_SECONDS / 2


def test_without_a_driver_nothing_is_watched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuWatch() as watch:
        watch.begin()
        assert watch.end() == ({}, {})


def test_a_driver_that_fails_is_no_hindrance(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not reach the driver'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with GpuWatch() as watch:
        watch.begin()
        assert watch.end() == ({}, {})
