"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere. Never writes to stdout."""

import sys
import time
from typing import Self

LINE_EVERY = 5.0
"""Seconds between two plain lines."""
EARLIEST = 0.02
"""Share of the work behind which the time left is said: before, start-up makes it look long."""


class Progress:
    """Counts work that is done, with its rate and the time left. Use it as a context manager."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0) -> None:
        """label: what is going on; total, done: in `unit`s; done: what an earlier run left finished."""
        self._label, self._total, self._unit = label, total, unit
        self._done = self._start = done
        self._detail = ""
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, initial=done, unit=f" {unit}", file=sys.stderr)
        elif done:
            self._line(f"{done} of {total} {unit} were done before")

    def advance(self, count: int, detail: str = "") -> None:
        """Count `count` more as done; `detail` (a loss, say) is shown beside the count."""
        self._done += count
        self._detail = detail
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(count)
        elif self._done < self._total and time.monotonic() - self._last_line >= LINE_EVERY:
            self._line(self._state())  # the last one is written at the end

    def skip(self, count: int) -> None:
        """Count `count` more as what an earlier run left finished."""
        self._done += count
        self._start += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def expect(self, total: int) -> None:
        """Take another total: it was not known how much there is."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    @property
    def seconds(self) -> float:
        """Since the clock was started."""
        return max(time.monotonic() - self._began, 1e-9)

    def restart_clock(self) -> None:
        """Count the rate from now on: what came before was preparation."""
        self._began, self._start = time.monotonic(), self._done
        if self._bar is not None:
            self._bar.unpause()

    def note(self, message: str) -> None:
        """Write one line without spoiling the bar."""
        if self._bar is not None:
            self._bar.write(f"{self._label}: {message}", file=sys.stderr)
        else:
            self._line(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._start:
            self._line(self._state())

    def _state(self) -> str:
        rate = (self._done - self._start) / self.seconds
        share = 100 * self._done // max(self._total, 1)
        state = f"{self._done}/{self._total} {self._unit} ({share} %), {rate:.3g} {self._unit}/s"
        state += f", {self._detail}" if self._detail else ""
        if self._done >= self._total or self._done - self._start < EARLIEST * (self._total - self._start):
            return state
        return f"{state}, {_clock((self._total - self._done) / rate)} left"

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(f"{self._label}: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
