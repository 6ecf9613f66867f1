"""Which runtime gives our vectors: every class of model x pooling x prompt, exported and verified as `export.py` does it.

    python bench/bench_parity.py --out results/parity.jsonl --models tiny --poolings "last, all"
    python bench/bench_parity.py --out results/parity.jsonl --to sentence-transformers vllm --vllm-python .vllm/bin/python
    python bench/bench_parity.py --out results/parity.jsonl --to onnx gguf --llama-cpp ~/llama.cpp --llama-python ~/llama/bin/python
    python bench/bench_parity.py --out results/parity.jsonl --table

A cell is a run with a random adapter, on the bundled model or on a small random one of the class behind a preset, whose 32 texts (some
empty, three past the limit) go through our encoder unmerged, merged, and through the runtime in a fresh process, one at a time and in
batches. It is a line of JSON in --out: the smallest cosine of each runtime, "refused" with the reason where the runtime cannot express the
contract, or "failed" with what the verification says. Cells that are there already are not computed again, so that an interrupted call can
be repeated; nor are those of sentence-transformers where the cell of another runtime has them, as every export is verified in it.
"""

import argparse
import contextlib
import io
import itertools
import json
import platform
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
from bench.gpu import append_row
from files.console import InputError, run_script
from prompts import PROMPTS

PROMPT_NAMES = {"none": "none", "short": "cluster", "long": "knowledge"}
POOLINGS = {
    "last, all": {"pooling": "last", "scope": "all"},
    "last, text": {"pooling": "last", "scope": "text"},
    "mean, all, BOS too": {"pooling": "mean", "scope": "all", "keep_bos": True},
    "mean, all": {"pooling": "mean", "scope": "all"},
    "mean, text": {"pooling": "mean", "scope": "text"},
    "position-mean, all, BOS too": {"pooling": "position-mean", "scope": "all", "keep_bos": True},
    "position-mean, all": {"pooling": "position-mean", "scope": "all"},
    "position-mean, text": {"pooling": "position-mean", "scope": "text"},
}
MODELS = ("tiny", "llama", "mistral", "qwen3", "gemma3", "gpt-neox")
WITHOUT_BOS = ("qwen3", "gpt-neox")  # as their presets
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_TOKENS = 48
HIDDEN = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512}
WINDOW = 12  # of sliding attention: shorter than most texts
GEMMA3 = {"num_hidden_layers": 7, "query_pre_attn_scalar": 32}  # as real ones: every sixth layer sees all, heads scale by their own width


class Cell(NamedTuple):
    model: str
    pooling: str
    prompt: str
    to: str
    dtype: str


def make_tokenizer(bos: bool):
    """A byte-level BPE that puts BOS before every text, or does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from serving.verification import SAMPLES

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SAMPLES, *(prompt.template for prompt in PROMPTS.values())] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A" if bos else "$A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_base(name: str, folder: Path) -> str:
    """A small random model of a class, with heads of 32 numbers: vLLM's attention on CPUs takes no smaller ones."""
    import torch
    import transformers

    grouped = {"num_key_value_heads": 1, "head_dim": 32}
    classes = {
        "llama": ("LlamaConfig", grouped),
        "mistral": ("MistralConfig", grouped | {"sliding_window": WINDOW}),
        "qwen3": ("Qwen3Config", grouped),
        "gemma3": ("Gemma3TextConfig", grouped | {"sliding_window": WINDOW} | GEMMA3),
        "gpt-neox": ("GPTNeoXConfig", {}),
    }
    config, extra = classes[name]
    tokenizer = make_tokenizer(name not in WITHOUT_BOS)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(HIDDEN | extra), **sizes))
    with torch.no_grad():  # larger weights than at a usual start: differences must show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_run(base: str, cell: Cell, folder: Path):
    """A run with a random adapter under the cell's contract -> the contract."""
    import torch

    from encoder import Encoder

    limit = {} if cell.model == "tiny" else {"max_tokens": MAX_TOKENS}
    encoder = Encoder.load(base, prompt=PROMPT_NAMES[cell.prompt], dtype="float32", **POOLINGS[cell.pooling], **limit)
    torch.manual_seed(0)
    encoder.add_adapter(4)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.05)
    encoder.save(folder)
    return encoder.contract


def measure(cell: Cell, base: str, flags: list[str]) -> dict:
    """The cell's outcome: "cosines" of every runtime that took part, or why it was "refused" or has "failed"."""
    from serving.folder import check_expressible
    from serving.runtimes import RuntimeCrashed, RuntimeFailed
    from serving.verification import VerificationFailed

    with tempfile.TemporaryDirectory() as scratch:
        run, out = Path(scratch) / "run", Path(scratch) / "exported"
        contract = make_run(base, cell, run)
        try:
            check_expressible(contract, cell.to)
        except InputError as error:
            return {"refused": str(error)}
        command = [str(run), "--out", str(out), *flags]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                export.main(export.build_parser().parse_args(command))
        except (VerificationFailed, RuntimeCrashed) as error:
            return {"failed": str(error).replace(f"{scratch}/", "")}
        except RuntimeFailed as error:  # it says itself that it cannot, or its converter
            return {"refused": str(error).replace(f"{scratch}/", "")}
        cosines = defaultdict(list)
        for check in json.loads((out / "verification.json").read_text(encoding="utf-8"))["checks"]:
            cosines[check["what"].partition(",")[0]].append(check["cosine"])
        return {"cosines": {what: min(values) for what, values in cosines.items()}}


