"""Progress: a rate of the last minute, the time left, and movement within a batch."""

import io
import sys

import pytest

from ple_data.common import progress
from ple_data.common.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def last_line(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_the_rate_is_of_the_last_minute_and_at_the_end_of_all(clock, capsys):
    """600 rows at 10/s, then 1/s: after two slow minutes the rate is 1 a second, and 280 rows take 280 s."""
    with Progress("score", 1000, "rows") as work:
        for rate in [10] * 60 + [1] * 120:
            clock.now += 1
            work.advance(rate)
        assert last_line(capsys) == "score: 720/1000 rows (72 %), 1 rows/s, 4 min 40 s left"
        clock.now += 20
        work.advance(280)
    assert last_line(capsys) == "score: 1000/1000 rows (100 %), 5 rows/s"


def test_where_nothing_moved_for_a_minute_the_rate_is_since_it_did(clock, capsys):
    with Progress("score", 10, "rows") as work:
        for _ in range(2):
            clock.now += 100
            work.advance(2)
        assert last_line(capsys) == "score: 4/10 rows (40 %), 0.02 rows/s, 5 min 00 s left"


def test_what_was_done_before_is_not_in_the_rate(clock, capsys):
    with Progress("score", 100, "rows", done=50) as work:
        clock.now += 10
        work.skip(20)
        work.advance(10)
        assert last_line(capsys) == "score: 80/100 rows (80 %), 1 rows/s, 20 s left"


def test_tokens_move_a_batch_that_is_not_done(clock, capsys):
    """4 responses of at most 100 tokens in batches of 2; they come to 50 each. Before the first is done, the time left
    is an upper bound: 4 x 100 less 60 tokens at 10 a second. Then the mean of 50 holds: 200 - 130 tokens at 10."""
    with Progress("generate", 4, "responses", most_tokens=100) as work:
        for step in range(1, 7):
            clock.now += 1
            work.under_way(10 * step)
        said = "generate: 0/4 responses (about 12 %), 50 tokens, 10 tokens/s, at most 35 s left"
        assert last_line(capsys) == said  # the line of the fifth second
        for step in range(7, 11):
            clock.now += 1
            work.under_way(10 * step)
        for _ in range(2):
            work.advance(1, tokens=50)
        for step in range(1, 4):
            clock.now += 1
            work.under_way(10 * step)
        clock.now += 2
        work.under_way(50)
        assert last_line(capsys) == "generate: 2/4 responses (about 75 %), 150 tokens, 10 tokens/s, 5 s left"


def test_the_tail_of_a_batch_does_not_stretch_the_time_left(clock, capsys):
    """Batches of 8 whose 7 short responses end after 10 s; the last one goes on alone for 90 s, at a tenth of the
    tokens. A rate of the last minute would say ten times the time that is left."""
    with Progress("generate", 32, "responses", most_tokens=200) as work:
        for _ in range(2):
            for second in range(1, 101):
                clock.now += 1
                work.under_way(second * 8 if second <= 10 else second)
                if second == 10:
                    work.advance(7, tokens=70)
            work.advance(1, tokens=100)
            clock.now += 5
            work.under_way(0)
            assert "tokens/s" in (line := last_line(capsys)), line
    assert "16/32 responses (50 %)" in line
    assert "3 min 30 s left" in line


def test_a_terminal_has_one_line_that_moves(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("generate", 2, "responses", most_tokens=10) as work:
        for tokens in range(1, 10):
            clock.now += 1
            work.under_way(tokens)
        work.note("a word")
        work.advance(2, tokens=20)
    shown = screen.getvalue().split("\r")
    assert any(
        "generate: 0/2 responses (about 45 %), 9 tokens, 1 tokens/s, at most 11 s left |" in line for line in shown
    )
    assert "generate: a word\n" in screen.getvalue()
    assert "generate: 2/2 responses (100 %), 20 tokens" in shown[-1]
