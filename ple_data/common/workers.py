"""Work on several GPUs or machines: actors of Ray, each with an engine or a reward model of its own.

Ray places them, watches them and starts those again that died with a process or a machine. What they were at goes to
whoever is free. The process that calls hands work out and takes results back; workers need the model and this package,
and no shared disk. What passes between them is pickled by Ray, between processes of one user's cluster.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ple_data.common.extras import need
from ple_data.common.loading import is_out_of_memory
from ple_data.common.terminal import printable
from ple_data.common.watchdog import Watchdog
from schemas.errors import PleError, UsageError, first_line

TRIES = 3
"""Workers that may die over a piece of work before it is given up; those that went with their machine do not count."""
MOST_TRIES = 10
"""Workers that may die over it, whatever else went."""
PATIENCE, LONGEST = 60.0, 1800.0
"""Seconds without any worker after which it is said that they are waited for, and after which that is given up."""
LOOK = 2.0
"""Seconds between two looks at what is under way."""
PAUSE = 0.5
"""Seconds after which a worker that Ray is starting again is asked again."""
CONNECT_SECONDS = 10.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
WORDS = 300
"""Characters of what a worker said last that are shown."""

Key = TypeVar("Key")
Job = TypeVar("Job")
Result = TypeVar("Result")
Outcome = tuple[bool, Any]
"""Whether it worked; the result, or whether the error is a UsageError and what it says."""


@dataclass(frozen=True)
class Wanted:
    """How many workers, on which cluster (None: one of this machine, for this command), with how many GPUs each where
    the cluster has some. needs_gpus: they work on nothing else, so that a cluster may have to grow first."""

    workers: int
    address: str | None = None
    gpus: int = 1
    needs_gpus: bool = False


@dataclass(frozen=True)
class Place:
    """Where a worker runs: machine, Ray's name of it, process, and the file that gets what it says."""

    host: str
    node: str
    pid: int
    log: str

    def last_words(self) -> str:
        """The last line that it wrote, where its file is on this machine; else where that is."""
        if self.host != socket.gethostname() or not (path := Path(self.log)).is_file():
            return f"what it said is in {self.log} there"
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
        said = [line.strip() for line in lines if line.strip() and not line.startswith((":", "[20"))]  # Ray's own marks
        return f"its last words: {printable(said[-1][:WORDS])}" if said else "it said nothing"


@dataclass
class _Piece(Generic[Key, Job]):
    """A piece of work, and the machines of the workers that died while they had it."""

    key: Key
    job: Job
    deaths: list[str] = field(default_factory=list)


