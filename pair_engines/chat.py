"""Pairs that a chat model makes: it rewrites each text by an instruction."""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

from files.console import InputError, Progress, say, warn
from files.writing import write_text
from pair_engines.inputs import read_input
from pair_engines.outputs import partial_file

# The five ways to rewrite of Roth et al. 2025 (arXiv 2507.22729, section on synthetic positives); the wording is ours.
TEMPLATES = {
    "detail": "Write this text again with more detail and the same meaning. Answer with the new text only.\n\n{text}",
    "simple": "Say the same thing as this text in simpler words. Answer with the new text only.\n\n{text}",
    "student": "You teach at a school. Explain this text to a student in your own words. Answer with the explanation only.\n\n{text}",
    "metaphor": "Find a metaphor that carries the idea of this text. Answer with the metaphor only.\n\n{text}",
    "question": "Which question would come to somebody who has just read this text? Answer with the question only.\n\n{text}",
}
# A resumed rewriting job must have been started with the same values of these.
REWRITING_SETTINGS = ("chat_model", "seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "templates")

Rewrite = Callable[[list[tuple[str, str, str]], int], list[str]]  # jobs (source, text, template) and a seed -> the new texts


def llm_pairs(args: argparse.Namespace) -> list[dict]:
    """A chat model rewrites each text once, following a template drawn at random for it.

    Each finished batch is appended to OUT.partial at once, so that an interrupted job continues where it stopped.
    """
    texts = read_input(args.input, args.column)[: args.limit]
    rng = random.Random(args.seed)
    jobs = [(source, text, rng.choice(sorted(args.templates))) for source, text in texts]
    settings = {name: getattr(args, name) for name in REWRITING_SETTINGS}
    header = {"settings": settings, "texts": hashlib.sha256(repr(texts).encode()).hexdigest()}
    partial = partial_file(args.out)
    rows = read_partial(partial, header)
    if rows:
        say(f"{partial}: continuing, {len(rows)} of {len(jobs)} texts are already rewritten")
    if len(rows) < len(jobs):
        rows += rewrite_rest(jobs, len(rows), partial, header, args)
    return rows


def rewrite_rest(jobs: list[tuple[str, str, str]], n_done: int, partial: Path, header: dict, args: argparse.Namespace) -> list[dict]:
    """Rows of the jobs from number `n_done` on, each batch appended to the partial file as soon as it is finished."""
    rewrite = load_chat_model(args)
    rows = []
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as f, Progress(len(jobs), "rewriting", "text", initial=n_done) as progress:
        if not f.tell():
            f.write(json.dumps(header) + "\n")
        for start in range(n_done, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            for (source, text, template), answer in zip(batch, rewrite(batch, args.seed + start), strict=True):
                rows.append({"anchor": text, "positive": answer, "engine": "llm", "source": source, "template": template})
                f.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            f.flush()
            progress.update(len(batch))
    return rows


def read_partial(partial: Path, header: dict) -> list[dict]:
    """Rows of an interrupted job; a last line that the interruption cut short is removed from the file.

    Raises InputError where the file's header is another one: other texts or settings.
    """
    if not partial.exists():
        return []
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")
    complete = lines[:-1]  # what follows the last newline is empty or cut short
    if complete and json.loads(complete[0]) != header:
        raise InputError(f"{partial} is from a job with other texts or settings: run that job again, or delete the file")
    write_text(partial, "".join(line + "\n" for line in complete))
    return [json.loads(line) for line in complete[1:]]


def load_chat_model(args: argparse.Namespace) -> Rewrite:
    """A function from a batch of jobs and a seed to the model's answers. Raises InputError where the model cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from encoder.base_models import hub_answers

    name = args.chat_model
    local = {"local_files_only": not (Path(name).is_dir() or hub_answers())}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **local)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **local).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the chat model {name!r}: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        warn(f"{name} has no chat template: it is given the instruction as plain text")

    def rewrite(jobs: list[tuple[str, str, str]], seed: int) -> list[str]:
        prompts = [TEMPLATES[template].format(text=text) for _, text, template in jobs]
        if tokenizer.chat_template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        # a chat template writes the special tokens itself
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template).to(device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        sampling = {"do_sample": args.temperature > 0, "repetition_penalty": args.repetition_penalty}
        if args.temperature > 0:
            sampling |= {"temperature": args.temperature, "top_p": args.top_p}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    return rewrite
