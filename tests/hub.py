"""A stand-in for the hub's API on this machine, for the real client: repositories, regular and large files, commits.

What it answers is what huggingface_hub 2.4 asks for when it creates a repository and commits files without Xet. A file
that is large by its suffix goes the way of Git LFS: a batch request, a PUT, and its hash in the commit.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_standInTokenForTests"
LARGE = (".parquet", ".safetensors")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class Hub(http.server.ThreadingHTTPServer):
    """`repositories` by kind and name ('datasets/me/pairs'); `asked`: method and path of each request, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.drop = 0
        """So many uploads of large files that are answered by no more than a closed connection."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def write(self, name: str, folder: Path) -> Path:
        """A repository's files, as a download has them."""
        for path, content in self.repositories[name].files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, value: Any = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._route("GET", b"")

    def do_POST(self) -> None:
        self._route("POST", self._body())

    def do_PUT(self) -> None:
        body = self._body()
        if self.server.drop:
            self.server.drop -= 1
            self.close_connection = True
            return
        self._route("PUT", body)

    def _body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, method: str, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{method} {path}")
        if method == "PUT":  # as to a bucket, without the token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/bucket/")
            self.server.objects[path.removeprefix("/bucket/")] = body
            return self._answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path):
            repository = self.server.repositories.get(found[1])
            if repository is None:
                return self._answer(404, {"error": "Repository not found"})
            if found[2] == "preupload":
                return self._preupload(json.loads(body))
            if found[2] == "commit":
                return self._commit(found[1], repository, [json.loads(line) for line in body.splitlines()])
            siblings = [{"rfilename": name} for name in repository.files]
            name = found[1].partition("/")[2]
            info = {"_id": "1", "id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings}
            return self._answer(200, info)
        return self._answer(404, {"error": f"no {path} here"})

    def _create(self, asked: dict[str, Any]) -> None:
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if f"{kind}/{name}" in self.server.repositories:
            prefix = "" if kind == "models" else f"{kind}/"
            return self._answer(409, {"error": "exists", "url": f"{self.server.url}/{prefix}{name}"})
        self.server.repositories[f"{kind}/{name}"] = Repository(asked.get("visibility") == "private")
        prefix = "" if kind == "models" else f"{kind}/"
        return self._answer(200, {"url": f"{self.server.url}/{prefix}{name}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        self._answer(200, {"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            actions = {"upload": {"href": f"{self.server.url}/bucket/{each['oid']}"}}
            objects.append(each if each["oid"] in self.server.objects else each | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
        repository.commits += 1
        where = f"{self.server.url}/{name.removeprefix('models/')}/commit/{repository.commits:040d}"
        self._answer(200, {"success": True, "commitOid": f"{repository.commits:040d}", "commitUrl": where})
