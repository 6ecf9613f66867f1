"""The rows of the table: runs, bases under every prompt, pooling and scope asked for, and baselines.

Legend: N texts, D numbers of a vector.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from encoder.contract import POOLING_PRESETS, Contract, Layer, default_scope, expand_pooling, trained_for
from encoder.names import base_of, find_base, is_run, newest_run
from evaluation import sentence_transformer
from evaluation.baselines import FITTED, baseline, side_by_side
from evaluation.failures import add_failure, several_processes
from evaluation.mteb_model import MtebModel, Pace, warn_once
from files.console import InputError, Progress, say, short_path, warn
from files.reading import read_texts
from prompts import TASK_PROMPTS, get_prompt, prompt_label

if TYPE_CHECKING:  # torch and transformers are imported where they are used: what is wrong with the flags is said at once
    from encoder import Encoder

OF_BASES = ("max_tokens", "dims", "layers", "embed_filter", "quantize")  # flags that are fields of an untuned base's contract
WITH_OTHER_TOKENS = [name for name, fields in POOLING_PRESETS.items() if "eos" in fields]  # they cannot share forward passes
RUNS = Path(__file__).resolve().parent.parent / "runs"
FEW_TEXTS = 100  # whose mean is as much theirs as the model's


class EncodingCache:
    """Rows that differ in pooling alone share the forward passes of one model.

    Each list of texts is encoded once, for the pooling configurations of all rows. The vectors of the last list of each role are kept:
    mteb scores one row after the other on the same texts. All rows have to be made before the first one is scored.
    """

    def __init__(self, encoder: "Encoder"):
        self.encoder, self.poolings, self.vectors, self.pace = encoder, [], {}, Pace()

    def row(self, label: str, encoder: "Encoder | None" = None) -> MtebModel:
        """A row for this model, or for `encoder`: the same weights under a contract with another pooling configuration."""
        encoder = encoder or self.encoder
        contract, pooling = json.loads(encoder.contract.to_json()), encoder.contract.pooling_config()
        self.poolings.append(pooling)
        computed = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device.type}"
        grid = contract["base"] if encoder.adapter_hash is None else None
        name = (grid if grid.count("/") == 1 else f"local/{grid}") if grid else None

        def encode(texts: list[str], role: str) -> np.ndarray:
            return self.encode(texts, role)[pooling]

        return MtebModel(label, encoder.fingerprint, contract, encode, computed, grid=grid, name=name, pace=self.pace)

    def encode(self, texts: list[str], role: str) -> dict:
        """Vectors (N, D) for each pooling configuration."""
        from encoder import EncodingReport

        digest = digest_of(texts)
        if self.vectors.get(role, (None,))[0] != digest:
            report = EncodingReport()
            self.vectors.pop(role, None)  # makes room
            arrays, at = self.allocate(len(texts)), 0
            with Progress(len(texts), "encoding", "text") as bar, self.pace.timing(len(texts)):
                for windows in self.encoder.stream(texts, role, poolings=self.poolings, report=report, done=bar.update):
                    for array, window in zip(arrays, windows, strict=True):
                        array[at : at + len(window)] = window
                    at += len(windows[0])
            self.vectors[role] = digest, dict(zip(self.poolings, arrays, strict=True))
            for line in report.warnings():
                warn(line)
        return self.vectors[role][1]

    def allocate(self, n: int) -> list[np.ndarray]:
        """An array (N, D) for each pooling configuration; on disk, in files that are gone with the arrays, where memory is short."""
        from encoder.runtime import free_memory, pick_device

        shapes = [(n, self.encoder.width_of(pooling.pooling)) for pooling in self.poolings]
        size, free = 4 * sum(map(math.prod, shapes)), free_memory(pick_device("cpu"))
        if free is None or size < free / 4:
            return [np.empty(shape, np.float32) for shape in shapes]
        say(f"{size / 2**30:,.1f} GiB of vectors go to {tempfile.gettempdir()}, as memory is short", error=True)
        return [np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape) for shape in shapes]


def read_mean_texts(path: Path, column: str | None) -> tuple[str, list[str]]:
    """Name and texts of --remove-mean, without labels, and a line that says what is done with them."""
    rows, summary = read_texts(path, column)
    say(f"{summary}; their mean is removed, as each model embeds them, and nothing else of the file is read", error=True)
    if len({text for _, text in rows}) < 2:
        raise InputError(f"{path.name} holds one text over and over: a mean needs different ones")
    if len(rows) < FEW_TEXTS:
        warn(f"the mean of {len(rows)} texts says as much of them as of the model: take {FEW_TEXTS} or more")
    return path.name, [text for _, text in rows]


def without_mean(cache: EncodingCache, variants: "dict[str, Encoder]", args: argparse.Namespace) -> list[MtebModel]:
    """A row beside each of the cache's rows, from the same forward passes, with the mean of --remove-mean removed; [] without it.

    variants    the encoder of each row, by its label
    """
    if not getattr(args, "mean_texts", None):
        return []
    from encoder.mean_direction import identity, mean_directions

    name, texts = args.mean_texts
    poolings = [encoder.contract.pooling_config() for encoder in variants.values()]
    directions, rows = mean_directions(cache.encoder, texts, poolings, progress=True), []
    for (label, encoder), pooling in zip(variants.items(), poolings, strict=True):
        removed = encoder.with_contract(mean_removed=identity(texts, name))
        cache.encoder.mean_directions[removed.contract.pooling_config()] = directions[pooling]
        rows.append(cache.row(f"{label}, mean of {name} removed", removed))
    return rows


def digest_of(texts: list[str]) -> bytes:
    """Tells lists of texts apart, without a copy of them all."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.digest()


