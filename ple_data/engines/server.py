"""Engine `server`: models that run elsewhere behind vLLM's HTTP server. Token ids go there, token ids come back.

A server is asked what it is before it is trusted: its model, its longest sequence, how it reads a text, and the
log-probabilities after short ones, which every server of a round must give alike. One that was away is asked again. The
key in PLE_ENGINE_API_KEY, if set, is sent as `Authorization: Bearer` and is never written or shown.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ple_data.common import web
from ple_data.common.digests import model_digest
from ple_data.common.models import AdapterInfo
from ple_data.common.web import RefusedError, UnansweredError, ask_json
from ple_data.engines import (
    TOLERANCE,
    Completion,
    EngineSpec,
    Probed,
    Request,
    Sampling,
    cut_at_stop,
    distance_of,
    refuse_no_numbers,
    refuse_no_plain_lora,
    refuse_unknown,
    response_text,
)
from schemas.errors import PleError, UsageError
from schemas.json_text import parse_json

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "PLE_ENGINE_API_KEY"
ARGUMENTS = {"concurrency": 256, "timeout": 600.0, "patience": 600.0}
"""What --engine-arg may say: requests in flight at a server; seconds for one; seconds for which servers are
tried again from a request's first failure on, over a restart, say."""
LEAST = {"concurrency": 1, "timeout": 0.001, "patience": 0.0}
GONE = 404
"""What a server says of an adapter that another process, which is done, took off: it is loaded again."""
FAILED = 500
"""What a server answers that cannot load an adapter, or that is about to end."""
PAUSE = 2.0
"""Seconds between two looks at a server that is away."""
CONNECT_SECONDS, QUICK_SECONDS = 10.0, 20.0
"""For a connection, and for what a server answers without its model."""
PROBE = ("The", "The quick brown fox jumps over the lazy", "1 2 3 4 5 6 7", "I")
"""Texts whose next token tells a policy: the log-probabilities of the likeliest."""
LIKELIEST, HOT = 20, 2.0
"""How many of them; and the temperature at which they must be the same."""
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""All that a server would otherwise take from the model's own generation settings."""
START_WITH = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank"


def check(engine_args: Mapping[str, Any], adapter: AdapterInfo | None) -> None:
    """Refuse arguments that there are not, addresses that are none, and an adapter that vLLM cannot load."""
    refuse_unknown(engine_args, [*ARGUMENTS, "endpoints"], "server")
    refuse_no_numbers(engine_args, LEAST)
    if not engine_args.get("endpoints"):
        raise UsageError("--engine server needs the address of a vLLM server: --endpoint http://host:8000")
    for url in engine_args["endpoints"]:
        web.checked_url(url, "--endpoint", API_KEY_VARIABLE)
    web.key_from_environment(API_KEY_VARIABLE)
    refuse_no_plain_lora(adapter)


def resolve_machine(dtype: str, engine_args: Mapping[str, Any]) -> tuple[str, str]:
    """The servers, in words; the number type is theirs."""
    if dtype != "auto":
        raise UsageError(f"--dtype {dtype}: the number type is the server's own; leave it out")
    return "its own type", f"{len(engine_args['endpoints'])} servers"


