"""What a command prints, whoever writes it: printable, without secrets, in lines that end."""

import logging
import subprocess
import sys

import pytest

from ple_data.common.secrets import may_be_key, public
from ple_data.common.terminal import LONGEST_LINE, guarded
from ple_data.common.web import checked_url

SECRET = "sk-test-0a1b2c3d4e5f"


def written(capsys: pytest.CaptureFixture[str], text: str, stream: str = "stderr") -> str:
    with guarded():
        print(text, file=getattr(sys, stream))
    said = capsys.readouterr()
    return said.err if stream == "stderr" else said.out


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_that_is_written_steers_the_terminal(capsys, stream: str):
    said = written(capsys, "a\x1b]0;title\x07b\u202ec\x9bd\x7f\ud800\ttab\n next\rline", stream)
    assert said == "a\\x1b]0;title\\x07b\\u202ec\\x9bd\\x7f\\ud800\ttab\n next\\rline\n"


def test_colours_of_libraries_are_left_out_and_bars_begin_anew(capsys):
    assert written(capsys, "\x1b[1mREPORT\x1b[0m") == "REPORT\n"
    assert written(capsys, "\r 50 %") == "\r 50 %\n"


def test_what_a_library_logs_is_guarded_too(capsys):
    with guarded():
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "\x1b[31mred\x1b[2J"}))
    assert capsys.readouterr().err == "red\\x1b[2J\n"


def test_a_line_on_stderr_ends(capsys):
    said = written(capsys, "x" * 5000 + "\ny")
    assert [len(line) <= LONGEST_LINE for line in said.splitlines()] == [True, True]
    assert said.endswith("... (3040 more characters)\ny\n")
    assert written(capsys, "x" * 5000, "stdout") == "x" * 5000 + "\n"


def test_keys_of_the_environment_are_struck_out(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    assert written(capsys, f"no: Bearer {SECRET}!") == "no: Bearer [key]!\n"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"https://h:80/score/{SECRET}", "https://h:80/score/[key]"),
        (f"https://h/{SECRET}/score", "https://h/[key]/score"),
        ("https://h/550e8400-e29b-41d4-a716-446655440000/run", "https://h/[key]/run"),
        ("https://h/services/T01/XXXXXXXXXXXXXXXXXXXXXXXX", "https://h/services/T01/[key]"),
        ("https://h/s3cr3t/x", "https://h/[key]/x"),
        ("https://me:word@h/x", "https://[key]@h/x"),
        ("https://h/x?token=word", "https://h/x?[key]"),
        ("https://h/x?0123456789ab", "https://h/x?0123456789ab"),
        ("http://h/v1beta1/llama-3.1-8b-instruct-rm/score", "http://h/v1beta1/llama-3.1-8b-instruct-rm/score"),
        ("https://example.org/docs/text-classification", "https://example.org/docs/text-classification"),
    ],
)
def test_a_key_in_an_address_is_struck_out(capsys, address: str, shown: str):
    assert public(f"asked {address} twice") == f"asked {shown} twice"
    assert written(capsys, f"asked {address} twice") == f"asked {shown} twice\n"


def test_a_key_of_an_address_that_is_used_is_struck_out_where_its_server_repeats_it(capsys):
    checked_url("https://h/sk-0b1c2d3e4f/score?token=sesame-open", "reward model", "K")
    assert written(capsys, "no: sk-0b1c2d3e4f, sesame-open") == "no: [key], [key]\n"


def test_plain_words_are_no_keys():
    words = ["score", "v1", "chat", "completions", "Skywork-Reward-V2-Llama-3.1-8B", "qwen2.5-7b-instruct", "235b-a22b"]
    assert not [word for word in words if may_be_key(word)]


def test_a_stream_of_another_encoding_takes_every_text():
    code = "from ple_data.common.terminal import guarded\nwith guarded(): print('\u2581 \ud83d\ude00')"
    ended = subprocess.run(
        [sys.executable, "-c", code.encode("unicode_escape").decode().replace("\\n", "\n")],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
