"""What training on one's own texts brings: labelled sets as unlabelled corpora, their labels only to score.

    python bench/bench_own_texts.py --data labelled/*.jsonl.gz --out results/own
    python bench/bench_own_texts.py --data labelled/*.jsonl.gz --out results/own --table --agreement   # evaluate.py --texts, against labels

--data   JSONL files with the fields text and label; each is a corpus of its first 3,000 rows of a fixed shuffle

Every row of the table is a set of vectors of these texts, scored by V-measure x 100 (mini-batch k-means as mteb runs it, the mean over
five seeds of it):

    untuned        the bundled model, prompt cluster, position-mean over all tokens; so are all runs
    general        train.py on the docstring pairs alone, as many steps as `auto` takes
    teacher        what make_pairs.py auto makes of the corpus, and cannot encode any other text
    auto           make_pairs.py auto, then train.py: the model has learned from the teacher
    own only       the same without general pairs
    half           auto on the first half of the corpus; scored on both halves, the second of which it never saw
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
from files.reading import read_rows
from files.writing import append_line, write_text
from pair_engines.teacher import copy_key
from tasks import unlabelled

ROOT, N_TEXTS = Path(__file__).resolve().parent.parent, 3000
ENCODERS = ("untuned", "general", "auto", "own only", "half")  # of the following, those that encode any text
RECIPES = ("untuned", "LSA", "general", "side by side", "teacher", "auto", "own only", "half", "MiniLM")
POOLING = {"prompt": "cluster", "pooling": "position-mean", "scope": "all"}


def call(script: str, *flags, log: Path) -> None:
    with open(log, "a") as f:
        subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=f, stderr=f)


def v_measure(vectors: np.ndarray, labels: list[str]) -> float:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    k, vectors = len(set(labels)), unit(vectors)
    scores = [
        v_measure_score(labels, MiniBatchKMeans(k, batch_size=500, n_init="auto", random_state=seed).fit_predict(vectors))
        for seed in range(5)
    ]
    return round(100 * float(np.mean(scores)), 1)


def read_set(path: Path) -> tuple[list[str], list[str]]:
    rows = [row for _, row in read_rows(path)]
    random.Random(0).shuffle(rows)
    return [row["text"] for row in rows[:N_TEXTS]], [str(row["label"]) for row in rows[:N_TEXTS]]


def lsa(texts: list[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    return TruncatedSVD(100, random_state=0).fit_transform(counts)


class Corpus:
    """A labelled set, and the vectors and runs made of it in a folder."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.name, self.args = path.name.partition(".")[0], args
        self.texts, self.labels = read_set(path)
        self.folder, self.general = args.out / self.name, ROOT / "pairs" / "docstrings.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)

    def encode(self, model: str, **contract) -> np.ndarray:
        encoder = Encoder.load(model, **contract)
        encoder.merge()
        return encoder.encode(self.texts)

    def encoder(self, recipe: str):
        """A function from texts to vectors, of a recipe that has been trained."""
        run = self.general_run() if recipe == "general" else self.folder / f"{recipe.replace(' ', '-')}-{self.args.seed}"
        encoder = Encoder.load("tiny", **POOLING) if recipe == "untuned" else Encoder.load(str(run))
        encoder.merge()
        return encoder.encode

    def train(self, name: str, texts: list[str], *flags) -> Path:
        """A run on these texts, by the two commands that a user types."""
        source, pairs, out = (self.folder / f"{name}{end}" for end in (".jsonl", "-pairs", f"-{self.args.seed}"))
        if not (out / "summary.json").is_file():
            log = self.folder / "log.txt"
            if not pairs.exists():
                write_text(source, "".join(json.dumps({"text": text}) + "\n" for text in texts))
                call("make_pairs.py", "auto", "--input", source, "--out", pairs, *flags, log=log)
            call("train.py", "--pairs", pairs, "--out", out, "--seed", self.args.seed, "--resume", log=log)
        return out

    def general_run(self) -> Path:
        """One run serves all corpora."""
        out = self.args.out / f"general-{self.args.seed}"
        if not (out / "summary.json").is_file():
            flags = ["--pairs", self.general, "--hold-out", 0, "--steps", self.args.steps, "--seed", self.args.seed, "--resume"]
            call("train.py", *flags, "--pooling", "position-mean", "--scope", "all", "--out", out, log=self.args.out / "log.txt")
        return out

    def teacher(self) -> np.ndarray:
        """The teacher's vectors of the recipe `auto`, a copy of a text having that of the first."""
        from safetensors.numpy import load_file

        self.train("auto", self.texts, "--general", self.general)
        folder = self.folder / "auto-pairs"
        places = {copy_key(row["text"]): i for i, (_, row) in enumerate(read_rows(folder / "texts.jsonl"))}
        return load_file(folder / "teacher.safetensors")["vectors"].astype(np.float32)[[places[copy_key(text)] for text in self.texts]]

    def vectors(self, recipe: str) -> np.ndarray:
        if recipe == "LSA":
            return lsa(self.texts)
        if recipe == "side by side":
            return np.hstack([unit(v - v.mean(0)) for v in (self.encode(str(self.general_run())), lsa(self.texts))])
        if recipe == "MiniLM":
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(self.args.sentence_transformer).encode(self.texts)
        if recipe == "teacher":
            return self.teacher()
        if recipe == "untuned":
            return self.encode("tiny", **POOLING)
        if recipe == "general":
            return self.encode(str(self.general_run()))
        texts = self.texts[: N_TEXTS // 2] if recipe == "half" else self.texts
        flags = ["--general", "none" if recipe == "own only" else self.general]
        return self.encode(str(self.train(recipe.replace(" ", "-"), texts, *flags)))


def agreement(corpora: list["Corpus"], rows: list[dict], out: Path) -> str:
    """How often evaluate.py --texts says of two sets of vectors what labels say, where these differ by more than a point.

    Comparisons are among untuned, general, auto and what else has been trained, on each corpus; LSA cannot encode a text alone.
    """
    results = out / "agreement.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for corpus in corpora:
        of = {row["recipe"]: row["score"] for row in rows if row["set"] == corpus.name and row["recipe"] in ENCODERS}
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
    return f"{right} right of {len(decided)} decided, of {n_clear} comparisons in which V-measure differs by more than a point"


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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=[r for r in RECIPES if r != "MiniLM"], choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=125, help="of the run on general pairs (default 125, as auto takes for 3,000 texts)")
    parser.add_argument("--sentence-transformer", help="folder of the encoder for the recipe MiniLM")
    parser.add_argument("--agreement", action="store_true", help="compare what is there without labels as well, and with them")
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
            vectors, half = corpus.vectors(recipe), N_TEXTS // 2
            np.save(corpus.folder / f"{recipe}-{args.seed}.npy", vectors.astype(np.float16))
            row = {"set": corpus.name, "recipe": recipe, "seed": args.seed, "score": v_measure(vectors, corpus.labels)}
            row |= {"first": v_measure(vectors[:half], corpus.labels[:half]), "second": v_measure(vectors[half:], corpus.labels[half:])}
            rows.append(row | {"seconds": round(time.perf_counter() - began)})
            append_line(results, json.dumps(rows[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if args.agreement:
        print(agreement([Corpus(path, args) for path in args.data], rows, args.out))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
