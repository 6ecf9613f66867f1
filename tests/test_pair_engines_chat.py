"""Pairs that a chat model makes, on this machine or behind a server; templates; jobs that were interrupted."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import make_tokenizer

import make_pairs
from files.console import InputError
from pair_engines import chat_model, chat_server, durable, gate
from pair_engines.templates import TEMPLATES, read_templates, without_thinking

HERE = Path(__file__).resolve().parent


def run(*flags) -> None:
    make_pairs.main(make_pairs.build_parser().parse_args([str(f) for f in flags]))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_texts(path: Path, n: int) -> Path:
    path.write_text("".join(f"The cat number {i} sat on the mat{' of the house' * (i % 4)}.\n" for i in range(n)))
    return path


def llm(texts: Path, model: str) -> tuple:
    return ("llm", "--input", texts, "--chat-model", model, "--dtype", "float32")


@pytest.fixture(scope="module")
def tiny_chat_model(tmp_path_factory, models_dir) -> str:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "chat-model"
    shutil.copytree(models_dir["qwen3"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A text.", "A text."),
        ("<think>Let me see.\nWell.</think>\n\nA text. ", "A text."),
        ("Let me see.</think> A text.", "A text."),
        ("<think>It never ends", ""),
        ("<think></think>One <thinking>hm</thinking>two", "One two"),
        ("I think <that> so", "I think <that> so"),
    ],
)
def test_what_a_model_writes_to_itself_is_no_answer(answer, expected):
    assert without_thinking(answer) == expected


def test_templates_of_a_users_file(tmp_path):
    (tmp_path / "legal.txt").write_text("Write {text} for a {court}.\n")
    assert read_templates(tmp_path / "legal.txt") == {"legal": "Write {text} for a {court}."}
    (tmp_path / "two.json").write_text('{"short": "Shorten: {text}", "question-2": "Ask: {text}"}')
    assert list(read_templates(tmp_path / "two.json")) == ["short", "question-2"]
    bad = {"none.txt": "Write it.", "none.json": '{"a": "no place"}', "five.json": '{"a": 5}', "list.json": '["{text}"]', "half.json": "{"}
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            read_templates(tmp_path / name)
    with pytest.raises(InputError, match="no file"):
        read_templates(tmp_path / "gone.txt")


# ----------------------------------------------------------------------------------------------------- on this machine


def fail_at(monkeypatch, *batches: int) -> list[int]:
    """Let the chat model be interrupted at these batches, counted over all runs; returns the sizes of all batches."""
    load, sizes = chat_model.load_chat_model, []

    def load_and_fail(args, templates):
        answer = load(args, templates)

        def failing(jobs):
            for answers in answer(jobs):
                sizes.append(len(answers))
                if len(sizes) in batches:
                    raise KeyboardInterrupt
                yield answers

        return failing

    monkeypatch.setattr(chat_model, "load_chat_model", load_and_fail)
    return sizes


def test_an_interrupted_rewriting_job_continues_where_it_stopped(tmp_path, tiny_chat_model, monkeypatch, capsys):
    texts = write_texts(tmp_path / "t.txt", 13)
    monkeypatch.setattr(durable, "POOL", 5)
    flags = (
        "llm",
        "--input",
        texts,
        "--chat-model",
        tiny_chat_model,
        "--dtype",
        "float32",
        "--batch-size",
        2,
        "--max-new-tokens",
        4,
        "--no-gate",
    )
    run(*flags, "--out", tmp_path / "whole.jsonl")
    whole = read_rows(tmp_path / "whole.jsonl")
    templates = {row["template"] for row in whole}
    assert len(whole) >= 7 and templates <= set(TEMPLATES) - {"question"} and len(templates) > 1
    assert [row["source"] for row in whole] == sorted((row["source"] for row in whole), key=lambda s: int(s.split(":")[1]))

    sizes = fail_at(monkeypatch, 3, 6)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "parts.jsonl")
    partial = tmp_path / "parts.jsonl.partial"
    with open(partial, "a") as f:
        f.write('{"rows": [[7, {"anch')
    assert not (tmp_path / "parts.jsonl").exists()
    with pytest.raises(InputError, match="other texts or settings"):
        run(*flags, "--seed", 3, "--out", tmp_path / "parts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "parts.jsonl")
    changed = texts.read_text()
    texts.write_text(changed.replace("number 1 ", "number 111 "))
    with pytest.raises(InputError, match="other texts or settings"):
        run(*flags, "--out", tmp_path / "parts.jsonl")
    texts.write_text(changed)
    run(*flags, "--out", tmp_path / "parts.jsonl")
    out = capsys.readouterr().out
    assert "4 texts are already answered" in out and "7 texts are already answered" in out
    assert sizes == [2, 2, 1, 1, 2, 2, 2, 1, 2, 1]  # pools of 5, 5 and 3 texts; the third and the sixth batch were lost
    for name in ("", ".questions.jsonl"):
        assert (tmp_path / f"parts.jsonl{name}").read_bytes() == (tmp_path / f"whole.jsonl{name}").read_bytes()
    assert not partial.exists()


def test_a_gate_that_leaves_nothing_does_not_cost_the_answers(tmp_path, tiny_chat_model, monkeypatch):
    flags = (
        "llm",
        "--input",
        write_texts(tmp_path / "t.txt", 3),
        "--chat-model",
        tiny_chat_model,
        "--dtype",
        "float32",
        "--max-new-tokens",
        4,
    )
    monkeypatch.setattr(gate, "COPY", -1)
    with pytest.raises(InputError, match="no pairs were made: read some with --review"):
        run(*flags, "--out", tmp_path / "out.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"t.txt", "out.jsonl.partial"}
    monkeypatch.setattr(chat_model, "load_chat_model", None)
    run(*flags, "--out", tmp_path / "out.jsonl", "--no-gate")


def test_questions_are_kept_apart(tmp_path, tiny_chat_model, capsys):
    texts = write_texts(tmp_path / "t.txt", 12)
    flags = (*llm(texts, tiny_chat_model), "--max-new-tokens", 4, "--no-gate")
    run(*flags, "--templates", "simple", "question", "--out", tmp_path / "out.jsonl")
    pairs, questions = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "out.jsonl.questions.jsonl")
    assert {row["template"] for row in pairs} == {"simple"} and {row["template"] for row in questions} == {"question"}
    lines = texts.read_text().splitlines()
    assert all(row["anchor"] in lines for row in pairs) and all(row["positive"] in lines for row in questions)
    assert f"{len(questions)} questions, each with its text" in capsys.readouterr().out
    run(*flags, "--templates", "question", "--out", tmp_path / "only.jsonl")
    assert all(row["positive"] in lines for row in read_rows(tmp_path / "only.jsonl"))
    assert not (tmp_path / "only.jsonl.questions.jsonl").exists()


def test_prompts_are_sorted_by_length_and_answers_are_the_texts_own(tmp_path, tiny_chat_model, monkeypatch):
    texts = write_texts(tmp_path / "t.txt", 8)
    (tmp_path / "my.txt").write_text("Say it again: {text}")
    flags = (
        "llm",
        "--input",
        texts,
        "--chat-model",
        tiny_chat_model,
        "--dtype",
        "float32",
        "--max-new-tokens",
        6,
        "--temperature",
        0,
        "--no-gate",
    )
    flags = (*flags, "--template-file", tmp_path / "my.txt")
    run(*flags, "--batch-size", 1, "--out", tmp_path / "alone.jsonl")
    run(*flags, "--batch-size", 3, "--out", tmp_path / "batches.jsonl")
    alone = read_rows(tmp_path / "alone.jsonl")
    assert {row["template"] for row in alone} == {"my"} and len({row["positive"] for row in alone}) > 1
    assert read_rows(tmp_path / "batches.jsonl") == alone


@pytest.fixture(scope="module")
def ending_model(tiny_chat_model):
    """A model that ends some of its answers early, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_chat_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [tokenizer(f"The cat {i} sat{' on the mat' * (i % 4)}")["input_ids"] for i in range(12)]
    with torch.no_grad():
        answers = [model.generate(torch.tensor([p]), max_new_tokens=40, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    # the token that ends an answer shall be one that they come to at many moments
    moments = {token: {tokens.index(token) for tokens in answers if token in tokens} for tokens in answers for token in tokens}
    model.generation_config.eos_token_id = max(moments, key=lambda token: len(moments[token]))
    return model, tokenizer, prompts


@pytest.mark.parametrize("how", ["stages", "continuous"])
def test_answers_are_those_of_generate_on_each_prompt_alone(ending_model, monkeypatch, how):
    import torch

    model, tokenizer, prompts = ending_model
    greedy = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        alone = [model.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :] for prompt in prompts]
    assert len({len(tokens) // 5 for tokens in alone}) > 3  # they end at different moments
    expected = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in alone]
    if how == "stages":
        monkeypatch.setattr(chat_model, "STAGE", 5)
        found = chat_model.generate(model, tokenizer, prompts, 0, greedy)
    else:
        limits = {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 64, "max_requests_per_batch": 5}
        found = chat_model.generate_continuously(model, tokenizer, prompts, 0, greedy, **limits)
        assert chat_model.generate(model, tokenizer, prompts, 0, greedy) == expected  # the model is as it was
    assert found == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.5, 0.3), (1.0, 1.0), (0.7, 0.0)])
