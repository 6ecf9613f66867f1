"""A teacher for texts without labels: what their words say and what a model says, for `train.py` to distil into an adapter.

Words and letter sequences know which texts of a corpus share a rare name, a dish, a product; a model knows which mean the same in
other words. Each is a set of vectors; side by side they cluster better than either (bench/README.md), and a model can learn their
similarities, also for texts that it has not seen. Nothing here needs a label, a chat model or a network.

Legend: N texts, E numbers of a teacher's vector, K neighbours of a text.
"""

import argparse
import glob
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from encoder.names import base_of, check_dtype, find_base, is_run
from files.console import InputError, say, warn
from files.reading import left_out
from files.writing import check_absent, check_writable, errors_of_writing, write_atomic, write_json, write_text
from pair_engines.docstring_pairs import docstring_pairs
from pair_engines.gate import SURE, language_identifier
from pair_engines.inputs import read_input
from pair_engines.spans import UNSPACED
from training.own_texts import GENERAL_FILE, OWN_SHARE, RECIPE_FILE, TEACHER_FILE, TEXTS_FILE, beginning
from training.pair_data import read_pairs

DOCSTRING_PAIRS = Path(__file__).resolve().parent.parent / "pairs" / "docstrings.jsonl"  # where make_pairs.py docstrings puts them
NEIGHBOURS = 8  # of a text; three texts of a batch are one of it and two of these
MIN_TEXTS, FEW_TEXTS = 32, 300  # of a corpus; by trial the latter were enough (bench/README.md)
MAX_TEXTS = 100_000  # that are taught, drawn at random from more: a run does not see more than these
MAX_SHARE = 0.2  # of all texts: what more of them share says little; by trial 0.4 is as good and 0.1 worse (bench/README.md)
DIMS = 100  # of each part of a teacher; of fewer than 1,000 texts a tenth of their number, 15 at least
LEXICAL_TEXTS, MAX_LEXICAL_DIMS = 3_000, 300  # of more texts words and letters have more, see `lexical_dims`
# By trial on six corpora (bench/README.md): shares in a teacher's cosines, those of the models together, and how far the vectors of
# models are whitened, and those of words and letters of more than LEXICAL_TEXTS texts
WORDS_SHARE, LETTERS_SHARE, MODELS_SHARE = 1, 2, 3
WHITENING, LEXICAL_WHITENING = 0.5, 0.25
MAX_CHARACTERS = 2_000  # of a text that count: most models cut soon after
BEGINNING = 400  # characters of a text that are trained on, see `beginnings_tell_apart`
ENGLISH_SHARE = 0.2  # of all words that are English function words; in English texts some 45 %, in other languages below 10 %
OTHERS_SHARE = 0.1  # of the texts whose language is sure: where so many are in another one than English, the corpus is in several
COSINES_AT_ONCE = 2**25  # 128 MiB
MIN_STEPS, MAX_STEPS, PASSES = 80, 2000, 5  # of a run; passes over the texts, of which three are a point worse by trial (bench/README.md)
# All runtimes can serve it, and of those poolings it costs other texts least; clusters are as good with the last token (bench/README.md)
POOLING = {"pooling": "mean", "scope": "all", "keep_bos": True}
TEXTS_PER_STEP = OWN_SHARE * 96  # the batch that the bundled model takes; others take some more


class Part(NamedTuple):
    """One of the sets of vectors of which a teacher is made."""

    name: str
    vectors: np.ndarray  # (N, any number)
    share: float  # in a teacher's cosines, beside those of the other parts


class Corpus(NamedTuple):
    texts: list[str]
    sources: list[str]  # FILE:ROW of each text
    language: str  # "English", "several" of which English is one, "other", or "unspaced": written without spaces between words
    words: int  # median number of words of a text; characters where unspaced


