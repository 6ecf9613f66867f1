"""From texts to vectors: load, tokenize, forward, pool, encode. The order of the steps is drawn in `encoder/__init__.py`.

Under torchrun every process calls `encode` with the same texts, does its share and gets all the vectors. Threads of one process
may encode at the same time; their forward passes take turns.

Legend: N texts, B sequences of a batch, T tokens of its row, M tokens chosen, L tokens of a sequence, H heads, D hidden size.
"""

import contextlib
import copy
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from encoder import lora
from encoder.attention_masks import AttentionMask
from encoder.base_models import PACKED_TYPES, find_blocks
from encoder.checks import check_padded, refuse_non_finite
from encoder.contract import (
    ARGUMENTS_FILE,
    CONTRACT_FILE,
    MEAN_FILE,
    QUERY_FILE,
    SUMMARY_FILE,
    Contract,
    PoolingConfig,
    adapter_hash,
    check_trainable,
    fingerprint,
    recorded_fingerprint,
)
from encoder.embed_filter import projection, unembedding
from encoder.loading import LoadedBase, contract_fields, load_base
from encoder.mean_direction import identity, load_direction, mean_directions, project_off, save_direction
from encoder.nearest import Nearest, nearest
from encoder.packing import MIN_SHARED_PREFIX, PackedAttention, PackedBatch, ReadLayer, collate, pad, plan_batches, trim_hook
from encoder.processes import distributed, shard_model
from encoder.runtime import (
    default_batch_tokens,
    emulates_bfloat16,
    keep_freed_memory,
    memory_budget,
    pick_device,
    pick_dtype,
)
from encoder.states import HiddenStates, check_layer, pool, pooled_width, recorded_states, scored_block
from encoder.streaming import EncodingReport, run_batch, tokenized_windows
from encoder.token_attention import TokenAttention, last_token_attention
from encoder.token_prepending import prepended, replaced_layers
from encoder.tokenization import PromptTokenizer, TokenizedTexts, check_list
from files.console import InputError, Progress
from files.writing import write_atomic, write_text

# Flash attention's backward pass holds 128 rows of float32 for a sequence, however short (2 MiB with 4,096 numbers a row): as much
# as one layer holds of some 16 tokens, by the estimate of `memory_budget`.
BACKWARD_COST = 16
# a few texts of different kinds, by which `merge` measures how far it moves vectors
SAMPLE_TEXTS = ["A cat sleeps.", "Interest rates rose again this month.", "def add(a, b): return a + b", "Où est la gare ?", "42"]
# what `encode` of sentence-transformers takes, and what stands for it here
ELSEWHERE = {
    "batch_size": ": batches are filled to a number of tokens, batch_tokens=2048",
    "show_progress_bar": ": take progress=True",
    "convert_to_tensor": ": it returns a NumPy array, torch.from_numpy makes it a tensor",
    "convert_to_numpy": ": it always returns a NumPy array",
    **dict.fromkeys(("normalize", "normalize_embeddings"), ": the contract says whether, Encoder.load(..., normalize=False)"),
    **dict.fromkeys(("prompt", "prompt_name"), ": the contract has the prompts, Encoder.load(..., prompt=...) and role"),
    "truncate_dim": ": Encoder.load(..., dims=...)",
    "device": ": Encoder.load(..., device=...)",
}


