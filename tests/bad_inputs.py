"""What evaluate.py says to input that it cannot use, or not well: one line and an exit status each.

python tests/bad_inputs.py    # prints the table of bench/README.md
"""

import contextlib
import gzip
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

GOOD = "text,label\n" + "".join(f"the {word} number {i},{word}\n" for i in range(20) for word in ("cat", "bank", "road"))
CORPUS, QUERIES = '{"_id": "d1", "text": "a"}\n', '{"_id": "q1", "text": "a"}\n'

# name -> content of files that the cases name; a dict is a folder, None an empty one
FILES = {
    "good.csv": GOOD,
    "empty.csv": "",
    "header.csv": "text,label\n",
    "columns.csv": "title,topic\na,b\n",
    "binary.csv": b"text,label\n\x00\x01\x02,a\n",
    "latin.csv": "text,label\ncaf\xe9,a\n".encode("latin-1"),
    "utf16.csv": GOOD.encode("utf-16"),
    "short.csv": "text,label\na,x\nb\n",
    "quote.csv": 'text,label\na,x\n"b,y\n',
    "twice.csv": "text,text,label\na,b,c\n",
    "one-label.csv": "text,label\na,x\nb,x\n",
    "all-labels.csv": "text,label\na,x\nb,y\n",
    "no-label.csv": "text,label\na,x\nb,\n",
    "nan.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n',
    "number.jsonl": '{"text": 1, "label": "x"}\n',
    "not.jsonl": '{"text": "a"\n',
    "list.json": "[1, 2]",
    "copies.csv": "text,label\n" + "a cat sat,x\nat the bank,y\n" * 30,
    "damaged-model": {"config.json": (ROOT / "models/tiny/config.json").read_text(), "model.safetensors": "damaged"},
    "sts.csv": "text1,text2,score\n" + "".join(f"a {i},b {i},{i % 5}\n" for i in range(60)),
    "score.csv": "text1,text2,score\na,b,1\nc,d,high\n",
    "same-scores.csv": "text1,text2,score\na,b,1\nc,d,1\n",
    "damaged.parquet": b"PAR1 and no more",
    "damaged.csv.gz": gzip.compress(GOOD.encode())[:40],
    "kind.xlsx": b"PK",
    "folder": None,
    "search": {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": '{"_id": "q1", "text": "a"}\n',
        "qrels.tsv": "query-id\tcorpus-id\tscore\nq1\td9\t1\n",
    },
    "search-half": {"corpus.jsonl": CORPUS, "queries.jsonl": '{"_id": "q1", "text": "a"}\n'},
    "few.txt": "one text\nanother text\n",
    "no-model": {"readme.txt": "nothing"},
    "bad-config": {"config.json": "{"},
    "encoder": {"config.json": json.dumps({"model_type": "bert"})},
    "no-weights": {"config.json": (ROOT / "models/tiny/config.json").read_text()},
    "bad-run": {"embedding.json": "{}"},
    "r.json.partial": "something else\n",
    "locked": None,
}

