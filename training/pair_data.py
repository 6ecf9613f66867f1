"""Positive pairs: the rule for a valid one, files of them on disk, which pairs each step takes, and their token ids.

Importing this module loads neither torch nor a model, so that `make_pairs.py` can share its rule for a valid pair.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from files.console import InputError
from files.reading import excerpt, file_kind, is_encodable, read_rows
from prompts import get_prompt
from training.own_texts import GENERAL_FILE, OWN_SHARE, RECIPE_FILE, OwnTexts, is_own_texts, read_recipe

if TYPE_CHECKING:
    from encoder import Encoder
    from encoder.tokenization import TokenizedTexts

MIN_HELD_OUT = 8  # pairs; with fewer, an accuracy says too little to choose an adapter by
SMALL_SET = 320  # pairs, of which a twentieth is 16


class Pair(NamedTuple):
    """Two texts that mean the same, and hard negatives: texts that a model may mistake for the positive."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    teacher: np.ndarray | None = None  # (texts of the pair, E): a teacher's vectors of anchor, positive and negatives, of norm 1
    prompt: str | None = None  # around all of its texts, a preset or a template; None: that of the contract


def validate_pair(row: dict, where: str) -> Pair:
    """Turn a row of a file of pairs into a Pair. Other fields of the row are ignored.

    row        the texts `anchor` and `positive`, and optionally the text `negative` or the list of texts `negatives`, and `prompt`
    where      the row's place, for the error message
    Raises InputError for a missing text, for a value that is no text, for a text that cannot be written as UTF-8, and for no prompt.
    """
    anchor, positive = row.get("anchor"), row.get("positive")
    if not isinstance(anchor, str) or not isinstance(positive, str):
        hint = ": rename the columns of pairs, or make pairs of texts with make_pairs.py" if {"anchor", "positive"}.isdisjoint(row) else ""
        raise InputError(f"{where}: needs the texts 'anchor' and 'positive', has {_shown(row)}{hint}")
    one, several = row.get("negative"), row.get("negatives")
    several = [] if several is None else several
    negatives = [*([] if one is None else [one]), *(several if isinstance(several, list) else [])]
    if not isinstance(several, list) or not all(isinstance(text, str) for text in negatives):
        raise InputError(f"{where}: 'negative' must be a text and 'negatives' a list of texts, has {_shown(row)}")
    prompt = row.get("prompt")
    try:
        prompt is None or get_prompt(prompt)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not is_encodable("".join((anchor, positive, *negatives, prompt or ""))):
        raise InputError(f"{where}: a text holds half a surrogate pair, which cannot be written as UTF-8")
    return Pair(anchor, positive, tuple(negatives), prompt=prompt)


def _shown(row: dict) -> str:
    return excerpt(json.dumps(row, ensure_ascii=False, default=str))


def read_pair_rows(path: Path) -> Iterator[tuple[Pair, dict]]:
    """The pairs of a file, one at a time, each with all cells of its row. Raises InputError with the place.

    An empty cell `negative` or `prompt` of a csv or tsv is none; these files cannot hold lists, and so no column `negatives`.
    """
    only_strings = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    for place, row in read_rows(path):
        if only_strings and "negatives" in row:
            raise InputError(f"{place}: a csv or tsv cannot hold the list 'negatives': take the column 'negative', or JSONL")
        for name in ("negative", "prompt"):
            if only_strings and row.get(name) == "":
                del row[name]
        yield validate_pair(row, place), row


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file, one at a time. Raises InputError with the place."""
    return (pair for pair, _ in read_pair_rows(path))


def _pair_rows(path: str) -> Iterator[dict]:
    """The pairs of a file as rows of the dataset's cache."""
    for pair in read_pairs(Path(path)):
        yield pair._asdict()


def check_pair_files(paths: list[Path]) -> None:
    """Raise InputError for a file that does not exist, or is of another kind. Nothing is read."""
    for path in paths:
        if not path.exists():
            raise InputError(f"no file {path}: make pairs with make_pairs.py")
        if is_own_texts(path):
            read_recipe(path)
        elif path.is_dir():
            raise InputError(f"{path} is a folder without {RECIPE_FILE}, so make_pairs.py auto did not write it: name a file of pairs")
        else:
            file_kind(path)


