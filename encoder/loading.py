"""From what a user names, a base or a training run, to a model in memory with its contract."""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from encoder.base_models import fetch, load_pretrained
from encoder.contract import DEFAULT_MAX_TOKENS, Contract, default_scope, expand_pooling, folder_hash, trained_for
from encoder.names import base_of_run, find_base, is_run
from files.console import InputError
from prompts import each_prompt, get_prompt


class LoadedBase(NamedTuple):
    model: nn.Module
    tokenizer: object
    contract: Contract
    source: str  # the folder or hub id that it was loaded from
    folder: Path  # where its files are
    base_hash: str
    run: Path | None  # the run whose adapter belongs to it


def load_base(
    spec: str, overrides: dict, dtype: torch.dtype, device: torch.device, *, override_contract: bool, trust_remote_code: bool
) -> LoadedBase:
    """A preset, folder, hub id or run -> the frozen base, on the device, and the contract.

    overrides     fields of the contract
    Raises InputError where they contradict the contract of a run (unless `override_contract`), and where the base of a run has
    changed since.
    """
    run, contract = None, None
    if is_run(spec):
        run = Path(spec)
        contract = Contract.read(run).override(overrides, force=override_contract, trained_for=trained_for(run))
        spec = base_of_run(run, contract)
    name, source, revision = find_base(spec)
    is_local = Path(source).is_dir()
    if contract and not is_local:
        revision = contract.revision
    folder = Path(source) if is_local else fetch(source, revision, trust_remote_code)
    attention = contract.attention if contract else overrides.get("attention", "causal")
    quantize = contract.quantize if contract else overrides.get("quantize")
    model, tokenizer = load_pretrained(folder, trust_remote_code, dtype, device, attention, quantize)
    base_hash = folder_hash(folder)
    revision = f"sha256:{base_hash[:16]}" if is_local else folder.name
    if contract and contract.revision != revision:
        raise InputError(
            f"{run}: trained on {contract.base} {contract.revision}, but {source} now holds {revision}: bring the old weights back"
        )
    if contract is None:
        contract = _default_contract(name, revision, overrides, model.config, tokenizer)
    model.requires_grad_(False).eval()
    return LoadedBase(model, tokenizer, contract, source, folder, base_hash, run)


def contract_fields(overrides: dict) -> dict:
    """Keyword arguments of `Encoder.load` as fields of the contract, without those that are None."""
    overrides = {k: v for k, v in overrides.items() if v is not None}
    settable = {f.name for f in fields(Contract)} - {"base", "revision", "version", "mean_removed"} | {"prompt", "query_prompt"}
    if set(overrides) - settable:
        raise InputError(f"unknown settings {sorted(set(overrides) - settable)}: there are {', '.join(sorted(settable))}")
    query = overrides.pop("query_prompt", None)
    if query is not None and "prompt" not in overrides:
        raise InputError("query_prompt stands beside a prompt for the documents: give prompt as well, none if there is none")
    if "prompt" in overrides:
        overrides["prompts"] = get_prompt(overrides.pop("prompt"), query).roles()
    return expand_pooling(overrides)


def _default_contract(name: str, revision: str, overrides: dict, config, tokenizer) -> Contract:
    """An untuned base's contract: BOS and EOS as its own tokenizer adds them, the rest by what the prompt asks for.

    A prompt with a suffix puts the answer into the last token, hence pooling `last`; without one, the mean of the text.
    """
    prompts = overrides.get("prompts") or get_prompt("none").roles()
    added = tokenizer("a")["input_ids"]
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    pooling = overrides.get("pooling") or ("last" if any(p["suffix"] for p in each_prompt(prompts["document"])) else "mean")
    settings = {
        "prompts": prompts,
        "bos": bos_id is not None and added[:1] == [bos_id],
        "eos": eos_id is not None and len(added) > 1 and added[-1] == eos_id,
        "pooling": pooling,
        "scope": default_scope(pooling),
    } | {k: v for k, v in overrides.items() if k != "prompts"}
    for special, token_id in (("bos", bos_id), ("eos", eos_id)):
        if settings[special] and token_id is None:
            raise InputError(f"{special} was asked for, but the tokenizer of {name} has no such token")
    if settings.get("keep_bos") and not settings["bos"] and settings["scope"] == "all":
        del settings["keep_bos"]  # all tokens are pooled anyway
    if "max_tokens" not in settings:
        positions = getattr(config, "max_position_embeddings", None) or 10**9
        copies = 2 if any("middle" in prompt for of_role in prompts.values() for prompt in each_prompt(of_role)) else 1
        settings["max_tokens"] = min(DEFAULT_MAX_TOKENS, positions * 3 // 4 // copies)
    return Contract(base=name, revision=revision, **settings)
