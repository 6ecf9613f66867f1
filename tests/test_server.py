"""`embed.py serve`: vectors as the offline ones, whatever arrives at the same time, and the right status for what is no request.

Needs the packages of requirements-extras.txt: make test-extras.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS, make_run

pytest.importorskip("starlette", reason="requirements-extras.txt is not installed")
pytest.importorskip("uvicorn", reason="requirements-extras.txt is not installed")

import uvicorn

import embed
from encoder import Encoder
from files.console import InputError
from serving import server
from serving.server import Batcher, Limits, Metrics, Refused, make_app

ROOT = Path(__file__).resolve().parent.parent


class Served:
    """A server in a thread of this process."""

    def __init__(self, encoder: Encoder, key: str | None = None):
        self.app = make_app(encoder, "mine", key, Limits(texts=40, body_bytes=20_000))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)

    def post(self, body: bytes | dict, **headers: str) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/embeddings", data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.app.state.batcher.close()


@pytest.fixture
def encoder(llama, tmp_path) -> Encoder:
    loaded = Encoder.load(make_run(llama, tmp_path / "run", prompt="cluster", query_prompt="question: {text}"), dtype="float32")
    loaded.merge()
    return loaded


@pytest.fixture
def served(encoder):
    running = Served(encoder)
    yield running
    running.close()


def vectors_of(answer: dict) -> np.ndarray:
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def test_the_official_client_gets_our_vectors(served, encoder):
    openai = pytest.importorskip("openai", reason="requirements-extras.txt is not installed")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
    for encoding in ("base64", "float"):
        result = client.embeddings.create(model="mine", input=TEXTS, encoding_format=encoding)
        values = [row.embedding for row in result.data]
        if encoding == "base64":
            values = [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else v for v in values]
        np.testing.assert_allclose(np.array(values), encoder.encode(TEXTS), atol=1e-6)
    assert result.usage.prompt_tokens == sum(map(len, encoder.tokenize(TEXTS).ids)) and result.model == "mine"
    queries = client.embeddings.create(model="mine", input="the cat", encoding_format="float", extra_body={"input_type": "query"})
    np.testing.assert_allclose(np.array([queries.data[0].embedding]), encoder.encode(["the cat"], "query"), atol=1e-6)
    assert [model.id for model in client.models.list()] == ["mine"]


def test_clients_at_the_same_time_get_their_own_vectors(served, encoder):
    texts = [f"{a} {b}" for a in TEXTS for b in ("the cat", "a bank", "rates", "this month")]
    documents, queries = encoder.encode(texts), encoder.encode(texts, "query")

    def ask(number: int) -> bool:
        role = ("document", "query")[number % 2]
        chosen = [(number * 7 + i) % len(texts) for i in range(1 + number % 5)]
        status, answer = served.post({"input": [texts[i] for i in chosen], "input_type": role})
        own = (queries if role == "query" else documents)[chosen]
        return status == 200 and np.allclose(vectors_of(answer), own, atol=1e-5)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))
    with urllib.request.urlopen(f"{served.url}/metrics") as response:
        assert 'embed_requests_total{status="200"} 200' in response.read().decode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"garbage", 400, "the body is not JSON"),
        (b"[" * 9999, 400, "the body is not JSON"),
        (b'"a"', 400, "no JSON object"),
        ({}, 400, "'input' must be a text or a list of texts"),
        ({"input": []}, 400, "'input' must be"),
        ({"input": [[1, 2]]}, 400, "token numbers are those of another tokenizer"),
        ({"input": ["a", None]}, 400, "'input' must be"),
        ({"input": ["a"] * 41}, 413, "41 texts are more than the 40 of a request"),
        ({"input": "a" * 30_000}, 413, "the body is larger than 20000 bytes"),
        ({"input": "a", "model": "other"}, 404, "there is no model 'other' here, only 'mine'"),
        ({"input": "a", "dimensions": 7}, 400, "'dimensions' can only be 32 here"),
        ({"input": "a", "encoding_format": "hex"}, 400, "'encoding_format' must be one of float, base64"),
        ({"input": "a", "input_type": "poem"}, 400, "'input_type' must be one of query, document"),
        (b'{"input": "\\ud800"}', 400, "half a surrogate pair"),
    ],
)
def test_what_is_no_request_has_its_status(served, body, status, message):
    got, answer = served.post(body)
    assert got == status and message in answer["error"]["message"], answer
    assert served.post({"input": "a"})[0] == 200


def test_a_bad_text_costs_no_other_request(served, encoder, monkeypatch):
    encode, both = encoder.encode, threading.Barrier(2)

    def waiting(texts: list[str], role: str) -> np.ndarray:
        if texts == ["a bank"]:
            both.wait(30)
        return encode(texts, role)

    monkeypatch.setattr(encoder, "encode", waiting)
    batcher = served.app.state.batcher
    first = batcher.submit(["a bank"], "document")
    good, bad = batcher.submit(["a cat"], "document"), batcher.submit(["\ud800"], "document")
    both.wait(30)
    assert first.exception(30) is None and isinstance(bad.exception(30), Refused)
    np.testing.assert_allclose(good.result(30)[0], encode(["a cat"]), atol=1e-6)


def test_slow_and_cut_off_requests(served, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 100\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as slow:
        slow.sendall(head + b'{"input"')
        assert b"408" in slow.recv(1000)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as cut_off:
        cut_off.sendall(head)
    assert served.post({"input": "a"})[0] == 200


def test_the_key(encoder):
    running = Served(encoder, key="secret")
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer secret"}, 200)):
        assert running.post({"input": "a"}, **headers)[0] == status
    running.close()


def test_requests_wait_up_to_a_number_and_are_encoded_together():
    go, calls = threading.Event(), []

    def encode(texts: list[str], role: str) -> tuple[np.ndarray, np.ndarray]:
        go.wait(30)
        calls.append((texts, role))
        return np.array([[len(text)] for text in texts], np.float32), np.array([10 * len(text) for text in texts])

    batcher = Batcher(encode, Limits(texts=4, waiting=5))
    first = batcher.submit(["a"], "document")
    while batcher.waiting:
        first.cancelled()
    jobs = [(["bb", "ccc"], "document"), (["q"], "query"), (["dddd"], "document"), (["e", "f", "g"], "document"), (["h"], "query")]
    results = [batcher.submit(*job) for job in jobs]
    with pytest.raises(Refused, match="the server is busy"):
        batcher.submit(["too many"], "query")
    go.set()
    assert [result.result(30)[0].ravel().tolist() for result in results] == [[2, 3], [1], [4], [1, 1, 1], [1]]
    assert [result.result()[1] for result in results] == [50, 10, 40, 30, 10]  # its own, not those of its batch
    assert calls == [(["a"], "document"), (["bb", "ccc", "dddd"], "document"), (["q", "h"], "query"), (["e", "f", "g"], "document")]
    batcher.close()
    assert not batcher.thread.is_alive()


def test_a_fault_of_the_model_reaches_all_that_wait():
    def encode(texts, role):
        raise RuntimeError("the GPU is gone")

    batcher = Batcher(encode, Limits())
    assert isinstance(batcher.submit(["a"], "document").exception(30), RuntimeError) and batcher.thread.is_alive()
    batcher.close()


def test_a_fault_of_the_model_is_answered_and_counted(served, encoder, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("the model has no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode", fail)
        status, answer = served.post({"input": ["one", "two"]})
    assert status == 500 and answer["error"]["message"].startswith("the model failed on this request")
    assert "a request of 2 texts failed: RuntimeError: the model has no memory left" in capsys.readouterr().err
    assert served.post({"input": "one"})[0] == 200
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=60) as response:
        assert 'embed_requests_total{status="500"} 1' in response.read().decode()


def test_metrics():
    metrics = Metrics()
    metrics.add(200, 3, 17, 0.5)
    metrics.add(400, 0, 0, 0.25)
    assert metrics.text(2) == (
        '# TYPE embed_requests_total counter\nembed_requests_total{status="200"} 1\nembed_requests_total{status="400"} 1\n'
        "# TYPE embed_texts_total counter\nembed_texts_total 3\n# TYPE embed_tokens_total counter\nembed_tokens_total 17\n"
        "# TYPE embed_request_seconds_total counter\nembed_request_seconds_total 0.75\n"
        "# TYPE embed_waiting_requests gauge\nembed_waiting_requests 2\n"
    )


def test_what_cannot_be_served_is_one_line(llama):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for flags, message in (
            ((llama, "--port", taken.getsockname()[1]), "cannot listen at 127.0.0.1:.*take another --host or --port"),
            ((llama, "--port", 99999), "cannot listen"),
            (("nothing",), "no model 'nothing'"),
        ):
            with pytest.raises(InputError, match=message):
                embed.main(["serve", *map(str, flags)])


def test_the_command_serves_until_it_is_told_to_stop(llama):
    """And answers what has been asked by then: a request that runs, and one that waits for it."""
    command = [sys.executable, str(ROOT / "embed.py"), "serve", llama, "--port", "0", "--name", "small"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"EMBED_API_KEY": "k"})
    url = job.stdout.readline().rpartition("at ")[2].strip()

    def ask(*texts: str) -> int:
        body = json.dumps({"input": texts, "model": "small"}).encode()
        request = urllib.request.Request(f"{url}/embeddings", body, {"Authorization": "Bearer k"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return len(json.load(answer)["data"])

    def waiting() -> bool:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=30) as answer:
            return "embed_waiting_requests 1" in answer.read().decode()

    while True:
        try:
            assert ask("a") == 1
            break
        except urllib.error.URLError as error:  # it does not listen yet
            assert not isinstance(error, urllib.error.HTTPError) and job.poll() is None
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, *["the bank raised its fees " * 20] * n) for n in (2048, 1000)]
        while not waiting():
            assert not all(answer.done() for answer in asked), "they were answered before one waited: ask for more"
        job.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in asked] == [2048, 1000]
    assert job.wait(30) in (0, -signal.SIGTERM)