def cells(args: argparse.Namespace) -> list[Cell]:
    every = itertools.product(args.prompts, args.poolings, args.models, args.to)
    named = (Cell(model, pooling, prompt, to, args.merge_dtype) for prompt, pooling, model, to in every)
    return [cell for cell in named if not ("BOS" in cell.pooling and cell.model in WITHOUT_BOS)]


def read_rows(path: Path) -> dict[Cell, dict]:
    """Cell -> its row, the latest one; a line that was cut off is left out."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[Cell(*(row[name] for name in Cell._fields))] = row
    return rows


def outcome(row: dict, to: str) -> str | None:
    """What a row says of a runtime: the smallest cosine, refused, FAILED, not verified where it took no part; None: nothing."""
    own = to == row["to"]
    if "cosines" not in row:
        return ("refused" if "refused" in row else "FAILED") if own else None
    others = {"our encoder", "sentence-transformers"} - {to}
    values = [value for what, value in row["cosines"].items() if (own or what == to) and what not in others]
    if values:
        return f"{min(1, *values):.6f}"
    return "not verified" if own else None


def table(rows: dict[Cell, dict]) -> str:
    """Markdown: the smallest cosine over the prompts; where these differ in kind, by prompt."""
    columns = list(dict.fromkeys((name, cell.dtype) for cell, row in rows.items() for name in ("sentence-transformers", cell.to)))
    found = defaultdict(lambda: defaultdict(dict))  # (model, pooling) -> column -> prompt -> outcome
    places = sorted(rows.items(), key=lambda item: (MODELS.index(item[0].model), list(POOLINGS).index(item[0].pooling)))
    for (cell, row), (to, dtype) in itertools.product(places, columns):
        if cell.dtype == dtype and (said := outcome(row, to)):
            found[cell.model, cell.pooling][to, dtype][cell.prompt] = said
    lines = ["| model | pooling, scope | " + " | ".join(map(", ".join, columns)) + " |", "|---" * (2 + len(columns)) + "|"]
    for (model, pooling), of_columns in found.items():
        shown = [summarized(of_columns[column]) for column in columns]
        lines.append(f"| {model} | {pooling} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def summarized(prompts: dict[str, str]) -> str:
    """{prompt: outcome} in few words; prompts are named where outcomes differ in kind, or some are missing."""
    kinds = defaultdict(list)
    for prompt, said in prompts.items():
        kinds[said if said[0].isalpha() else "cosine"].append((prompt, said))
    texts = []
    for kind, members in kinds.items():
        value = min(said for _, said in members) if kind == "cosine" else kind
        texts.append(value if len(members) == len(PROMPT_NAMES) else f"{', '.join(prompt for prompt, _ in members)}: {value}")
    return "; ".join(texts) or "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL of cells; those that are in it are not computed again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS))
    parser.add_argument("--prompts", nargs="+", choices=PROMPT_NAMES, default=list(PROMPT_NAMES))
    parser.add_argument(
        "--to", nargs="+", choices=export.RUNTIMES, default=["sentence-transformers"], help="runtimes, as export.py names them"
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="Python of an environment with vLLM, for --to vllm")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="llama.cpp's source, for --to gguf")
    parser.add_argument("--llama-python", metavar="PATH", help="Python of an environment with llama-cpp-python, for --to gguf")
    parser.add_argument("--merge-dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--table", action="store_true", help="compute nothing, print the table of --out")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for to in args.to:  # a package that is missing is no refusal of the runtime
            export.check_runtime_flags(export.build_parser().parse_args(["run", "--out", "exported", *export_flags(args, to)]))
        compute(args)
    print(table(read_rows(args.out)))
    versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")} | {"python": platform.python_version()}
    print(json.dumps({"rows": len(read_rows(args.out)), "date": str(date.today()), "versions": versions}))


def export_flags(args: argparse.Namespace, to: str) -> list[str]:
    """The flags of export.py that name a runtime, where it is, and the dtype of its weights."""
    names = {"vllm": ("vllm_python",), "gguf": ("llama_cpp", "llama_python")}.get(to, ())
    stored = ["--gguf-type", GGUF_TYPES[args.merge_dtype]] if to == "gguf" else ["--merge-dtype", args.merge_dtype]
    where = [text for name in names if getattr(args, name) for text in (f"--{name.replace('_', '-')}", getattr(args, name))]
    return ["--to", to, *stored, *where]


def compute(args: argparse.Namespace) -> None:
    """Append the cells that are missing to --out."""
    import transformers

    transformers.logging.set_verbosity_error()
    done = read_rows(args.out)
    with tempfile.TemporaryDirectory() as folder:
        bases = {"tiny": "tiny"}
        for cell in cells(args):
            if any(outcome(row, cell.to) for other, row in done.items() if other._replace(to=cell.to) == cell):
                continue
            if cell.model not in bases:
                bases[cell.model] = make_base(cell.model, Path(folder) / cell.model)
            began = time.perf_counter()
            row = (
                cell._asdict()
                | measure(cell, bases[cell.model], export_flags(args, cell.to))
                | {"seconds": round(time.perf_counter() - began, 1)}
            )
            print(json.dumps(row), flush=True)
            append_row(args.out, row)
            done[cell] = row


if __name__ == "__main__":
    run_script(main)
