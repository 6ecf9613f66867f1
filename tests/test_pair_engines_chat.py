"""Pairs that a model on this machine makes, which rewrites or translates; templates; jobs that were interrupted."""

import argparse
import random
import shutil
import subprocess
import sys

import pytest
from conftest import make_tokenizer
from short_jobs import SCRIPT, llm, read_rows, run, write_texts

from files.console import InputError
from pair_engines import chat_model, durable, gate
from pair_engines.durable import Failure
from pair_engines.templates import STILL_THINKING, TEMPLATES, draw_jobs, read_templates, without_thinking
from pair_engines.translation import text_jobs

# ------------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A text.", "A text."),
        ("<think>Let me see.\nWell.</think>\n\nA text. ", "A text."),
        ("Let me see.</think> A text.", "A text."),
        ("<think>It never ends", Failure(STILL_THINKING)),
        ("<think>Hm.</think>", ""),
        ("A text. <think>And now", "A text."),
        ("<think></think>One <thinking>hm</thinking>two", "One two"),
        ("I think <that> so", "I think <that> so"),
    ],
)
def test_what_a_model_writes_to_itself_is_no_answer(answer, expected):
    assert without_thinking(answer) == expected


def test_a_model_that_can_do_without_thinking_is_told_to(tiny_chat_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
    assert tokenizer.decode(chat_model.prompt_ids(tokenizer, ["Hm"])[0]).strip() == "user: Hm\nassistant:"


def test_a_model_that_never_ends_its_thinking_stops_the_job(tmp_path, tiny_chat_model):
    """Here the chat template opens the block of thinking, so that the answer itself holds no tag."""
    from transformers import AutoTokenizer

    folder = tmp_path / "thinking"
    shutil.copytree(tiny_chat_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "<think>\n"
    tokenizer.save_pretrained(folder)
    texts = write_texts(tmp_path / "t.txt", 21)
    with pytest.raises(InputError, match=r"all of the first 21 texts failed, .* was still thinking .* raise --max-new"):
        run(*llm(texts, str(folder)), "--max-new-tokens", 3, "--batch-size", 7, "--out", tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"t.txt", "thinking"}
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("assistant: <think>\n", "Well.</think> A text."))
    assert chat_model.read_answer(tokenizer, prompt, answer) == "A text."
    assert chat_model.read_answer(tokenizer, prompt[:3], answer[:3]) == tokenizer.decode(answer[:3]).strip()


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


@pytest.mark.parametrize("make", [lambda args: draw_jobs(args, TEMPLATES), text_jobs])
def test_no_text_is_read_beyond_the_limit(tmp_path, make, capsys):
    args = argparse.Namespace(seed=0, input=write_texts(tmp_path / "t.txt", 9), column=None, limit=4, shard=(2, 2))
    assert [job.source for job in make(args)] == ["t.txt:2", "t.txt:4"]
    assert "t.txt: 4 texts in its lines" in capsys.readouterr().out


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
    flags = (*llm(texts, tiny_chat_model), "--batch-size", 2, "--max-new-tokens", 4, "--no-gate")
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
    flags = (*llm(texts, tiny_chat_model), "--max-new-tokens", 3, "--no-gate", "--templates", "simple")
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
    with pytest.raises(InputError, match="'org/none': there is no such folder here, and it is not in this machine's cache"):
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


# -------------------------------------------------------------------------------------------------- killed at any moment


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llm", "backtranslate"])
def test_a_job_with_a_model_killed_at_random_moments_ends_as_one_that_nobody_killed(tmp_path, engine, tiny_chat_model, marian_models):
    texts = write_texts(tmp_path / "t.txt", {"llm": 240, "backtranslate": 60}[engine])
    there, back = marian_models
    flags = {
        "llm": (*llm(texts, tiny_chat_model), "--temperature", 0, "--max-new-tokens", 16),
        "backtranslate": ("backtranslate", "--input", texts, "--to-pivot", there, "--from-pivot", back),
    }[engine]
    flags = (*flags, "--no-gate", "--batch-size", 4)
    run(*flags, "--out", tmp_path / "whole.jsonl")
    command = [str(word) for word in (sys.executable, SCRIPT, *flags, "--out", tmp_path / "out.jsonl")]
    partial, rng, kills = tmp_path / "out.jsonl.partial", random.Random(0), 0
    most = (tmp_path / "whole.jsonl").stat().st_size // 2
    while not (tmp_path / "out.jsonl").exists():
        enough = (partial.stat().st_size if partial.exists() else 0) + rng.randint(1, most)  # bytes, and then it is killed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                assert process.wait(0.005) == 0
                break
            except subprocess.TimeoutExpired:
                if partial.exists() and partial.stat().st_size > enough:
                    process.kill()
                    process.wait()
                    kills += 1
                    break
    assert kills > 1
    for name in ("", ".questions.jsonl", ".failed.jsonl"):
        names = [tmp_path / f"{which}.jsonl{name}" for which in ("whole", "out")]
        assert not any(path.exists() for path in names) or names[0].read_bytes() == names[1].read_bytes()
    assert not partial.exists()