class Encoder:
    """A decoder-only language model, a contract, and the way from texts to vectors. Make one with `Encoder.load`.

    Longer than other classes because it is the one object that a user holds: its methods tie the modules of this package together.

    notes                       facts about this model that its user should know, one line each
    share_prefix,               execution options; none of them changes the vectors: compute the prompt's prefix once a batch,
    trim_last_layer,            compute only the last tokens in the last layer where nothing else is read, which implementation
    attention_implementation    of packed attention to take ("auto", "varlen", "stacked": see `PackedAttention`)
    """

    def __init__(self, base: LoadedBase, device: torch.device, dtype: torch.dtype):
        model = base.model
        self.decoder, self.blocks, self.tokenizer, self.contract = model, find_blocks(model), base.tokenizer, base.contract
        self.source, self.folder, self.base_hash, self.adapter_hash = base.source, base.folder, base.base_hash, None
        self.filters: dict[float, Tensor] = {}  # by the share of directions that they drop; shared by all that share the weights
        self.mean_directions: dict[PoolingConfig, Tensor] = {}  # of poolings that remove a mean, (D,) each
        self.device, self.dtype = device, dtype
        self.peft, self.adapter_on = None, True  # the adapter's handle; its layers sit inside `decoder`
        # the learned query of pooling `query`; a query of zeros is the mean
        self.query = nn.Parameter(torch.zeros(1, model.config.hidden_size, device=device), requires_grad=False)
        self.sharded = False  # FSDP: every process must run as many forward passes as the others
        self.packed = model.config.model_type in PACKED_TYPES
        self.share_prefix, self.trim_last_layer, self.attention_implementation = True, True, "auto"
        self.attention_mask: AttentionMask | None = None  # only in what `hiding` of attention_masks.py returns
        self.memory_limit = sys.maxsize  # tokens of a batch beyond which memory has run out
        self.notes = [] if self.packed else [f"{model.config.model_type} models are not packed: texts are padded, which is slower"]
        self._forward_lock = threading.RLock()  # hooks and the adapter's switch belong to the model, not to a call
        if self.packed:
            model.set_attn_implementation("packed")  # others keep the implementation that their class chooses
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        self._apply_contract()

    def _apply_contract(self) -> None:
        """Tokenize the prompts, and refuse a contract that does not fit the model."""
        config = self.decoder.config
        for index in self.contract.layers:
            check_layer(index, len(self.blocks))
        if self.contract.token_prepending is not None:
            replaced_layers(self.contract.token_prepending, len(self.blocks))
        width = pooled_width(self.contract.pooling, config.hidden_size)
        if self.contract.dims is not None and self.contract.dims > width:
            raise InputError(f"dims {self.contract.dims} is more than the {width} numbers of this model's vectors")
        if self.contract.pooling == "attention":
            self._check_attention_is_read()
            scored_block(self.contract.attention_layer, len(self.blocks))
        share = self.contract.embed_filter
        if share is not None and share not in self.filters:
            self.filters[share] = projection(unembedding(self.folder, self.decoder), share).to(self.device)
        self.prompt_tokenizer = PromptTokenizer(self.tokenizer, self.contract, getattr(config, "max_position_embeddings", None))

    def _check_attention_is_read(self) -> None:
        if not self.packed:
            raise InputError(f"{type(self.decoder).__name__} does not let its attention be read: take another pooling")

    @classmethod
    def load(
        cls,
        spec: str = "tiny",
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        override_contract: bool = False,
        trust_remote_code: bool = False,
        shard: bool = False,
        **overrides,
    ) -> "Encoder":
        """Load a preset, a folder, a hub id or a training run.

        dtype       see `pick_dtype`; None: float32 on CPU, bfloat16 on CUDA; "auto", "float32", "bfloat16", "float16"
        shard       leave the weights in the CPU's memory until `shard` divides them among the processes
        overrides   contract fields: prompt (preset name or template), query_prompt (another one for the role "query"), pooling,
                    scope, layers, attention_layer, max_tokens, bos, eos, keep_bos, attention, normalize, dims, embed_filter,
                    token_prepending, quantize. None counts as not given.
                    On a run, a value that contradicts its contract raises InputError unless `override_contract`; dims and prompt
                    may be one of those that it was trained for (`--matryoshka`, the prompts of its pairs).
        """
        device, is_default_dtype = pick_device(device), dtype in (None, "auto")
        dtype = pick_dtype(dtype, device)
        if device.type == "cpu":
            keep_freed_memory()
        # weights that are stored in this dtype are mapped from the file on a CPU: processes that shard them share one copy
        place, trust = torch.device("cpu") if shard else device, trust_remote_code
        base = load_base(spec, contract_fields(overrides), dtype, place, override_contract=override_contract, trust_remote_code=trust)
        encoder = cls(base, device, dtype)
        if is_default_dtype and emulates_bfloat16(device):
            encoder.notes.append(f"this GPU has no bfloat16 instructions: computing in {str(dtype).removeprefix('torch.')}")
        if not encoder.packed:
            check_padded(encoder)
        if base.run:
            encoder._load_adapter(base.run)
        return encoder

    def with_contract(self, **changes) -> "Encoder":
        """The same weights in memory under a changed contract, for several ways to read one base. A mean is no longer removed."""
        other = copy.copy(self)
        other.contract, other.notes = replace(self.contract, **{"mean_removed": None} | changes), list(self.notes)
        other.mean_directions = {}
        other._apply_contract()
        return other

    def remove_mean(self, texts: Iterable[str], name: str = "texts", *, progress: bool = False) -> "Encoder":
        """The same weights under the contract that takes the direction of these texts' mean out of every vector.

        name    of the texts, which the contract keeps beside their hash
        `save` writes the direction beside the adapter of a run; an untuned base has no folder for it.
        Raises InputError where a mean is removed already, and for texts that have none.
        """
        if self.contract.mean_removed is not None:
            raise InputError(f"the mean of {self.contract.mean_removed['name']} is removed already: load the run that it was made from")
        texts = list(check_list(texts))
        (direction,) = mean_directions(self, texts, [self.contract.pooling_config()], progress=progress).values()
        other = self.with_contract(mean_removed=identity(texts, name))
        other.mean_directions[other.contract.pooling_config()] = direction
        return other

    def compile(self) -> None:
        """torch.compile the layers, once for all lengths: worth it for many texts. On a CPU it needs a C++ compiler."""
        if self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise InputError("compiling for a CPU needs a C++ compiler, g++ or clang++: install one, or do not compile")
        for block in self.blocks:
            block.compile(dynamic=True)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the contract and the base's and the adapter's files: same vectors, or another fingerprint."""
        return fingerprint(self.contract, self.base_hash, self.adapter_hash)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.width_of(self.contract.pooling)

    def width_of(self, pooling: str) -> int:
        """Numbers of a vector of another pooling, cut as the contract says."""
        width = pooled_width(pooling, self.decoder.config.hidden_size)
        return min(self.contract.dims or width, width)

    # ------------------------------------------------------------------------------------------------------ adapter

    def add_adapter(self, rank: int, alpha: int | None = None, dropout: float = 0.0, targets: list[str] | None = None, **options) -> int:
        """LoRA on every linear layer of every block, weights in float32. Returns the number of trainable parameters.

        targets     last names of the layers that get one, such as q_proj (default: all)
        options     peft's own, such as use_rslora and use_dora
        """
        check_trainable(self.contract)
        self.peft = lora.add_lora(self.decoder, self.blocks, rank, alpha, dropout, targets, **options)
        if unreached := lora.unreached(self.blocks):
            self.notes.append(f"LoRA reaches linear layers only: the weights of {', '.join(unreached)} are not trained")
        self.query.requires_grad_(self.contract.pooling == "query")
        return sum(p.numel() for p in self.trainable().values())

    def unfreeze_adapter(self, dropout: float = 0.0) -> None:
        """Train the adapter of the run that was loaded on, instead of a fresh one."""
        check_trainable(self.contract)
        lora.unfreeze(self.peft, dropout)
        self.query.requires_grad_(self.contract.pooling == "query")

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the adapter, and the query of pooling `query`."""
        return {n: p for n, p in (*self.peft.named_parameters(), ("query", self.query)) if p.requires_grad}

    def set_gradient_checkpointing(self, every: int) -> None:
        """Compute every n-th layer, counted from the last, again in the backward pass instead of keeping its states; 0: none."""
        if every and not self.decoder.supports_gradient_checkpointing:
            raise InputError(f"{type(self.decoder).__name__} has no gradient checkpointing: set it to 0")
        if every:  # transformers has renamed it
            enable = getattr(self.decoder, "activation_checkpointing_enable", self.decoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        for i, block in enumerate(reversed(self.blocks), 1):
            block.gradient_checkpointing = every > 0 and i % every == 0

    def shard(self) -> None:
        """Divide the base's weights among torchrun's processes (FSDP2); the adapter stays whole in each."""
        shard_model(self.decoder, self.blocks, self.device)
        self.sharded = True

    def save(self, folder: str | Path) -> None:
        """Write adapter, its config and the contract, each complete or not at all. Raises InputError for an untuned base."""
        folder = Path(folder)
        if self.peft is None or not self.adapter_on:
            raise InputError("an untuned base has no adapter to save: load a run")
        if self.contract.mean_removed is not None and (folder / CONTRACT_FILE).exists():
            raise InputError(f"{folder} holds a run already, which it would no longer be: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        is_local = Path(self.source).is_dir()
        base, revision = (str(Path(self.source).resolve()), None) if is_local else (self.source, self.contract.revision)
        lora.save_lora(self.peft, folder, base, revision)
        if self.contract.pooling == "query":
            query = {"query": self.query.detach().cpu()}
            write_atomic(folder / QUERY_FILE, lambda path: lora.save_tensors(query, path))
        if self.contract.mean_removed is not None:
            save_direction(self.mean_directions[self.contract.pooling_config()], folder / MEAN_FILE)
        write_text(folder / CONTRACT_FILE, self.contract.to_json())
        self.adapter_hash = adapter_hash(folder)

    def _load_adapter(self, run: Path) -> None:
        self.peft = lora.load_lora(self.decoder, run)
        if self.contract.pooling == "query":
            try:
                self.query.data.copy_(load_file(run / QUERY_FILE)["query"])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise InputError(f"{run / QUERY_FILE} is missing or damaged ({' '.join(str(error).split())[:100]})") from None
        if self.contract.mean_removed is not None:
            if self.contract != Contract.read(run):
                raise InputError(f"{run}: the mean that it removes is that of its vectors as they are: let its contract be")
            direction = load_direction(run / MEAN_FILE, self.width)
            self.mean_directions[self.contract.pooling_config()] = direction.to(self.device)
        self.adapter_hash = adapter_hash(run)
        recorded, present = recorded_fingerprint(run), fingerprint(Contract.read(run), self.base_hash, self.adapter_hash)
        if recorded is None and (run / ARGUMENTS_FILE).is_file():
            self.notes.append("the training of this run has not ended: its last checkpoint is taken")
        elif recorded not in (None, present):
            self.notes.append(
                f"{CONTRACT_FILE} or the adapter was changed after training: fingerprint {present}, {SUMMARY_FILE} has {recorded}"
            )

    @property
    def merged(self) -> bool:
        """Whether the adapter is added to the base's weights, which all encoders of this model share."""
        return lora.is_merged(self.decoder)

    def untuned(self) -> "Encoder":
        """The base model alone under the same contract, from the same weights in memory."""
        if self.merged:
            raise InputError("the adapter is merged into the base: load the run again to read the base alone")
        other = self.with_contract(data=None)
        other.adapter_on, other.adapter_hash = False, None
        other.query = nn.Parameter(torch.zeros_like(self.query), requires_grad=False)
        return other

    @torch.no_grad()
    def merge(self) -> float:
        """Add the adapter to the base's weights, so that it costs no time; the base alone is then no longer in memory.

        Returns the drift: the largest 1 - cosine between vectors before and after, over a few texts. In bfloat16 the sum
        is rounded like any weight. A quantized base is left as it is: the sum would be quantized too.
        """
        if self.peft is None or self.merged or self.contract.quantize:
            return 0.0
        before = torch.from_numpy(self.encode(SAMPLE_TEXTS)).double()
        self.peft.merge_adapter()
        after = torch.from_numpy(self.encode(SAMPLE_TEXTS)).double()
        return max(0.0, 1 - F.cosine_similarity(before, after).min().item())

    # ---------------------------------------------------------------------------------------------- tokens and batches

    def tokenize(self, texts: Iterable[str], role: str = "document", *, first_number: int = 0) -> TokenizedTexts:
        """Texts as ids with the prompt of their role, see `PromptTokenizer`. Raises InputError for what is no text."""
        return self.prompt_tokenizer(list(check_list(texts)), role, first_number)

    def _shared_prefix(self, tokenized: TokenizedTexts) -> int:
        """Tokens that a batch computes once. Only under causal attention do they not depend on the texts behind them."""
        can_share = self.packed and self.share_prefix and self.contract.attention == "causal"
        return tokenized.prefix_length if can_share and tokenized.prefix_length >= MIN_SHARED_PREFIX else 0

    def collate(self, tokenized: TokenizedTexts, rows: list[int]) -> PackedBatch:
        """The chosen rows as one packed batch on the device; of several prompts one for each, the others in `more` of the first."""
        prefix_length = self._shared_prefix(tokenized) if len(rows) > 1 else 0
        batch = collate(tokenized, rows, prefix_length, self.contract.bos, self.device)
        return batch._replace(more=tuple(self.collate(others, rows) for others in tokenized.more))

    def plan(self, tokenized: TokenizedTexts, rows: list[int], batch_tokens: int | None = None) -> list[list[int]]:
        """`rows` sorted by length, in batches of at most `batch_tokens` tokens (default: 2,048 on a CPU, else 32,768)."""
        return plan_batches(self.costs(tokenized, rows), batch_tokens or default_batch_tokens(self.device), padded=not self.packed)

    def batches(
        self, tokenized: TokenizedTexts, rows: list[int], batch_tokens: int | None = None
    ) -> Iterator[tuple[list[int], PackedBatch]]:
        """The batches of `plan`, each with its rows."""
        for batch_rows in self.plan(tokenized, rows, batch_tokens):
            yield batch_rows, self.collate(tokenized, batch_rows)

    def costs(self, tokenized: TokenizedTexts, rows: list[int]) -> dict[int, int]:
        """Tokens that each sequence adds to a batch: its own, and shares for what attention holds for it besides.

        Of several prompts the longest counts; in training, which holds the graphs of all of them, their sum.
        """
        backward = BACKWARD_COST if self.decoder.training and self.device.type == "cuda" else 0
        each = [(texts.ids, self._shared_prefix(texts)) for texts in (tokenized, *tokenized.more)]
        total = sum if self.decoder.training else max
        return {row: total(len(ids[row]) - shared + shared // 8 + backward for ids, shared in each) for row in rows}

    # ----------------------------------------------------------------------------------------------- forward and pool

    def forward(self, batch: PackedBatch, poolings: list[PoolingConfig] | None = None, read: ReadLayer | None = None) -> HiddenStates:
        """One forward pass -> the states that `poolings` need (default: the contract's).

        read    is shown the queries and keys of every layer, see `PackedAttention`; the last layer is then computed whole
        """
        poolings = poolings or [self.contract.pooling_config()]
        numbers = {index: check_layer(index, len(self.blocks)) for pooling in poolings for index in pooling.layers}
        scored_layers = {scored_block(p.attention_layer, len(self.blocks)) for p in poolings if p.pooling == "attention"}
        if scored_layers or read:
            self._check_attention_is_read()
        last_layer, trim = len(self.blocks) - 1, read is None and _can_trim(self, batch, poolings, numbers)
        packed = PackedAttention(
            batch,
            self.contract.attention == "causal",
            scored_layers=scored_layers,
            trimmed_layer=last_layer if trim else None,
            implementation=self.attention_implementation,
            read=read,
            hidden=self.attention_mask and self.attention_mask.of(batch),
        )
        if not len(batch.ids):  # sequences without a token
            empty = torch.zeros(0, self.decoder.config.hidden_size, device=self.device)
            return HiddenStates(dict.fromkeys(numbers, empty), packed, False, {})
        with self._forward_lock, recorded_states(self.blocks, set(numbers.values())) as states, contextlib.ExitStack() as stack:
            if batch.placeholder is not None:  # before the hook that trims, which reads all states
                layers = replaced_layers(self.contract.token_prepending, len(self.blocks))
                stack.enter_context(prepended(self.blocks, layers, batch, self.packed))
            if trim:
                stack.callback(self.blocks[-1].register_forward_pre_hook(trim_hook(packed), with_kwargs=True).remove)
            if self.peft and not self.adapter_on:
                if self.merged:
                    raise InputError("the adapter was merged into the base meanwhile: load the run again to read the base alone")
                stack.enter_context(self.peft.disable_adapter())
            if self.packed:
                # lengths are rounded up: oneDNN caches one primitive per shape
                fill = (0, -len(batch.ids) % (64 if len(batch.ids) > 512 else 8))
                ids, positions = (F.pad(x, fill)[None] for x in (batch.ids, batch.positions))
                inputs = {"input_ids": ids, "position_ids": positions, "packed": packed}
            else:
                inputs, places = pad(batch)
            try:
                states[-1] = self.decoder(**inputs, use_cache=False).last_hidden_state
            except BaseException:
                packed.release()
                raise
        rows = {number: state[0, : len(batch.ids)] if self.packed else state[places] for number, state in states.items()}
        return HiddenStates({index: rows[number] for index, number in numbers.items()}, packed, trim, {})

    def pool(self, states: HiddenStates, batch: PackedBatch, pooling: PoolingConfig | None = None) -> Tensor:
        """States -> (B, D) float32 by `pooling` (default: the contract's), cut to dims and normalized as the contract says."""
        pooling = pooling or self.contract.pooling_config()
        return self._finish(pool(states, batch, pooling, self.query, len(self.blocks), self.device), pooling)

    def _finish(self, vectors: Tensor, pooling: PoolingConfig) -> Tensor:
        if self.contract.embed_filter is not None:
            matrix = self.filters[self.contract.embed_filter]
            with torch.autocast(self.device.type, enabled=False):  # in training it would filter in bfloat16
                vectors = (vectors.unflatten(1, (-1, len(matrix))) @ matrix).flatten(1)  # of `last+mean` either half
        if self.contract.dims is not None:
            vectors = vectors[:, : self.contract.dims]
        if pooling.mean_removed is not None:
            vectors = project_off(vectors, self.mean_directions[pooling])
        return F.normalize(vectors, dim=-1) if self.contract.normalize else vectors

    def embed(self, batch: PackedBatch, poolings: list[PoolingConfig] | None = None) -> list[Tensor]:
        """One forward pass a prompt -> vectors (B, D) for each pooling (default: the contract's), with gradients where they are on."""
        poolings = poolings or [self.contract.pooling_config()]
        by_prompt = []
        for part in (batch, *batch.more):
            states = self.forward(part, poolings)
            try:
                by_prompt.append([pool(states, part, p, self.query, len(self.blocks), self.device) for p in poolings])
            finally:
                states.attention.release()
        means = (of[0] if len(of) == 1 else torch.stack(of).mean(0) for of in zip(*by_prompt, strict=True))
        return [self._finish(mean, pooling) for mean, pooling in zip(means, poolings, strict=True)]

    # -------------------------------------------------------------------------------------------------------- encode

    def stream(
        self,
        texts: Iterable[str],
        role: str = "document",
        *,
        poolings: list[PoolingConfig] | None = None,
        batch_tokens: int | None = None,
        report: EncodingReport | None = None,
        done: Callable[[int], object] | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """Texts -> float32 (n, D) for each pooling, at most `WINDOW` texts at a time, in order, in memory that does not grow.

        The next texts are read and tokenized, in a thread, while the model runs on these. A sequence without a single token
        (no BOS, no prompt, empty text) is a vector of zeros. Under torchrun every process takes every n-th batch, and all
        get all vectors. `done` is called with the number of texts after every batch. `report` collects warnings.
        """
        poolings, done = poolings or [self.contract.pooling_config()], done or (lambda n: None)
        report = EncodingReport() if report is None else report
        rank, world_size, group = distributed()
        budget = batch_tokens or memory_budget(self.decoder.config, self.dtype, self.device)
        self.decoder.eval()

        @torch.no_grad()
        def compute(batch: PackedBatch) -> list[Tensor]:
            return [vectors.float() for vectors in self.embed(batch, poolings)]

        n_texts = 0
        for tokenized in tokenized_windows(self, texts, role, report):
            batches = self.plan(tokenized, tokenized.filled(), budget)
            results = []  # stay on the device until all batches are under way, so that a GPU need not wait
            for rows in batches[rank::world_size]:
                results += run_batch(self, tokenized, rows, compute, report)
                done(len(rows))
            if self.sharded and rank >= (len(batches) % world_size or world_size):
                compute(self.collate(tokenized, batches[0]))  # other processes have one batch more; this output is discarded
            arrays = [np.zeros((len(tokenized.ids), self.width_of(p.pooling)), dtype=np.float32) for p in poolings]
            for rows, vectors in results:
                for array, rows_vectors in zip(arrays, vectors, strict=True):
                    array[rows] = values = rows_vectors.cpu().numpy()
                    if not np.isfinite(values).all():
                        refuse_non_finite(array, n_texts, self.dtype)
            if world_size > 1:
                for array in arrays:  # the sum of all: each has zeros where another process did the work
                    torch.distributed.all_reduce(torch.from_numpy(array), group=group)
            done(len(tokenized.ids) - sum(map(len, batches[rank::world_size])))
            n_texts += len(tokenized.ids)
            yield arrays

    def encode(
        self,
        texts: Iterable[str],
        role: str = "document",
        *,
        poolings: list[PoolingConfig] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
        report: EncodingReport | None = None,
        **unknown,
    ) -> np.ndarray | list[np.ndarray]:
        """Texts -> float32 (N, D) in the order given; with `poolings`, one such array for each, from the same forward passes.

        role            "query" or "document"; makes a difference only where the contract's prompts differ: under `retrieve`, or with
                        a query_prompt, and not under the default
        batch_tokens    of a batch (default: 2,048 on a CPU, else 32,768, or fewer where memory is short)
        report          collects what happened to the texts: empty, truncated, out of memory
        Raises TypeError for an argument of sentence-transformers, and says what it is called here.
        """
        if unknown:
            raise TypeError("; ".join(f"encode takes no {name}{ELSEWHERE.get(name, '')}" for name in unknown))
        texts = list(check_list(texts))
        configs = poolings or [self.contract.pooling_config()]
        out = [np.empty((len(texts), self.width_of(config.pooling)), dtype=np.float32) for config in configs]
        at = 0
        with Progress(len(texts), "encoding", "text", disable=not progress) as bar:
            for arrays in self.stream(texts, role, poolings=poolings, batch_tokens=batch_tokens, report=report, done=bar.update):
                for whole, window in zip(out, arrays, strict=True):
                    whole[at : at + len(window)] = window
                at += len(arrays[0])
        return out if poolings else out[0]

    def nearest(
        self,
        queries: Iterable[str],
        texts: Iterable[str] | np.ndarray,
        k: int = 5,
        *,
        batch_tokens: int | None = None,
        progress: bool = False,
        report: EncodingReport | None = None,
    ) -> Nearest:
        """For each query the numbers of the k nearest texts and their cosines, nearest first; of equally near ones the first.

        texts     any number, read a window at a time; or the vectors (N, D) that `encode` made of them
        Queries are embedded with the role "query". A prompt that is the same for both roles makes no difference of it.
        """
        if k < 1:
            raise InputError(f"k must be 1 or more, not {k}")
        vectors = self.encode(queries, "query", batch_tokens=batch_tokens, report=report)
        if isinstance(texts, np.ndarray):
            if texts.ndim != 2 or texts.shape[1] != self.width:
                raise InputError(f"vectors must be (N, {self.width}), not {texts.shape}")
            return nearest(vectors, [texts], k)
        total = len(texts) if hasattr(texts, "__len__") else 0
        with Progress(total, "encoding", "text", disable=not (progress and total)) as bar:
            windows = self.stream(texts, batch_tokens=batch_tokens, report=report, done=bar.update)
            return nearest(vectors, (arrays[0] for arrays in windows), k)

    def last_token_attention(
        self,
        texts: Iterable[str],
        role: str = "document",
        *,
        layers: Sequence[int] | None = None,
        report: EncodingReport | None = None,
    ) -> list[TokenAttention]:
        """What each text's last token attends to, in the order given. A text without a token has no weights.

        layers    1 for the first block to the number of blocks, -1 for the last; None: the last alone, and weights have no axis of layers
        """
        out = last_token_attention(self, texts, role, (-1,) if layers is None else layers, report)
        return [text._replace(weights=text.weights[:, 0]) for text in out] if layers is None else out


# ------------------------------------------------------------------------------------------------------------- helpers


def _can_trim(encoder: Encoder, batch: PackedBatch, poolings: list[PoolingConfig], numbers: dict[int, int]) -> bool:
    """Whether the last layer may compute each sequence's last token only: nothing else is read from it."""
    if not (encoder.trim_last_layer and encoder.packed and set(numbers.values()) == {-1}):
        return False
    if not all(p.pooling == "last" and (batch.pooled_range(p)[1] == batch.lengths).all() for p in poolings):
        return False
    # a layer that is computed again in the backward pass would be computed without the hook
    checkpointed = encoder.decoder.training and getattr(encoder.blocks[-1], "gradient_checkpointing", False)
    return not checkpointed and batch.lengths.min() > 0 and len(batch.ids) > len(batch.spans)
