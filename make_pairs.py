"""Make positive pairs: two texts that mean the same thing, for contrastive training.

    python make_pairs.py docstrings                                  # from the packages installed here, offline, a minute
    python make_pairs.py crop --input texts.csv --out pairs/mine.jsonl       # two spans of each document
    python make_pairs.py noise --input texts.txt --out pairs/mine.jsonl      # a text and its damaged copy
    python make_pairs.py llm --input texts.csv --writer Qwen/Qwen3-4B --out pairs/mine.jsonl    # a chat model rewrites
    python make_pairs.py mine --pairs pairs/mine.jsonl --model runs/mine --out pairs/hard.jsonl # hard negatives for pairs

Leaves behind one JSONL file, a pair a line:

    {"anchor": str, "positive": str, "engine": "docstrings" | "crop" | "noise" | "llm", "source": where the anchor is from,
     "template": which rewriting instruction the writer had ("llm" only)}

`mine` adds {"negatives": [str], "scores": cosines of the anchor to the positive and to each of them}.

Input: txt (a text a line), csv, jsonl, each also gzipped, or parquet. Nothing is imported or executed to read docstrings.
The modules behind the embedded evaluation tasks (`tasks/*.jsonl.gz`) are left out, and so is any pair that shares a sentence
with them.

`python make_pairs.py tasks --out FOLDER` is how those tasks were drawn, once, before anything was tuned.
"""

import argparse
import ast
import csv
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from prompts import InputError

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
TEXT_COLUMNS = ("text", "sentence", "sentences", "content", "document", "body", "abstract", "question", "title", "anchor")

# The five ways of rewriting of Roth et al. 2025 (arXiv 2507.22729, section on synthetic positives), in words of our own.
TEMPLATES = {
    "detail": "Write this text again with more detail and the same meaning. Answer with the new text only.\n\n{text}",
    "simple": "Say the same thing as this text in simpler words. Answer with the new text only.\n\n{text}",
    "student": "You teach at a school. Explain this text to a student in your own words. Answer with the explanation only.\n\n{text}",
    "metaphor": "Find a metaphor that carries the idea of this text. Answer with the metaphor only.\n\n{text}",
    "question": "Which question would come to somebody who has just read this text? Answer with the question only.\n\n{text}",
}

# --------------------------------------------------------------------------------------------------------- docstrings

NOT_LIBRARIES = {"pip", "setuptools", "pkg_resources", "wheel", "ensurepip", "site-packages", "lib2to3", "idlelib"}
# of the tests alone, and younger than the figures in README
NOT_LIBRARIES |= {"hypothesis", "sortedcontainers", "_hypothesis_ftz_detector", "_hypothesis_globals", "_hypothesis_pytestplugin"}
SECTION = re.compile(
    r"^(args?|arguments|parameters?|params|returns?|yields?|raises?|examples?|notes?|references?|see also|attributes|methods|usage|"
    r"warnings?|keyword arguments|kwargs|inputs?|outputs?|shape|todo|explanation|other parameters)\b[^.]{0,30}:?$",
    re.IGNORECASE,
)
MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"`+|\*\*|__"), ""),
    (re.compile(r"\|(\w+)\|_?"), r"\1"),
    (re.compile(r"\s+"), " "),
)
NOT_PROSE = re.compile(r">>>|^\s*(\.\.|[-*+|#=]|:\w+|\d+[.)] )|::\s*$|^\s*\w+ ?(\([^)]*\))? ?:( |$)", re.MULTILINE)
MAX_POSITIVE_WORDS = 64


def clean(text: str) -> str:
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(paragraph: str) -> bool:
    readable = sum(c.isalpha() or c.isspace() for c in paragraph)
    return not NOT_PROSE.search(paragraph) and readable > 0.85 * len(paragraph)


def split_docstring(doc: str) -> tuple[str, str] | None:
    """A docstring -> its first sentence and the prose after it ("" if there is none), or None where it opens with markup."""
    paragraphs = [p for p in re.split(r"\n\s*\n", doc.strip()) if p.strip()]
    if not paragraphs or not is_prose(paragraphs[0]):
        return None
    sentence, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", clean(paragraphs[0]), maxsplit=1)
    for paragraph in paragraphs[1:]:
        if SECTION.match(paragraph.strip().split("\n")[0].strip()) or re.search(r"\n\s*[-=~]{3,}\s*$", paragraph, re.MULTILINE):
            break
        if is_prose(paragraph):
            rest.append(clean(paragraph))
            break
    return sentence, " ".join(" ".join(rest).split()[:MAX_POSITIVE_WORDS])


