"""Pairs that a chat model behind a server makes; jobs that were killed; shards of them."""

import functools
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from short_jobs import read_rows, run, write_texts

import make_pairs
from files.console import InputError
from pair_engines import chat_server
from pair_engines.templates import TEMPLATES

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------- a server


class ServerProcess:
    def __init__(self, *flags: str):
        command = [sys.executable, str(HERE / "chat_server.py"), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def log(self) -> dict:
        with urllib.request.urlopen(self.url, timeout=10) as response:
            return json.load(response)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve(monkeypatch):
    """A function from flags of `chat_server.py` to a running server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat_server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(chat_server, "LONGEST_WAIT", 0.05)
    servers = []

    def start(*flags: str) -> ServerProcess:
        servers.append(ServerProcess(*flags))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_a_server_with_a_real_model_answers_as_the_model_does_here(tmp_path, tiny_chat_model, serve):
    texts = write_texts(tmp_path / "t.txt", 10)
    server = serve(tiny_chat_model)
    common = ("--input", texts, "--temperature", 0, "--max-new-tokens", 6, "--no-gate")
    run("server", *common, "--url", server.url, "--chat-model", "tiny", "--out", tmp_path / "server.jsonl", "--concurrency", 3)
    run("llm", *common, "--chat-model", tiny_chat_model, "--dtype", "float32", "--out", tmp_path / "llm.jsonl", "--batch-size", 1)
    for name in ("", ".questions.jsonl"):
        rows, here = read_rows(tmp_path / f"server.jsonl{name}"), read_rows(tmp_path / f"llm.jsonl{name}")
        assert rows and [row | {"engine": "llm"} for row in rows] == here
    assert server.log()["keys"] == [""]


def test_a_server_that_misbehaves_is_asked_again_as_often_as_it_takes(tmp_path, serve, monkeypatch, capsys):
    texts = write_texts(tmp_path / "t.txt", 6)
    with open(texts, "a") as f:
        f.write("POISON\nA text that is TOO LONG\n")
    server = serve("--misbehave")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    flags = ("server", "--input", texts, "--url", server.url, "--chat-model", "x", "--timeout", 0.3, "--templates", "simple")
    run(*flags, "--out", tmp_path / "out.jsonl", "--concurrency", 4, "--retries", 12)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["source"] for row in rows] == [f"t.txt:{i}" for i in range(1, 7)]  # each once, in the order of the texts
    assert all(row["positive"] == f"An answer to: {TEMPLATES['simple'].format(text=row['anchor'])[-40:]}" for row in rows)
    failed = {row["text"]: row["error"] for row in read_rows(tmp_path / "out.jsonl.failed.jsonl")}
    assert failed["POISON"] == "500 Internal Server Error: always (tried 13 times)"
    assert "400 Bad Request" in failed["A text that is TOO LONG"] and "context length" in failed["A text that is TOO LONG"]
    log = server.log()
    assert log["most at once"] <= 4 + 4 and log["keys"] == ["Bearer secret-7"]  # requests that timed out still run on the server
    out = capsys.readouterr()
    assert "2 failed, the last with" in out.err and "secret-7" not in out.out + out.err
    assert "secret-7" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_after_a_429_nothing_is_asked_before_the_server_allows_it(tmp_path, serve):
    server = serve("--misbehave")
    flags = ("server", "--input", write_texts(tmp_path / "t.txt", 2), "--url", server.url, "--chat-model", "x", "--timeout", 0.3)
    run(*flags, "--out", tmp_path / "out.jsonl", "--concurrency", 1, "--retries", 9, "--templates", "simple")
    log = server.log()
    assert (log["429"], log["early"], log["requests"]) == (2, 0, 16)


def test_merged_shards_have_their_questions_and_failures(tmp_path, serve):
    texts = write_texts(tmp_path / "t.txt", 33)
    with open(texts, "a") as f:
        f.write("POISON\nPOISON, too\n")
    server = serve("--plain")
    flags = ("server", "--input", texts, "--url", server.url, "--chat-model", "x", "--retries", 0, "--no-gate", "--out")
    run(*flags, tmp_path / "whole.jsonl")
    for i in (1, 2):
        run(*flags, tmp_path / f"{i}.jsonl", "--shard", f"{i}/2")
    shards = sorted(path for path in tmp_path.glob("[12].*") if path.name.endswith(".jsonl"))
    assert len(shards) == 6  # as *.jsonl names them: pairs, questions and failures
    run("merge", *shards, "--no-gate", "--out", tmp_path / "all.jsonl")
    for end in ("", ".questions.jsonl", ".failed.jsonl"):
        assert (tmp_path / f"all.jsonl{end}").read_bytes() == (tmp_path / f"whole.jsonl{end}").read_bytes()


def test_an_interrupt_does_not_wait_for_the_server(tmp_path, serve):
    (tmp_path / "t.txt").write_text("A text.\nSLEEP\n")
    server = serve("--plain")
    flags = ("server", "--input", tmp_path / "t.txt", "--url", server.url, "--chat-model", "x", "--out", tmp_path / "out.jsonl")
    command = [sys.executable, str(HERE.parent / "make_pairs.py"), *map(str, flags)]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background may have been told to ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed)
    while server.log()["requests"] < 2 or not (tmp_path / "out.jsonl.partial").stat().st_size:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == 130


def test_a_server_that_does_not_answer_is_named_at_once_and_once(tmp_path, monkeypatch, capsys):
    """And not only after all tries, of which the later ones wait for long."""
    monkeypatch.setattr(chat_server, "FIRST_WAIT", 0.001)
    texts = write_texts(tmp_path / "t.txt", 9)
    flags = ("server", "--input", texts, "--url", "http://127.0.0.1:9/v1", "--chat-model", "x", "--retries", 2, "--concurrency", 5)
    with pytest.raises(InputError, match=r"no text was answered; the last failed with .* \(tried 3 times\)"):
        run(*flags, "--out", tmp_path / "out.jsonl")
    assert capsys.readouterr().err.count("each request is tried again (--retries 2)") == 1


def test_a_model_whose_server_keeps_its_thinking_apart_has_to_come_to_an_end():
    def answer(content: str | None, ended_by: str) -> bytes:
        return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": ended_by}]}).encode()

    with pytest.raises(chat_server.RefusedError, match="raise --max-new-tokens"):
        chat_server.read_answer(answer(None, "length"))
    assert chat_server.read_answer(answer("half a", "length")) == "half a" and chat_server.read_answer(answer("", "stop")) == ""


def test_one_request_that_is_told_to_wait_makes_all_wait(monkeypatch):
    args = ["server", "--input", "t.txt", "--out", "o.jsonl", "--url", "http://host/v1", "--chat-model", "x", "--retries", "0"]
    server, clock = chat_server.Server(make_pairs.build_parser().parse_args(args)), [100.0]
    monkeypatch.setattr(chat_server.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(server.stopped, "wait", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def request(prompt):
        if prompt == "first":
            raise chat_server.RetryError("429", wait=30)
        return "An answer."

    server.request = request
    assert server.ask("first").error.startswith("429")
    assert clock == [100] and server.ask("second") == "An answer." and clock == [130]


def test_the_key_does_not_follow_to_another_address(tmp_path, serve, monkeypatch):
    server = serve("--plain")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    flags = ("server", "--input", write_texts(tmp_path / "t.txt", 1), "--url", server.url.replace("/v1", "/moved/v1"), "--chat-model", "x")
    with pytest.raises(InputError, match=r"302 Found.*check --url"):
        run(*flags, "--out", tmp_path / "out.jsonl")
    assert server.log()["moved"] == 0


def test_so_many_requests_at_once_and_no_more(tmp_path, serve):
    server = serve("--plain")
    flags = ("server", "--input", write_texts(tmp_path / "t.txt", 30), "--url", server.url, "--chat-model", "x", "--concurrency", 3)
    run(*flags, "--out", tmp_path / "out.jsonl")
    assert server.log()["most at once"] == 3


def test_a_server_that_has_gone_ends_the_job_which_goes_on_later(tmp_path, serve, monkeypatch):
    texts = write_texts(tmp_path / "t.txt", 8)
    server = serve("--plain")
    flags = ("server", "--input", texts, "--chat-model", "x", "--retries", 1, "--no-gate", "--out", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="no text was answered; the last failed with ConnectionRefusedError"):
        run(*flags, "--url", "http://127.0.0.1:9/v1")
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
    ask, asked = chat_server.Server.ask, []

    def ask_and_stop(self, prompt):
        asked.append(prompt)
        if len(asked) == 4:
            server.stop()
        return ask(self, prompt)

    monkeypatch.setattr(chat_server.Server, "ask", ask_and_stop)
    monkeypatch.setattr(chat_server, "GIVE_UP", 3)
    with pytest.raises(InputError, match="3 texts in a row failed, the last with ConnectionRefusedError"):
        run(*flags, "--url", server.url, "--concurrency", 1)
    assert len(asked) < 8 and not (tmp_path / "out.jsonl.failed.jsonl").exists()
    monkeypatch.setattr(chat_server.Server, "ask", lambda self, prompt: asked.append(prompt) or "An answer.")
    run(*flags, "--url", server.url)
    assert len(read_rows(tmp_path / "out.jsonl")) + len(read_rows(tmp_path / "out.jsonl.questions.jsonl")) == 8
    assert 8 < len(asked) <= 8 + 4  # only what had failed was asked again


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "refuses: 401 .*OPENAI_API_KEY"),
        (404, {}, "404 .*check --url"),
        (302, {"Location": "http://127.0.0.1:9/"}, "302 .*check --url"),
        (429, {"Retry-After": "7200"}, "asks to wait for 7200 seconds"),
        (503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, "asks to wait for [0-9]+ seconds"),
    ],
)
def test_what_no_try_can_mend_ends_the_job_at_once(tmp_path, monkeypatch, status, headers, message):
    import http.client
    import io
    import urllib.error

    def refuse(self, request, timeout):
        raise urllib.error.HTTPError(
            request.full_url,
            status,
            "reason",
            http.client.parse_headers(io.BytesIO("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n")),
            io.BytesIO(b"<html>"),
        )

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    flags = ("server", "--input", write_texts(tmp_path / "t.txt", 3), "--url", "http://host/v1", "--chat-model", "x")
    with pytest.raises(InputError, match=message):
        run(*flags, "--out", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:99999/v1", "http://ho st/v1", "http://[/"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError, match="needs an address such as"):
        chat_server.completions_url(url)
    assert chat_server.completions_url("http://host:1/v1/") == "http://host:1/v1/chat/completions"
    assert chat_server.completions_url("https://host/v1/chat/completions") == "https://host/v1/chat/completions"


def test_a_header_retry_after_is_seconds_or_a_date():
    import email.utils

    assert chat_server.seconds_to_wait("2.5") == 2.5
    assert chat_server.seconds_to_wait(email.utils.formatdate(time.time() + 100)) == pytest.approx(100, abs=5)
    assert chat_server.seconds_to_wait(None) is None and chat_server.seconds_to_wait("soon") is None


# ------------------------------------------------------------------------------------------------- killed at any moment


@pytest.mark.slow
def test_a_job_killed_at_random_moments_loses_and_repeats_nothing(tmp_path, serve):
    """The server answers the same question in the same way, so that the file must be that of a job that nobody killed."""
    server = serve("--plain")
    texts = write_texts(tmp_path / "t.txt", 3000)
    command = [sys.executable, str(HERE.parent / "make_pairs.py"), "server", "--input", texts, "--url", server.url, "--chat-model", "x"]
    command = [str(word) for word in (*command, "--no-gate", "--out")]
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    rng, kills, seen = random.Random(0), 0, 0
    while not (tmp_path / "out.jsonl").exists():
        process = subprocess.Popen([*command, str(tmp_path / "out.jsonl")], stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        partial = tmp_path / "out.jsonl.partial"
        if partial.exists():
            assert partial.stat().st_size >= seen  # what was answered stays
            seen = partial.stat().st_size - 1000  # the last line may have been cut short
    assert kills > 3
    for name in ("", ".questions.jsonl"):
        assert (tmp_path / f"out.jsonl{name}").read_bytes() == (tmp_path / f"whole.jsonl{name}").read_bytes()
    assert not list(tmp_path.glob(".*"))
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["made"] == 3000 and (tmp_path / "out.jsonl.report.png").exists()