def auto(args: argparse.Namespace) -> None:
    """Write the folder of texts, teacher, general pairs and recipe (training/own_texts.py), and say what was chosen and why."""
    check_absent(args.out)
    check_writable(args.out)
    if args.out.suffix in (".jsonl", ".json", ".gz"):
        raise InputError(f"--out {args.out}: auto writes a folder, name one such as {args.out.parent / args.out.name.partition('.')[0]}")
    check_dtype(args.dtype)
    models = teacher_models(args.model)
    general = read_general(args)
    corpus = read_corpus(args)
    if general is None:
        say("general pairs: docstrings of the installed packages, which takes a minute to read (--general FILE takes others)")
        general = docstring_pairs(args)
    if general and args.general is None and corpus.language != "English":
        say("general pairs are English docstrings: pairs in the language of your texts are better (--general FILE, or none)")
    parts, fingerprints = lexical_parts(corpus), []
    for model in models:
        vectors, fingerprint = model_vectors(model, corpus.texts, args)
        parts.append(Part(f"vectors of {model}", vectors, MODELS_SHARE / len(models)))
        fingerprints.append(fingerprint)
    names = [part.name for part in parts]
    say(f"teacher: {', '.join(names)}{', side by side' * (len(names) > 1)}")
    teacher, neighbours = side_by_side(parts)
    student = next((model for model in models if is_run(model)), models[0] if models else "tiny")  # a run is trained on
    wanted = max(MIN_STEPS, int(PASSES * len(corpus.texts) / TEXTS_PER_STEP))
    steps = min(MAX_STEPS, wanted)
    per_step = TEXTS_PER_STEP if general else TEXTS_PER_STEP / OWN_SHARE
    passes = f"{steps * per_step / len(corpus.texts):.3g} passes over the texts in batches of {TEXTS_PER_STEP / OWN_SHARE:.0f}"
    more = f" (train.py --steps {wanted}: {wanted * per_step / len(corpus.texts):.3g})" if wanted > steps else ""
    say(f"training: {steps:,} steps, {passes}{more}")
    if is_run(student):
        say(f"pooling: that of {student}, which is trained on; if it is no mean, whole texts are read")
    else:
        say("pooling: the mean of all tokens, BOS too, which every runtime can serve (train.py --pooling takes others)")
    training = {"steps": steps, **POOLING}
    if n_long := sum(len(beginning(text, BEGINNING)) < len(text) for text in corpus.texts):
        if beginnings_tell_apart(corpus):
            training["characters"] = BEGINNING
            say(f"{n_long:,} longer texts are trained on with their first {BEGINNING} characters (train.py --characters)")
        else:
            say(f"{n_long:,} texts are longer, but few, or much alike in their first {BEGINNING} characters: they are trained on uncut")
    share = f"{len(general):,}, {1 - OWN_SHARE:.0%} of each batch, so that the model keeps what it knows" if general else "none"
    say(f"general pairs: {share}")
    recipe = {
        "texts": len(corpus.texts),
        "language": corpus.language,
        "median_words": corpus.words,
        "teacher": names,
        "shares": [part.share for part in parts],
        "models": models,
        "fingerprints": fingerprints,
        "general": str(args.general or "docstrings"),
        "train": training,
    }
    write_folder(args.out, corpus, teacher, neighbours, general, recipe)
    say(f"{args.out}: {len(corpus.texts):,} texts with their neighbours, for example")
    for number in (0, 1):
        say(f"  {corpus.texts[number][:90]!r}\n  {corpus.texts[neighbours[number, 0]][:90]!r}")
    say(f"next: python train.py --model {student} --pairs {args.out} --out runs/{args.out.name}")