class Pool(Generic[Key, Job, Result]):
    """`make` is called in every worker; what it gives is called with each piece of work there, and has `told`, which is
    kept here by worker once that one is up. beside: pieces that a worker has at once; threads: those it works on at
    once. looks: it has `under_way` too, which tells in a thread of its own how much of these is done.

    Nobody can tell which of its pieces a worker died over: each is tried again with a worker to itself.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Job], Result]],
        wanted: Wanted,
        say: Callable[[str], None],
        *,
        beside: int = 2,
        threads: int = 1,
        looks: bool = False,
    ) -> None:
        """Start the workers, and wait for the first. Raises UsageError where there is no room for any."""
        need("ray", "--workers needs")
        self._say, self._beside = say, beside
        address = wanted.address or os.environ.get("RAY_ADDRESS")
        self._held = ExitStack()
        if not address:
            self._held.callback(Watchdog().stop)  # what Ray starts here outlives a caller that is killed
        self._held.enter_context(redirect_stdout(sys.stderr))  # Ray prints of workers that died
        self.told: dict[int, Any] = {}
        self._places: dict[int, Place] = {}
        self._deaths: dict[int, list[str]] = {at: [] for at in range(wanted.workers)}
        self._none_since, self._none_said = time.monotonic(), False
        self._under_way: dict[int, int] = {}
        self._looks: dict[Any, int] = {}
        self._looked = time.monotonic()
        try:
            self._ray = _connect(wanted, address)
            how = _resources(self._ray, wanted, say) | {"max_restarts": -1, "max_concurrency": threads}
            how |= {"concurrency_groups": {"look": 1}} if looks else {}
            actor = self._ray.remote(**how)(_Worker)
            self._make = self._ray.put(make)
            self._actors = [actor.remote(os.getcwd()) for _ in range(wanted.workers)]
            self._coming = {worker.place.remote(): at for at, worker in enumerate(self._actors)}
            while not self.told:
                for ref in self._wait(self._coming):
                    self._came(ref)
        except BaseException:
            self.close()
            raise

    def each(
        self, jobs: Iterator[tuple[Key, Job]], under_way: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Key, Result]]:
        """Each piece of work with its result, as it is done; the next is asked for when a worker has room for it.
        under_way: told now and then how much the workers have of what is not done, if they were made with `looks`.

        Raises PleError that a worker raised, or where one piece of work ended `TRIES` workers.
        """
        running: dict[Any, tuple[int, Place, _Piece[Key, Job]]] = {}
        again: deque[_Piece[Key, Job]] = deque()
        more = True
        while True:
            while more or again:
                if (free := self._free(running, alone=bool(again))) is None:
                    break
                if again:
                    piece = again.popleft()
                elif (found := next(jobs, None)) is not None:
                    piece = _Piece(*found)
                else:
                    more = False
                    break
                running[self._actors[free].work.remote(piece.job)] = (free, self._places[free], piece)
            if not running and not again and not more:
                return
            done = self._wait([*running, *self._coming], LOOK if under_way else math.inf)
            if under_way and time.monotonic() >= self._looked + LOOK:
                under_way(self._look())
            for ref in done:
                if ref in self._coming:
                    self._came(ref)
                    continue
                at, place, piece = running.pop(ref)
                try:
                    found = self._result(ref)
                except self._ray.exceptions.RayError as error:
                    words = self._lost(at, place, error)
                    piece.deaths.append(place.node)
                    again.append(piece)
                    if self._is_given_up(piece.deaths):
                        what = f"{piece.key}: {len(piece.deaths)} workers died over it, one after the other ({words})"
                        raise PleError(f"{what}; what was done before is kept") from error
                else:
                    yield piece.key, found

    def state(self) -> str:
        """How many workers are up, in words."""
        return f"{len(self.told)} of {len(self._actors)} workers"

    def close(self) -> None:
        """End the workers, and the cluster where it is our own."""
        ray, self._ray = getattr(self, "_ray", None), None
        try:
            if ray is not None:
                for actor in getattr(self, "_actors", ()):
                    ray.kill(actor)
                ray.shutdown()
        finally:
            self._held.close()

    def _free(self, running: dict[Any, tuple[int, Place, _Piece[Key, Job]]], *, alone: bool) -> int | None:
        """The worker that has the least to do, if it has room; alone: for a piece that must be its only one."""
        load = dict.fromkeys(self.told, 0)
        for at, _, piece in running.values():
            if at in load:
                load[at] += self._beside if piece.deaths else 1
        least = min(load, key=lambda at: load[at], default=None)
        return least if least is not None and load[least] < (1 if alone else self._beside) else None

    def _look(self) -> int:
        """What the workers told last of what they have under way; asks those again that have answered."""
        self._looked = time.monotonic()
        for ref in self._ray.wait(list(self._looks), num_returns=len(self._looks), timeout=0)[0] if self._looks else ():
            at = self._looks.pop(ref)
            with suppress(self._ray.exceptions.RayError):  # it died: found out by its work
                self._under_way[at] = self._ray.get(ref)
        for at in self.told.keys() - self._looks.values():
            self._looks[self._actors[at].under_way.options(concurrency_group="look").remote()] = at
        return sum(self._under_way.get(at, 0) for at in self.told)

    def _wait(self, refs: Iterable[Any], seconds: float = math.inf) -> list[Any]:
        """Those that are done, after `PATIENCE` or `seconds` at most. Raises PleError where there has been no worker
        for `LONGEST`."""
        self._refuse_none()
        return list(self._ray.wait(list(refs), timeout=min(seconds, PATIENCE))[0])

    def _refuse_none(self) -> None:
        """Say that there is no worker, after a while, and give up at last: one that Ray starts again and again, and
        that finds no place, is none."""
        if self._places:  # at work, or loading a model
            self._none_since, self._none_said = time.monotonic(), False
            return
        seconds = time.monotonic() - self._none_since
        if seconds >= LONGEST:
            what = f"--workers: Ray found no room for any in {LONGEST / 60:.0f} minutes ({_there(self._ray)})"
            raise PleError(f"{what}; free some, ask for less, or wait and run the same command again")
        if seconds >= PATIENCE and not self._none_said:
            self._none_said = True
            self._say(f"no worker yet: waiting for Ray to find room ({_there(self._ray)})")

    def _came(self, ref: Any) -> None:
        """A worker has its place, or is up, or has died at its start."""
        at = self._coming.pop(ref)
        place = self._places.get(at)
        try:
            found = self._result(ref)
        except self._ray.exceptions.RayError as error:
            if place is not None:
                words = self._lost(at, place, error)
                self._deaths[at].append(place.node)
                if self._is_given_up(self._deaths[at]):
                    raise PleError(f"a worker died at its start {len(self._deaths[at])} times ({words})") from error
                return
            if getattr(error, "actor_init_failed", False):
                raise PleError(f"a worker did not start: {first_line(error)}") from error
            time.sleep(PAUSE)  # Ray is at it
            self._coming[self._actors[at].place.remote()] = at
            return
        if place is None:
            self._places[at] = found
            self._coming[self._actors[at].begin.remote(self._make)] = at
        else:
            self.told[at] = found
            self._deaths[at].clear()

    def _lost(self, at: int, place: Place, error: Exception) -> str:
        """A worker died: Ray starts another one → in words, what is known of it."""
        memory = isinstance(error, self._ray.exceptions.OutOfMemoryError) or "low on memory" in str(error)
        why = "it was ended as memory ran out" if memory else place.last_words()
        words = f"process {place.pid} of {place.host}: {why}"
        if self._places.get(at) == place:  # else this was found out before
            del self._places[at]
            self.told.pop(at, None)
            self._under_way.pop(at, None)
            self._coming[self._actors[at].place.remote()] = at
            self._say(f"worker {at + 1} is gone ({words}): its work goes to others")
        return words

    def _is_given_up(self, deaths: list[str]) -> bool:
        """Whether that many workers died for no other reason: that of one whose machine went is known."""
        gone = {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}
        return sum(node not in gone for node in deaths) >= TRIES or len(deaths) >= MOST_TRIES

    def _result(self, ref: Any) -> Any:
        """What a worker gave. Raises what it raised, RayError where it died."""
        try:
            worked, found = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if is_out_of_memory(error.cause):
                raise error.cause from error
            raise PleError(f"a worker failed: {first_line(error.cause or error)}") from error
        if worked:
            return found
        is_usage, what = found
        raise (UsageError if is_usage else PleError)(what)


class _Worker:
    """What runs as an actor."""

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        self._made: Any = None
        self._lock = threading.Lock()

    def place(self) -> Outcome:
        """Where it runs."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return True, Place(socket.gethostname(), node, os.getpid(), _log())

    def begin(self, make: Callable[[], Any]) -> Outcome:
        """Makes the object, where it was not → what that tells of itself."""

        def made() -> Any:
            with self._lock:  # the line to the caller may have broken meanwhile
                self._made = self._made or make()
            return self._made.told

        return _tried(made)

    def work(self, job: Any) -> Outcome:
        """What the object gives for a piece of work."""
        if self._made is None:
            os._exit(1)  # one that was started again before its death was seen: it is begun anew
        return _tried(lambda: self._made(job))

    def under_way(self) -> int:
        """How much the object has of pieces that are not done."""
        return self._made.under_way() if self._made else 0


