"""Small data sets and models in the layout of the hub's cache, under real names, revisions and columns, so that mteb's tasks load them.

Files lie under blobs/ by their hash, and links to them in the snapshot of a commit.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("cat", "dog", "car", "road", "bank", "rate")  # a text is about the word that it begins with
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def texts(n: int, kind: str = "text") -> list[str]:
    return [f"{WORDS[i % len(WORDS)]} {kind} number {i}" for i in range(n)]


def topics(n: int) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(n)]


def retrieval(n: int = 12) -> dict[str, dict[str, dict]]:
    """As mteb's sets for retrieval have it: qrels are the default configuration."""
    ids = [str(i) for i in range(n)]
    return {
        "corpus": {"test": {"_id": [f"d{i}" for i in ids], "title": [""] * n, "text": texts(n, "document")}},
        "queries": {"test": {"_id": [f"q{i}" for i in ids], "text": texts(n, "question")}},
        "default": {"test": {"query-id": [f"q{i}" for i in ids], "corpus-id": [f"d{i}" for i in ids], "score": [1] * n}},
    }


def reranking(n: int = 12, parts: int = 1) -> dict[str, dict[str, dict]]:
    """With `parts` more than 1, every so many queries are parts of one, and want the same document."""
    ids = [f"q{i}" if parts == 1 else f"q{i // parts}_{i % parts}" for i in range(n)]
    ranked = [[f"d{(i + shift) % n}" for shift in range(4)] for i in range(n)]
    wanted = [f"d{i - i % parts}" for i in range(n)]
    queries = {"queries": {"test": {"_id": ids, "text": texts(n, "question")}}}
    qrels = {"default": {"test": {"query-id": ids, "corpus-id": wanted, "score": [1] * n}}}
    return retrieval(n) | queries | qrels | {"top_ranked": {"test": {"query-id": ids, "corpus-ids": ranked}}}


def pairs(n: int = 30) -> dict[str, list]:
    return {
        "sentence1": texts(n, "one"),
        "sentence2": [f"{WORDS[i * i % 6]} two" for i in range(n)],
        "score": [float(i % 6) for i in range(n)],
    }


# task -> its configurations, their splits and columns, as the hub has them
DATASETS = {
    "TwentyNewsgroupsClustering.v2": {"default": {"test": {"sentences": [texts(60)], "labels": [topics(60)]}}},
    "TwentyNewsgroupsClustering": {"default": {"test": {"sentences": [texts(60)] * 2, "labels": [topics(60)] * 2}}},
    "RedditClustering": {"default": {"test": {"sentences": [texts(60)] * 2, "labels": [topics(60)] * 2}}},
    "Banking77Classification": {
        "default": {split: {"text": texts(60), "label": [i % 6 for i in range(60)]} for split in ("train", "test")},
    },
    "MTOPDomainClassification": {
        config: {split: {"text": texts(60), "label": [i % 6 for i in range(60)]} for split in ("train", "validation", "test")}
        for config in ("de", "en")
    },
    "STS12": {"default": {"test": pairs()}},
    "STS17": {"default": {"test": pairs() | {"lang": [("en-en", "en-de", "ar-ar")[i // 10] for i in range(30)]}}},
    "ArguAna": retrieval(),
    "AskUbuntuDupQuestions": reranking(),
    "MindSmallReranking": reranking(parts=2),
    "TwitterSemEval2015": {
        "default": {
            "test": {
                "sent1": [texts(30)],
                "sent2": [[f"{WORDS[i % 5]} other" for i in range(30)]],
                "labels": [[int(i % 30 < 5) for i in range(30)]],
            }
        }
    },
    "SummEvalSummarization.v2": {
        "default": {
            "test": {
                "text": texts(8, "article"),
                "human_summaries": [[f"{WORDS[i % 6]} in short", f"{WORDS[i % 6]} in brief"] for i in range(8)],
                "machine_summaries": [[f"{WORDS[(i + j) % 6]} by machine" for j in range(4)] for i in range(8)],
                "relevance": [[5.0 - j for j in range(4)] for i in range(8)],
            }
        }
    },
}


def task_of(name: str):
    """A task of mteb as its benchmark has it: of several languages, English alone."""
    import mteb

    return next(task for b in ("MTEB(eng, v2)", "MTEB(eng, v1)") for task in mteb.get_benchmark(b).tasks if task.metadata.name == name)


def write_repository(folder: Path, configs: dict[str, dict[str, dict]]) -> None:
    """A data set as its repository holds it: a parquet for each split, and a card that says which is which."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def put_into_cache(hub: Path, source: Path, repository: str, revision: str, kind: str = "datasets") -> Path:
    """The files of a repository as snapshot `revision` in the cache `hub`: what a download leaves. Returns the snapshot."""
    home = hub / f"{kind}--{repository.replace('/', '--')}"
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = home / "snapshots" / revision / file.relative_to(source)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


def dataset_in_cache(hub: Path, name: str, scratch: Path) -> None:
    """The stand-in for a task's data, in the cache."""
    about = task_of(name).metadata.dataset
    write_repository(scratch / name, DATASETS[name])
    put_into_cache(hub, scratch / name, about["path"], about["revision"])


class Hub(ThreadingHTTPServer):
    """A hub on this machine: the repositories in a folder, `datasets/org/name/` and `models/org/name/`, each with one commit.

    asked    paths of all requests
    """

    def __init__(self, folder: Path, commits: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.commits, self.asked = folder, commits, []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, *, with_body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        words = path.strip("/").split("/")
        if words[0] == "api" and (about := self.about(*words[1:])) is not None:
            self.answer(json.dumps(about).encode(), with_body, {"Content-Type": "application/json"})
            return
        kind, words = ("datasets", words[1:]) if words[0] == "datasets" else ("models", words)
        file = self.server.folder / kind / "/".join(words[:2]) / "/".join(words[4:])
        if len(words) > 4 and words[2] == "resolve" and file.is_file():
            content = file.read_bytes()
            headers = {"X-Repo-Commit": self.server.commits["/".join(words[:2])], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self.answer(content, with_body, headers)
        else:
            self.answer(b"", with_body, {"X-Error-Code": "RepoNotFound"}, 404)

    def about(self, kind: str, organisation: str, name: str, *_) -> dict | list | None:
        """What the hub says of a repository; its files."""
        folder = self.server.folder / kind / organisation / name
        if not folder.is_dir():
            return None
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        if "/tree/" in self.path:
            return [{"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0" * 40} for file in files]
        commit = self.server.commits[f"{organisation}/{name}"]
        return {"id": f"{organisation}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files], "private": False}

    def answer(self, content: bytes, with_body: bool, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)
