"""Make positive pairs: two texts that mean the same thing, for contrastive training.

    python make_pairs.py docstrings                                  # from the packages installed here, offline, a minute
    python make_pairs.py crop --input texts.csv --out pairs/mine.jsonl       # two spans of each document
    python make_pairs.py noise --input texts.txt --out pairs/mine.jsonl      # a text and its damaged copy
    python make_pairs.py llm --input texts.csv --chat-model Qwen/Qwen3-4B --out pairs/mine.jsonl    # a chat model rewrites
    python make_pairs.py mine --pairs pairs/mine.jsonl --model runs/mine --out pairs/hard.jsonl # hard negatives for pairs

Leaves behind one JSONL file with a pair a line:

    {"anchor": str, "positive": str, "engine": "docstrings" | "crop" | "noise" | "llm",
     "source": module or FILE:ROW that the anchor comes from, "template": name of the instruction ("llm" only)}

`mine` adds {"negatives": [str], "scores": cosines of the anchor to the positive and to each of the negatives}.

--input and --corpus take txt (a text a line), csv, tsv, jsonl or json, each also gzipped, parquet, or `-` for standard input: JSONL
where it begins with {, csv where its first line names a known column, else a text a line. --pairs takes the same, with columns
anchor,positive and perhaps negative. Of a text, crop and noise take the first 2,048 words; in scripts without spaces a character is a word.

Docstrings are read from the source files; no code is imported or run. The modules behind the bundled evaluation tasks
(`tasks/*.jsonl.gz`) are left out, and so is any docstring that shares a sentence with them.
"""

import argparse
import hashlib
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from files.console import InputError, Progress, run_script, say, warn
from files.docstrings import SENTENCE_END, bundled_task_files, normalized_key, read_excluded, read_library
from files.reading import display_name, left_out, read_texts
from files.writing import check_absent, write_new, write_text

HERE = Path(__file__).resolve().parent

# The five ways to rewrite of Roth et al. 2025 (arXiv 2507.22729, section on synthetic positives); the wording is ours.
TEMPLATES = {
    "detail": "Write this text again with more detail and the same meaning. Answer with the new text only.\n\n{text}",
    "simple": "Say the same thing as this text in simpler words. Answer with the new text only.\n\n{text}",
    "student": "You teach at a school. Explain this text to a student in your own words. Answer with the explanation only.\n\n{text}",
    "metaphor": "Find a metaphor that carries the idea of this text. Answer with the metaphor only.\n\n{text}",
    "question": "Which question would come to somebody who has just read this text? Answer with the question only.\n\n{text}",
}
# A resumed rewriting job must have been started with the same values of these.
REWRITING_SETTINGS = ("chat_model", "seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "templates")
MAX_WORDS = 2048  # of a text that crop and noise take: models cut at 512 tokens by default, and a word is seldom less than one
# Scripts written without spaces, and emoji: Thai to Myanmar, Khmer, symbols, CJK and kana, more Myanmar, fullwidth forms, pictographs
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2600-\u27bf\u2e80-\u312f\u31a0-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff00-\uff9f"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff]"
)
INVISIBLE = re.compile("[\u200b-\u200d\ufe00-\ufe0f]")
JOINS_NEXT = "\u200d\u1039\u17d2"  # the joiner of emoji, and the signs that stack consonants
FLAG_LETTER = re.compile("[\U0001f1e6-\U0001f1ff]")  # two make a flag
SIMILARITIES_AT_ONCE = 2**26  # entries of the similarity matrix of one step of mining: 256 MiB in float32

Rewrite = Callable[[list[tuple[str, str, str]], int], list[str]]  # jobs (source, text, template) and a seed -> the new texts


# ------------------------------------------------------------------------------------------------------------ docstrings


def docstring_pairs(args: argparse.Namespace) -> list[dict]:
    """A docstring's first sentence (4 to 40 words) and the prose after it (8 words or more), each text used only once."""
    excluded = read_excluded(bundled_task_files())
    pairs, seen = [], set(excluded.keys)
    for module, sentence, prose in read_library():
        if module in excluded.modules or not 4 <= len(sentence.split()) <= 40 or len(prose.split()) < 8:
            continue
        anchor, positive = normalized_key(sentence), normalized_key(prose)
        if anchor in seen or positive in seen or excluded.keys & {normalized_key(s) for s in SENTENCE_END.split(prose)}:
            continue
        seen |= {anchor, positive}
        pairs.append({"anchor": sentence, "positive": prose, "engine": "docstrings", "source": module})
    random.Random(args.seed).shuffle(pairs)
    return pairs


