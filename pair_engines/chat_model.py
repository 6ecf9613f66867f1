"""Pairs that a chat model on this machine makes: it rewrites each text by an instruction."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from files.console import InputError, warn
from files.reading import excerpt
from pair_engines.durable import Answer, Failure, Job, durable_rows
from pair_engines.outputs import partial_file
from pair_engines.templates import chosen_templates, draw_jobs, instruction, without_thinking

# A resumed job must have been started with the same values of these.
SETTINGS = ("chat_model", "seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens")


def llm_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """A chat model rewrites each text once, following a template drawn at random for it.

    A text on which the model fails, alone in its batch, becomes a row with the error.
    """
    templates = chosen_templates(args)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"templates": templates, "shard": args.shard}
    return durable_rows(partial_file(args.out), draw_jobs(args, templates), settings, "llm", lambda _: load_chat_model(args, templates))


def load_chat_model(args: argparse.Namespace, templates: dict[str, str]) -> Answer:
    """What answers jobs with a model's words. Raises InputError where the model cannot be loaded."""
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

    def prompt_ids(prompts: list[str]) -> list[list[int]]:
        if tokenizer.chat_template:  # it writes the special tokens itself
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]

    def generate(prompts: list[list[int]], seed: int) -> list[str]:
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)  # (B, L)
        torch.manual_seed(seed)
        sampling = {"do_sample": args.temperature > 0, "repetition_penalty": args.repetition_penalty}
        if args.temperature > 0:
            sampling |= {"temperature": args.temperature, "top_p": args.top_p}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [without_thinking(answer) for answer in answers]

    def answer(jobs: list[Job]) -> Iterator[list[tuple[Job, str | Failure]]]:
        prompts = prompt_ids([instruction(job, templates) for job in jobs])
        order = sorted(range(len(jobs)), key=lambda i: -len(prompts[i]))  # the longest first: should memory not do, it shows at once
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            yield in_halves([jobs[i] for i in batch], [prompts[i] for i in batch], generate, args.seed + jobs[batch[0]].number)

    return answer


def in_halves(jobs: list[Job], prompts: list[list[int]], generate, seed: int) -> list[tuple[Job, str | Failure]]:
    """The answers to a batch. Where it fails, as when memory runs out, each half is tried, and so on down to a single text."""
    try:
        return list(zip(jobs, generate(prompts, seed), strict=True))
    except (RuntimeError, MemoryError) as error:  # torch's errors of memory among them
        why = f"{type(error).__name__}: {excerpt(error)}"
    if len(jobs) == 1:
        return [(jobs[0], Failure(why))]
    half = len(jobs) // 2
    return [*in_halves(jobs[:half], prompts[:half], generate, seed), *in_halves(jobs[half:], prompts[half:], generate, seed)]
