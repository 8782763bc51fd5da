"""Work on several GPUs or machines: actors of Ray, each with an engine or a reward model of its own.

Ray places them, watches them and starts those again that died with a process or a machine. What they were at goes to
whoever is free. The process that calls hands work out and takes results back; workers need the model and this package,
and no shared disk. What passes between them is pickled by Ray, between processes of one user's cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ple_data.common.extras import need
from ple_data.common.watchdog import Watchdog
from schemas.errors import PleError, UsageError, first_line

TRIES = 3
"""Workers that may die over a piece of work before it is given up."""
PATIENCE = 60.0
"""Seconds without any worker after which it is said that they are waited for."""
PAUSE = 0.5
"""Seconds after which a worker that Ray is starting again is asked again."""
NODE_DIED = "node has died"
"""What Ray says of a worker whose machine is gone."""
CONNECT_SECONDS = 10.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

Key = TypeVar("Key")
Job = TypeVar("Job")
Result = TypeVar("Result")
Outcome = tuple[bool, Any]
"""Whether it worked; the result, or whether the error is a UsageError and what it says."""


@dataclass(frozen=True)
class Wanted:
    """How many workers, on which cluster (None: one of this machine, for this command), with how many GPUs each where
    the cluster has some."""

    workers: int
    address: str | None = None
    gpus: int = 1


class Pool(Generic[Key, Job, Result]):
    """`make` is called in every worker; what it gives is called with each piece of work there, and has `told`, which is
    kept here by worker once that one is up. beside: pieces that a worker has at once; threads: those it works on at
    once.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Job], Result]],
        wanted: Wanted,
        say: Callable[[str], None],
        *,
        beside: int = 2,
        threads: int = 1,
    ) -> None:
        """Start the workers, and wait for the first. Raises UsageError where there is no room for any."""
        need("ray", "--workers needs")
        self._say, self._beside = say, beside
        address = wanted.address or os.environ.get("RAY_ADDRESS")
        self._watchdog = None if address else Watchdog()  # what Ray starts here outlives a caller that is killed
        self.told: dict[int, Any] = {}
        self._deaths: dict[int, int] = dict.fromkeys(range(wanted.workers), 0)
        try:
            self._ray = _connect(wanted, address)
            how = _resources(self._ray, wanted, say) | {"max_restarts": -1, "max_concurrency": threads}
            actor = self._ray.remote(_Worker).options(**how)
            self._actors = [actor.remote(make) for _ in range(wanted.workers)]
            self._coming = {worker.begin.remote(): at for at, worker in enumerate(self._actors)}
            began, said = time.monotonic(), False
            while not self.told:
                for ref in self._ray.wait(list(self._coming), timeout=1.0)[0]:
                    self._came(ref)
                if not said and time.monotonic() - began > PATIENCE:
                    said = True
                    say(f"no worker yet: waiting for Ray to find room ({_room(self._ray)})")
        except BaseException:
            self.close()
            raise

    def each(self, jobs: Iterator[tuple[Key, Job]]) -> Iterator[tuple[Key, Result]]:
        """Each piece of work with its result, as it is done; the next is asked for when a worker has room for it.

        Raises PleError that a worker raised, or where one piece of work ended `TRIES` workers.
        """
        running: dict[Any, tuple[int, Key, Job, int]] = {}
        again: deque[tuple[Key, Job, int]] = deque()
        more = True
        while True:
            while (more or again) and (free := self._free(running)) is not None:
                if again:
                    key, job, deaths = again.popleft()
                elif (found := next(jobs, None)) is not None:
                    (key, job), deaths = found, 0
                else:
                    more = False
                    break
                running[self._actors[free].work.remote(job)] = (free, key, job, deaths)
            if not running and not again and not more:
                return
            for ref in self._ray.wait([*running, *self._coming])[0]:
                if ref in self._coming:
                    self._came(ref)
                    continue
                at, key, job, deaths = running.pop(ref)
                try:
                    yield key, self._result(ref)
                except self._ray.exceptions.RayError as error:
                    self._lost(at, error)
                    if deaths + 1 == TRIES:
                        what = f"{key}: {TRIES} workers died over it, one after the other ({first_line(error)})"
                        raise PleError(f"{what}; what was done before is kept") from error
                    again.append((key, job, deaths + 1))

    def close(self) -> None:
        """End the workers, and the cluster where it is our own."""
        ray, self._ray = getattr(self, "_ray", None), None
        try:
            if ray is not None:
                for actor in getattr(self, "_actors", ()):
                    ray.kill(actor)
                ray.shutdown()
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()

    def _free(self, running: dict[Any, tuple[int, Key, Job, int]]) -> int | None:
        """The worker that has the least to do, if it has room."""
        load = dict.fromkeys(self.told, 0)
        for at, *_ in running.values():
            if at in load:
                load[at] += 1
        least = min(load, key=lambda at: load[at], default=None)
        return least if least is not None and load[least] < self._beside else None

    def _came(self, ref: Any) -> None:
        """A worker is up, or has died at its start."""
        at = self._coming.pop(ref)
        try:
            self.told[at], self._deaths[at] = self._result(ref), 0
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.ActorUnavailableError) or NODE_DIED in str(error):
                time.sleep(PAUSE)  # Ray is at it
            else:
                self._deaths[at] += 1
            if self._deaths[at] == TRIES:
                raise PleError(f"a worker died at its start {TRIES} times ({first_line(error)})") from error
            self._coming[self._actors[at].begin.remote()] = at

    def _lost(self, at: int, error: Exception) -> None:
        """A worker died: it is waited for again."""
        if self.told.pop(at, None) is not None:
            self._say(f"worker {at + 1} is gone ({first_line(error)}): its work goes to others")
            self._coming[self._actors[at].begin.remote()] = at

    def _result(self, ref: Any) -> Any:
        """What a worker gave. Raises what it raised, RayError where it died."""
        try:
            worked, found = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise PleError(f"a worker failed: {first_line(error.cause or error)}") from error
        if worked:
            return found
        is_usage, what = found
        raise (UsageError if is_usage else PleError)(what)


