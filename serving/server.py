"""Embeddings over HTTP as OpenAI's API has them: POST /v1/embeddings, GET /v1/models, /health, /metrics.

One thread runs the model. What arrives while it runs is encoded together with the next batch, so that many small requests cost little more
than one large one. A request may name a role, {"input_type": "query"}; without one its texts are documents.

Needs starlette and uvicorn (requirements-extras.txt).
"""

import asyncio
import base64
import collections
import hmac
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from files.console import InputError, warn
from prompts import ROLES

if TYPE_CHECKING:
    from encoder import Encoder

BODY_SECONDS = 30  # that a client may take to send its request
FORMATS = ("float", "base64")


class Limits(NamedTuple):
    texts: int = 2048  # of a request, and of a batch
    body_bytes: int = 8 * 2**20
    waiting: int = 1024  # requests, beyond which the server says that it is busy


class Refused(Exception):
    """A request that gets no vectors: status, and why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Waiting:
    texts: list[str]
    role: str
    result: Future  # of (vectors (N, D), tokens)


class Batcher:
    """The thread that runs the model, and the requests that wait for it.

    encode    texts and a role -> vectors (N, D) and the tokens of each (N,). Raises InputError.
    """

    def __init__(self, encode: Callable[[list[str], str], tuple[np.ndarray, np.ndarray]], limits: Limits):
        self.encode, self.limits = encode, limits
        self.waiting, self.changed, self.closed = collections.deque(), threading.Condition(), False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, texts: list[str], role: str) -> Future:
        """Raises Refused where too many requests wait."""
        with self.changed:
            if len(self.waiting) >= self.limits.waiting:
                raise Refused(503, "the server is busy: try again later")
            item = Waiting(texts, role, Future())
            self.waiting.append(item)
            self.changed.notify()
        return item.result

    def close(self) -> None:
        """End the thread when nothing waits any more."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _take(self) -> list[Waiting]:
        """The requests of the next batch, of one role, the oldest first; [] at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if not self.waiting:
                return []
            role, chosen, others, n_texts = self.waiting[0].role, [], [], 0
            while self.waiting:
                item = self.waiting.popleft()
                if item.role == role and (not chosen or n_texts + len(item.texts) <= self.limits.texts):
                    chosen.append(item)
                    n_texts += len(item.texts)
                else:
                    others.append(item)
            self.waiting.extend(others)
            return [item for item in chosen if item.result.set_running_or_notify_cancel()] or self._take()

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _answer(self, batch: list[Waiting]) -> None:
        try:
            vectors, n_tokens = self.encode([text for item in batch for text in item.texts], batch[0].role)
            ends = np.cumsum([len(item.texts) for item in batch])[:-1]
            parts = zip(np.split(vectors, ends), np.split(n_tokens, ends), strict=True)
        except InputError as error:
            if len(batch) == 1:
                batch[0].result.set_exception(Refused(400, str(error)))
            for item in batch if len(batch) > 1 else ():  # one of them is to blame, the others are not
                self._answer([item])
        except BaseException as error:  # whatever it is, those who wait must hear of it, and the thread goes on
            for item in batch:
                item.result.set_exception(error)
        else:
            for item, (own, tokens) in zip(batch, parts, strict=True):
                item.result.set_result((own, int(tokens.sum())))


class Metrics:
    """Counts since the start, in the text format of Prometheus."""

    def __init__(self):
        self.requests, self.texts, self.tokens, self.seconds, self.lock = collections.Counter(), 0, 0, 0.0, threading.Lock()

    def add(self, status: int, texts: int, tokens: int, seconds: float) -> None:
        with self.lock:
            self.requests[status] += 1
            self.texts, self.tokens, self.seconds = self.texts + texts, self.tokens + tokens, self.seconds + seconds

    def text(self, n_waiting: int) -> str:
        lines = ["# TYPE embed_requests_total counter"]
        lines += [f'embed_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        for name, value in (("texts", self.texts), ("tokens", self.tokens), ("request_seconds", self.seconds)):
            lines += [f"# TYPE embed_{name}_total counter", f"embed_{name}_total {value:g}"]
        return "\n".join([*lines, "# TYPE embed_waiting_requests gauge", f"embed_waiting_requests {n_waiting}"]) + "\n"


def read_request(body: bytes, name: str, width: int, limits: Limits) -> tuple[list[str], str, str]:
    """Texts, role and format of a request. Raises Refused."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise Refused(400, "the body is no JSON object")
    texts = asked.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        tokens = isinstance(texts, list) and any(isinstance(x, int | list) for x in texts)
        advice = ": token numbers are those of another tokenizer, send text (LangChain: check_embedding_ctx_length=False)" if tokens else ""
        raise Refused(400, f"'input' must be a text or a list of texts{advice}")
    if len(texts) > limits.texts:
        raise Refused(413, f"{len(texts)} texts are more than the {limits.texts} of a request")
    if asked.get("model", name) != name:
        raise Refused(404, f"there is no model {str(asked['model'])[:80]!r} here, only {name!r}")
    if asked.get("dimensions") not in (None, width):
        raise Refused(400, f"'dimensions' can only be {width} here")
    role, encoding = asked.get("input_type") or "document", asked.get("encoding_format") or "float"
    for field, value, known in (("input_type", role, ROLES), ("encoding_format", encoding, FORMATS)):
        if value not in known:
            raise Refused(400, f"{field!r} must be one of {', '.join(known)}")
    return texts, role, encoding


