"""`ple report RUN --watch`: serves the page to this machine alone, and makes it anew when the run's files change.

Only reads: the run, and requests that are GET. An address holds a secret, the Host header must name this machine and
other sites' requests are refused, since a report holds users' data.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ple_data.report.browse import Browser, Wanted
from ple_data.report.page import render, template
from ple_data.report.sections import sections
from ple_data.report.sources import Sources
from schemas.errors import PleError, UsageError, first_line
from schemas.options import Report

HOST, PORT = "127.0.0.1", 8765
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""What this machine is called in a Host header, before the port: a tunnel may have another port."""
LOOK_EVERY, SHARE = 1.0, 4
"""Seconds between two looks at the files; and how many times the page's own making it then rests."""
SCANS = 2
"""Requests that read shards at once."""
READ = ("recipe.yaml", "stages.json", "metrics/*.parquet", "policy/round=*/metrics.parquet", "purity/purity.json")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def watch(chosen: Report) -> str:
    """Serve the report until Ctrl-C; then a sentence. Raises as `page.report`, and where the port is taken."""
    if chosen.output:
        raise UsageError("--watch serves the page and writes none: leave --output out, or leave --watch out")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a tokenizer is looked for on this machine only
    try:
        with Server(chosen) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print(f"report: follows {chosen.run} at this address, until Ctrl-C", file=sys.stderr, flush=True)
            sys.stdout.buffer.write(f"{server.address}\n".encode())  # with a key that is meant to be seen
            sys.stdout.flush()
            try:
                while True:
                    began = time.monotonic()
                    server.look()
                    time.sleep(LOOK_EVERY + SHARE * (time.monotonic() - began))
            finally:
                server.shutdown()
    except KeyboardInterrupt:
        return "the report is no longer served; nothing was written"


@dataclass(frozen=True)
class Shown:
    """The page as it stands, with the pairs of the same moment. `fault`: why the files could not be read since."""

    page: bytes
    browser: Browser
    fault: str = ""

    @property
    def tag(self) -> str:
        return hashlib.sha256(self.page).hexdigest()[:16]


def _made(chosen: Report) -> Shown:
    sources = Sources(chosen.run, chosen.evals, chosen.judges, chosen.purity, chosen.cases, chosen.tau0, chosen.alpha)
    browser = Browser(sources)
    return Shown(render(sources, sections(sources), browser.rounds).encode(), browser)


def _state(chosen: Report) -> list[tuple[str, int, int]]:
    """What changes with the files that the page is made from: names, times and sizes. A commit changes its folder."""
    return sorted(
        (str(path), found.st_mtime_ns, found.st_size) for path in _files(chosen) if (found := _stat(path)) is not None
    )


def _files(chosen: Report) -> Iterator[Path]:
    for pattern in READ:
        yield from chosen.run.glob(pattern)
    for root in (chosen.run, chosen.run / "data"):
        yield from root.glob(".ple/commits/*/round=*")
        yield from root.glob(".ple/rounds/*.json")
    yield from (path / "eval.json" for path in chosen.evals)
    yield from (path / "judge.json" for path in chosen.judges)
    yield from (path / name for path, name in ((chosen.purity, "purity.json"), (chosen.cases, "cases.parquet")) if path)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


class Server(ThreadingHTTPServer):
    """The page of one run at an address of its own."""

    daemon_threads = True

    def __init__(self, chosen: Report) -> None:
        """Takes the port, then makes the page. Raises as `watch` does."""
        self.secret, self.scans = secrets.token_urlsafe(16), threading.Semaphore(SCANS)
        port = PORT if chosen.port is None else chosen.port
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be served on ({error.strerror or first_line(error)}): give another --port, or "
                "--port 0 for any free one"
            ) from error
        self.address = f"http://{HOST}:{self.server_port}/{self.secret}/"
        try:
            self._chosen, self._state = chosen, _state(chosen)
            self.shown = _made(chosen)
        except BaseException:
            self.server_close()
            raise

    def look(self) -> None:
        """Make the page anew where files changed; where they cannot be read, the page stays and says so."""
        if (now := _state(self._chosen)) == self._state:
            return
        try:
            self.shown, self._state = _made(self._chosen), now
        except (PleError, OSError) as error:
            self.shown = Shown(self.shown.page, self.shown.browser, str(error))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no fault."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    server_version, sys_version = "ple", ""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        secret, _, name = address.path.removeprefix("/").partition("/")
        if refused := self._refused(secret):
            return self._send(403, {"error": refused})
        shown = self.server.shown
        if name == "":
            return self._send(200, shown.page)
        if name == "state":
            return self._send(200, {"tag": shown.tag, "fault": shown.fault})
        try:
            with self.server.scans:
                return self._send(200, _answer(shown.browser, name, dict(parse_qsl(address.query))))
        except UsageError as error:
            return self._send(400, {"error": str(error)})
        except PleError as error:
            return self._send(500, {"error": str(error)})

    def _refused(self, secret: str) -> str:
        if self.headers.get("Host", "").rpartition(":")[0] not in NAMES and self.headers.get("Host") not in NAMES:
            return "this is not the name of this machine"
        if self.headers.get("Sec-Fetch-Site", "none") == "cross-site":
            return "this is for no other site"
        known = secrets.compare_digest(secret.encode(), self.server.secret.encode())
        return "" if known else "take the whole address that ple report printed"

    def _send(self, status: int, content: bytes | dict[str, Any]) -> None:
        kind = "text/html" if isinstance(content, bytes) else "application/json"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in _HEADERS.items():
            self.send_header(header, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing about requests is said or kept."""


def _answer(browser: Browser, name: str, query: dict[str, str]) -> dict[str, Any]:
    """What the page's script asks for. Raises UsageError for what it would not ask."""
    if name not in ("pairs", "count", "prompts"):
        raise UsageError(f"there is no {name[:40]!r} here")
    try:
        if name == "prompts":
            found = browser.asked(int(query["round"]), query["unit"], int(query["row"]))
            return {"html": template("prompts.html").render(found)}
        wanted = Wanted.model_validate(query)
    except (KeyError, ValueError) as error:
        raise UsageError(f"not a question about pairs: {first_line(error)}") from error
    if name == "count":
        return {"count": browser.count(wanted)}
    cards, more = browser.page(wanted)
    return {"html": template("cards.html").render(pairs=cards, sets=browser.sources.sets, live=True), "more": more}