def _tried(work: Callable[[], Any]) -> Outcome:
    try:
        return True, work()
    except PleError as error:
        said = str(error).replace("messages are above", f"messages are in {_log()}")
        return False, (isinstance(error, UsageError), f"{said} (on {socket.gethostname()})")


def _log() -> str:
    """The file that gets what this process says."""
    return str(Path("/proc/self/fd/2").resolve())


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
            ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, **how)
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
    own = not (wanted.address or os.environ.get("RAY_ADDRESS"))
    set_by_user = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(set_by_user) if set_by_user.isdecimal() else 0
    if wanted.gpus and (there.get("GPU") or (wanted.needs_gpus and not own)):
        asked = {"GPU": wanted.gpus, "CPU": 1}
    else:  # Ray gives a worker as many threads as cores
        if wanted.gpus and not own:
            say("no GPU in this cluster: workers on CPUs")
        asked = {"CPU": threads or (max(1, int(there["CPU"]) // wanted.workers) if own else 1)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0) // count for name, count in asked.items())) for node in nodes)
    if room < wanted.workers:
        each = " and ".join(f"{count} {name}" for name, count in asked.items())
        what = f"--workers {wanted.workers}: there is room for {room} ({_there(ray)}; a worker takes {each})"
        if own:
            raise UsageError(f"{what}; ask for fewer")
        say(f"{what}; the others start when the cluster grows")
    return {"num_gpus": asked.get("GPU", 0), "num_cpus": asked["CPU"]}


def _there(ray: Any) -> str:
    there = ray.cluster_resources()
    return f"{int(there.get('GPU', 0))} GPUs and {int(there.get('CPU', 0))} cores on {len(ray.nodes())} nodes"