async def read_body(request: Request, limit: int) -> bytes:
    """Raises Refused where it is too large, or takes too long to come."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    raise Refused(413, f"the body is larger than {limit} bytes")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS} seconds") from None
    return b"".join(chunks)


def answer(vectors: np.ndarray, encoding: str, name: str, n_tokens: int) -> dict:
    """The body of a response."""
    values = vectors.tolist() if encoding == "float" else [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    rows = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    return {"object": "list", "data": rows, "model": name, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}


def refusal(error: Refused) -> Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}
    return JSONResponse(body, error.status, headers={"Retry-After": "1"} if error.status == 503 else None)


def make_app(encoder: "Encoder", name: str, key: str | None, limits: Limits) -> Starlette:
    """The application; `app.state.batcher` runs the model.

    key    that requests must bear; None: anybody may ask
    """

    def encode(texts: list[str], role: str) -> tuple[np.ndarray, np.ndarray]:
        tokenized = encoder.tokenize(texts, role)
        return encoder.encode(texts, role), np.sum([list(map(len, some.ids)) for some in (tokenized, *tokenized.more)], axis=0)

    metrics, batcher = Metrics(), Batcher(encode, limits)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise Refused(401, "the key is missing or wrong")

    async def embeddings(request: Request) -> Response:
        began, texts, n_tokens = time.perf_counter(), [], 0
        try:
            check_key(request)
            texts, role, encoding = read_request(await read_body(request, limits.body_bytes), name, encoder.width, limits)
            vectors, n_tokens = await asyncio.wrap_future(batcher.submit(texts, role))
            response = JSONResponse(answer(vectors, encoding, name, n_tokens))
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Refused as error:
            response = refusal(error)
        except Exception as error:  # memory that ran out, a fault of the model: the client and the metrics hear of it as well
            warn(f"a request of {len(texts)} texts failed: {type(error).__name__}: {error}")
            response = refusal(Refused(500, "the model failed on this request: its error is in the server's log"))
        metrics.add(response.status_code, len(texts), n_tokens, time.perf_counter() - began)
        return response

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": encoder.fingerprint}]})

    async def health(_: Request) -> Response:
        alive = batcher.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the model has stopped"}, 200 if alive else 500)

    async def show_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.text(len(batcher.waiting)))

    routes = [("/v1/embeddings", embeddings, "POST"), ("/v1/models", models, "GET"), ("/health", health, "GET")]
    app = Starlette(routes=[Route(path, run, methods=[method]) for path, run, method in (*routes, ("/metrics", show_metrics, "GET"))])
    app.state.batcher = batcher
    return app