def test_answers_are_drawn_as_generate_draws_them(ending_model, monkeypatch, temperature, top_p):
    import torch

    model, tokenizer, prompts = ending_model
    monkeypatch.setattr(chat_model, "STAGE", 100)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id}
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    torch.manual_seed(3)
    with torch.no_grad():
        out = model.generate(**{key: inputs[key] for key in ("input_ids", "attention_mask")}, **sampling)
    answers = [text.strip() for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
    assert chat_model.generate(model, tokenizer, prompts, 3, sampling) == answers and len(set(answers)) > 2


def test_a_batch_that_fails_is_halved_and_what_fails_alone_is_set_aside(tmp_path, tiny_chat_model, monkeypatch, capsys):
    from transformers import Qwen3ForCausalLM

    generate, sizes = Qwen3ForCausalLM.generate, []

    def failing(self, input_ids, **options):
        sizes.append(len(input_ids))
        if input_ids.shape[1] > 130 or len(input_ids) > 4:
            raise RuntimeError("out of memory\nfor a reason")
        return generate(self, input_ids, **options)

    texts = write_texts(tmp_path / "t.txt", 9)
    with open(texts, "a") as f:
        f.write(" ".join(f"word {i} of a very long text" for i in range(20)))
    monkeypatch.setattr(Qwen3ForCausalLM, "generate", failing)
    flags = (
        "llm",
        "--input",
        texts,
        "--chat-model",
        tiny_chat_model,
        "--dtype",
        "float32",
        "--max-new-tokens",
        3,
        "--no-gate",
        "--templates",
        "simple",
    )
    run(*flags, "--out", tmp_path / "out.jsonl")
    failed = read_rows(tmp_path / "out.jsonl.failed.jsonl")
    assert [(row["source"], row["error"]) for row in failed] == [("t.txt:10", "RuntimeError: out of memory for a reason")]
    assert [row["source"] for row in read_rows(tmp_path / "out.jsonl")] == [f"t.txt:{i}" for i in range(1, 10)]
    assert sizes[0] == 10 and 1 in sizes and "1 failed, the last with RuntimeError" in capsys.readouterr().err
    with open(tmp_path / "long.txt", "w") as f:
        f.write(texts.read_text().splitlines()[-1])
    flags = (*llm(tmp_path / "long.txt", tiny_chat_model), "--max-new-tokens", 3, "--no-gate")
    with pytest.raises(InputError, match=r"every text failed, 1 in all, the last with RuntimeError: .*; delete .*partial to try again"):
        run(*flags, "--out", tmp_path / "none.jsonl")
    run("crop", "--input", tmp_path / "out.jsonl.failed.jsonl", "--out", tmp_path / "again.jsonl")  # the file may be an input


def test_a_chat_model_that_is_missing_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "t.txt").write_text("A text.\n")
    with pytest.raises(InputError, match="cannot load the chat model 'org/none'"):
        run("llm", "--input", tmp_path / "t.txt", "--chat-model", "org/none", "--out", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


# ------------------------------------------------------------------------------------------------------- translation


@pytest.fixture(scope="module")
def marian_models(tmp_path_factory) -> tuple[str, str]:
    """Two random Marian models with the tests' tokenizer."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"vocab_size": 400, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 48}
        special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
        model = MarianMTModel(MarianConfig(**sizes, **layers, **special))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)
        folders.append(str(tmp_path_factory.mktemp("marian") / "model"))
        model.save_pretrained(folders[-1])
        tokenizer = make_tokenizer("bytes", bos=False, eos=True)
        tokenizer.pad_token = "<unk>"
        tokenizer.save_pretrained(folders[-1])
    return tuple(folders)


def test_a_back_translation_goes_there_and_back_sentence_by_sentence(tmp_path, marian_models, capsys):
    import torch
    from transformers import AutoTokenizer, MarianMTModel

    def translate(sentence: str, folder: str) -> str:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), MarianMTModel.from_pretrained(folder).eval()
        with torch.no_grad():
            out = model.generate(torch.tensor([tokenizer(sentence)["input_ids"]]), num_beams=1, max_new_tokens=47)
        return tokenizer.decode(out[0], skip_special_tokens=True).strip()

    texts = ["The cat sat on the mat.", "A dog. It barks at the bank!", "Rates", "The cat number 7"]
    (tmp_path / "t.txt").write_text("\n".join([*texts, "word " * 100]))
    there, back = marian_models
    flags = ("backtranslate", "--input", tmp_path / "t.txt", "--to-pivot", there, "--from-pivot", back, "--no-gate", "--batch-size", 2)
    run(*flags, "--out", tmp_path / "out.jsonl")
    failed = {row["source"]: row["error"] for row in read_rows(tmp_path / "out.jsonl.failed.jsonl")}
    assert "tokens, the model takes 48" in failed["t.txt:5"]
    rows = {row["source"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert rows
    for i, text in enumerate(texts, 1):
        sentences = text.split(". ") if i != 2 else ["A dog.", "It barks at the bank!"]
        pivots = [translate(sentence, there) for sentence in sentences]
        if f"t.txt:{i}" in failed:  # what a random model says may be too long for the other
            continue
        assert rows[f"t.txt:{i}"]["anchor"] == text and rows[f"t.txt:{i}"]["engine"] == "backtranslate"
        assert rows[f"t.txt:{i}"]["positive"] == " ".join(translate(pivot, back) for pivot in pivots)
    for flags, message in (
        (("--pivot", "xx"), "cannot load the translation model 'Helsinki-NLP/opus-mt-en-xx'"),
        (("--to-pivot", there, "--from-pivot", "org/none"), "cannot load the translation model 'org/none'"),
    ):
        with pytest.raises(InputError, match=message):
            run("backtranslate", "--input", tmp_path / "t.txt", *flags, "--out", tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))


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
    process = subprocess.Popen([sys.executable, str(HERE.parent / "make_pairs.py"), *map(str, flags)], stderr=subprocess.PIPE)
    while server.log()["requests"] < 2 or not (tmp_path / "out.jsonl.partial").stat().st_size:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == 130


def test_one_request_that_is_told_to_wait_makes_all_wait(monkeypatch):
    args = ["server", "--input", "t.txt", "--out", "o.jsonl", "--url", "http://host/v1", "--chat-model", "x", "--retries", "0"]
    server, asked = chat_server.Server(make_pairs.build_parser().parse_args(args)), []

    def request(prompt):
        asked.append(time.monotonic())
        if prompt == "first":
            raise chat_server.RetryError("429", wait=0.3)
        return "An answer."

    server.request = request
    assert server.ask("first").error.startswith("429")
    assert server.ask("second") == "An answer." and asked[1] - asked[0] >= 0.29


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
    assert not list(tmp_path.glob(".*")) and not partial.exists()
