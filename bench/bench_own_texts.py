"""What training on one's own texts brings: labelled sets as unlabelled corpora, their labels only to score.

    python bench/bench_own_texts.py --data labelled/*.jsonl.gz --out results/own
    python bench/bench_own_texts.py --data labelled/*.jsonl.gz --out results/own --table --agreement   # evaluate.py --texts, against labels
    python bench/bench_own_texts.py --data labelled/*.jsonl.gz --out results/own --table --teachers    # of what a teacher is best made

--data   JSONL files with the fields text and label; each is a corpus of its first 3,000 rows (--texts) of a fixed shuffle

Every row of the table is a set of vectors of these texts, scored by V-measure x 100 (mini-batch k-means as mteb runs it, the mean over
five seeds of it):

    untuned        the bundled model, prompt cluster, position-mean over all tokens
    general        train.py on the docstring pairs alone, as many steps as `auto` takes of 3,000 texts, pooled as `untuned`
    words          the teacher of make_pairs.py auto --model none: words and letter sequences, smoothed over neighbours
    teacher        what make_pairs.py auto makes of the corpus, the untuned model beside the words; neither can encode any other text
    auto           make_pairs.py auto, then train.py: the model has learned from the teacher; the mean of all tokens with BOS
    two rounds     the same once more, from the untuned model, with the run of `auto` in its place in the teacher
    with general   `auto` with the run `general` in the teacher beside the untuned model, and then also
    from general   where training goes on with the run `general`, and its pooling
    second teacher, teacher with general    the teachers of two of these; neither can encode any other text
    own only       `auto` without general pairs
    half           auto on the first half of the corpus; scored on both halves, the second of which it never saw
    mixed          auto on all rows of all sets of --data and the anchors of the pairs of --more, one corpus and one run for all sets
    neighbours, same, crop, noise    train.py on pairs alone, one of each text, steps and pooling as of `general`: the text and its
                   nearest under the teacher, the text twice (with dropout), two of its spans, it and a damaged copy
    faulty, no gate    `crop`, but three in ten positives are what chat models get wrong, such as refusals, copies and loops
    faulty         those of these pairs that the quality gate keeps; both are as many
    columns        the same of a title and 400 characters after it, for texts with a title before their first ". " (arXiv abstracts)
    LSA            TF-IDF and truncated SVD of 100, of words (--baselines tfidf of evaluate.py clusters the like)
    side by side   vectors of `general` and LSA, both centred and of norm 1, nothing trained on the corpus
    MiniLM         with --sentence-transformer: a folder of an encoder trained on a billion labelled pairs

Rows are appended to OUT/rows.jsonl, and what is there is not made again: an interrupted call can be repeated.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from encoder import Encoder
from encoder.nearest import unit
from files.console import run_script
from files.reading import read_rows
from files.writing import append_line, write_text
from pair_engines import teacher
from pair_engines.gate import ALL_CHECKS, Gate
from pair_engines.teacher import copy_key
from tasks import unlabelled
from training.own_texts import beginning

ROOT, STEPS = Path(__file__).resolve().parent.parent, 208
ENGINES = {  # recipe -> engine and flags of make_pairs.py, flags of train.py
    "same": (["same"], ["--lora-dropout", 0.1]),
    "crop": (["crop", "--min-words", 4], []),
    "noise": (["noise"], []),
    "columns": (["columns", "--columns", "title", "abstract"], []),
    "faulty": (["crop", "--min-words", 4, "--no-gate"], []),
    "faulty, no gate": (["crop", "--min-words", 4, "--no-gate"], []),
}
FAULTY = 0.3  # of the positives
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot rewrite this text.",
    "Unfortunately, I cannot assist.",
)
LEAKS = ("Sure, here is the rewritten text: ", "Here is a paraphrased version of the text: ", "Rewritten text: ")
FOREIGN = (
    "Ich habe den Text leider nicht verstanden und kann dazu nichts sagen.",
    "Je ne comprends pas bien ce que vous voulez dire avec ce texte.",
    "Пожалуйста, напишите этот текст ещё раз другими словами.",
)
# of all recipes, those that encode any text
ENCODERS = ("untuned", "general", "auto", "two rounds", "with general", "from general", "own only", "half", "mixed", "neighbours", *ENGINES)
# recipe of a teacher's vectors -> of its folder
TEACHERS = {"words": "words", "teacher": "auto", "second teacher": "two rounds", "teacher with general": "with general"}
DEFAULT = ("untuned", "LSA", "words", "general", "side by side", "teacher", "auto")
RECIPES = (*DEFAULT, *ENCODERS[3:], *list(TEACHERS)[2:], "MiniLM")
TEACHER_TRIALS = [  # shares of words, letter sequences and the untuned model, and how far the latter's vectors are whitened
    *[(1, 1, 1, degree) for degree in (0, 0.5)],
    *[(1, 2, 3, degree) for degree in (0, 0.25, 0.5, 0.75, 1)],
    *[(*shares, 0.5) for shares in ((1, 1, 2), (1, 0, 1), (0, 1, 1), (1, 3, 4), (1, 2, 6), (1, 1, 0), (1, 2, 0))],
]
POOLING = {"prompt": "cluster", "pooling": "position-mean", "scope": "all"}


def call(script: str, *flags, log: Path) -> None:
    with open(log, "a") as f:
        subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=f, stderr=f)


def make_pairs(texts: list[str], flags: list, out: Path) -> None:
    """Call make_pairs.py on a file of the texts, which stays beside OUT; its columns `title` and `abstract` are for `columns`."""
    source = out.with_name(f"{out.stem}.texts.jsonl")
    parts = [text.partition(". ")[::2] for text in texts]
    rows = ({"text": t, "title": title, "abstract": beginning(rest, 400)} for t, (title, rest) in zip(texts, parts, strict=True))
    write_text(source, "".join(json.dumps(row) + "\n" for row in rows))
    call("make_pairs.py", *flags, "--input", source, "--out", out, log=out.parent / "log.txt")


def write_faulty(source: Path, out: Path, gated: bool) -> None:
    """Put what chat models get wrong into the pairs of a file, and write as many as the gate keeps: those, or the first of all."""
    chance, pairs = random.Random(0), [row for _, row in read_rows(source)]
    chance.shuffle(pairs)

    def faulty(anchor: str, positive: str) -> str:
        others = " ".join(pair["positive"] for pair in chance.sample(pairs, 12))
        refusal, leak, foreign = (chance.choice(texts) for texts in (REFUSALS, LEAKS, FOREIGN))
        return chance.choice((refusal, leak + positive, foreign, " ".join([positive] * 12), anchor, f"{positive} {others}"))

    rows = [pair | {"positive": faulty(pair["anchor"], pair["positive"])} if chance.random() < FAULTY else pair for pair in pairs]
    kept = [verdict.pair for verdict in Gate(ALL_CHECKS).sort(rows) if not verdict.reason]
    write_text(out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in (kept if gated else rows[: len(kept)])))


def v_measure(vectors: np.ndarray, labels: list[str]) -> float:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    k, vectors = len(set(labels)), unit(vectors)
    scores = [
        v_measure_score(labels, MiniBatchKMeans(k, batch_size=500, n_init="auto", random_state=seed).fit_predict(vectors))
        for seed in range(5)
    ]
    return round(100 * float(np.mean(scores)), 1)


def read_set(path: Path, n_texts: int) -> tuple[list[str], list[str]]:
    rows = [row for _, row in read_rows(path)]
    random.Random(0).shuffle(rows)
    return [row["text"] for row in rows[:n_texts]], [str(row["label"]) for row in rows[:n_texts]]


def lsa(texts: list[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    return TruncatedSVD(100, random_state=0).fit_transform(counts)


class Corpus:
    """A labelled set, and the vectors and runs made of it in a folder."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.name, self.args = path.name.partition(".")[0], args
        self.texts, self.labels = read_set(path, args.texts)
        self.folder, self.general = args.out / self.name, ROOT / "pairs" / "docstrings.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)

    def encoder(self, recipe: str):
        """A function from texts to vectors, of a recipe that encodes any text."""
        encoder = Encoder.load("tiny", **POOLING) if recipe == "untuned" else Encoder.load(str(self.run(recipe)))
        encoder.merge()
        return encoder.encode

    def run(self, recipe: str) -> Path:
        """The folder of a recipe's run, which is trained by the commands that a user types."""
        if recipe == "general":  # one run serves all corpora
            return self.train(self.args.out / "general", self.general)
        if recipe == "mixed":  # so does this
            pairs = self.mixed_pairs()
            return self.train(pairs.with_name(pairs.name.removesuffix("-pairs")), pairs)
        if recipe == "neighbours":
            return self.train(self.folder / "neighbours", self.neighbour_pairs())
        if recipe == "from general":
            return self.train(self.folder / "from-general", self.pairs("with general"), "--model", self.run("general"))
        flags = ENGINES[recipe][1] if recipe in ENGINES else []
        return self.train(self.folder / recipe.replace(",", "").replace(" ", "-"), self.pairs(recipe), *flags)

    def pairs(self, recipe: str) -> Path:
        """What make_pairs.py makes for a recipe of the corpus: a file of pairs, or the folder of `auto`."""
        name = recipe.replace(",", "").replace(" ", "-")
        pairs = self.folder / (f"{name}.jsonl" if recipe in ENGINES else f"{name}-pairs")
        if not pairs.exists():
            texts = self.texts[: len(self.texts) // 2] if recipe == "half" else self.texts
            general = ["--general", "none" if recipe in ("own only", "words") else self.general]
            models = self.teacher_models(recipe)
            engine = ENGINES[recipe][0] if recipe in ENGINES else ["auto", *general, "--model", *models]
            column = [] if recipe == "columns" else ["--column", "text"]
            faulty = recipe.startswith("faulty")
            made = pairs.with_name(f"{pairs.stem}-crops.jsonl") if faulty else pairs
            if not made.exists():
                make_pairs(texts, [*engine, *column], made)
            if faulty:
                write_faulty(made, pairs, gated=recipe == "faulty")
        return pairs

    def mixed_pairs(self) -> Path:
        """The folder of `auto` of all sets together."""
        texts = [row["text"] for path in self.args.data for _, row in read_rows(path)]
        texts += [row["anchor"] for path in self.args.more for _, row in read_rows(path)]
        pairs = self.args.out / f"mixed-{len(texts)}-pairs"
        if not pairs.exists():
            make_pairs(texts, ["auto", "--general", self.general, "--model", "tiny", "--column", "text"], pairs)
        return pairs

    def teacher_models(self, recipe: str) -> list:
        """What --model of `auto` names for a recipe."""
        if recipe == "two rounds":
            return [self.run("auto")]
        return ["none"] if recipe == "words" else ["tiny", *([self.run("general")] if recipe == "with general" else [])]

    def train(self, out: Path, pairs: Path, *flags) -> Path:
        """The run OUT-SEED on these pairs. Those that are no folder of `auto` take --steps, and are pooled as `untuned`."""
        out = out.with_name(f"{out.name}-{self.args.seed}")
        if not (out / "summary.json").is_file():
            fixed = ["--hold-out", 0, "--steps", self.args.steps, "--pooling", "position-mean", "--scope", "all"]
            flags = [*flags, *([] if pairs.is_dir() else fixed), "--seed", self.args.seed, "--resume"]
            call("train.py", "--pairs", pairs, "--out", out, *flags, log=out.parent / "log.txt")
        return out

    def neighbour_pairs(self) -> Path:
        """The teacher's texts, each with its nearest."""
        from safetensors.numpy import load_file

        folder, path = self.pairs("auto"), self.folder / "neighbours.jsonl"
        texts = [row["text"] for _, row in read_rows(folder / "texts.jsonl")]
        nearest = load_file(folder / "teacher.safetensors")["neighbours"][:, 0].tolist()
        write_text(path, "".join(json.dumps({"anchor": a, "positive": texts[i]}) + "\n" for a, i in zip(texts, nearest, strict=True)))
        return path

    def teacher(self, recipe: str) -> np.ndarray:
        """The teacher's vectors of a folder of `auto`, a copy of a text having that of the first."""
        from safetensors.numpy import load_file

        folder = self.pairs(recipe)
        places = {copy_key(row["text"]): i for i, (_, row) in enumerate(read_rows(folder / "texts.jsonl"))}
        return load_file(folder / "teacher.safetensors")["vectors"].astype(np.float32)[[places[copy_key(text)] for text in self.texts]]

    def vectors(self, recipe: str) -> np.ndarray:
        if recipe == "LSA":
            return lsa(self.texts)
        if recipe == "side by side":
            return np.hstack([unit(v - v.mean(0)) for v in (self.encoder("general")(self.texts), lsa(self.texts))])
        if recipe == "MiniLM":
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(self.args.sentence_transformer).encode(self.texts)
        if recipe in TEACHERS:
            return self.teacher(TEACHERS[recipe])
        return self.encoder(recipe)(self.texts)


def agreement(corpora: list["Corpus"], rows: list[dict], out: Path) -> str:
    """How often evaluate.py --texts says of two sets of vectors what labels say, where these differ by more than a point.

    Comparisons are among untuned, general, auto and what else has been trained, on each corpus; LSA cannot encode a text alone.
    """
    from scipy.stats import binomtest

    results = out / "agreement.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for corpus in corpora:
        of_runs = [row for row in rows if row["set"] == corpus.name and row["seed"] == corpus.args.seed]  # of the runs that are encoded
        of = {row["recipe"]: row["score"] for row in of_runs if row["recipe"] in ENCODERS}
        if corpus.name in {row["set"] for row in known}:
            continue
        splits, scores = unlabelled.hide_words(list(dict.fromkeys(corpus.texts))), {}
        for recipe in of:
            encode = corpus.encoder(recipe)
            scores[recipe] = [unlabelled.scores(encode(split.texts), split) for split in splits]
        for one, other in itertools.combinations(of, 2):
            result = unlabelled.compare(scores[one], scores[other], splits)
            row = {"set": corpus.name, "recipes": [one, other], "labels": round(of[other] - of[one], 1), "ratio": round(result.ratio, 3)}
            known.append(row | {"verdict": result.verdict})
            append_line(results, json.dumps(known[-1]))
    decided = [row for row in known if abs(row["labels"]) > 1 and row["verdict"] != "cannot tell"]
    right = sum((row["verdict"] == "better") == (row["labels"] > 0) for row in decided)
    n_clear = sum(abs(row["labels"]) > 1 for row in known)
    clear = f"of {n_clear} comparisons in which V-measure differs by more than a point"
    if not decided:
        return f"none decided, {clear}"
    low, high = binomtest(right, len(decided)).proportion_ci()
    return f"{right} right of {len(decided)} decided ({low:.1%} to {high:.1%}, were they independent), {clear}"


def teachers(corpora: list["Corpus"]) -> str:
    """V-measure of teachers that are made in other ways, the corpora in columns, their mean last.

    The last row has for each corpus the teacher that is best on the mean of the others, as one would choose who has not seen it.
    """
    lines, scores = ["| words : letters : model, whitening |", "|---|"], [[] for _ in TEACHER_TRIALS]
    for corpus in corpora:
        parts = teacher.lexical_parts(teacher.Corpus(corpus.texts, [], *teacher.look_at(corpus.texts)))
        of_model = corpus.encoder("untuned")(corpus.texts)
        for row, (*shares, degree) in zip(scores, TEACHER_TRIALS, strict=True):
            trial = [*parts, teacher.Part("model", teacher.whitened(of_model, degree), 0)]
            trial = [part._replace(share=share) for part, share in zip(trial, shares, strict=True) if share]
            row.append(v_measure(teacher.side_by_side(trial)[0], corpus.labels))
        lines[0], lines[1] = f"{lines[0]} {corpus.name} |", f"{lines[1]}---|"
    lines[0], lines[1] = f"{lines[0]} mean |", f"{lines[1]}---|"
    names = [f"{' : '.join(map(str, shares))}{f', {degree}' * bool(shares[2])}" for *shares, degree in TEACHER_TRIALS]
    table = np.array(scores)  # (trials, corpora)
    others = table.sum(1, keepdims=True) - table
    unseen = np.take_along_axis(table, others.argmax(0)[None], axis=0)[0]
    for name, row in zip([*names, "best on the other sets"], [*table, unseen], strict=True):
        lines.append(f"| {name} | {' | '.join(f'{score:.1f}' for score in [*row, np.mean(row)])} |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Sets and recipes, means over seeds; below, the two halves of the sets of which `half` has seen the first."""
    sets, recipes = list(dict.fromkeys(row["set"] for row in rows)), [r for r in RECIPES if r in {row["recipe"] for row in rows}]

    def mean(name: str, recipe: str, field: str = "score") -> float | None:
        values = [row[field] for row in rows if row["set"] == name and row["recipe"] == recipe]
        return float(np.mean(values)) if values else None

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    lines = [["set", *recipes], ["---"] * (1 + len(recipes)), *([name, *(show(mean(name, r)) for r in recipes)] for name in sets)]
    columns = [[mean(name, recipe) for name in sets] for recipe in recipes]
    lines.append(["mean", *(show(None if None in column else float(np.mean(column))) for column in columns)])
    halved = [name for name in sets if mean(name, "half") is not None]
    if halved:
        recipes = [r for r in ("untuned", "LSA", "general", "auto", "half") if r in recipes]
        lines += [[], ["first half / second half", *recipes], ["---"] * (1 + len(recipes))]
        lines += [[name, *(f"{show(mean(name, r, 'first'))} / {show(mean(name, r, 'second'))}" for r in recipes)] for name in halved]
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="JSONL files of pairs, whose anchors `mixed` takes too")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=DEFAULT, choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=3000, help="rows of a corpus (default 3000); give other numbers another --out")
    steps = f"of the runs on pairs alone (default {STEPS}, as auto takes for 3,000 texts)"
    parser.add_argument("--steps", type=int, default=STEPS, help=steps)
    parser.add_argument("--sentence-transformer", help="folder of the encoder for the recipe MiniLM")
    parser.add_argument("--agreement", action="store_true", help="compare what is there without labels as well, and with them")
    parser.add_argument("--teachers", action="store_true", help="score teachers that are made in other ways as well")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["set"], row["recipe"], row["seed"]) for row in rows}
    for path in [] if args.table else args.data:
        corpus = Corpus(path, args)
        for recipe in args.recipes:
            if (corpus.name, recipe, args.seed) in done:
                continue
            began = time.perf_counter()
            vectors, half = corpus.vectors(recipe), len(corpus.texts) // 2
            np.save(corpus.folder / f"{recipe}-{args.seed}.npy", vectors.astype(np.float16))
            row = {"set": corpus.name, "recipe": recipe, "seed": args.seed, "score": v_measure(vectors, corpus.labels)}
            row |= {"first": v_measure(vectors[:half], corpus.labels[:half]), "second": v_measure(vectors[half:], corpus.labels[half:])}
            rows.append(row | {"seconds": round(time.perf_counter() - began)})
            append_line(results, json.dumps(rows[-1]))
            print(json.dumps(rows[-1]), flush=True)
    if rows:
        print(table(rows))
    if args.agreement:
        print(agreement([Corpus(path, args) for path in args.data], rows, args.out))
    if args.teachers:
        print(teachers([Corpus(path, args) for path in args.data]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_script(main)