class PairFile:
    """The pairs of a file. `datasets` copies them into its cache once, and they are mapped into memory from there.

    Raises InputError for a file that is invalid or too short, and for a damaged cache.
    """

    def __init__(self, path: Path):
        import datasets

        with open(path, "rb") as f:
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        first_two = list(itertools.islice(read_pairs(path), 2))
        if len(first_two) < 2:
            raise InputError(f"{path} holds {len(first_two)} pairs: contrastive training needs at least two")
        text = datasets.Value("string")
        features = datasets.Features({"anchor": text, "positive": text, "negatives": datasets.List(text), "prompt": text})
        try:
            self._rows = datasets.Dataset.from_generator(
                _pair_rows, gen_kwargs={"path": str(path)}, features=features, fingerprint=f"pairs-2-{self.sha256}"
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ from None
        except ValueError as error:  # Arrow cannot read the cached file
            folder = Path(datasets.config.HF_DATASETS_CACHE) / "generator"
            raise InputError(f"the cache of {path} is damaged ({str(error)[:80]}): delete {folder}") from None

        self.prompts = [prompt for prompt in self._rows.unique("prompt") if prompt is not None]

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, pairs: list[Pair]) -> np.ndarray:
        """Numbers of the pairs that are equal to one of these, sorted."""
        import pyarrow as pa
        from pyarrow.compute import is_in

        table = self._rows.data
        columns = {"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]}
        known = [is_in(table.column(name), value_set=pa.array(texts, pa.string())).to_numpy() for name, texts in columns.items()]
        return np.flatnonzero(known[0] & known[1])

    def __getitem__(self, rows: list[int]) -> list[Pair]:
        columns = self._rows[rows]
        cells = zip(*(columns[name] for name in ("anchor", "positive", "negatives", "prompt")), strict=True)
        return [Pair(anchor, positive, tuple(negatives), prompt=prompt) for anchor, positive, negatives, prompt in cells]


class PairDataset:
    """The pairs of one or more files, or folders of `make_pairs.py auto`, whose own texts and general pairs are two sources.

    characters    texts with a teacher are cut to about so many; None: never

    name       the files' names
    sha256     of the file, or of the hashes of all files in their order
    sizes      pairs of each source; rows are counted through all sources in their order
    taught     whether some of the texts have a teacher
    prompts    those that pairs have of their own, sorted
    summary    what there is, where they have; else empty
    Raises InputError for a file that is missing, invalid, given twice, or too short, and for a damaged cache.
    """

    def __init__(self, paths: list[Path], characters: int | None = None):
        import datasets

        check_pair_files(paths)
        datasets.disable_progress_bars()
        self.name, self._sources, self._sources_of = " + ".join(path.name for path in paths), [], []
        for path in paths:
            folder = is_own_texts(path)
            sources = [OwnTexts(path, characters)] if folder else [PairFile(path)]
            if folder and (path / GENERAL_FILE).is_file():
                sources.append(PairFile(path / GENERAL_FILE))
            if sources[0].sha256 in [source.sha256 for source in self._sources]:
                raise InputError(f"{path} holds the same pairs as another file of --pairs: give it once")
            self._sources += sources
            self._sources_of.append(len(sources))
        hashes = [source.sha256 for source in self._sources]
        self.sizes, self.taught = [len(source) for source in self._sources], any(isinstance(s, OwnTexts) for s in self._sources)
        self.sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        self.prompts = sorted({prompt for source in self._sources if isinstance(source, PairFile) for prompt in source.prompts})
        n_texts = sum(len(source.texts) for source in self._sources if isinstance(source, OwnTexts))
        n_pairs = sum(len(source) for source in self._sources if isinstance(source, PairFile))
        self.summary = f"{n_texts:,} texts with a teacher" + f" and {n_pairs:,} pairs" * (n_pairs > 0) if self.taught else ""
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return sum(self.sizes)

    def weights(self, given: list[float] | None) -> list[float] | None:
        """Weights of the sources from those of the paths; None: in proportion to the pairs.

        Of a folder's weight OWN_SHARE goes to its own texts, where it has general pairs as well. With a folder and no weights given all
        paths weigh the same.
        """
        if given is None and not self.taught:
            return None
        given = given or [1.0] * len(self._sources_of)
        shares = {1: [1.0], 2: [OWN_SHARE, 1 - OWN_SHARE]}
        return [weight * share for weight, n in zip(given, self._sources_of, strict=True) for share in shares[n]]

    def some_texts(self, n: int) -> list[str]:
        """About n of the texts with a teacher; where there are none, of the anchors of all pairs."""
        for source in self._sources:
            if isinstance(source, OwnTexts):
                return source.texts[:: max(1, len(source.texts) // n)]["text"]
        return [pair.anchor for pair in self[list(range(0, len(self), max(1, len(self) // n)))]]

    def copies(self, rows: np.ndarray) -> np.ndarray:
        """All rows whose pair is equal to the pair of one of `rows`, those included, sorted."""
        pairs = self[rows.tolist()]
        places = zip(self._sources, self._starts, strict=False)
        return np.concatenate([source.find(pairs) + start for source, start in places if isinstance(source, PairFile)])

    def __getitem__(self, rows: list[int]) -> list[Pair]:
        """The pairs of these rows; of a text with a teacher, itself, a neighbour and, as its negative, another neighbour."""
        chosen = np.asarray(rows, np.int64)
        pairs: list[Pair] = [None] * len(chosen)
        numbers = np.searchsorted(self._starts, chosen, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            source, inner = self._sources[number], (chosen[places] - self._starts[number]).tolist()
            items = source[inner]
            if isinstance(source, OwnTexts):
                items = [Pair(anchor, positive, (other,), teacher) for (anchor, positive, other), teacher in items]
            for place, pair in zip(places.tolist(), items, strict=True):
                pairs[place] = pair
        return pairs


def hold_out(size: int, n: int, batch_size: int = 2) -> np.ndarray:
    """Choose the rows that are not trained on: n of `size` pairs, a twentieth of them at most, sorted.

    A small set gives a tenth, 16 pairs at most, and keeps a batch. None are chosen where that makes fewer than MIN_HELD_OUT.
    """
    n = min(n, size // 20 if size >= SMALL_SET else min(SMALL_SET // 20, size // 10, size - batch_size))
    return np.sort(np.random.default_rng(0).choice(size, n if n >= MIN_HELD_OUT else 0, replace=False))


class PairSampler:
    """Which pairs each step takes. That depends on the step's number alone, so that a run can resume at any step.

    The pairs of a source are taken in one random permutation after another, each drawn from (seed, source, number of the
    permutation). A batch is mixed from all sources, or comes from a single one if `one_source`, in the proportions of
    `weights`. Each file is a source; without weights and with mixed batches all files together are one.

    sizes       pairs of each file
    held_out    rows that are never taken, counted through all files
    steps       of the whole run
    weights     one for each file; None: in proportion to the files' pairs
    """

    def __init__(
        self,
        sizes: list[int],
        held_out: np.ndarray,
        batch_size: int,
        steps: int,
        seed: int,
        weights: list[float] | None = None,
        one_source: bool = False,
    ):
        ends = np.cumsum([0, *sizes])
        sources = [np.arange(a, b) for a, b in itertools.pairwise(ends if weights or one_source else ends[[0, -1]])]
        self.sources, self.seed = [np.setdiff1d(rows, held_out, assume_unique=True) for rows in sources], seed
        shares = np.asarray(weights or [len(rows) for rows in self.sources], float)
        random = np.random.default_rng(seed)
        draws, pairs_per_draw = (1, batch_size) if one_source else (batch_size, 1)
        counts = pairs_per_draw * random.multinomial(draws, shares / shares.sum(), size=steps)
        # (steps + 1, sources): how many pairs of each source were taken before each step
        self.taken = np.concatenate([np.zeros((1, len(self.sources)), np.int64), counts.cumsum(0)])
        self._permutation = functools.lru_cache(2 * len(self.sources))(self._draw_permutation)

    def _draw_permutation(self, source: int, number: int) -> np.ndarray:
        return np.random.default_rng((self.seed, source, number)).permutation(self.sources[source])

    def rows(self, step: int) -> list[int]:
        """The rows of the pairs that make up the batch of this step, counted from 0."""
        rows = []
        for source, (first, end) in enumerate(self.taken[step : step + 2].T.tolist()):
            size = len(self.sources[source])
            for number in range(first // size, -(-end // size)):
                start = number * size
                rows += self._permutation(source, number)[max(first - start, 0) : end - start].tolist()
        return rows


class PairBatch(NamedTuple):
    """The pairs of a batch as token ids."""

    anchors: "TokenizedTexts"
    positives: "TokenizedTexts"
    negatives: "TokenizedTexts"  # the hard negatives of all pairs
    negative_rows: list[list[int]]  # for each pair, where in `negatives` its hard negatives are
    text_ids: list[list[int]]  # for each pair, an id of each of its texts (anchor, positive, negatives): equal ids, equal texts
    taught: list[int]  # which pairs have a teacher's vectors
    teacher: np.ndarray | None  # (texts of these pairs, E): of their anchors, of their positives, of their negatives
    prompts: list[str | None]  # of each pair

    @property
    def n_pairs(self) -> int:
        return len(self.negative_rows)

    @property
    def texts(self) -> "tuple[TokenizedTexts, TokenizedTexts, TokenizedTexts]":
        return self.anchors, self.positives, self.negatives


def rows_by_prompt(prompts: list[str | None]) -> dict[str | None, list[int]]:
    """The rows of each prompt, in order; prompts in order of appearance."""
    return {prompt: [row for row, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}


def under_prompt(encoder: "Encoder", prompt: str | None) -> "Encoder":
    """The same weights under a pair's prompt; None: under that of the contract."""
    return encoder if prompt is None else encoder.with_contract(prompts=get_prompt(prompt).roles())


def tokenize_each(encoder: "Encoder", texts: list[str], prompts: list[str | None], role: str) -> "TokenizedTexts":
    """Texts as ids, each under its prompt. The shared prefix is the beginning that these prompts have in common.

    A batch is not divided by prompts: for prompts of a few tokens that would be more forward passes for little.
    """
    groups = rows_by_prompt(prompts)
    if set(groups) <= {None}:
        return encoder.tokenize(texts, role)
    parts = [under_prompt(encoder, prompt).tokenize([texts[row] for row in rows], role) for prompt, rows in groups.items()]
    places = np.argsort(np.concatenate(list(groups.values())))
    ids, spans = ([values[i] for i in places] for values in (list(itertools.chain(*(part[field] for part in parts))) for field in (0, 1)))
    prefixes = zip(*(part.ids[0][: part.prefix_length] for part in parts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, prefixes))
    return type(parts[0])(ids, spans, shared, sum(part.n_empty for part in parts), sum(part.n_truncated for part in parts))


def tokenize_pairs(encoder: "Encoder", pairs: list[Pair]) -> PairBatch:
    """Tokenize the pairs of a batch: anchors in the role "query", positives and hard negatives in the role "document"."""
    ends = itertools.accumulate((len(pair.negatives) for pair in pairs), initial=0)
    ids: dict[str, int] = {}
    taught = [i for i, pair in enumerate(pairs) if pair.teacher is not None]
    kinds = [[pairs[i].teacher[part] for i in taught] for part in (slice(0, 1), slice(1, 2), slice(2, None))]
    prompts = [pair.prompt for pair in pairs]
    return PairBatch(
        tokenize_each(encoder, [pair.anchor for pair in pairs], prompts, "query"),
        tokenize_each(encoder, [pair.positive for pair in pairs], prompts, "document"),
        tokenize_each(
            encoder, [n for pair in pairs for n in pair.negatives], [pair.prompt for pair in pairs for _ in pair.negatives], "document"
        ),
        [list(range(*span)) for span in itertools.pairwise(ends)],
        [[ids.setdefault(text, len(ids)) for text in (pair.anchor, pair.positive, *pair.negatives)] for pair in pairs],
        taught,
        np.concatenate([vectors for kind in kinds for vectors in kind]).astype(np.float32) if taught else None,
        prompts,
    )


def prefetch(encoder: "Encoder", pairs: PairDataset, sampler: PairSampler, steps: range) -> Iterator[PairBatch]:
    """The batches of these steps. A thread reads and tokenizes each one while the model trains on the one before it."""

    def load(step: int) -> PairBatch:
        return tokenize_pairs(encoder, pairs[sampler.rows(step)])

    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(load, step) for step in steps[:1]]
        for step in steps:
            batch = pending.pop().result()
            pending += [thread.submit(load, step + 1)] if step + 1 in steps else []
            yield batch
