"""Hostile HTTP peers: reward endpoints and judges that answer everything but what they should, or never end."""

import gzip
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.stages import World
from tests.hostile.mutations import json_texts
from tests.hostile.rule import SECRET, Input

Talk = Callable[[socket.socket], None]


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers]).encode("latin-1") + b"\r\n\r\n"


def whole(body: bytes, *headers: str, status: str = "200 OK") -> Talk:
    return lambda c: c.sendall(head(*headers, f"Content-Length: {len(body)}", status=status) + body)


def endless(first: bytes, again: bytes, pause: float = 0.0) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(pause)

    return talk


def serve(talk: Talk) -> str:
    """The address of a server of raw bytes that lives as long as this process."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(65536)
                talk(connection)
            except OSError:
                pass

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def talks(good: dict) -> Iterator[tuple[str, Talk]]:
    body = json.dumps(good).encode()
    for name, text in json_texts(good):
        yield name, whole(text.encode("utf-8", "surrogatepass"))
    yield "body without end", endless(head(), b" " * 65536)
    yield "chunks without end", endless(head("Transfer-Encoding: chunked"), b"1000\r\n" + b" " * 4096 + b"\r\n")
    yield "headers without end", endless(b"HTTP/1.1 200 OK\r\n", b"X: " + b"a" * 1000 + b"\r\n")
    yield "no HTTP", endless(b"", b"hello " * 1000)
    yield "bomb", whole(gzip.compress(bytes(2**28)), "Content-Encoding: gzip")
    yield "bomb in a bomb", whole(gzip.compress(gzip.compress(bytes(2**26))), "Content-Encoding: gzip, gzip")
    yield "bad gzip", whole(b"no gzip", "Content-Encoding: gzip")
    yield "gzip cut", whole(gzip.compress(body)[:-5], "Content-Encoding: gzip")
    yield "deflate", whole(body, "Content-Encoding: deflate")
    yield "unknown packing", whole(body, "Content-Encoding: br")
    for charset in ("bogus", "hex", "utf-16", "idna", "undefined"):
        yield f"charset {charset}", whole(b"\xff\xfe", f"Content-Type: application/json; charset={charset}")
        yield f"refused, charset {charset}", whole(b"\xff", f"Content-Type: t/p; charset={charset}", status="400 No")
    yield "deep", whole(b"[" * 10**7)
    yield "4,000 digits", whole(body.replace(b"1", b"1" * 4000))
    yield "redirect", whole(b"", "Location: http://127.0.0.1:9/", status="302 Found")
    yield "redirect to itself", whole(b"", "Location: /", status="308 P")
    for asked in (
        "31536000",
        "9" * 400,
        "\u00b2",
        "-1",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 01 Jan 0001 00:00:00 -0000",
    ):
        yield f"retry after {asked[:20]}", whole(b"", f"Retry-After: {asked}", status="503 No")
    yield "escape", whole(b"\x1b[31m\xe2\x80\xae" * 1000, status="400 \x1b[31m")
    yield "key", whole(f"no key {SECRET}".encode(), status="401 No")
    yield "status 999", whole(b"", status="999 X")
    yield "status 204", whole(b"", status="204 None")


def reward_peers(world: World) -> Iterator[Input]:
    for name, talk in talks({"scores": [0.5] * 1}):

        def make(place: Path, talk: Talk = talk) -> list[str]:
            shutil.copytree(world.left / "gen/data", place / "data")
            return ["score", "--data", str(place / "data"), "--reward-model", f"{serve(talk)}/{SECRET}/score"]

        yield Input("reward peers", name, make, may_succeed=False)


def judge_peers(world: World) -> Iterator[Input]:
    good = {"choices": [{"message": {"content": "[[1]]"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2}}  # fmt: skip
    for name, talk in talks(good):

        def make(place: Path, talk: Talk = talk) -> list[str]:
            for side in "ab":
                (place / f"{side}.jsonl").write_text(json.dumps({"query_id": "q", "x": "the film", "y": side}) + "\n")
            return ["judge", str(place / "a.jsonl"), str(place / "b.jsonl"), "--judge", "openai:m", "--output",
                    str(place / "out"), "--endpoint", f"{serve(talk)}/{SECRET}/v1"]  # fmt: skip

        yield Input("judge peers", name, make)
