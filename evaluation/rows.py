"""The rows of the table: runs, bases under every prompt, pooling and scope asked for, and baselines.

Legend: N texts, D numbers of a vector.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.contract import Contract, default_scope, trained_dims
from encoder.names import is_run, newest_run
from evaluation.baselines import FITTED, baseline, side_by_side
from evaluation.mteb_model import MtebModel, warn_once
from files.console import InputError, say, short_path, warn
from prompts import TASK_PROMPTS, get_prompt, prompt_label

if TYPE_CHECKING:  # torch and transformers are imported where they are used: what is wrong with the flags is said at once
    from encoder import Encoder

RUNS = Path(__file__).resolve().parent.parent / "runs"


class EncodingCache:
    """Rows that differ in pooling alone share the forward passes of one model.

    Each list of texts is encoded once, for the pooling configurations of all rows. The vectors of the last list of each role are kept:
    mteb scores one row after the other on the same texts. All rows have to be made before the first one is scored.
    """

    def __init__(self, encoder: "Encoder"):
        self.encoder, self.poolings, self.vectors = encoder, [], {}

    def row(self, label: str, encoder: "Encoder | None" = None) -> MtebModel:
        """A row for this model, or for `encoder`: the same weights under a contract with another pooling configuration."""
        encoder = encoder or self.encoder
        contract, pooling = json.loads(encoder.contract.to_json()), encoder.contract.pooling_config()
        self.poolings.append(pooling)
        computed = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device.type}"
        grid = contract["base"] if encoder.adapter_hash is None else None
        return MtebModel(label, encoder.fingerprint, contract, lambda texts, role: self.encode(texts, role)[pooling], computed, grid=grid)

    def encode(self, texts: list[str], role: str) -> dict:
        """Vectors (N, D) for each pooling configuration."""
        from encoder import EncodingReport

        digest = hashlib.sha256(json.dumps(texts).encode()).digest()
        if self.vectors.get(role, (None,))[0] != digest:
            report = EncodingReport()
            arrays = self.encoder.encode(texts, role, poolings=self.poolings, progress=True, report=report)
            self.vectors[role] = digest, dict(zip(self.poolings, arrays, strict=True))
            for line in report.warnings():
                warn(line)
        return self.vectors[role][1]


def load_encoder(spec: str, args: argparse.Namespace, **contract_fields) -> "Encoder":
    """A run, or a base under the given contract fields, on the machine that the flags describe."""
    from encoder import Encoder

    machine = {"dtype": args.dtype, "device": args.device, "trust_remote_code": args.trust_remote_code}
    encoder = Encoder.load(spec, override_contract=args.override_contract, **machine, **contract_fields)
    for note in encoder.notes:
        warn_once(f"{short_path(spec) if is_run(spec) else encoder.contract.base}: {note}")
    return encoder


@contextlib.contextmanager
def other_rows_go_on(args: argparse.Namespace, failures: list[str]) -> Iterator[None]:
    """Of several models, let one that fails not cost the scores of the others: its InputError is printed and added to `failures`.

    Not under torchrun: a process that fails alone would no longer meet the others, which would wait for it.
    """
    try:
        yield
    except InputError as error:
        if len(args.model or []) < 2 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise
        if str(error) not in failures:
            failures.append(str(error))
            warn(str(error))


def table_rows(args: argparse.Namespace, task_type: str, failures: list[str]) -> Iterator[list[MtebModel]]:
    """The table's rows for a type of task, in groups that share one model in memory; a group is loaded when it is asked for.

    Why a model could not be loaded is added to `failures`.
    """
    fitted = [name for name in args.baselines or [] if name in FITTED]
    if fitted and task_type != "Clustering":
        raise InputError(f"--baselines {fitted[0]} is fitted on the texts that it embeds: it can score clustering, not {task_type}")
    yield from (baseline(name) for name in args.baselines or [] if name != "side-by-side")
    for rows in model_rows(args, task_type, failures):
        yield rows
        if "side-by-side" in fitted:  # with the first of a grid's rows
            yield side_by_side(rows[0])


def model_rows(args: argparse.Namespace, task_type: str, failures: list[str]) -> Iterator[list[MtebModel]]:
    """The rows of --model, see `table_rows`."""
    newest = None if args.model else newest_run(RUNS)
    beside_its_base = newest is not None or args.texts is not None
    for spec in args.model or [str(newest or "tiny")]:
        for prompt in [None] if is_run(spec) else args.prompt or [TASK_PROMPTS.get(task_type, "none")]:
            with other_rows_go_on(args, failures):
                if prompt is None:
                    yield from run_rows(spec, args, beside_its_base=beside_its_base)
                else:
                    yield base_rows(spec, prompt, args)


def run_rows(spec: str, args: argparse.Namespace, *, beside_its_base: bool = False) -> Iterator[list[MtebModel]]:
    """The row of a run; before it, if asked for, that of its untuned base under the same contract: the difference is the training."""
    encoder = load_encoder(spec, args, **changes_to_run(spec, args))
    if beside_its_base:
        base = encoder.untuned()
        yield [EncodingCache(base).row(f"{base.contract.base}, untuned, same contract")]
    drift = encoder.merge()
    how = f"merged into the base, 1 - cosine {drift:.0e} at most" if encoder.merged else "not merged, because its base is quantized"
    (warn if drift > 1e-2 else functools.partial(say, error=True))(f"{short_path(spec)}: adapter {how}")
    if args.compile:
        encoder.compile()
    yield [EncodingCache(encoder).row(short_path(spec))]


def base_rows(spec: str, prompt: str, args: argparse.Namespace) -> list[MtebModel]:
    """Rows of an untuned base under one prompt, for every --pooling x --scope. Combinations that pool the same tokens are one row."""
    fields = {name: getattr(args, name) for name in ("max_tokens", "dims", "layers", "quantize")}
    encoder = load_encoder(spec, args, prompt=prompt, query_prompt=args.query_prompt, **fields)
    if args.compile:
        encoder.compile()
    cache, variants = EncodingCache(encoder), {}
    for pooling, scope in itertools.product(args.pooling or [encoder.contract.pooling], args.scope or [None]):
        scope, bare = scope or default_scope(pooling), encoder.contract.is_bare()
        keep_bos = bool(args.keep_bos and scope == "all")
        if bare and not keep_bos:
            scope = "text"  # nothing stands around the text: both scopes are the same tokens
        variant = encoder.with_contract(pooling=pooling, scope=scope, keep_bos=keep_bos)
        queries = f" / {args.query_prompt}" if args.query_prompt else ""
        label = f"{encoder.contract.base}, {prompt}{queries}, {pooling}" + ("" if bare and scope == "text" else f", {scope}")
        variants.setdefault(variant.fingerprint, (label + (" with BOS" if keep_bos else ""), variant))
    return [cache.row(label, variant) for label, variant in variants.values()]


def changes_to_run(spec: str, args: argparse.Namespace) -> dict:
    """What the flags change in a run's contract, as fields for `Encoder.load`.

    A run keeps its prompt, pooling and scope where they are among the values of the flag, so that it can stand beside a grid of bases.
    A single other value is a change. Raises InputError for several other values, and for a change without --override-contract.
    """
    contract = Contract.read(spec)
    changes = {name: getattr(args, name) for name in ("max_tokens", "dims", "layers", "quantize") if getattr(args, name) is not None}
    if args.keep_bos:
        changes["keep_bos"] = True
    fields = dict(changes)
    for flag, name in (("prompt", "prompts"), ("pooling", "pooling"), ("scope", "scope")):
        values, of_run = getattr(args, flag) or [], getattr(contract, name)
        meanings = [get_prompt(value, args.query_prompt).roles() for value in values] if flag == "prompt" else values
        if values and of_run not in meanings:
            if len(values) > 1:
                hint = f"add the run's {flag} to them, or give one value with --override-contract"
                shown = prompt_label(of_run)[:80] if flag == "prompt" else of_run
                raise InputError(f"{flag} is {shown!r} in {spec}, {values} were asked for: {hint}")
            changes[flag], fields[name] = values[0], meanings[0]
            if flag == "prompt":
                changes["query_prompt"] = args.query_prompt
    contract.override(fields, force=args.override_contract, trained_dims=trained_dims(spec))
    return changes
