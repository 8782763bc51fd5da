"""How much memory of each GPU is in use, as the driver sees it: whatever process holds it, vLLM's workers included.

`nvidia-smi`, which comes with the driver, tells it four times a second. Without one nothing is watched. This never
opens a GPU itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import Counter
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Self

QUERY = ("--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits", "--loop-ms=250")
NEWS_SECONDS = 5.0
"""How long the driver's next word is waited for."""
RELEASE_SECONDS = 30.0
"""How long the driver may take to free what an ended process held."""
SLACK = 256 * 2**20
"""Bytes that may come and go without a stage of ours."""


class GpuWatch:
    """Bytes in use of each GPU that CUDA_VISIBLE_DEVICES leaves visible, by its index. A context manager."""

    def __init__(self) -> None:
        self._process: Popen[str] | None = None
        self._listening = False
        self._news = threading.Condition()
        self._words: Counter[int] = Counter()
        self._now: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._most: dict[int, int] = {}

    def __enter__(self) -> Self:
        if program := shutil.which("nvidia-smi"):
            self._process = Popen([program, *QUERY], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, text=True)
            self._listening = True
            threading.Thread(target=self._listen, args=[self._process], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(TimeoutExpired):  # a driver that hangs holds it
                self._process.wait(NEWS_SECONDS)

    def begin(self) -> None:
        """A stage begins: what is in use now is not its own."""
        if not self._words:
            self._await_news()
        with self._news:
            self._before, self._most = dict(self._now), dict(self._now)

    def end(self) -> tuple[dict[int, int], dict[int, int]]:
        """The stage has ended → the most that was in use meanwhile, and what is still in use beyond what was before,
        after `RELEASE_SECONDS` at most; of the GPUs alone where that is more than `SLACK`."""
        deadline = time.monotonic() + RELEASE_SECONDS
        while True:
            self._await_news()
            with self._news:
                left = self._beyond(self._now) if self._listening else {}
                if not left or time.monotonic() > deadline:
                    return {gpu: self._most[gpu] for gpu in self._beyond(self._most)}, left

    def _beyond(self, used: dict[int, int]) -> dict[int, int]:
        more = {gpu: size - self._before.get(gpu, 0) for gpu, size in used.items()}
        return {gpu: size for gpu, size in more.items() if size > SLACK}

    def _await_news(self) -> None:
        """Until every GPU was heard of twice: the first word may have been on its way. At once where none speaks."""
        with self._news:
            old = dict(self._words)
            self._news.wait_for(lambda: self._has_news_since(old) or not self._listening, NEWS_SECONDS)
            self._listening = self._listening and bool(self._words)  # one that never speaks is not waited for again

    def _has_news_since(self, old: dict[int, int]) -> bool:
        return bool(self._words) and all(words >= old.get(gpu, 0) + 2 for gpu, words in self._words.items())

    def _listen(self, process: Popen[str]) -> None:
        visible = _visible()
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                index, uuid, used = [word.strip() for word in [*line.split(","), "", ""][:3]]
                if not index.isdecimal():
                    continue  # an error in words
                with self._news:
                    gpu = int(index)
                    self._words[gpu] += 1
                    if used.isdecimal() and (visible is None or index in visible or uuid.startswith(tuple(visible))):
                        self._now[gpu] = int(used) * 2**20
                        self._most[gpu] = max(self._now[gpu], self._most.get(gpu, 0))
                    self._news.notify_all()
        with self._news:
            self._listening = False
            self._news.notify_all()


def _visible() -> set[str] | None:
    """Indices of the GPUs that a process may see, or beginnings of their UUIDs; None: all. Indices count as the driver
    does, and so as CUDA does on a machine whose GPUs are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else {word.strip() for word in named.split(",")} - {""}


def gibibytes(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB"
