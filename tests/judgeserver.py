"""A real local HTTP server that speaks the OpenAI and the Anthropic formats, with scripted verdicts.

It stands for paid endpoints, which the tests cannot reach; the formats are those of the public references. The longer
response is better, unless the query says: BIASED (always response 1), EQUAL (tie), BABBLE (no verdict), TORN (both).
Asked for a rating by a rubric, it gives 1 and a tenth for each character, unless the response says: BABBLE or TORN
(as above), SHY (no rating at first), QUOTE (it quotes the response before it rates), 40 (rates 40).
"""

import http.server
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ple_data.judge.judge import judge as run_judge
from ple_data.rewards.judge import AGAIN
from schemas.options import Judge

_PART = re.compile(r"----- begin of (.*?) -----\n(.*?)\n----- end of", re.DOTALL)


_RATED = re.compile(r"===== ([0-9a-f]{12}) begin of response =====\n(.*)\n===== \1 end of response =====", re.DOTALL)


def rating(prompt: str) -> str:
    """What the scripted judge answers to a question for a rating."""
    response = _RATED.findall(prompt)[0][1]
    again = prompt.rstrip().endswith(AGAIN)
    scripted = {"BABBLE": "Hard to say.", "TORN": "[[3]] or [[4]]", "40": "[[40]]"}
    if word := next((word for word in scripted if word in response), None):
        return scripted[word]
    own = f"[[{min(10.0, 1 + len(response) / 10):g}]]"
    if "SHY" in response and not again:
        return "It is quite good."
    if "QUOTE" in response and not again:
        return f"It says {response!r}, which is no reason. {own}"
    return own if again else f"It is long. {own}"


def verdict(prompt: str) -> str:
    """What the scripted judge answers to a question made from one of the templates that come with the program."""
    if _RATED.search(prompt):
        return rating(prompt)
    parts = dict(_PART.findall(prompt))
    query, first, second = parts["query"], parts["response 1"], parts["response 2"]
    scripted = {"BIASED": "[[1]]", "EQUAL": "[[tie]]", "BABBLE": "Hard to say.", "TORN": "[[1]] or [[2]]"}
    for word, answer in scripted.items():
        if word in query:
            return answer
    return f"The longer one is better. [[{1 if len(first) > len(second) else 2}]]"


class JudgeServer(http.server.ThreadingHTTPServer):
    """`plan` lists how the first requests fail: a status, (status, Retry-After), "drop", or a JSON text as answer."""

    def __init__(
        self, plan: list[Any] | None = None, seconds: float = 0.0, judge: Callable[[str], str] = verdict
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan, self.seconds, self.judge = plan or [], seconds, judge
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.now = self.most_at_once = 0
        self.refuse_when = ""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            fault = server.plan.pop(0) if server.plan else None
            server.requests.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.paths.append(self.path)
            server.times.append(time.monotonic())
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        time.sleep(server.seconds)
        with server.lock:
            server.now -= 1
        prompt = body["messages"][0]["content"]
        if fault == "drop":
            self.connection.close()
        elif isinstance(fault, str):
            self._answer(200, fault)
        elif isinstance(fault, tuple):
            self._answer(fault[0], "busy", {"Retry-After": fault[1]})
        elif isinstance(fault, int):
            self._answer(fault, f"no: {self.headers.get('Authorization') or self.headers.get('x-api-key')}")
        elif server.refuse_when and server.refuse_when in prompt:
            self._answer(400, "maximum context length exceeded")
        else:
            self._answer(200, json.dumps(self._found(body["model"], server.judge(prompt))))

    def _found(self, model: str, text: str) -> dict[str, Any]:
        if self.path.endswith("/messages"):
            return {
                "type": "message",
                "model": model,
                "content": [{"type": "text", "text": text}],
                "stop_reason": "end_turn",
                "usage": {"input_tokens": 100, "output_tokens": 10},
            }
        return {
            "object": "chat.completion",
            "model": model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    def _answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def judge(a: Any, b: Any, spec: str, output: Path, *, request_args: dict[str, Any] | None = None, **more: Any) -> str:
    """`ple judge`, fields of the request given as a dictionary."""
    fields = [f"{name}={json.dumps(value)}" for name, value in (request_args or {}).items()]
    return run_judge(Judge(a=str(a), b=str(b), spec=spec, output=output, request_args=fields, **more))