def check_model(spec: str, trust_remote_code: bool) -> None:
    """Raise InputError for a model whose config alone shows that it cannot be loaded."""
    from encoder.base_models import check_base

    if sentence_transformer.is_sentence_transformer(spec):
        sentence_transformer.find_folder(spec, trust_remote_code, ("modules.json",))
    else:
        check_base(base_of(spec), trust_remote_code)


def fetch_model(spec: str, args: argparse.Namespace) -> Path | None:
    """The folder of a hub model in the cache, downloaded where the hub answers; None for what lies here. Raises InputError."""
    from encoder.base_models import fetch

    if sentence_transformer.is_sentence_transformer(spec):
        folder = sentence_transformer.find_folder(spec, args.trust_remote_code)
        return None if str(folder) == str(Path(spec.removeprefix(sentence_transformer.PREFIX)).expanduser()) else folder
    _, source, revision = find_base(base_of(spec))
    return None if Path(source).is_dir() else fetch(source, revision, args.trust_remote_code)


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
        if (len(args.model or []) < 2 and not args.paper) or several_processes():
            raise
        add_failure(failures, str(error))


def table_rows(args: argparse.Namespace, task_type: str, failures: list[str]) -> Iterator[list[MtebModel]]:
    """The table's rows for a type of task, in groups that share one model in memory; a group is loaded when it is asked for.

    Why a model could not be loaded is added to `failures`.
    """
    if "tfidf" in (args.baselines or []):
        yield baseline()
    for rows in model_rows(args, task_type, failures):
        yield rows
        if "side-by-side" in (args.baselines or []):  # with the first of a grid's rows
            yield side_by_side(rows[0])


def check_baselines(args: argparse.Namespace, task_types: Iterable[str]) -> None:
    """Raise InputError for --baselines that are unknown, or are fitted on the texts that they embed and so cannot score these tasks."""
    for name in args.baselines or []:
        if name not in FITTED:
            hint = f"a sentence-transformers model is a row of --model: {sentence_transformer.PREFIX}{name}"
            raise InputError(f"--baselines {name!r} is none of {', '.join(FITTED)}; {hint}")
        if others := [task_type for task_type in task_types if task_type != "Clustering"]:
            raise InputError(f"--baselines {name} is fitted on the texts that it embeds: it can score clustering, not {others[0]}")


def model_rows(args: argparse.Namespace, task_type: str, failures: list[str]) -> Iterator[list[MtebModel]]:
    """The rows of --model, see `table_rows`."""
    newest = None if args.model else newest_run(RUNS)
    beside_its_base = newest is not None or args.texts is not None
    for spec in args.model or [str(newest or "tiny")]:
        if is_run(spec) or sentence_transformer.is_sentence_transformer(spec):
            with other_rows_go_on(args, failures):
                if is_run(spec):
                    yield from run_rows(spec, args, beside_its_base=beside_its_base)
                else:
                    yield [sentence_transformer.row(spec, args, task_type)]
            continue
        prompts = args.prompt or [TASK_PROMPTS.get(task_type, "none")]
        for prompt, prepending in itertools.product(prompts, args.token_prepending or [None]):
            with other_rows_go_on(args, failures):
                ending = [pooling for pooling in args.pooling or [] if pooling in WITH_OTHER_TOKENS]
                if not args.pooling or len(ending) < len(args.pooling):
                    yield base_rows(spec, prompt, args, prepending=prepending)
                for pooling in ending:
                    yield base_rows(spec, prompt, args, pooling, prepending)