class _Worker:
    """What runs as an actor."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made, self._lock = make, None, threading.Lock()

    def begin(self) -> Outcome:
        """What the object tells of itself, which is made first."""
        return _tried(lambda: self._object().told)

    def work(self, job: Any) -> Outcome:
        """What it gives for a piece of work; a worker that was started again meanwhile makes it anew."""
        return _tried(lambda: self._object()(job))

    def _object(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def _tried(work: Callable[[], Any]) -> Outcome:
    try:
        return True, work()
    except PleError as error:
        return False, (isinstance(error, UsageError), f"{error} (on {socket.gethostname()})")


def _connect(wanted: Wanted, address: str | None) -> Any:
    """Ray, connected to a cluster that is there or to one that ends with this process."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    how: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    own = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdecimal():
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself tries for minutes
            ray.init(address=address, **how)
        else:
            cores = max(wanted.workers, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **how)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"--ray {address}" if address else "--workers"
        raise UsageError(
            f"{where}: no cluster of Ray there ({first_line(error)}); start one, or check the address"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)  # Ray puts its own there
    return ray


def _resources(ray: Any, wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """What a worker asks Ray for. Raises UsageError where a cluster of our own has no room for all."""
    there = ray.cluster_resources()
    gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    asked = {"num_gpus": wanted.gpus, "num_cpus": 1} if gpus else {"num_cpus": 1}
    room = gpus // wanted.gpus if gpus and wanted.gpus else cores
    if room < wanted.workers:
        each = f", {wanted.gpus} GPUs each" if gpus else ""
        what = f"--workers {wanted.workers}: there is room for {room} ({_room(ray)}{each})"
        if not wanted.address and not os.environ.get("RAY_ADDRESS"):
            raise UsageError(f"{what}; ask for fewer")
        say(f"{what}; the others start when the cluster grows")
    return asked


def _room(ray: Any) -> str:
    there = ray.cluster_resources()
    return f"{int(there.get('GPU', 0))} GPUs and {int(there.get('CPU', 0))} cores on {len(ray.nodes())} nodes"