def read_module(job: tuple[Path, Path]) -> list[tuple[str, str, str]]:
    """One source file -> (module, first sentence, prose after it) for each docstring in it."""
    root, path = job
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):  # Python 2 leftovers, templates
        return []
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    docs = (
        ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    )
    found = (split_docstring(doc) for doc in docs if doc)
    return [(module, *parts) for parts in found if parts]


def source_files() -> list[tuple[Path, Path]]:
    """(root, file) of every library module: installed packages, then the standard library; tests are not libraries."""
    jobs = []
    for root in (Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])):
        for folder, children, names in os.walk(root):
            children[:] = sorted(c for c in children if c.isidentifier() and not c.startswith("test") and c not in NOT_LIBRARIES)
            names = sorted(n for n in names if n.endswith(".py") and not n.startswith("test"))
            jobs += [(root, Path(folder) / n) for n in names if Path(folder) != root or n.removesuffix(".py") not in NOT_LIBRARIES]
    return jobs


def read_docstrings() -> list[tuple[str, str, str]]:
    with ProcessPoolExecutor() as pool:
        return list(itertools.chain.from_iterable(pool.map(read_module, source_files(), chunksize=64)))


def key(text: str) -> str:
    """What two texts share when they differ in case, digits and punctuation only."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def held_out() -> tuple[set[str], set[str]]:
    """Modules, and sentence keys, of the embedded evaluation tasks."""
    modules, keys = set(), set()
    for path in sorted(TASKS.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for row in map(json.loads, f):
                modules.add(row["module"])
                keys.add(key(row["text"]))
    return modules, keys


def docstring_pairs(args) -> list[dict]:
    modules, keys = held_out()
    pairs, seen = [], set(keys)
    for module, sentence, prose in read_docstrings():
        if module in modules or not 4 <= len(sentence.split()) <= 40 or len(prose.split()) < 8:
            continue
        a, p = key(sentence), key(prose)
        if a in seen or p in seen or keys & {key(s) for s in re.split(r"(?<=[.!?])\s+", prose)}:
            continue
        seen |= {a, p}
        pairs.append({"anchor": sentence, "positive": prose, "engine": "docstrings", "source": module})
    random.Random(args.seed).shuffle(pairs)
    return pairs


def draw_tasks(args) -> None:
    """Two clustering tasks from docstrings' first sentences: by package (60 a cluster), by module (40 a cluster)."""
    rng = random.Random(0)
    sentences, owners = defaultdict(list), defaultdict(set)
    for module, sentence, _ in read_docstrings():
        if 5 <= len(sentence.split()) <= 40:
            owners[key(sentence)].add(module)
            if sentence not in sentences[module]:
                sentences[module].append(sentence)
    copies = {"narwhals", "multiprocess", "distutils", "hypothesis"}  # of other packages; or not a requirement
    unique = {m: [s for s in ss if len(owners[key(s)]) == 1] for m, ss in sorted(sentences.items())}
    packages = defaultdict(list)
    for module in unique:
        top = module.split(".")[0]
        if not top.startswith("_") and top not in copies:
            packages[top].append(module)
    by_module, taken = [], Counter()
    for module in rng.sample(sorted(unique), len(unique)):
        top = module.split(".")[0]
        if top in packages and len(unique[module]) >= 40 and taken[top] < 2 and len(by_module) < 24 and len(packages[top]) > 4:
            taken[top] += 1
            by_module.append(module)
    tasks = {"docstrings-by-module": [(s, m, m) for m in by_module for s in rng.sample(unique[m], 40)], "docstrings-by-package": []}
    for package, modules in sorted(packages.items()):
        rows = []
        for module in rng.sample(modules, len(modules)):
            if module not in by_module:
                rows += [(s, package, module) for s in rng.sample(unique[module], min(10, len(unique[module])))]
        if len(rows) >= 180:  # a third at most of what a package has is held out
            tasks["docstrings-by-package"] += rows[:60]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        text = "".join(json.dumps(dict(zip(("text", "label", "module"), row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        write_new(args.out / f"{name}.jsonl.gz", text.encode())
        print(f"{args.out / name}.jsonl.gz: {len(rows)} sentences, {len({label for _, label, _ in rows})} clusters")


# -------------------------------------------------------------------------------------------------- a user's own texts


def read_texts(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(source, text) of every row, through `datasets`. Raises InputError for what cannot be read."""
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    if not path.is_file():
        raise InputError(f"no file {path}")
    suffix = "".join(s for s in path.suffixes[-2:] if s != ".gz").lower().rpartition(".")[2]
    kinds = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    if suffix not in kinds:
        raise InputError(f"{path}: unknown kind of file, take one of .{', .'.join(kinds)} (txt, csv and jsonl may be gzipped)")
    options = {"encoding": "utf-8-sig"} if kinds[suffix] == "text" else {}
    try:
        if kinds[suffix] == "csv":  # "NA" is a text like others: nothing is guessed
            sep = "\t" if suffix == "tsv" else ","
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as f:
                header = next(csv.reader(f, delimiter=sep), [])
            options = {
                "sep": sep,
                "keep_default_na": False,
                "encoding": "utf-8-sig",
                "features": Features({c: Value("string") for c in header}),
            }
        rows = list(load_dataset(kinds[suffix], data_files=str(path), split="train", streaming=True, **options))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it first, for example with iconv -t utf-8") from None
    except (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration, zlib.error) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200] or 'it is empty'}") from None
    if not rows:
        raise InputError(f"{path} is empty")
    columns = list(rows[0])
    strings = [c for c in columns if any(isinstance(r.get(c), str) for r in rows[:100])]
    guess = next((c for c in TEXT_COLUMNS if c in strings), strings[0] if len(strings) == 1 else None)
    chosen = column or guess
    if chosen not in columns:
        raise InputError(f"{path}: no column {column or 'that is plainly the text'}; it has {', '.join(columns)}: name one with --column")
    texts = [(f"{path.name}:{i}", r[chosen].strip()) for i, r in enumerate(rows, 1) if isinstance(r.get(chosen), str) and r[chosen].strip()]
    if not texts:
        raise InputError(f"{path}: column {chosen} holds no text")
    told = "given" if column else "guessed"
    print(f"{path}: {len(texts)} texts in column {chosen!r} ({told}), {len(rows) - len(texts)} empty rows left out")
    return texts


def crop_pairs(args) -> list[dict]:
    """Two random spans of each document, each of 30 to 70 % of its words (Contriever, Izacard et al. 2022, arXiv 2112.09118)."""
    rng = random.Random(args.seed)
    pairs = []
    for source, text in read_texts(args.input, args.column):
        words = text.split()
        if len(words) < args.min_words:
            continue
        spans = []
        for _ in range(2):
            n = max(1, round(len(words) * rng.uniform(0.3, 0.7)))
            at = rng.randint(0, len(words) - n)
            spans.append(" ".join(words[at : at + n]))
        if spans[0] != spans[1]:
            pairs.append({"anchor": spans[0], "positive": spans[1], "engine": "crop", "source": source})
    return pairs


def damage(text: str, rng: random.Random, delete: float, swap: float, chars: float) -> str:
    """Words left out, neighbouring words swapped, neighbouring letters swapped, each with its own probability a word."""
    words = text.split()
    kept = [w for w in words if rng.random() >= delete] or words[:1]
    for i in range(len(kept) - 1):
        if rng.random() < swap:
            kept[i], kept[i + 1] = kept[i + 1], kept[i]
    for i, word in enumerate(kept):
        if len(word) > 3 and rng.random() < chars:
            at = rng.randint(1, len(word) - 3)
            kept[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(kept)


def noise_pairs(args) -> list[dict]:
    rng = random.Random(args.seed)
    pairs = []
    for source, text in read_texts(args.input, args.column):
        positive = damage(text, rng, args.delete, args.swap, args.chars)
        if positive != " ".join(text.split()):
            pairs.append({"anchor": text, "positive": positive, "engine": "noise", "source": source})
    return pairs


# ------------------------------------------------------------------------------------------------------------- writer


def llm_pairs(args) -> list[dict]:
    """A chat model rewrites each text once, by a template drawn for it. Every finished batch is kept in OUT.partial."""
    from tqdm import tqdm

    texts = read_texts(args.input, args.column)[: args.limit]
    rng = random.Random(args.seed)
    jobs = [(source, text, rng.choice(sorted(args.templates))) for source, text in texts]
    names = ("writer", "seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "templates")
    settings = {"settings": {n: getattr(args, n) for n in names}, "texts": hashlib.sha256(repr(texts).encode()).hexdigest()}
    partial = args.out.with_name(args.out.name + ".partial")
    done = read_partial(partial, settings)
    if done:
        print(f"{partial}: {len(done)} of {len(jobs)} texts are written already, going on from there")
    write = None if len(done) == len(jobs) else load_writer(args)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as f:
        if not done and not f.tell():
            f.write(json.dumps(settings) + "\n")
        for at in tqdm(range(len(done), len(jobs), args.batch_size), desc="writing", unit="batch", file=sys.stderr):
            batch = jobs[at : at + args.batch_size]
            for (source, text, template), positive in zip(batch, write(batch, args.seed + at), strict=True):
                row = {"anchor": text, "positive": positive, "engine": "llm", "source": source, "template": template}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                done.append(row)
            f.flush()
    pairs = [r for r in done if r["positive"] and key(r["positive"]) != key(r["anchor"])]
    print(f"{len(done) - len(pairs)} answers were empty or repeated the text and are left out")
    return pairs


def read_partial(partial: Path, settings: dict) -> list[dict]:
    """Rows of an interrupted job; a line cut short by the interruption is taken out of the file."""
    if not partial.exists():
        return []
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")
    whole = lines[:-1]  # what follows the last newline is cut short, or empty
    if whole and json.loads(whole[0]) != settings:
        raise InputError(f"{partial} is from a job with other texts or settings: repeat that one, or delete the file")
    partial.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return [json.loads(line) for line in whole[1:]]


def load_writer(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from encoder import hub_answers

    local = {"local_files_only": not (Path(args.writer).is_dir() or hub_answers())}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.writer, padding_side="left", **local)
        model = AutoModelForCausalLM.from_pretrained(args.writer, dtype=dtype, use_safetensors=True, **local).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the writer {args.writer!r}: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        print(f"{args.writer} has no chat template: it is given the bare instruction", file=sys.stderr)

    def write(jobs: list[tuple[str, str, str]], seed: int) -> list[str]:
        asked = [TEMPLATES[template].format(text=text) for _, text, template in jobs]
        if tokenizer.chat_template:
            chats = [[{"role": "user", "content": a}] for a in asked]
            asked = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template).to(device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        sampling = {"do_sample": args.temperature > 0, "repetition_penalty": args.repetition_penalty}
        if args.temperature > 0:
            sampling |= {"temperature": args.temperature, "top_p": args.top_p}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
        return [t.strip() for t in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    return write


# ------------------------------------------------------------------------------------------------------ hard negatives


def mined_pairs(args) -> list[dict]:
    """To each pair the texts of a corpus that the model takes for the positive, and that most likely are none.

    Never taken: the anchor's own text, any positive of an anchor of the same text, and whatever comes closer than `--below`
    times the positive's cosine, as it may well be right (TopK-PercPos: de Souza Moreira et al. 2024, arXiv 2407.15831).
    """
    import torch
    import torch.nn.functional as F

    from encoder import Encoder

    pairs = read_pairs(args.pairs)[: args.limit]
    found = [text for _, text in read_texts(args.corpus, args.column)] if args.corpus else [p["positive"] for p in pairs]
    corpus = list(dict.fromkeys(found))
    at = {text: i for i, text in enumerate(corpus)}
    own = defaultdict(set)  # anchor -> corpus texts that are no negatives of it
    for pair in pairs:
        own[pair["anchor"]] |= {at[t] for t in (pair["anchor"], pair["positive"]) if t in at}
    encoder = Encoder.load(args.model, dtype=args.dtype, device=args.device)
    encoder.merge()

    def embed(texts: list[str], role: str):
        return F.normalize(torch.from_numpy(encoder.encode(texts, role, progress=sys.stderr.isatty())).to(encoder.device), dim=-1)

    anchors, positives = embed([p["anchor"] for p in pairs], "query"), embed([p["positive"] for p in pairs], "document")
    candidates = embed(corpus, "document")
    right = (anchors * positives).sum(1)
    n, block = min(args.negatives, len(corpus)), max(1, 2**26 // len(corpus))  # a block's similarities take 256 MiB
    for start in range(0, len(pairs), block):
        rows = pairs[start : start + block]
        similarity = anchors[start : start + block] @ candidates.T
        similarity[similarity > args.below * right[start : start + block, None]] = -torch.inf
        for i, pair in enumerate(rows):
            similarity[i, list(own[pair["anchor"]])] = -torch.inf
        best, index = (x.tolist() for x in similarity.topk(n, dim=1))
        for i, pair in enumerate(rows):
            taken = [(corpus[j], score) for j, score in zip(index[i], best[i], strict=True) if score > -1.5]
            pair["negatives"] = [text for text, _ in taken]
            pair["scores"] = [round(score, 4) for score in (right[start + i].item(), *(score for _, score in taken))]
    for line in encoder.warnings():
        print(f"warning: {line}", file=sys.stderr)
    short = sum(len(pair["negatives"]) < args.negatives for pair in pairs)
    print(f"{len(corpus)} candidates, fingerprint {encoder.fingerprint}; {short} of {len(pairs)} pairs got fewer than {args.negatives}")
    return pairs


def read_pairs(path: Path) -> list[dict]:
    """The rows of a file of pairs, which may be gzipped. Raises InputError with the line."""
    if not path.is_file():
        raise InputError(f"no file {path}: make pairs with another engine first")
    rows, lines = [], 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            for line in f:
                lines += 1
                if line.strip():
                    rows.append(json.loads(line))
                    if not all(isinstance(rows[-1].get(name), str) for name in ("anchor", "positive")):
                        raise ValueError("needs the texts 'anchor' and 'positive'")
    except (ValueError, AttributeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}, line {lines}: {' '.join(str(error).split())[:150]}") from None
    if not rows:
        raise InputError(f"{path} holds no pairs")
    return rows


# --------------------------------------------------------------------------------------------------------------- main


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, complete or not at all; gzipped where its name says so."""
    if path.exists():
        raise InputError(f"{path} exists already: choose another --out, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    engines = parser.add_subparsers(dest="engine", required=True, metavar="ENGINE")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    common.add_argument("--limit", type=positive, help="at most this many pairs (default: all)")
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--input", type=Path, required=True, help="txt, csv, tsv, jsonl (also .gz) or parquet")
    own.add_argument("--column", help="the column with the text (default: guessed, and printed)")
    own.add_argument("--out", type=Path, required=True, help="the JSONL file to write")

    docs = engines.add_parser("docstrings", parents=[common], help="a docstring's first sentence and the prose after it")
    docs.add_argument("--out", type=Path, default=HERE / "pairs" / "docstrings.jsonl", help="default pairs/docstrings.jsonl")
    crop = engines.add_parser("crop", parents=[common, own], help="two spans of one document")
    crop.add_argument("--min-words", type=positive, default=8, help="shorter documents are left out (default 8)")
    noise = engines.add_parser("noise", parents=[common, own], help="a text and its damaged copy")
    for name, what in (("delete", "leaving a word out"), ("swap", "swapping two words"), ("chars", "swapping two letters of a word")):
        noise.add_argument(f"--{name}", type=probability, default=0.1, help=f"probability of {what} (default 0.1)")
    llm = engines.add_parser("llm", parents=[common, own], help="a local chat model rewrites each text")
    llm.add_argument("--writer", required=True, help="hub id or folder of the chat model")
    llm.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES), help="default: all five")
    llm.add_argument("--batch-size", type=positive, default=8, help="texts a batch (default 8)")
    llm.add_argument("--max-new-tokens", type=positive, default=100, help="length of an answer (default 100)")
    llm.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default 0.6)")
    llm.add_argument("--top-p", type=float, default=0.9, help="nucleus sampling (default 0.9)")
    llm.add_argument("--repetition-penalty", type=float, default=1.0, help="default 1.0")
    mine = engines.add_parser("mine", help="hard negatives for pairs, by a model's own mistakes")
    mine.add_argument("--pairs", type=Path, required=True, help="JSONL of another engine, also .gz")
    mine.add_argument("--model", default="tiny", help="a run, a preset, a folder or a hub id: best the run trained so far (default tiny)")
    mine.add_argument("--corpus", type=Path, help="where negatives are looked for: txt, csv, jsonl, ... (default: the positives)")
    mine.add_argument("--column", help="the corpus's column with the text (default: guessed, and printed)")
    mine.add_argument("--negatives", type=positive, default=4, help="of each pair (default 4)")
    mine.add_argument("--below", type=probability, default=0.95, help="largest share of the positive's cosine (default 0.95)")
    mine.add_argument("--limit", type=positive, help="at most this many pairs (default: all)")
    mine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 (default auto)")
    mine.add_argument("--device", help="default cuda where there is one, else cpu")
    mine.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    tasks = engines.add_parser("tasks", help="draw the embedded evaluation tasks anew (they are frozen: for the record)")
    tasks.add_argument("--out", type=Path, required=True, help="a folder")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.engine == "tasks":
        draw_tasks(args)
        return
    if args.out.exists():
        raise InputError(f"{args.out} exists already: choose another --out, or delete it first")
    make = {"docstrings": docstring_pairs, "crop": crop_pairs, "noise": noise_pairs, "llm": llm_pairs, "mine": mined_pairs}[args.engine]
    pairs = make(args)[: args.limit]
    if not pairs:
        raise InputError("no pair came out: the texts are too short or too few")
    write_new(args.out, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs).encode())
    args.out.with_name(args.out.name + ".partial").unlink(missing_ok=True)
    print(f"{args.out}: {len(pairs)} pairs, for example")
    for p in pairs[:2]:
        print(f"  {p['anchor'][:90]!r}\n  {p['positive'][:90]!r}")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except (InputError, OSError) as error:
        print(f"make_pairs.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
