"""Pairs that a chat model on this machine makes: it rewrites each text by an instruction."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from files.console import InputError, warn
from pair_engines.durable import Answer, Failure, Job, durable_rows, in_halves
from pair_engines.outputs import partial_file
from pair_engines.templates import THINKING_OPEN, chosen_templates, draw_jobs, instruction, without_thinking

THINKING_OPENED = re.compile(rf"{THINKING_OPEN.pattern}\s*\Z", THINKING_OPEN.flags)
OPENING_TOKENS = 16  # of a prompt's end, among which an opening tag is sought
STAGE = 16  # new tokens, after which the texts that have ended leave the batch
# A resumed job must have been started with the same values of these.
SETTINGS = ("chat_model", "dtype", "seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens")


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

    from encoder.base_models import hub_answers, why_not_loaded
    from encoder.runtime import pick_dtype

    name = args.chat_model
    local = {"local_files_only": not (Path(name).is_dir() or hub_answers())}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype(args.dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **local)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **local).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the chat model {name!r}: {why_not_loaded(name, error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        warn(f"{name} has no chat template: it is given the instruction as plain text")
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    sampling |= {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    sampling |= {"repetition_penalty": args.repetition_penalty} if args.repetition_penalty != 1 else {}

    def answer(jobs: list[Job]) -> Iterator[list[tuple[Job, str | Failure]]]:
        prompts = prompt_ids(tokenizer, [instruction(job, templates) for job in jobs])
        order = sorted(range(len(jobs)), key=lambda i: -len(prompts[i]))  # the longest first: should memory not do, it shows at once
        if device.type == "cuda" and args.repetition_penalty == 1:  # which continuous batching does not know
            found = generate_continuously(model, tokenizer, prompts, args.seed + jobs[0].number, sampling)
            yield [(job, text) for job, text in zip(jobs, found, strict=True) if text is not None]
            order = [i for i in order if found[i] is None]
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            seed = args.seed + jobs[batch[0]].number
            found = in_halves([prompts[i] for i in batch], lambda part, seed=seed: generate(model, tokenizer, part, seed, sampling))
            yield [(jobs[i], text) for i, text in zip(batch, found, strict=True)]

    return answer


def prompt_ids(tokenizer, prompts: list[str]) -> list[list[int]]:
    """The token ids of what the model is told, through its chat template where it has one. A rewrite needs no thinking."""
    if tokenizer.chat_template:  # it writes the special tokens itself
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def read_answer(tokenizer, prompt: list[int], answer: list[int]) -> str | Failure:
    """What the tokens of an answer say. Some chat templates open the block of thinking themselves, as the last thing of the prompt."""
    opened = THINKING_OPENED.search(tokenizer.decode(prompt[-OPENING_TOKENS:]))
    return without_thinking((opened.group() if opened else "") + tokenizer.decode(answer, skip_special_tokens=True))


def generate(model, tokenizer, prompts: list[list[int]], seed: int, sampling: dict) -> list[str | Failure]:
    """The answers to a batch of prompts, as `model.generate` gives them; a text that has ended leaves the batch at the next stage.

    sampling     what `model.generate` takes, with max_new_tokens
    """
    import torch

    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None  # (B, L), (B, L)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=ids.device).reshape(-1)
    n_prompt, rows, answers = ids.shape[1], list(range(len(prompts))), [""] * len(prompts)
    longest = n_prompt + sampling["max_new_tokens"]
    top_k, processors = model.generation_config.top_k, None
    top_k = 50 if top_k is None else top_k  # as `generate` has it
    if sampling["do_sample"] and top_k:
        processors = [keep_likeliest(top_k, sampling["temperature"], sampling["top_p"])]
        sampling = sampling | {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    torch.manual_seed(seed)
    while rows:
        stage = sampling | {"max_new_tokens": min(STAGE, longest - ids.shape[1])}
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, past_key_values=cache, logits_processor=processors, return_dict_in_generate=True, **stage
            )
        mask = torch.cat([mask, mask.new_ones(len(rows), out.sequences.shape[1] - ids.shape[1])], 1)
        ids, cache = out.sequences, out.past_key_values
        ended = torch.isin(ids[:, n_prompt:], ends).any(1)  # (B,)
        if ids.shape[1] >= longest:
            ended[:] = True
        for i in ended.nonzero().flatten().tolist():
            answers[rows[i]] = read_answer(tokenizer, prompts[rows[i]], ids[i, n_prompt:])
        rows = [row for row, has_ended in zip(rows, ended.tolist(), strict=True) if not has_ended]
        if rows and ended.any():
            ids, mask = ids[~ended], mask[~ended]
            cache.batch_select_indices((~ended).nonzero().flatten())
    return answers


def keep_likeliest(top_k: int, temperature: float, top_p: float):
    """What `generate` does for sampling with these, but for ties: it sorts the whole vocabulary for top_p, this only the top_k.

    Returns a function from the ids so far and the logits (B, V) to the logits over the temperature, -inf for tokens not to be drawn.
    """
    import torch

    def process(_, scores):
        best, tokens = (scores / temperature).topk(min(top_k, scores.shape[1]))  # (B, K), descending
        shares = best.softmax(-1)
        best = best.masked_fill(shares.cumsum(-1) - shares >= top_p, -torch.inf)  # what comes before it is enough
        best[:, 0] = best[:, 0].where(best[:, 0] > -torch.inf, 0)  # one is left also where top_p is 0
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, best)

    return process


def generate_continuously(model, tokenizer, prompts: list[list[int]], seed: int, sampling: dict, **limits) -> list[str | Failure | None]:
    """The answers to any number of prompts by the continuous batching of transformers; None where it gave none.

    limits     arguments of ContinuousBatchingConfig: on a CPU it takes most of the memory unless num_blocks says otherwise
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(**sampling, eos_token_id=model.generation_config.eos_token_id)
    results = model.generate_batch(
        inputs=prompts, generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(seed=seed, **limits)
    )
    found = [results.get(f"req_{i}") for i in range(len(prompts))]
    good = [None if result is None or result.error else result.generated_tokens for result in found]
    if None in good:
        warn(f"continuous batching gave no answer to {good.count(None)} of {len(good)} texts: they are answered in plain batches")
    return [None if tokens is None else read_answer(tokenizer, prompt, tokens) for prompt, tokens in zip(prompts, good, strict=True)]
