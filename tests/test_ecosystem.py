"""Libraries on the server and on exported folders, each as its users call it: LangChain, LlamaIndex, Qdrant, mteb's own runner.

All but mteb need the packages of requirements-extras.txt: make test-extras.
"""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS, make_run

import evaluate
from encoder import Encoder
from serving.folder import write_folder
from tasks.mteb_tasks import bundled_tasks, local_task

QUERY = "question: {text}"
TWO_LINES, ONE_LINE = "two\nlines", "two lines"


def package(name: str):
    return pytest.importorskip(name, reason="requirements-extras.txt is not installed")


@pytest.fixture
def run(llama, tmp_path) -> str:
    """Queries have another prompt than documents."""
    return make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=8)


@pytest.fixture
def encoder(run) -> Encoder:
    loaded = Encoder.load(run, dtype="float32")
    loaded.merge()
    return loaded


@pytest.fixture
def folder(run, tmp_path) -> Path:
    exporting = Encoder.load(run, dtype="float32")
    exporting.merge()
    write_folder(exporting, tmp_path / "exported", "float32")
    return tmp_path / "exported"


@pytest.fixture
def served(encoder):
    package("starlette")
    package("uvicorn")
    from test_server import Served

    running = Served(encoder)
    yield running
    running.close()


def assert_ours(vectors, encoder: Encoder, texts: list[str], role: str = "document") -> None:
    np.testing.assert_allclose(np.array(vectors), encoder.encode(texts, role), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- LangChain


def test_langchain_asks_the_server(served, encoder):
    langchain = package("langchain_openai")
    client = langchain.OpenAIEmbeddings(base_url=f"{served.url}/v1", model="mine", api_key="any", check_embedding_ctx_length=False)
    texts = [*TEXTS, TWO_LINES]
    assert_ours(client.embed_documents(texts), encoder, texts)
    assert_ours(client.embed_documents(texts, chunk_size=2), encoder, texts)
    assert_ours(asyncio.run(client.aembed_documents(texts)), encoder, texts)
    assert_ours([client.embed_query("a cat")], encoder, ["a cat"])
    assert_ours([client.embed_query("a cat", extra_body={"input_type": "query"})], encoder, ["a cat"], "query")


def test_langchain_is_told_that_token_numbers_are_no_text(served, monkeypatch):
    langchain, tiktoken, openai = package("langchain_openai"), package("tiktoken"), package("openai")

    class Encoding:  # OpenAI's are fetched from the network
        def encode_ordinary(self, text: str) -> list[int]:
            return list(text.encode())

    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: Encoding())
    client = langchain.OpenAIEmbeddings(base_url=f"{served.url}/v1", model="mine", api_key="any")
    with pytest.raises(openai.BadRequestError, match=r"token numbers are those of another tokenizer.*check_embedding_ctx_length=False"):
        client.embed_documents(["a cat"])


def test_langchain_loads_the_folder(folder, encoder):
    langchain = package("langchain_huggingface")
    model = langchain.HuggingFaceEmbeddings(model_name=str(folder))
    assert_ours(model.embed_documents(TEXTS), encoder, TEXTS)
    assert_ours([model.embed_query("a cat")], encoder, ["a cat"])
    assert_ours([langchain.HuggingFaceEmbeddings(model_name=str(folder / "query")).embed_query("a cat")], encoder, ["a cat"], "query")
    assert_ours(model.embed_documents([TWO_LINES]), encoder, [ONE_LINE])  # it makes spaces of newlines, as README says


# --------------------------------------------------------------------------------------------------------- LlamaIndex


def test_llamaindex_asks_the_server(served, encoder):
    llamaindex = package("llama_index.embeddings.openai_like")
    address = {"api_base": f"{served.url}/v1", "model_name": "mine", "api_key": "any"}
    documents = llamaindex.OpenAILikeEmbedding(**address)
    queries = llamaindex.OpenAILikeEmbedding(**address, additional_kwargs={"extra_body": {"input_type": "query"}})
    assert_ours(documents.get_text_embedding_batch(TEXTS * 5), encoder, TEXTS * 5)
    assert_ours([documents.get_query_embedding("a cat")], encoder, ["a cat"])
    assert_ours([queries.get_query_embedding("a cat")], encoder, ["a cat"], "query")
    assert_ours([documents.get_text_embedding(TWO_LINES)], encoder, [ONE_LINE])  # it makes spaces of newlines, as README says


def test_llamaindex_loads_the_folder(folder, encoder):
    llamaindex = package("llama_index.embeddings.huggingface")
    model = llamaindex.HuggingFaceEmbedding(model_name=str(folder))
    texts = [*TEXTS, TWO_LINES]
    assert_ours(model.get_text_embedding_batch(texts), encoder, texts)
    assert_ours([model.get_query_embedding("a cat")], encoder, ["a cat"])
    queries = llamaindex.HuggingFaceEmbedding(model_name=str(folder / "query"))
    assert_ours([queries.get_query_embedding("a cat")], encoder, ["a cat"], "query")