# ------------------------------------------------------------------------------------------------------------ the corpus


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The texts without copies, at most MAX_TEXTS of them. Prints what was left out, and what the corpus looks like and calls for."""
    limit = min(args.limit or MAX_TEXTS, MAX_TEXTS)
    if limit < MIN_TEXTS:
        raise InputError(f"--limit {limit}: a teacher needs at least {MIN_TEXTS} texts")
    rows, seen, reasons = [], set(), Counter()
    for source, text in read_input(args.input, args.column):
        key = copy_key(text)
        if key in seen:
            reasons["that are copies of others"] += 1
        else:
            seen.add(key)
            rows.append((source, text))
    if len(rows) < MIN_TEXTS:
        raise InputError(f"{args.input} holds {len(rows)} different texts: a teacher needs at least {MIN_TEXTS}")
    if reasons:
        say(left_out("text", reasons))
    if len(rows) < FEW_TEXTS:
        warn(f"{len(rows)} texts are few: the nearest texts of one may have little to do with it; {FEW_TEXTS} or more are better")
    if len(rows) > limit:
        chosen = np.sort(np.random.default_rng(args.seed).choice(len(rows), limit, replace=False))
        say(f"{limit:,} of {len(rows):,} texts are drawn at random")
        rows = [rows[i] for i in chosen.tolist()]
    texts = [text for _, text in rows]
    language, words = look_at(texts)
    unit = "characters" if language == "unspaced" else "words"
    look, so = {
        "English": ("in English", "its stop words do not count"),
        "several": ("in several languages", f"English stop words and what more than {MAX_SHARE:.0%} of the texts share do not count"),
        "other": ("not in English", f"what more than {MAX_SHARE:.0%} of the texts share does not count"),
        "unspaced": ("written without spaces", "characters stand for words"),
    }[language]
    say(f"{len(texts):,} texts, {look}, of {words} {unit} at the median: {so}")
    shares = languages(texts)
    if language != "English" and shares:
        named = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        say(f"languages of those texts that are surely in one: {named}")
    if n_long := sum(len(text) > MAX_CHARACTERS for text in texts):
        say(f"{n_long:,} of them count with their first {MAX_CHARACTERS:,} characters")
    return Corpus(texts, [source for source, _ in rows], language, words)


def copy_key(text: str) -> str:
    """Equal for texts that differ in capitals and spaces alone."""
    return " ".join(text.casefold().split())


def look_at(texts: list[str]) -> tuple[str, int]:
    """Language, as `Corpus` has it, and the median number of words, from up to 4,000 texts."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    some = texts[:: max(1, len(texts) // 2000)]
    beginnings = [text[:MAX_CHARACTERS] for text in some]  # so that one huge text does not speak for all
    joined = "".join("".join(text.split()) for text in beginnings)
    if 2 * len(UNSPACED.sub("", joined)) < len(joined):
        return "unspaced", int(np.median([len("".join(text.split())) for text in some]))
    words = [text.lower().split() for text in beginnings]
    n_english = sum(word in ENGLISH_STOP_WORDS for text in words for word in text)
    language = "English" if n_english > ENGLISH_SHARE * sum(map(len, words)) else "other"
    if language == "English" and languages(texts).get("en", 1) < 1 - OTHERS_SHARE:
        language = "several"
    return language, int(np.median([len(text.split()) for text in some]))