# flags (with --model tiny where they name none), what the answer says, the exit status where it is not 2
CASES = [
    # data
    ("--data no.csv", "no file or folder no.csv"),
    ("--data folder", "folder has no corpus.jsonl: a retrieval task needs corpus.jsonl, queries.jsonl and qrels.tsv"),
    ("--data kind.xlsx", "kind.xlsx: unknown kind of file, take one of"),
    ("--data empty.csv", "empty.csv is empty"),
    ("--data header.csv", "header.csv is empty below its first line"),
    ("--data columns.csv", "columns.csv: needs columns text,label or text1,text2,score; it has title, topic"),
    ("--data binary.csv", "binary.csv, line 2: holds a NUL byte"),
    ("--data latin.csv", "latin.csv is not UTF-8 (line 2)"),
    ("--data utf16.csv", "utf16.csv, line 1: holds a NUL byte: is this UTF-16, or no text?"),
    ("--data short.csv", "short.csv, line 3: has 1 of the header's 2 cells"),
    ("--data quote.csv", "quote.csv, line 3: a quote in this row is never closed"),
    ("--data twice.csv", "twice.csv, line 1: two columns are called text"),
    ("--data one-label.csv", "one-label.csv: one class only ('x'), there is nothing to tell apart"),
    ("--data all-labels.csv", "all-labels.csv: 2 texts have 2 labels, there is nothing to group"),
    ("--data all-labels.csv --task classification", "all-labels.csv: every class has one row only"),
    ("--data no-label.csv", "no-label.csv, line 3: label is empty"),
    ("--data nan.jsonl", "nan.jsonl, line 2: label is nan"),
    ("--data number.jsonl", "number.jsonl, line 1: text is a number, not a string"),
    ("--data not.jsonl", "not.jsonl, line 1: not JSON"),
    ("--data list.json", "list.json, row 1: needs a JSON object, has 1"),
    ("--data score.csv", "score.csv, line 3: score is 'high', which is not a number"),
    ("--data same-scores.csv", "same-scores.csv: all scores are 1.0, there is nothing to correlate with"),
    ("--data damaged.parquet", "damaged.parquet is damaged, or no parquet file"),
    ("--data damaged.csv.gz", "damaged.csv.gz is damaged, or no gzip file"),
    ("--data search", "qrels.tsv, line 2: query 'q1' or document 'd9' is not in the other files"),
    ("--data search-half", "search-half has no qrels.tsv"),
    ("--data good.csv good.csv", "two --data files make a Clustering task called 'good': rename one"),
    ("--data copies.csv", "warning: copies.csv: 58 of 60 texts are copies of others", 0),
    ("--data good.csv --task sts", "good.csv: columns text,label, data for Clustering or Classification, --task asks for STS"),
    ("--data good.csv --task STS12", "--data is scored by its columns, --task 'STS12' names another task"),
    # tasks
    ("--task no-such", "--task: 'no-such' not found"),
    ("--benchmark no-such", "--benchmark: 'no-such' not found"),
    ("--task sts", "the data of STS of MTEB(eng, v2) is not available (no network, nothing in the cache)"),
    ("--bundled --task sts", "--bundled runs clustering tasks: leave --task out beside it"),
    ("--bundled --data good.csv", "--data and --bundled are scored in tables of their own"),
    ("--data good.csv --benchmark", "--benchmark concerns mteb's tasks, not --data"),
    ("--data good.csv --results kept", "--results concerns mteb's tasks, not --data"),
    ("--bundled --prefetch", "--prefetch concerns mteb's tasks, not --bundled"),
    ("--task sts --prefetch --out r2.json", "--prefetch scores nothing that --out could hold"),
    ("--paper --task sts", "--paper has its own tasks, prompts and pooling: leave --task out"),
    ("--task STS12 --prefetch", "could not be computed:\n  STS12: mteb/sts12-sts: it is not in this machine's cache", 1),
    ("--paper --prompt none", "--paper has its own tasks, prompts and pooling: leave --prompt out"),
    # texts without labels
    ("--texts no.txt", "no file no.txt"),
    ("--texts few.txt", "few.txt: fewer than 100 of 2 texts share words with others: too few"),
    ("--texts good.csv --column topic", "good.csv: no column topic; it has text, label"),
    ("--texts few.txt --task sts", "--texts compares models without labels: leave --task"),
    ("--data good.csv --column text", "--column names the column of --texts"),
    # models
    ("--data good.csv --model typo", "no model 'typo'"),
    ("--data good.csv --model no/such", "cannot load 'no/such'"),
    ("--data good.csv --model no-model", "no-model: a folder with neither embedding.json (a run) nor config.json (a model)"),
    ("--data good.csv --model bad-config", "bad-config does not hold a whole model"),
    ("--data good.csv --model encoder", "encoder is a model of type 'bert', no decoder"),
    ("--data good.csv --model damaged-model", "damaged-model does not hold a whole model"),
    ("--data good.csv --model tiny damaged-model", "could not be computed:\n  damaged-model does not hold a whole model", 1),
    ("--data good.csv --model no-weights", "no-weights does not hold a whole model: it has no weights in safetensors files"),
    ("--data good.csv --model bad-run", "embedding.json: missing fields"),
    ("--data good.csv --model st:no-model", "--model st:no-model: a folder without modules.json"),
    ("--data good.csv --model st:no/such", "cannot load 'no/such'"),
    ("--data good.csv --model st:tiny --pooling last", "--model st:tiny: no folder 'tiny', and no hub id"),
    ("--data good.csv --model st:typo", "--model st:typo: no folder 'typo', and no hub id like org/name"),
    ("--data good.csv --model", "argument --model: expected at least one argument"),
    # how texts become vectors
    ("--data good.csv --prompt clutser", "unknown prompt 'clutser'"),
    ("--data good.csv --prompt {text}{text}{text}", "a prompt needs {text} once, or twice to read the second"),
    ("--data good.csv --query-prompt none", "--query-prompt stands beside the prompt of the documents"),
    ("--data good.csv --pooling median", "argument --pooling: invalid choice: 'median'"),
    ("--data good.csv --pooling query", "argument --pooling: invalid choice: 'query'"),
    ("--data good.csv --layers first", "argument --layers: "),
    ("--data good.csv --sweep depth=1", "argument --sweep: 'depth=1' is not one of"),
    ("--data good.csv --sweep pooling=mean --pooling last", "--sweep pooling is given twice, or beside --pooling"),
    ("--data good.csv --embed-filter 2", "argument --embed-filter: "),
    ("--data good.csv --attention-layer 1", "--attention-layer works with --pooling attention"),
    ("--data good.csv --keep-bos", "--keep-bos works with --scope all"),
    ("--data good.csv --max-tokens 0", "--max-tokens must be 1 or more, not 0"),
    ("--data good.csv --max-tokens many", "argument --max-tokens: invalid int value: 'many'"),
    ("--data good.csv --dims -1", "--dims must be 1 or more, not -1"),
    ("--data good.csv --layers 99", "layer 99"),
    ("--data good.csv --dims 9999", "9999"),
    ("--data good.csv --baselines lsa", "--baselines 'lsa' is none of tfidf, side-by-side"),
    ("--data sts.csv --baselines tfidf", "--baselines tfidf is fitted on the texts that it embeds: it can score clustering, not STS"),
    # the machine, and where results go
    ("--data good.csv --dtype float8", "unknown dtype 'float8': take auto, float32, bfloat16, float16"),
    ("--data good.csv --device tpu", "unknown device 'tpu': take cpu, cuda or cuda:N"),
    ("--data good.csv --device cuda", "device 'cuda:0' was asked for, but this PyTorch sees no CUDA device"),
    ("--data good.csv --out folder", "--out folder is a folder: name a file, such as folder/results.json"),
    ("--data good.csv --out good.csv", "good.csv exists already"),
    ("--data good.csv --out good.csv/r.json", "good.csv is a file, choose another place"),
    ("--data good.csv --out r.json", "r.json.partial exists already and holds no cells of a table"),
    ("--data good.csv --out locked/r.json", "locked may not be written to, choose another place"),
    ("--task STS12 --results good.csv", "--results good.csv: good.csv is a file, choose another place"),
    ("--task STS12 --results locked/kept", "locked may not be written to, choose another place"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
]


def make_files(folder: Path) -> None:
    """Everything that the cases name."""
    for name, content in FILES.items():
        path = folder / name
        if content is None or isinstance(content, dict):
            path.mkdir()
            for inner, text in (content or {}).items():
                (path / inner).write_text(text)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def answer(flags: str) -> tuple[int, str]:
    """The exit status of a call of evaluate.py in the working folder, and what it says on standard error."""
    import evaluate
    from files.console import run_script

    words, said = flags.split(), io.StringIO()
    if "--model" not in words and "--no-such-flag" not in words:
        words += ["--model", "tiny"]
    sys.argv = ["evaluate.py", *words]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        access = os.access  # root may write anywhere
        os.access = lambda path, mode: Path(path).name != "locked" and access(path, mode)
        try:
            run_script(lambda: evaluate.main(evaluate.build_parser().parse_args()))
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os.access = access
    return status, said.getvalue()


def shown(flags: str) -> str:
    """A row of the table: flags, status, the beginning of the answer."""
    status, said = answer(flags)
    line = said.removeprefix("evaluate.py: ").rpartition("could not be computed:\n")[2].strip().split("\n")[0]
    return f"| `{flags}` | {status} | {line[:100].rstrip()}{'…' * (len(line) > 100)} |"


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_CACHE"] = str(Path(folder) / "hub")
        os.chdir(folder)
        make_files(Path(folder))
        print("| flags | status | answer |\n|---|---|---|")
        for flags, *_ in CASES:
            print(shown(flags), flush=True)


if __name__ == "__main__":
    main()