def run_rows(spec: str, args: argparse.Namespace, *, beside_its_base: bool = False) -> Iterator[list[MtebModel]]:
    """The row of a run; before it, if asked for, that of its untuned base under the same contract: the difference is the training."""
    encoder = load_encoder(spec, args, **changes_to_run(spec, args))
    if beside_its_base:
        base = encoder.untuned()
        label = f"{base.contract.base}, untuned, same contract" + ("" if encoder.contract.mean_removed is None else ", mean kept")
        cache = EncodingCache(base)
        yield [cache.row(label), *without_mean(cache, {label: base}, args)]
    drift = encoder.merge()
    how = f"merged into the base, 1 - cosine {drift:.0e} at most" if encoder.merged else "not merged, because its base is quantized"
    (warn if drift > 1e-2 else functools.partial(say, error=True))(f"{short_path(spec)}: adapter {how}")
    if args.compile:
        encoder.compile()
    cache = EncodingCache(encoder)
    yield [cache.row(short_path(spec)), *without_mean(cache, {short_path(spec): encoder}, args)]


def base_rows(
    spec: str, prompt: str, args: argparse.Namespace, ending: str | None = None, prepending: tuple[Layer, Layer] | None = None
) -> list[MtebModel]:
    """Rows of an untuned base under one prompt and one token_prepending, for every --pooling x --scope x layers of --sweep.

    Combinations that pool the same states are one row. ending: the one of WITH_OTHER_TOKENS that they are, None for the other poolings.
    """
    fields = {name: getattr(args, name) for name in OF_BASES}
    if ending:
        fields["eos"] = POOLING_PRESETS[ending]["eos"]
    encoder = load_encoder(spec, args, prompt=prompt, query_prompt=args.query_prompt, token_prepending=prepending, **fields)
    if args.compile:
        encoder.compile()
    cache, variants = EncodingCache(encoder), {}
    poolings = [ending] if ending else [name for name in args.pooling or [encoder.contract.pooling] if name not in WITH_OTHER_TOKENS]
    scopes = ["all"] if ending else args.scope or [None]
    for name, scope, layers in itertools.product(poolings, scopes, getattr(args, "layer_sets", [None])):
        preset = POOLING_PRESETS.get(name, {})
        if layers and "layers" in preset:  # it has its own
            layers = None
        pooling, layers = preset.get("pooling", name), layers or preset.get("layers") or encoder.contract.layers
        scope, bare = scope or default_scope(pooling), encoder.contract.is_bare()
        keep_bos = bool(args.keep_bos and scope == "all" and not ending)
        if bare and not keep_bos:
            scope = "text"  # nothing stands around the text: both scopes are the same tokens
        attention_layer = args.attention_layer if pooling == "attention" and args.attention_layer is not None else -1
        changes = {"pooling": pooling, "scope": scope, "keep_bos": keep_bos, "layers": layers, "attention_layer": attention_layer}
        variant = encoder.with_contract(**changes)
        queries = f" / {args.query_prompt}" if args.query_prompt else ""
        label = f"{encoder.contract.base}, {prompt}{queries}, {name}" + ("" if bare and scope == "text" else f", {scope}")
        if layers not in ((-1,), preset.get("layers")):
            label += f", layer {' '.join(map(str, layers))}"
        if attention_layer != -1:
            label += f", attention of layer {attention_layer}"
        if args.embed_filter is not None:
            label += f", embed filter {args.embed_filter:g}"
        if prepending:
            label += f", token prepending {prepending[0]}..{prepending[1]}"
        variants.setdefault(variant.fingerprint, (label + (" with BOS" if keep_bos else ""), variant))
    by_label = dict(variants.values())
    return [*(cache.row(label, variant) for label, variant in by_label.items()), *without_mean(cache, by_label, args)]


def changes_to_run(spec: str, args: argparse.Namespace) -> dict:
    """What the flags change in a run's contract, as fields for `Encoder.load`.

    A run keeps its prompt, pooling and scope where they are among the values of the flag, so that it can stand beside a grid of bases.
    A single other value is a change. Raises InputError for several other values, and for a change without --override-contract.
    """
    contract = Contract.read(spec)
    if args.remove_mean and contract.mean_removed is not None:
        raise InputError(f"{spec} is without the mean of {contract.mean_removed['name']} already: leave it or --remove-mean out")
    changes = {name: getattr(args, name) for name in (*OF_BASES, "attention_layer") if getattr(args, name) is not None}
    if args.keep_bos:
        changes["keep_bos"] = True
    fields = dict(changes)
    for flag, name in (("prompt", "prompts"), *((same, same) for same in ("pooling", "scope", "token_prepending"))):
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
    fields = expand_pooling(fields)
    contract.override(fields, force=args.override_contract, trained_for=trained_for(spec))
    return changes