def languages(texts: list[str]) -> dict[str, float]:
    """Code of a language -> its share of the texts of which the language is sure, of a sample of up to 1,000; those above 5 %."""
    some = texts[:: max(1, len(texts) // 500)]
    counts = Counter(name for name, sure in (language_identifier().classify(text[:MAX_CHARACTERS]) for text in some) if sure >= SURE)
    return {name: n / counts.total() for name, n in counts.most_common() if n >= 0.05 * counts.total()}


def beginnings_tell_apart(corpus: Corpus) -> bool:
    """Whether the first BEGINNING characters of longer texts tell these apart, as they do not in letters and forms.

    By trial a model learns as much from the beginnings of abstracts, title included, as from the whole, in a third of the time
    (bench/README.md). They are alike where the share of words that tell texts apart (those in 2 texts at least, and in no more than
    MAX_SHARE of them) is less than half of what it is in the whole texts.
    """

    def words(text: str) -> list[str]:
        text = text.casefold()
        return [*map("".join, itertools.pairwise(text))] if corpus.language == "unspaced" else text.split()

    some = [text[:MAX_CHARACTERS] for text in corpus.texts if len(beginning(text, BEGINNING)) < len(text)]
    some = some[:: max(1, len(some) // 2000)]
    wholes, beginnings = ([words(text) for text in texts] for texts in (some, [beginning(text, BEGINNING) for text in some]))
    texts_with = Counter(word for text in wholes for word in set(text))
    telling = {word for word, n in texts_with.items() if 2 <= n <= MAX_SHARE * len(some)}

    def share(texts: list[list[str]]) -> float:
        return sum(word in telling for text in texts for word in text) / max(1, sum(map(len, texts)))

    return bool(telling) and 2 * share(beginnings) >= share(wholes)


def read_general(args: argparse.Namespace) -> list[dict] | None:
    """The pairs that keep the model's general knowledge, those of --general; docstrings by default, None where these are to be read yet.

    [] where it is "none".
    """
    if str(args.general) == "none":
        return []
    if args.general is None and not DOCSTRING_PAIRS.exists():
        return None
    pairs = read_pairs(args.general or DOCSTRING_PAIRS)
    texts = ({"anchor": pair.anchor, "positive": pair.positive, "negatives": list(pair.negatives), "prompt": pair.prompt} for pair in pairs)
    return [{name: value for name, value in row.items() if value is not None} for row in texts]


# ----------------------------------------------------------------------------------------------------------- the teacher


def n_dims(n_texts: int) -> int:
    """How many numbers of a part's vectors count."""
    return min(DIMS, max(15, n_texts // 10))


def lexical_dims(n_texts: int) -> int:
    """The same for words and for letter sequences, which more texts have more of: 100 of 3,000 texts, 182 of 10,000, 300 from 27,000 on.

    By trial on six sets of 3,000 texts, and on 30,000 and 100,000 texts of many kinds (bench/README.md). Still more would be better, but
    of 100,000 texts 577 took 5.4 GiB.
    """
    return min(MAX_LEXICAL_DIMS, int(n_dims(n_texts) * max(1.0, math.sqrt(n_texts / LEXICAL_TEXTS))))


def lexical_parts(corpus: Corpus) -> list[Part]:
    """Latent semantic analysis (TF-IDF and truncated SVD) of words and of letter sequences.

    Words in English lose the stop words; in another language, and sequences of letters, those of more than MAX_SHARE of the texts;
    in several languages both.
    The first directions of a large corpus tell its subjects apart; whitening gives those that tell apart texts of a subject more weight.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text[:MAX_CHARACTERS] for text in corpus.texts]
    if corpus.language == "unspaced":
        lengths = {"characters": (1, 1), "sequences of 2 to 3 characters": (2, 3)}
        settings = {name: {"analyzer": "char", "ngram_range": span} for name, span in lengths.items()}
    else:
        words = {"stop_words": "english"} if corpus.language in ("English", "several") else {}
        words |= {} if corpus.language == "English" else {"max_df": MAX_SHARE}
        settings = {"words": words, "sequences of 3 to 5 letters": {"analyzer": "char_wb", "ngram_range": (3, 5), "max_df": MAX_SHARE}}
    parts, left = [], []
    for (name, options), share in zip(settings.items(), (WORDS_SHARE, LETTERS_SHARE), strict=True):
        try:
            counts = TfidfVectorizer(sublinear_tf=True, min_df=2, dtype=np.float32, **options).fit_transform(texts)
        except ValueError:  # nothing is left: every word stands in a single text, or in too many
            counts = np.empty((len(texts), 0))
        dims = min(lexical_dims(len(texts)), min(counts.shape) - 1)
        vectors = np.zeros((len(texts), 1))
        if dims > 1:
            with np.errstate(divide="ignore", invalid="ignore"):  # of texts that all have the same words
                vectors = TruncatedSVD(dims, random_state=0).fit_transform(counts)
        if vectors.std(0).max() > 1e-6:
            if len(texts) > LEXICAL_TEXTS:
                vectors = whitened(vectors, LEXICAL_WHITENING, dims)
            parts.append(Part(name, vectors, share))
        else:
            left.append(name)
    if not parts:
        raise InputError(f"hardly any {' or '.join(left)} are in some texts and not in others: a teacher cannot be made of these texts")
    for name in left:
        warn(f"hardly any {name} are in some texts and not in others: these are not part of the teacher")
    return parts


def teacher_models(specs: list[str]) -> list[str]:
    """The models of --model. Raises InputError for what cannot be found, or beside "none", before anything slow begins."""
    if "none" in specs:
        if len(specs) > 1:
            raise InputError("--model none means that no model takes part: leave it or the others out")
        return []
    if len(set(specs)) < len(specs):
        raise InputError("--model names a model twice: each has one say")
    for spec in specs:
        find_base(base_of(spec))
    return specs


def model_vectors(model: str, texts: list[str], args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Vectors (N, at most DIMS) of a model of --model, and its fingerprint; the mean over all tokens unless it is a run."""
    from encoder import Encoder, EncodingReport

    contract = {} if is_run(model) else {"prompt": "cluster", "pooling": "position-mean", "scope": "all"}
    encoder, report = Encoder.load(model, dtype=args.dtype, device=args.device, **contract), EncodingReport()
    encoder.merge()
    vectors = encoder.encode(texts, progress=True, report=report)
    for line in [*encoder.notes, *report.warnings()]:
        warn(line)
    return whitened(vectors), encoder.fingerprint


def whitened(vectors: np.ndarray, degree: float = WHITENING, dims: int | None = None) -> np.ndarray:
    """Principal components of vectors (N, D), `dims` of them or `n_dims(N)`, whitened.

    Each is divided by its standard deviation to the power of `degree` (0: left as it is, 1: whitened in full). A few directions make up
    most of a language model's vectors and say little about what a text means, while whitening in full makes noise as loud as all else.
    For SVD of word counts see "eigenvalue weighting" in Levy, Goldberg and Dagan 2015, https://aclanthology.org/Q15-1016.
    """
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # of a model that gives all texts the same vector
        components = PCA(min(dims or n_dims(len(vectors)), *vectors.shape), random_state=0).fit_transform(vectors)
    deviations = components.std(0)
    return components / np.maximum(deviations, 1e-6 * deviations.max() + 1e-30) ** degree


def side_by_side(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Teacher's vectors (N, E) of norm 1 and the numbers (N, K) of each text's nearest.

    The parts are centred, brought to the norm that gives them their shares in a cosine, and stand side by side. Each vector then
    moves halfway to the mean of its neighbours, weighted by their cosines: what a text shares with them stays, its noise does not.
    """
    import torch

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors.float(), dim=-1)

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def scaled(part: Part) -> torch.Tensor:
        vectors = torch.from_numpy(part.vectors).float().to(device)
        return math.sqrt(part.share) * unit(vectors - vectors.mean(0))

    vectors = unit(torch.cat([scaled(part) for part in parts], dim=1))
    n_neighbours = min(NEIGHBOURS, 2 * ((len(vectors) - 1) // 2))
    neighbours, smooth = [], torch.empty_like(vectors)
    for rows in torch.arange(len(vectors), device=device).split(max(1, COSINES_AT_ONCE // len(vectors))):
        cosines = vectors[rows] @ vectors.T
        cosines[torch.arange(len(rows), device=device), rows] = -2
        best, numbers = cosines.topk(n_neighbours)
        weights = best.clamp(min=0)[:, :, None]
        means = (weights * vectors[numbers]).sum(1) / weights.sum(1).clamp(min=1e-6)
        smooth[rows] = unit(vectors[rows] + means)
        neighbours.append(numbers.int())
    return smooth.cpu().numpy(), torch.cat(neighbours).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------ the folder


def write_folder(out: Path, corpus: Corpus, teacher: np.ndarray, neighbours: np.ndarray, general: list[dict], recipe: dict) -> None:
    """Write all files into a folder beside `out` and rename it: the folder is complete or absent."""
    from safetensors.numpy import save_file

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # by a job that was killed here
        shutil.rmtree(left, ignore_errors=True)

    def lines(rows: Iterator[dict]) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    with errors_of_writing(out):
        temporary.mkdir(parents=True)
        try:
            write_text(temporary / TEXTS_FILE, lines({"text": t, "source": s} for t, s in zip(corpus.texts, corpus.sources, strict=True)))
            tensors = {"vectors": teacher.astype(np.float16), "neighbours": neighbours}
            write_atomic(temporary / TEACHER_FILE, lambda path: save_file(tensors, path))
            if general:
                write_text(temporary / GENERAL_FILE, lines(general))
            files = [TEXTS_FILE, TEACHER_FILE, *([GENERAL_FILE] if general else [])]
            write_json(temporary / RECIPE_FILE, recipe | {"files": files})
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
