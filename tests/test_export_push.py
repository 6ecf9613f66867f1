"""`export.py --push`: asked first, only what was verified, and a failure leaves the exported folder. The hub is a server on loopback."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import make_run
from huggingface_hub import constants

import export
from encoder import Encoder
from files.console import InputError
from serving import hub, runtimes

REPO = "somebody/model"


class FakeHub:
    """The calls of the hub that an upload makes; a repository exists once it was created or where `exists` says so."""

    def __init__(self, exists: bool = False, fails: str | None = None):
        self.asked, self.files, self.private, self.exists, self.fails = [], {}, None, exists, fails
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path, self.headers.get("Authorization")))
                status, value = outer.respond(self.path, body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.fails and self.fails in path:
            return 403, {"error": "You may not write here"}
        if path == f"/api/models/{REPO}":
            return (200, {"id": REPO}) if self.exists else (404, {"error": "Repository not found"})
        if path == "/api/repos/create":
            self.private, self.exists = json.loads(body).get("visibility") == "private", True
            return 200, {"url": f"{self.url}/{REPO}"}
        if "/preupload/" in path:
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{REPO}/commit/1", "commitOid": "1", "success": True}
        return 200, {}


@pytest.fixture
def use(monkeypatch):
    """Called with a hub and an answer: a terminal in which it is given to the question, and the questions."""

    def start(fake: FakeHub, answer: str) -> list[str]:
        questions = []

        def ask(question: str) -> str:
            questions.append(question)
            return answer

        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(hub.sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", ask)
        return questions

    return start


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "exported"
    (folder / "query").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1" * 2_000_000)
    (folder / "query" / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("private", "exists", "kind"), [(True, False, "private"), (False, False, "public"), (True, True, "an existing")])
def test_yes_uploads_the_folder(use, folder, capsys, private, exists, kind):
    questions = use(fake := FakeHub(exists), "y")
    assert hub.push(folder, REPO, private)
    assert f"(2 MB, {kind}" in questions[0] and f"to {REPO}? [y/N]" in questions[0]
    assert set(fake.files) == {"model.safetensors", "query/tokenizer.json"} and fake.files["query/tokenizer.json"] == b"{}"
    assert fake.private in (private, None) and f"pushed: {fake.url}/{REPO}/commit/1" in capsys.readouterr().out
    assert {key for _, path, key in fake.asked if REPO in path} == {"Bearer hf_secret"}


@pytest.mark.parametrize("answer", ["", "n", "no", "maybe"])
def test_anything_but_yes_uploads_nothing(use, folder, answer, capsys):
    use(fake := FakeHub(), answer)
    assert not hub.push(folder, REPO, private=False)
    assert all(method == "GET" for method, _, _ in fake.asked) and not fake.files
    assert "not pushed" in capsys.readouterr().out


@pytest.mark.parametrize("fails", ["/api/repos/create", "/commit/"])
def test_a_failing_upload_is_one_line_and_leaves_the_folder(use, folder, fails):
    use(FakeHub(fails=fails), "yes")
    with pytest.raises(InputError, match=rf"{REPO}: not pushed: .*403.*exported is kept: hf upload") as caught:
        hub.push(folder, REPO, private=False)
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)
    assert (folder / "model.safetensors").stat().st_size == 2_000_000


def test_a_hub_that_does_not_answer_is_one_line(use, folder, monkeypatch):
    use(fake := FakeHub(), "yes")
    fake.server.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"not pushed: .*is kept"):
        hub.push(folder, REPO, private=False)


def run(*flags) -> None:
    export.main(export.build_parser().parse_args([str(flag) for flag in flags]))


def test_a_run_is_exported_verified_and_pushed(use, llama, tmp_path, monkeypatch):
    questions = use(fake := FakeHub(), "y")
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="last")
    encoder = Encoder.load(source, dtype="float32")
    monkeypatch.setattr(runtimes, "sentence_transformers_vectors", lambda _, texts: {"one at a time": encoder.encode(texts)})
    run(source, "--out", tmp_path / "out", "--push", REPO, "--private")
    assert len(questions) == 1 and fake.private
    on_disk = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(fake.files) == on_disk and "README.md" in on_disk


def test_what_is_not_verified_is_never_asked_about(use, llama, tmp_path, monkeypatch):
    questions = use(fake := FakeHub(), "y")
    for flags, message in (
        (("--no-verify",), "nothing is pushed that was not verified"),
        (("--to", "vllm"), "not verified in its runtime: add --vllm-python"),
        (("--to", "tei"), "TEI cannot be verified from here: push --to sentence-transformers"),
    ):
        with pytest.raises(InputError, match=message):
            run(llama, "--out", tmp_path / "out", "--push", REPO, *flags)
    fail = runtimes.RuntimeFailed("it does not start")
    monkeypatch.setattr(runtimes, "sentence_transformers_vectors", lambda *_: (_ for _ in ()).throw(fail))
    with contextlib.suppress(InputError):
        run(llama, "--prompt", "cluster", "--out", tmp_path / "out", "--push", REPO)
    assert not questions and not fake.asked and not (tmp_path / "out").exists()


def test_no_terminal_no_token_and_no_name_are_refused_before_anything_is_loaded(use, llama, tmp_path, monkeypatch):
    use(FakeHub(), "y")
    with pytest.raises(InputError, match="--push a/b/c: "):
        run(llama, "--out", tmp_path / "out", "--push", "a/b/c")
    with pytest.raises(InputError, match="--private is of the repository"):
        run(llama, "--out", tmp_path / "out", "--private")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="needs a token that may write in the environment variable HF_TOKEN"):
        run(llama, "--out", tmp_path / "out", "--push", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub.sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(InputError, match="there is no terminal"):
        run(llama, "--out", tmp_path / "out", "--push", REPO)
    assert not (tmp_path / "out").exists()