class ServerEngine:
    """Sends requests to the servers in turn, many at once. `probe`: what tells the policy (`engines.distance_of`)."""

    def __init__(self, spec: EngineSpec, engine_args: Mapping[str, Any]) -> None:
        """Find one that is there. Raises UsageError for one with another model, PleError where there is none."""
        told = ARGUMENTS | dict(engine_args)
        self._spec, self._patience, self._stop = spec, float(told["patience"]), threading.Event()
        self._key = web.key_from_environment(API_KEY_VARIABLE)
        self._name = spec.adapter and f"ple-{model_digest(spec.adapter.path)}"
        self.probe: Probed | None = None
        self._servers = [_Server(self, url) for url in told["endpoints"]]
        self._turn = itertools.count()
        self._in_flight, self._cut = int(told["concurrency"]) * len(self._servers), web.Cut()
        self._noted, seconds = set[str](), float(told["timeout"])
        self._client, self._quick = (self._open(min(seconds, most)) for most in (seconds, QUICK_SECONDS))
        self._pool = ThreadPoolExecutor(self._in_flight, thread_name_prefix="server")
        try:
            self._when_there(self._servers, lambda server: None)
        except BaseException:
            self.close()
            raise

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Each request with its completion as it comes back. Raises PleError where no server answers any more."""
        done: SimpleQueue[tuple[Request, Future[Completion]]] = SimpleQueue()
        waiting, more = 0, True
        while True:
            while more and waiting < 2 * self._in_flight:
                unit = next(units, None)
                more = unit is not None
                for request in unit or ():
                    future = self._pool.submit(self._completion, request, sampling)
                    future.add_done_callback(partial(_put, done, request))
                    waiting += 1
            if not waiting:
                return
            request, future = done.get()
            waiting -= 1
            yield request, future.result()

    def close(self) -> None:
        """Stop asking, and take the adapter off the servers."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._cut.now()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for server in self._servers:
            server.end()
        self._client.close()
        self._quick.close()

    def note(self, message: str) -> None:
        """Say it, once."""
        if message not in self._noted:
            self._noted.add(message)
            print(message, file=sys.stderr, flush=True)

    def _open(self, seconds: float) -> httpx.Client:
        import httpx

        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return web.open_client(self._in_flight, headers=headers, timeout=timeout)

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        first = next(self._turn)
        turn = [self._servers[(first + n) % len(self._servers)] for n in range(len(self._servers))]
        body = PLAIN | {
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **{name: getattr(sampling, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
            "seed": request.seed,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(self._spec.end_ids),
            "logprobs": 0 if sampling.logprobs else None,
            "return_token_ids": True,
        }
        return self._when_there(turn, lambda server: self._read(server, request, server.ask(body), sampling))

    def _when_there(self, turn: Sequence[_Server], work: Any) -> Any:
        """What `work` gives with the first server that is there. Where all fail they are tried again, for as long as
        there is patience from the first failure on."""
        deadline, fault = math.inf, PleError("there is no server")
        while True:
            another = any(server.known for server in turn)
            for server in turn:
                sure = False
                try:
                    server.make_sure(wait=not another)
                    sure = True
                    return work(server)
                except UsageError:
                    raise
                except PleError as error:
                    lost = sure and self._name and isinstance(error, RefusedError) and error.status == GONE
                    if self._stop.is_set() or (isinstance(error, RefusedError) and not lost):
                        raise
                    if sure:
                        server.lose(error)
                    fault = error
            deadline = min(deadline, time.monotonic() + self._patience)
            if time.monotonic() > deadline or self._stop.wait(PAUSE):
                raise fault

    def _read(self, server: _Server, request: Request, answer: Any, sampling: Sampling) -> Completion:
        try:
            (choice,) = answer["choices"]
            ids, finish = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
            logps = [float(logp) for logp in choice["logprobs"]["token_logprobs"]] if sampling.logprobs else None
            if finish == "abort":
                raise UnansweredError(f"{server.what} broke a response off, as it does when it is ended")
            if finish not in ("stop", "length") or (logps is not None and len(logps) != len(ids)):
                raise ValueError(finish)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{server.what} gave no token ids with their log-probabilities ({type(error).__name__}: {error}); it "
                "must be vLLM 0.11 or later"
            ) from error
        text = cut_at_stop(response_text(self._spec, request.prompt_ids, ids), sampling.stop)
        return Completion(ids, text, finish, logps)


start = ServerEngine


def _put(done: SimpleQueue[tuple[Request, Future[Completion]]], request: Request, future: Future[Completion]) -> None:
    done.put((request, future))


class _Server:
    """One address, and what is known of the server there. It may be restarted at any time, and be another one then."""

    def __init__(self, engine: ServerEngine, url: str) -> None:
        self._engine, self._url = engine, web.checked_url(url, "--endpoint", API_KEY_VARIABLE)
        self.what = f"the server at {web.shown_url(self._url)}"
        self.known, self._model, self._lock = False, "", threading.Lock()
        self._away, self._next_look = "", 0.0

    def ask(self, body: Mapping[str, Any]) -> Any:
        """The answer to a request of the policy. Raises RefusedError, and PleError where the server is away."""
        return self._post("v1/completions", {"model": self._engine._name or self._model, **body})

    def make_sure(self, *, wait: bool) -> None:
        """Look at a server that is not known, or was away: whether it holds the policy. One thread looks, and at one
        that is away every `PAUSE`; the others are told so at once, or wait for that look. Raises UsageError, PleError.
        """
        if self.known:
            return
        if not self._lock.acquire(blocking=wait):
            raise PleError(self._away or f"{self.what} is being looked at")
        try:
            if self.known:
                return
            if self._engine._stop.is_set() or (self._away and time.monotonic() < self._next_look):
                raise PleError(self._away or f"{self.what} was not looked at")
            try:
                self._look()
            except UsageError:
                raise
            except PleError as error:
                self.lose(error)
                self._next_look = time.monotonic() + PAUSE
                raise
            self.known, self._away = True, ""
        finally:
            self._lock.release()

    def lose(self, error: PleError) -> None:
        """It is away, or rid of the adapter: it is looked at before it is asked again."""
        first, self.known = not self._away, False
        if not isinstance(error, RefusedError) and not self._engine._stop.is_set():
            self._away = str(error)
            if first:
                again = f"asking again for {self._engine._patience:.0f} s"
                print(f"{error}: {again}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the adapter off, where the server is there."""
        if self.known and self._engine._name:
            with suppress(PleError):
                self._post("v1/unload_lora_adapter", {"lora_name": self._engine._name}, quick=True, last=True)

    def _look(self) -> None:
        spec = self._engine._spec
        base = next((model for model in self._models() if not model.get("parent")), None)
        if base is None:
            raise UsageError(f"{self.what} serves no model")
        root, self._model = str(base.get("root") or base["id"]), str(base["id"])
        if (same := same_model(root, spec.model, spec.revision)) is False:
            raise UsageError(f"{self.what} serves {root}, and --model is {spec.model}: start it with that model")
        if same is None:
            self._engine.note(f"note: of {root} at {self.what} only the name was compared: it cannot be seen from here")
        longest = base.get("max_model_len")
        if isinstance(longest, int) and longest < spec.max_length:
            raise UsageError(
                f"{self.what} takes {longest} tokens, and the longest prompt with --max-new-tokens has "
                f"{spec.max_length}: start it with --max-model-len {spec.max_length}"
            )
        if spec.adapter is not None:
            self._load(spec.adapter)
        self._compare_vocabulary(spec.tokenizer)
        texts = [spec.tokenizer(text).input_ids for text in PROBE]
        found = [self._probe(ids) for ids in texts]
        self._refuse_processed(found[:1], [self._probe(texts[0], HOT)])
        self._compare(found)

    def _load(self, adapter: AdapterInfo) -> None:
        """The adapter under a name that says its content, unless it is there already."""
        name = self._engine._name
        if any(model["id"] == name for model in self._models()):
            return
        path = str(Path(adapter.path).resolve())
        try:
            self._post("v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except (RefusedError, UnansweredError) as error:
            if "already" in str(error):
                return
            if error.status == FAILED:
                self._post("health", None, quick=True)  # it may be about to end: then it is away
            elif isinstance(error, UnansweredError):
                raise
            raise UsageError(f"{error}: it cannot load the adapter {path}; {START_WITH}") from error

    def _compare_vocabulary(self, tokenizer: Any) -> None:
        """Raise UsageError where the server reads a text as other ids than we do."""
        for text in PROBE:
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            try:
                told = self._post("tokenize", body, quick=True)
            except RefusedError:
                told = None
            ids = told.get("tokens") if isinstance(told, dict) else None
            if ids is None:
                self._engine.note(f"note: {self.what} does not say how it reads a text: vocabularies were not compared")
                return
            if ids != tokenizer(text, add_special_tokens=False).input_ids:
                raise UsageError(
                    f"{self.what} reads {text!r} as other token ids than the tokenizer of --model: start it with the "
                    "same model and tokenizer"
                )

    def _probe(self, ids: list[int], temperature: float = 0.0) -> dict[str, float]:
        body = PLAIN | {"prompt": ids, "max_tokens": 1, "temperature": temperature, "seed": 0, "logprobs": LIKELIEST}
        try:
            (found,) = self.ask(body | {"return_tokens_as_token_ids": True})["choices"][0]["logprobs"]["top_logprobs"]
            return {str(int(token.removeprefix("token_id:"))): float(logp) for token, logp in found.items()}
        except RefusedError as error:
            raise UsageError(f"{error}: the server does not take the tokens of --model") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UsageError(f"{self.what} gave no log-probabilities by token id; it must be vLLM") from error

    def _refuse_processed(self, found: Probed, hot: Probed) -> None:
        """Raise UsageError where log-probabilities are not those of the model, before temperature and top-p."""
        total = max(sum(map(math.exp, logps.values())) for logps in found)
        if distance_of(hot, found) > TOLERANCE or total > 1 + TOLERANCE:
            raise UsageError(
                f"{self.what} gives other numbers than the model's log-probabilities (they change with the "
                "temperature, or are logits): start it without --logprobs-mode"
            )

    def _compare(self, found: Probed) -> None:
        expected = self._engine.probe
        if expected is None:
            self._engine.probe = found
        elif (distance := distance_of(found, expected)) > TOLERANCE:
            raise UsageError(
                f"{self.what} holds another policy than the round began with: log-probabilities after short texts "
                f"differ by {distance:.2g} nats a token; start it with the same model"
            )

    def _models(self) -> list[dict[str, Any]]:
        """Those that it serves, adapters too."""
        told = self._post("v1/models", None, quick=True)
        models = told.get("data") if isinstance(told, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) and "id" in model for model in models):
            raise UsageError(f"{self.what} does not say which models it serves (v1/models); it must be vLLM")
        return models

    def _post(self, path: str, body: Mapping[str, Any] | None, *, quick: bool = False, last: bool = False) -> Any:
        """quick: it is answered without the model; last: it is asked when all else is over, and once."""
        engine = self._engine
        patience = web.Patience(1 if last else 2, 0.5, engine._stop, web.Cut() if last else engine._cut)
        failed = "what was finished before is kept; check the server"
        client = engine._quick if quick else engine._client
        return self._parsed(
            ask_json(client, self._at(path), body, patience, what=self.what, failed=failed, key=engine._key)
        )

    def _at(self, path: str) -> str:
        base = self._url.path.rstrip("/").removesuffix("/v1")
        return str(self._url.copy_with(path=f"{base}/{path}"))

    def _parsed(self, response: httpx.Response) -> Any:
        try:
            return parse_json(response.content)
        except ValueError:
            return {"text": response.text}


def same_model(root: str, model: str, revision: str | None = None) -> bool | None:
    """Whether what a server calls its model is the one that is meant: the same files, or the same hub id. None where
    one of the two cannot be seen from here and their last names are the same."""
    there, meant = Path(root), Path(model)
    if there.is_dir() and meant.is_dir():
        with suppress(OSError):  # it has no files that we may read
            return there.samefile(meant) or model_digest(there) == model_digest(meant, revision)
    if not (there.is_absolute() or meant.is_dir()):
        return root == model
    return None if there.name == meant.resolve().name else False
