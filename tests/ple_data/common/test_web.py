"""Servers that do everything wrong: each is one sentence, soon, and in little memory."""

import gzip
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest

from ple_data.common import web
from ple_data.rewards.endpoint import HttpReward
from schemas.errors import PleError, UsageError
from tests.hostile.peers import endless

ROWS = [("x", "y")]
GOOD = b'{"scores": [1.5]}'


class Peer:
    """A server of raw bytes: `talk` is given the connection after a request has been read."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk, self.asked = talk, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        self.asked += 1
        with connection:
            try:
                request = b""
                while not request.endswith(b"}"):  # the end of its JSON
                    request += connection.recv(65536)
                self._talk(connection)
            except OSError:
                pass  # the client has had enough

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[socket.socket], None]], Peer]]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    peers: list[Peer] = []

    def start(talk: Callable[[socket.socket], None]) -> Peer:
        peers.append(Peer(talk))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


def answer(body: bytes, *headers: str, status: str = "200 OK", sized: bool = True) -> Callable[[socket.socket], None]:
    size = [f"Content-Length: {len(body)}"] if sized else []
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, *size]) + "\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def ask(peer: Peer, **options: float) -> list[float]:
    return HttpReward(peer.url, **{"tries": 2, "first_wait": 0.01, "timeout": 0.4, **options}).score(ROWS)


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (endless(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.02), "gave no whole answer in 1 seconds"),
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), "gave no whole answer"),
        (endless(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b" ", 0.02), "gave no whole answer"),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.02), "gave no whole answer"),
        (endless(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"a" * 2000 + b"\r\n"), "failed 2 times"),
        (endless(b"", b"a" * 4096), "failed 2 times"),
    ],
    ids=["headers drip", "informational", "body drips", "body drips to the end", "headers", "no HTTP"],
)
def test_an_answer_without_end_is_given_up(serve, talk, message: str):
    began = time.monotonic()
    with pytest.raises(PleError, match=message):
        ask(serve(talk))
    assert time.monotonic() - began < 5


def test_a_large_answer_is_given_up_packed_or_not(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "MOST_BYTES", 2**20)
    plain = serve(endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536))
    with pytest.raises(PleError, match="gave an answer of more than 1048576 bytes"):
        ask(plain, timeout=20.0)
    assert plain.asked == 1
    bomb = serve(answer(gzip.compress(bytes(2**26)), "Content-Encoding: gzip"))
    with pytest.raises(PleError, match="gave an answer that is more than 1048576 bytes, packed in"):
        ask(bomb, timeout=20.0)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_an_answer_that_is_packed_unasked_is_read(serve, pack: Callable[[bytes], bytes]):
    assert ask(serve(answer(pack(GOOD), "Content-Encoding: gzip"))) == [1.5]


def test_a_charset_does_not_matter(serve):
    for charset in ("bogus", "hex", "utf-16", "\u00e9"):
        assert ask(serve(answer(GOOD, f"Content-Type: application/json; charset={charset}"))) == [1.5]


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (answer(b"not gzip", "Content-Encoding: gzip"), "does not unpack"),
        (answer(gzip.compress(GOOD)[:-9], "Content-Encoding: gzip"), "was cut short"),
        (answer(GOOD, "Content-Encoding: br"), "does not unpack"),
        (answer(b"\xff\xfe\xff"), 'expected {"scores"'),
        (answer(b"\xff", "Content-Type: text/plain; charset=hex", status="400 No"), "status 400"),
        (answer(b'{"scores": [' + b"9" * 5000 + b"]}"), 'expected {"scores"'),
        (answer(b'{"scores": [' + b"9" * 4000 + b"]}"), "must be a list of 1 numbers"),
        (answer(b"[" * 10**6), 'expected {"scores"'),
        (answer(b'{"scores": {"0": 1}}'), "got dict"),
        (answer(b'{"scores": [true]}'), "must be a list of 1 numbers"),
        (answer(b"[1.0]"), 'expected {"scores"'),
        (answer(b"", "Location: http://127.0.0.1:1/", status="302 Found"), "a redirect: give the address"),
        (answer(b"", "Retry-After: 31536000", status="503 No"), "asks to wait for 31536000 seconds"),
        (answer(b"", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", status="429 No"), "asks to wait for"),
        (answer(b"", "Retry-After: " + "9" * 300, status="503 No"), "asks to wait for"),
        (answer(b"", "Retry-After: \u00b2", status="503 No"), "failed 2 times"),
        (answer(b"", "Retry-After: Mon, 01 Jan 0001 00:00:00 -0000", status="503 No"), "failed 2 times"),
    ],
)
def test_a_wrong_answer_is_one_sentence(serve, talk, message: str):
    with pytest.raises(PleError, match=message) as caught:
        ask(serve(talk), timeout=20.0)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "gopher://me:sesame@h:1"),
        ("http_proxy", "http://me:ses/ame@h:1"),
        ("ALL_PROXY", "http://a..sesame:1"),
        ("NO_PROXY", "[::sesame"),
        ("SSL_CERT_FILE", "/sesame"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_said_by_the_name_of_its_variable(monkeypatch, name: str, value: str):
    for known in [known for known in os.environ if "_PROXY" in known.upper() or "SSL_CERT" in known]:
        monkeypatch.delenv(known)
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"correct {name}$") as caught:
        HttpReward("http://reward.invalid/score", tries=1).score(ROWS)
    assert "ses" not in str(caught.value)


def test_no_proxy_stands_before_a_server_of_this_machine(serve, monkeypatch: pytest.MonkeyPatch):
    here, proxy = serve(answer(GOOD)), serve(answer(b'{"scores": [2.5]}'))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/score"))
    assert ask(here) == [1.5]
    assert HttpReward(here.url.replace("127.0.0.1", "localhost")).score(ROWS) == [1.5]
    assert HttpReward("http://reward.invalid/score").score(ROWS) == [2.5]
    assert (here.asked, proxy.asked) == (2, 1)


def test_as_many_requests_are_in_flight_as_there_may_be(serve):
    gate = threading.Barrier(200)

    def wait_for_all(connection: socket.socket) -> None:
        gate.wait(30)
        answer(GOOD)(connection)

    peer = serve(wait_for_all)
    with web.open_client(200, timeout=30.0) as client:

        def one(row: int, stop: threading.Event) -> int:
            patience = web.Patience(1, 0.0, stop)
            return web.ask_json(client, peer.url, {}, patience, what="it", failed="").status_code

        assert [status for _, status in web.each(one, range(200), 200)] == [200] * 200


@pytest.mark.parametrize("host", ["a..b", "." + "a" * 70, "a" * 70, "xn--a", ".", "999.1.1.1", "[::1", "h:x"])
def test_an_address_whose_host_no_connection_can_spell_is_refused_at_once(host: str):
    with pytest.raises(UsageError, match=r"its address is not of the form http://host:port/path"):
        HttpReward(f"http://{host}/")


def test_a_server_that_never_answers_is_given_up(serve):
    began = time.monotonic()
    peer = serve(lambda connection: time.sleep(60))
    with pytest.raises(PleError, match="failed 3 times, the last with ReadTimeout"):
        ask(peer, tries=3, timeout=0.2)
    assert peer.asked == 3
    assert time.monotonic() - began < 5


def test_a_key_in_the_path_is_neither_shown_nor_recorded(serve):
    peer = serve(answer(b"", status="500 No"))
    reward_model = HttpReward(f"{peer.url}/sk-live-0a1b2c3d", tries=1)
    with pytest.raises(PleError, match=r"/score/\[key\] failed 1 times") as caught:
        reward_model.score(ROWS)
    assert "0a1b2c3d" not in str(caught.value) + reward_model.name
    assert reward_model.name != HttpReward(f"{peer.url}/sk-live-11111111").name