def test_llamaindex_normalizes_unless_told_otherwise(llama, tmp_path):
    llamaindex = package("llama_index.embeddings.huggingface")
    encoder = Encoder.load(make_run(llama, tmp_path / "run", prompt="cluster", pooling="last", normalize=False), dtype="float32")
    encoder.merge()
    own = encoder.encode(TEXTS)
    write_folder(encoder, tmp_path / "out", "float32")
    as_it_is = llamaindex.HuggingFaceEmbedding(model_name=str(tmp_path / "out"), normalize=False)
    np.testing.assert_allclose(as_it_is.get_text_embedding_batch(TEXTS), own, rtol=1e-4, atol=1e-4)
    normalized = llamaindex.HuggingFaceEmbedding(model_name=str(tmp_path / "out")).get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(normalized, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Qdrant


def test_qdrant_finds_what_we_find(folder, encoder, tmp_path):
    """Vectors of the exported folder, kept on disk, asked with those of its query folder."""
    qdrant = package("qdrant_client")
    from sentence_transformers import SentenceTransformer

    texts, questions = [f"{a} {b}" for a in TEXTS for b in ("the cat", "a bank", "rates", "this month")], ["a cat", "which bank?"]
    distance = qdrant.models.VectorParams(size=encoder.width, distance=qdrant.models.Distance.COSINE)
    client = qdrant.QdrantClient(path=str(tmp_path / "qdrant"))
    client.create_collection("texts", vectors_config=distance)
    vectors = SentenceTransformer(str(folder), device="cpu").encode(texts)
    client.upload_collection("texts", vectors=vectors, payload=[{"text": text} for text in texts], ids=range(len(texts)))
    client.close()
    client = qdrant.QdrantClient(path=str(tmp_path / "qdrant"))
    numbers, cosines = encoder.nearest(questions, texts, k=5)
    asked = SentenceTransformer(str(folder / "query"), device="cpu").encode(questions)
    for own, values, vector in zip(numbers.tolist(), cosines.tolist(), asked, strict=True):
        points = client.query_points("texts", query=vector, limit=5).points
        assert [point.payload["text"] for point in points] == [texts[i] for i in own]
        np.testing.assert_allclose([point.score for point in points], values, atol=1e-5)
    client.close()


# --------------------------------------------------------------------------------------------------------------- mteb


def evaluated(run: str, out: Path, *flags) -> float:
    """The score that evaluate.py gives a run."""
    evaluate.main(evaluate.build_parser().parse_args(["--model", run, "--dtype", "float32", "--out", str(out), *map(str, flags)]))
    (cell,) = json.loads(out.read_text())["results"]
    return cell["score"]


def by_mteb(model, task) -> float:
    import mteb

    return float(mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results[0].get_score())


class QueriesApart:
    """What mteb sees of an exported folder whose queries have a folder of their own: its own wrapper of each."""

    def __init__(self, folder: Path):
        from mteb.models import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer

        self.document, self.query = (
            SentenceTransformerEncoderWrapper(SentenceTransformer(str(path), device="cpu")) for path in (folder, folder / "query")
        )
        self.mteb_model_meta = self.document.mteb_model_meta
        self.similarity, self.similarity_pairwise = self.document.similarity, self.document.similarity_pairwise

    def encode(self, inputs, *, prompt_type=None, **kwargs):
        of_role = self.query if prompt_type is not None and prompt_type.value == "query" else self.document
        return of_role.encode(inputs, prompt_type=prompt_type, **kwargs)


@pytest.mark.slow
def test_mteb_gives_the_folder_the_score_of_evaluate(run, folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    path = bundled_tasks()["docstrings-by-module"]
    score = by_mteb(SentenceTransformer(str(folder), device="cpu"), local_task(path, "Clustering"))
    assert abs(score - evaluated(run, tmp_path / "scores.json", "--task", "docstrings-by-module")) < 1e-3


def test_mteb_searches_with_the_folder_of_the_queries(run, folder, tmp_path):
    data = tmp_path / "search"
    data.mkdir()
    texts = [f"{a} {b}" for a in TEXTS for b in ("the cat", "a bank", "rates", "this month")]
    rows = [json.dumps({"_id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (data / "corpus.jsonl").write_text("\n".join(rows))
    (data / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{i}", "text": text[:-4]}) for i, text in enumerate(texts)))
    judged = [f"q{i}\td{(i + shift) % len(texts)}\t1" for i in range(len(texts)) for shift in (0, 3)]
    (data / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    score = evaluated(run, tmp_path / "scores.json", "--data", data)
    assert abs(by_mteb(QueriesApart(folder), local_task(data)) - score) < 1e-3
    from sentence_transformers import SentenceTransformer

    assert abs(by_mteb(SentenceTransformer(str(folder), device="cpu"), local_task(data)) - score) > 1e-3  # the prompt of documents
