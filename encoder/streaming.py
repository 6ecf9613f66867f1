"""Any number of texts through a model in memory that does not grow: windows of texts, batches of a window, halved where memory ends."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from encoder.packing import PackedBatch
from encoder.runtime import empty_cache, is_out_of_memory, memory_budget
from encoder.tokenization import TokenizedTexts, check_list
from files.console import InputError

if TYPE_CHECKING:
    from encoder.encoder import Encoder

WINDOW, WINDOW_CHARACTERS = 16384, 2**25  # most texts, and most characters, that are sorted by length and held in memory at a time


@dataclass
class EncodingReport:
    """What a user should know about the texts of one call of `encode`, or of several that are given the same report."""

    n_empty: int = 0
    n_truncated: int = 0
    max_tokens: int | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, tokenized: TokenizedTexts, max_tokens: int) -> None:
        self.n_empty += tokenized.n_empty
        self.n_truncated += tokenized.n_truncated
        self.max_tokens = max_tokens

    def warnings(self) -> list[str]:
        """One line for each kind of event."""
        lines = list(self.notes)
        if self.n_empty:
            lines.append(f"{number_of('empty text', self.n_empty)} embedded as the prompt alone")
        if self.n_truncated:
            lines.append(f"{number_of('text', self.n_truncated)} truncated to {self.max_tokens} tokens")
        return lines


def number_of(what: str, n: int) -> str:
    return f"{n} {what}s were" if n != 1 else f"1 {what} was"


def tokenized_windows(encoder: "Encoder", texts: Iterable[str], role: str, report: EncodingReport) -> Iterator[TokenizedTexts]:
    """Texts tokenized a window at a time; where there is more than one window, the next is tokenized in a thread meanwhile."""
    source, n_read, closed = iter(check_list(texts)), 0, False

    def read_window() -> tuple[TokenizedTexts, bool]:
        nonlocal n_read
        window, characters, exhausted = [], 0, True
        for text in source:
            window.append(text)
            characters += len(text) if isinstance(text, str) else 0
            if closed or len(window) == WINDOW or characters > WINDOW_CHARACTERS:
                exhausted = False
                break
        n_read += len(window)
        return encoder.tokenize(window, role, first_number=n_read - len(window)), exhausted

    tokenized, exhausted = read_window()
    if exhausted:  # most calls: not worth a thread
        if tokenized.ids:
            report.add(tokenized, encoder.contract.max_tokens)
            yield tokenized
        return
    with ThreadPoolExecutor(1) as pool:
        try:
            while tokenized.ids:
                upcoming = None if exhausted else pool.submit(read_window)
                report.add(tokenized, encoder.contract.max_tokens)
                yield tokenized
                if upcoming is None:
                    return
                tokenized, exhausted = upcoming.result()
        finally:
            closed = True


def computed_batches(
    encoder: "Encoder",
    texts: Iterable[str],
    role: str,
    compute: Callable[[PackedBatch], Any],
    report: EncodingReport | None = None,
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, TokenizedTexts, list[int], Any]]:
    """Every batch of texts that have a token, longest first within a window, with what `compute` returns for it.

    Yields the number of texts before the window, the window, the batch's rows in it, and what was computed.
    batch_tokens    of a batch (default: what memory has room for)
    """
    report = EncodingReport() if report is None else report
    budget, n_before = batch_tokens or memory_budget(encoder.decoder.config, encoder.dtype, encoder.device), 0
    encoder.decoder.eval()
    for tokenized in tokenized_windows(encoder, texts, role, report):
        for rows in encoder.plan(tokenized, tokenized.filled(), budget):
            for some, values in run_batch(encoder, tokenized, rows, compute, report):
                yield n_before, tokenized, some, values
        n_before += len(tokenized.ids)


def run_batch(
    encoder: "Encoder", tokenized: TokenizedTexts, rows: list[int], compute: Callable[[PackedBatch], Any], report: EncodingReport
) -> Iterator[tuple[list[int], Any]]:
    """`rows` with what `compute` returns for their batch. What does not fit into memory is halved, and so are later batches.

    Raises InputError where a single text does not fit, and where a sharded model runs out of memory: the other processes could
    not follow.
    """
    size = sum(encoder.costs(tokenized, rows).values())
    if len(rows) == 1 or size <= encoder.memory_limit:
        try:
            result = compute(encoder.collate(tokenized, rows))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            yield rows, result
            return
        if len(rows) == 1:
            length = len(tokenized.ids[rows[0]])
            raise InputError(
                f"a text of {length} tokens, with its prompt, does not fit into memory: lower max_tokens or take another dtype"
            )
        if encoder.sharded:
            raise InputError(f"{size} tokens do not fit into memory: lower batch_tokens")
        empty_cache(encoder.device)
        encoder.memory_limit = max(1, size // 2)
        report.notes.append(f"out of memory at {size} tokens: batches were halved to {encoder.memory_limit}")
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        yield from run_batch(encoder, tokenized, half, compute, report)
