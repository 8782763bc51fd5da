"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere. Never writes to stdout."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Self

LINE_EVERY, BAR_EVERY = 5.0, 0.2
"""Seconds between two plain lines, and between two looks of the bar."""
EARLIEST = 0.02
"""Share of the work behind which the time left is said: before, start-up makes it look long."""
WINDOW = 60.0
"""Seconds that a rate is of; more where nothing moved in them."""


class _Mark(NamedTuple):
    """Where the work stood at a moment: units done here, tokens of those, and tokens of units that are under way."""

    time: float
    done: int
    settled: int
    pending: int


class Progress:
    """Counts work that is done, with its rate and the time left. Use it as a context manager."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, most_tokens: int = 0) -> None:
        """label: what is going on; total, done: in `unit`s; done: what an earlier run left finished.

        most_tokens: that a unit may have; then tokens are counted too, and those of unfinished units move the rest.
        """
        self._label, self._total, self._unit, self._most_tokens = label, total, unit, most_tokens
        self._length = float(most_tokens)  # a mean once no unit is under way: the first ones to end are short
        self._done = self._start = done
        self._settled = self._pending = self._with_tokens = 0
        self._detail = ""
        self.beside: Callable[[], str] = str
        """What is shown beside the rest, asked for each time: how many workers there are, say."""
        self._began = self._last_line = self._last_bar = time.monotonic()
        self._marks = deque([self._mark()])
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, initial=done, file=sys.stderr, bar_format="{desc} |{bar}|")
        elif done:
            self._line(f"{done} of {total} {unit} were done before")

    def advance(self, count: int, detail: str = "", *, tokens: int = 0) -> None:
        """Count `count` more as done, which have `tokens`; `detail` (a loss, say) is shown beside the count."""
        self._done += count
        self._settled += tokens
        self._with_tokens += count if tokens else 0
        self._pending = max(0, self._pending - tokens)
        if self._settled and not self._pending:
            self._length = self._settled / self._with_tokens
        self._detail = detail
        self._moved_on()

    def under_way(self, tokens: int) -> None:
        """Note how many tokens the unfinished units have by now; `advance` takes away those of a finished one."""
        self._pending = tokens
        self._moved_on()

    def skip(self, count: int) -> None:
        """Count `count` more as what an earlier run left finished."""
        self._done += count
        self._start += count

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
        self._marks = deque([self._mark()])

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
            self._draw(self._bar)
            self._bar.close()
        elif self._done > self._start:
            self._line(self._state())

    def _mark(self) -> _Mark:
        return _Mark(time.monotonic(), self._done - self._start, self._settled, self._pending)

    def _moved_on(self) -> None:
        now = self._mark()
        if now.time - self._marks[-1].time >= 1:
            self._marks.append(now)
        if self._bar is not None:
            if now.time - self._last_bar >= BAR_EVERY:
                self._draw(self._bar)
        elif self._done < self._total and now.time - self._last_line >= LINE_EVERY:
            self._line(self._state())  # the last one is written at the end

    def _units(self, mark: _Mark) -> float:
        """Units done here, or as many as all tokens so far would be at the length that is known, if these are more."""
        units = (mark.settled + mark.pending) / self._length if self._length else 0.0
        return min(max(mark.done, units), self._total - self._start)

    def _state(self) -> str:
        now = self._mark()
        while len(self._marks) > 2 and self._marks[1].time <= now.time - WINDOW:
            self._marks.popleft()
        all_of_it = _Mark(self._began, 0, 0, 0)
        first = self._marks[0] if self._done < self._total else all_of_it  # at the end, of all
        units = self._units(now)
        about = "" if units == now.done else "about "
        share = int(100 * (self._start + units) / max(self._total, 1))
        share = share if self._done >= self._total else min(share, 99)
        state = f"{self._done}/{self._total} {self._unit} ({about}{share} %)"
        seconds = max(now.time - first.time, 1e-9)
        if self._most_tokens:
            tokens = now.settled + now.pending
            state += f", {tokens} tokens, {(tokens - first.settled - first.pending) / seconds:.3g} tokens/s"
            first = all_of_it  # a batch slows down while its last responses end: the minute is no rate for the rest
        else:
            state += f", {(now.done - first.done) / seconds:.3g} {self._unit}/s"
        state += "".join(f", {detail}" for detail in (self._detail, self.beside()) if detail)
        rate = (units - self._units(first)) / max(now.time - first.time, 1e-9)
        left = self._total - self._start - units
        if left <= 0 or rate <= 0 or units < EARLIEST * (self._total - self._start):
            return state
        return f"{state}, {'at most ' if self._most_tokens and not now.done else ''}{_clock(left / rate)} left"

    def _draw(self, bar: Any) -> None:
        self._last_bar = time.monotonic()
        bar.n = min(self._total, self._start + self._units(self._mark()))
        bar.set_description_str(f"{self._label}: {self._state()}")

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
