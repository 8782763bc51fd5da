"""What a command prints, whoever writes it: printable, without secrets, in lines that end."""

import logging
import subprocess
import sys

import pytest

from ple_data.common.command import command
from ple_data.common.digests import text_digest
from ple_data.common.secrets import may_be_key, public
from ple_data.common.terminal import LONGEST_LINE, guarded
from ple_data.common.web import checked_url
from schemas.options import Inspect

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
        ("https://h/AbCdEfGhIjKlMnOp/x", "https://h/[key]/x"),
        ("https://h/%73k-abc/x", "https://h/[key]/x"),
        ("https://h/[0123456789ab]/TinyLlamaChat/DeBERTa", "https://h/[0123456789ab]/TinyLlamaChat/DeBERTa"),
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
    checked_url("https://h/sk-0b1c2d3e4f/%73k-1b1c2d3e4f?token=sesame-open", "reward model", "K")
    said = "no: sk-0b1c2d3e4f, sk-1b1c2d3e4f, %73k-1b1c2d3e4f, sesame-open"
    assert written(capsys, said) == "no: [key], [key], [key], [key]\n"


def test_an_address_is_recorded_once_and_stays_as_it_was_recorded():
    for address in ("http://h/v1/8f434346648f/score", "http://h/sk-abc", "http://h/score?0123456789ab"):
        recorded = public(address, text_digest)
        assert public(recorded, text_digest) == recorded


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


def both(capsys: pytest.CaptureFixture[str], *texts: str) -> list[str]:
    """What stdout and stderr show of the same texts, each a write."""
    with guarded():
        for text in texts:
            sys.stdout.write(text)
            sys.stderr.write(text)
            sys.stderr.flush()
    return list(capsys.readouterr())


def test_a_secret_that_comes_in_parts_is_struck_out_on_both_streams(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("OTHER_TOKEN", SECRET[:12])
    monkeypatch.setenv("SIGNING_SECRET", "first-line\nsecond-line")
    assert both(capsys, f"key {SECRET[:9]}", f"{SECRET[9:]}\n") == ["key [key]\n"] * 2
    assert both(capsys, "a", "\nfirst-line\n", "second-line") == ["a\n[key]\n[key]"] * 2


def test_lines_are_cut_whole_whoever_writes_them_in_parts(capsys):
    assert both(capsys, "x" * 3000, "y" * 3000, "\n")[1] == "x" * (LONGEST_LINE - 40) + "... (4040 more characters)\n"
    with guarded():
        sys.stderr.writelines(["a\x1b]0;t", "\x07\n"])
    assert capsys.readouterr().err == "a\\x1b]0;t\\x07\n"


def test_a_bar_is_seen_at_once_and_an_unfinished_line_at_the_end(capsys):
    with guarded():
        sys.stderr.write("half")
        assert capsys.readouterr().err == ""
        for text, seen in (("\r 50 %", "half\r 50 %"), ("\r100 %", "\r100 %"), ("\n", "\n"), ("end", "")):
            sys.stderr.write(text)
            assert capsys.readouterr().err == seen
    assert capsys.readouterr().err == "end"


def test_what_is_for_programs_is_exact_and_stderr_takes_only_text(capsysbinary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    with guarded():
        sys.stdout.buffer.write(SECRET.encode())
        assert not hasattr(sys.stderr, "buffer")
    assert capsysbinary.readouterr().out == SECRET.encode()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_key_in_a_commands_text_is_struck_out_but_not_in_its_json(capsys, monkeypatch: pytest.MonkeyPatch, as_json):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    made = command("inspect", Inspect, lambda chosen: f'"{SECRET}"')
    made.main(["data", *(["--json"] if as_json else [])], standalone_mode=False)
    assert capsys.readouterr().out == (f'"{SECRET}"\n' if as_json else '"[key]"\n')