# ---------------------------------------------------------------------------------------------------- crops and noise


def read_input(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(source, text) of each row with a text; prints which column was taken."""
    texts, summary = read_texts(path, column)
    say(summary)
    return texts


def split_words(text: str) -> tuple[list[str], str]:
    """The words of a text, and what joins them again: a space.

    Where most characters belong to scripts without spaces, these characters are the words (a combining mark, and what a joiner
    connects, stay with theirs), and so is each run of other characters. A word then keeps the space before it, and "" joins them.
    """
    words = text.split()
    visible = INVISIBLE.sub("", "".join(words))
    if 2 * len(UNSPACED.sub("", visible)) >= len(visible):
        return words, " "
    units = []
    for c in " ".join(words):
        if units and c != " " and (units[-1] == " " or is_joined(units[-1], c)):
            units[-1] += c
        elif len(units) > MAX_WORDS:  # of no more use
            break
        else:
            units.append(c)
    return units, ""


def is_joined(unit: str, c: str) -> bool:
    """Whether a character belongs to the unit before it."""
    if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= c <= "\U0001f3ff" or unit[-1] in JOINS_NEXT:
        return True  # marks, invisible characters, skin tones
    if UNSPACED.match(c):
        return bool(FLAG_LETTER.match(c) and FLAG_LETTER.fullmatch(unit.strip()))
    return not UNSPACED.search(unit[:2])  # it may begin with a space


def read_words(args: argparse.Namespace, reasons: Counter[str]) -> Iterator[tuple[str, str, list[str], str]]:
    """Source, text, and its words with what joins them, see `split_words`, of each row with a text; at most `MAX_WORDS` words.

    At the end prints how many texts were cut, and how many the caller has left out for the reasons that it counted.
    Raises InputError where all were left out.
    """
    texts, n_cut = read_input(args.input, args.column), 0
    for source, text in texts:
        words, space = split_words(text)
        if len(words) > MAX_WORDS:
            words, n_cut = words[:MAX_WORDS], n_cut + 1
            text = space.join(words)
        yield source, text, words, space
    if n_cut:
        say(f"{n_cut} of {len(texts)} texts cut to their first {MAX_WORDS:,} words")
    if reasons.total() == len(texts):
        raise InputError(f"{display_name(args.input)}: no pairs were made, {left_out('text', reasons)}")
    if reasons:
        say(left_out("text", reasons))


def crop_pairs(args: argparse.Namespace) -> list[dict]:
    """Two random spans of each document, each of 30 to 70 % of its words (Contriever, Izacard et al. 2022, arXiv 2112.09118)."""
    rng, reasons = random.Random(args.seed), Counter()
    pairs = []
    for source, _, words, space in read_words(args, reasons):
        if len(words) < args.min_words:
            reasons[f"of fewer than {args.min_words} words (--min-words)"] += 1
            continue
        spans = []
        for _ in range(2):
            length = max(1, round(len(words) * rng.uniform(0.3, 0.7)))
            start = rng.randint(0, len(words) - length)
            spans.append(space.join(words[start : start + length]).strip())
        if spans[0] != spans[1]:
            pairs.append({"anchor": spans[0], "positive": spans[1], "engine": "crop", "source": source})
        else:
            reasons["whose two spans are equal"] += 1
    return pairs


def damage(text: str, rng: random.Random, delete: float, swap: float, chars: float) -> str:
    """The text with words deleted, neighbouring words swapped, and neighbouring letters within a word swapped.

    delete, swap, chars     probability of each, for each word
    The first and the last letter of a word stay where they are. At least one word is left.
    """
    words, space = split_words(text)
    kept = [word for word in words if rng.random() >= delete] or words[:1]
    for i in range(len(kept) - 1):
        if rng.random() < swap:
            kept[i], kept[i + 1] = kept[i + 1], kept[i]
    for i, word in enumerate(kept):
        if not space and UNSPACED.search(word):  # one character, though of several codes
            continue
        first = int(word.startswith(" "))
        if len(word) > 3 + first and rng.random() < chars:
            at = rng.randint(first + 1, len(word) - 3)
            kept[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return space.join(kept).strip()


def noise_pairs(args: argparse.Namespace) -> list[dict]:
    """Each text and its damaged copy; texts that no damage has changed are left out."""
    rng, reasons = random.Random(args.seed), Counter()
    pairs = []
    for source, text, words, space in read_words(args, reasons):
        damaged = damage(text, rng, args.delete, args.swap, args.chars)
        if damaged != space.join(words):
            pairs.append({"anchor": text, "positive": damaged, "engine": "noise", "source": source})
        else:
            reasons["that the damage did not change"] += 1
    return pairs


# ------------------------------------------------------------------------------------------------ rewriting by a chat model


def llm_pairs(args: argparse.Namespace) -> list[dict]:
    """A chat model rewrites each text once, following a template drawn at random for it.

    Each finished batch is appended to OUT.partial at once, so that an interrupted job continues where it stopped.
    """
    texts = read_input(args.input, args.column)[: args.limit]
    rng = random.Random(args.seed)
    jobs = [(source, text, rng.choice(sorted(args.templates))) for source, text in texts]
    settings = {name: getattr(args, name) for name in REWRITING_SETTINGS}
    header = {"settings": settings, "texts": hashlib.sha256(repr(texts).encode()).hexdigest()}
    partial = partial_file(args.out)
    rows = read_partial(partial, header)
    if rows:
        say(f"{partial}: continuing, {len(rows)} of {len(jobs)} texts are already rewritten")
    if len(rows) < len(jobs):
        rows += rewrite_rest(jobs, len(rows), partial, header, args)
    pairs = [row for row in rows if row["positive"] and normalized_key(row["positive"]) != normalized_key(row["anchor"])]
    say(f"{len(rows) - len(pairs)} answers were empty or repeated the text: left out")
    return pairs


def rewrite_rest(jobs: list[tuple[str, str, str]], n_done: int, partial: Path, header: dict, args: argparse.Namespace) -> list[dict]:
    """Rows of the jobs from number `n_done` on, each batch appended to the partial file as soon as it is finished."""
    rewrite = load_chat_model(args)
    rows = []
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as f, Progress(len(jobs), "rewriting", "text", initial=n_done) as progress:
        if not f.tell():
            f.write(json.dumps(header) + "\n")
        for start in range(n_done, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            for (source, text, template), answer in zip(batch, rewrite(batch, args.seed + start), strict=True):
                rows.append({"anchor": text, "positive": answer, "engine": "llm", "source": source, "template": template})
                f.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            f.flush()
            progress.update(len(batch))
    return rows


def partial_file(out: Path) -> Path:
    """Where the rows of an unfinished rewriting job are kept."""
    return out.with_name(out.name + ".partial")


def read_partial(partial: Path, header: dict) -> list[dict]:
    """Rows of an interrupted job; a last line that the interruption cut short is removed from the file.

    Raises InputError where the file's header is another one: other texts or settings.
    """
    if not partial.exists():
        return []
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")
    complete = lines[:-1]  # what follows the last newline is empty or cut short
    if complete and json.loads(complete[0]) != header:
        raise InputError(f"{partial} is from a job with other texts or settings: run that job again, or delete the file")
    write_text(partial, "".join(line + "\n" for line in complete))
    return [json.loads(line) for line in complete[1:]]


def load_chat_model(args: argparse.Namespace) -> Rewrite:
    """A function from a batch of jobs and a seed to the model's answers. Raises InputError where the model cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from encoder.base_models import hub_answers

    name = args.chat_model
    local = {"local_files_only": not (Path(name).is_dir() or hub_answers())}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **local)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **local).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the chat model {name!r}: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        warn(f"{name} has no chat template: it is given the instruction as plain text")

    def rewrite(jobs: list[tuple[str, str, str]], seed: int) -> list[str]:
        prompts = [TEMPLATES[template].format(text=text) for _, text, template in jobs]
        if tokenizer.chat_template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        # a chat template writes the special tokens itself
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template).to(device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        sampling = {"do_sample": args.temperature > 0, "repetition_penalty": args.repetition_penalty}
        if args.temperature > 0:
            sampling |= {"temperature": args.temperature, "top_p": args.top_p}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    return rewrite


# --------------------------------------------------------------------------------------------------------- hard negatives


def mined_pairs(args: argparse.Namespace) -> list[dict]:
    """The pairs with hard negatives: for each anchor the most similar texts of a corpus that are probably wrong answers.

    Never taken are the anchor's text itself, the positives of all anchors with that text, and any text whose cosine to the
    anchor is above `--below` times the positive's cosine, because it may be a right answer
    (TopK-PercPos: de Souza Moreira et al. 2024, arXiv 2407.15831).
    """
    import torch
    import torch.nn.functional as F

    from encoder import Encoder, EncodingReport
    from training.pair_data import read_pair_rows

    pairs = [row for _, row in read_pair_rows(args.pairs)][: args.limit]
    candidates = [text for _, text in read_input(args.corpus, args.column)] if args.corpus else [pair["positive"] for pair in pairs]
    corpus = list(dict.fromkeys(candidates))
    encoder, report = Encoder.load(args.model, dtype=args.dtype, device=args.device), EncodingReport()
    encoder.merge()

    def embed(texts: list[str], role: str) -> torch.Tensor:
        vectors = encoder.encode(texts, role, progress=True, report=report)
        return F.normalize(torch.from_numpy(vectors).to(encoder.device), dim=-1)  # (N, D)

    anchors = embed([pair["anchor"] for pair in pairs], "query")
    positives = embed([pair["positive"] for pair in pairs], "document")
    add_negatives(pairs, anchors, positives, corpus, embed(corpus, "document"), args.negatives, args.below)
    for line in [*encoder.notes, *report.warnings()]:
        warn(line)
    n_short = sum(len(pair["negatives"]) < args.negatives for pair in pairs)
    say(
        f"{len(corpus)} candidates, fingerprint {encoder.fingerprint}; "
        f"{n_short} of {len(pairs)} pairs have fewer than {args.negatives} negatives"
    )
    return pairs


def add_negatives(pairs: list[dict], anchors, positives, corpus: list[str], candidates, n_negatives: int, below: float) -> None:
    """Write "negatives" and "scores" into each pair.

    anchors, positives   (N, D) unit vectors of the pairs' texts
    candidates           (C, D) unit vectors of the texts of `corpus`
    """
    import torch

    number_of = {text: i for i, text in enumerate(corpus)}
    not_negative = defaultdict(set)  # anchor text -> numbers of the corpus texts that are right answers to it
    for pair in pairs:
        not_negative[pair["anchor"]] |= {number_of[text] for text in (pair["anchor"], pair["positive"]) if text in number_of}
    positive_cosines = (anchors * positives).sum(1)  # (N,)
    n_best, step = min(n_negatives, len(corpus)), max(1, SIMILARITIES_AT_ONCE // len(corpus))
    for start in range(0, len(pairs), step):
        rows = slice(start, start + step)
        similarity = anchors[rows] @ candidates.T  # (rows, C)
        similarity[similarity > below * positive_cosines[rows, None]] = -torch.inf
        for i, pair in enumerate(pairs[rows]):
            similarity[i, list(not_negative[pair["anchor"]])] = -torch.inf
        best, numbers = (x.tolist() for x in similarity.topk(n_best, dim=1))
        for i, pair in enumerate(pairs[rows]):
            negatives = [(corpus[n], cosine) for n, cosine in zip(numbers[i], best[i], strict=True) if cosine > -torch.inf]
            pair["negatives"] = [text for text, _ in negatives]
            pair["scores"] = [round(cosine, 4) for cosine in (positive_cosines[start + i].item(), *(c for _, c in negatives))]


# ------------------------------------------------------------------------------------------------------------------ main

ENGINES = {"docstrings": docstring_pairs, "crop": crop_pairs, "noise": noise_pairs, "llm": llm_pairs, "mine": mined_pairs}


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    engines = parser.add_subparsers(dest="engine", required=True, metavar="ENGINE", help="how the pairs are made:")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="seed of all random choices (default 0)")
    common.add_argument("--limit", type=positive_int, help="make at most this many pairs (default: all)")
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument(
        "--input", type=Path, required=True, help="file of texts: txt, csv, tsv, jsonl (also .gz), parquet, or - for standard input"
    )
    table.add_argument("--column", help="column that holds the text (default: guessed, and printed)")
    table.add_argument("--out", type=Path, required=True, help="JSONL file to write")

    docs = engines.add_parser("docstrings", parents=[common], help="a docstring's first sentence and the prose after it")
    docs.add_argument(
        "--out", type=Path, default=HERE / "pairs" / "docstrings.jsonl", help="JSONL file to write (default pairs/docstrings.jsonl)"
    )
    crop = engines.add_parser("crop", parents=[common, table], help="two spans of one document")
    crop.add_argument("--min-words", type=positive_int, default=8, help="leave documents of fewer words out (default 8)")
    noise = engines.add_parser("noise", parents=[common, table], help="a text and its damaged copy")
    for name, what in (
        ("delete", "deleting a word"),
        ("swap", "swapping a word with the next"),
        ("chars", "swapping two letters of a word"),
    ):
        noise.add_argument(f"--{name}", type=probability, default=0.1, help=f"probability of {what} (default 0.1)")
    llm = engines.add_parser("llm", parents=[common, table], help="a local chat model rewrites each text")
    llm.add_argument("--chat-model", required=True, help="hub id or folder of the chat model")
    llm.add_argument(
        "--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES), help="instructions to draw from (default: all five)"
    )
    llm.add_argument("--batch-size", type=positive_int, default=8, help="texts in a batch (default 8)")
    llm.add_argument("--max-new-tokens", type=positive_int, default=100, help="longest answer, in tokens (default 100)")
    llm.add_argument("--temperature", type=float, default=0.6, help="sampling temperature; 0 takes the likeliest token (default 0.6)")
    llm.add_argument("--top-p", type=float, default=0.9, help="share of the probability mass to sample from (default 0.9)")
    llm.add_argument("--repetition-penalty", type=float, default=1.0, help="penalty on repeated tokens; 1 is none (default 1.0)")
    mine = engines.add_parser("mine", help="hard negatives for pairs, chosen by a model's own mistakes")
    mine.add_argument("--pairs", type=Path, required=True, help="file of pairs, such as another engine's")
    mine.add_argument(
        "--model", default="tiny", help="run, preset, folder or hub id; the run trained so far is best (default tiny, the bundled model)"
    )
    mine.add_argument(
        "--corpus", type=Path, help="file to take negatives from, of the kinds that --input takes elsewhere (default: the positives)"
    )
    mine.add_argument("--column", help="column of --corpus that holds the text (default: guessed, and printed)")
    mine.add_argument("--negatives", type=positive_int, default=4, help="negatives of each pair (default 4)")
    mine.add_argument(
        "--below", type=probability, default=0.95, help="largest cosine of a negative, as a share of the positive's (default 0.95)"
    )
    mine.add_argument("--limit", type=positive_int, help="use at most this many pairs (default: all)")
    mine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: bfloat16 where it is fast)")
    mine.add_argument("--device", help="device of the model (default: cuda where there is one, else cpu)")
    mine.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    return parser


def main(args: argparse.Namespace) -> None:
    check_absent(args.out)
    if not args.out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out {args.out}: pairs are written as JSONL, take a name that ends in .jsonl or .jsonl.gz")
    pairs = ENGINES[args.engine](args)[: args.limit]
    if not pairs:
        why = "every answer was empty or repeated its text" if args.engine == "llm" else "no docstring has two sentences that fit"
        raise InputError(f"no pairs were made: {why}")
    lines = (json.dumps(pair, ensure_ascii=False, default=str) + "\n" for pair in pairs)
    write_new(args.out, "".join(lines).encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON's escape
    partial_file(args.out).unlink(missing_ok=True)
    say(f"{args.out}: {len(pairs)} pairs, for example")
    for pair in pairs[:2]:
        say(f"  {pair['anchor'][:90]!r}\n  {pair['positive'][:90]!r}")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
