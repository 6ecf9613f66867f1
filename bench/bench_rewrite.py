"""How fast `make_pairs.py llm` rewrites, beside a loop of `generate` over batches in the order of the texts.

    python bench/bench_rewrite.py --input texts.jsonl.gz
    python bench/bench_rewrite.py --input texts.jsonl.gz --model Qwen/Qwen3-0.6B --texts 512
    python bench/bench_rewrite.py --input texts.jsonl.gz --end-at .      # the bundled model, which seldom ends an answer by itself

Both sides have the same model, prompts and sampling on the same machine. First the likeliest tokens of both in float32 are compared,
then the sides are timed in turn, forwards and backwards; the answers' mean length shows that they do the same work.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from encoder.runtime import pick_dtype
from files.reading import read_texts
from pair_engines.chat_model import load_chat_model, prompt_ids
from pair_engines.durable import Job
from pair_engines.templates import TEMPLATES, instruction, without_thinking

ROOT = Path(__file__).resolve().parent.parent


class Loop:
    """The loop that anybody writes: batches in the order of the texts, padded, each until its longest answer has ended."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(args.chat_model, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.chat_model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def __call__(self, jobs: list[Job], args: argparse.Namespace, batch_size: int) -> list[str]:
        answers = []
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {"do_sample": False}
        torch.manual_seed(0)
        for start in range(0, len(jobs), batch_size):
            prompts = prompt_ids(self.tokenizer, [instruction(job, TEMPLATES) for job in jobs[start : start + batch_size]])
            inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
            with torch.no_grad():
                out = self.model.generate(
                    **inputs, **sampling, max_new_tokens=args.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id
                )
            answers += self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [without_thinking(answer) for answer in answers]


def ending_at(end: str, model: Path, folder: Path) -> str:
    """The model in `folder`, with an answer ended by every token that holds `end`, as a chat model ends answers of any length."""
    from transformers import AutoTokenizer, GenerationConfig

    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    tokenizer, settings = AutoTokenizer.from_pretrained(model), GenerationConfig.from_pretrained(model)
    ends = [number for number in range(len(tokenizer)) if end in tokenizer.decode(number)]
    settings.eos_token_id = [tokenizer.eos_token_id, *ends]
    (folder / "generation_config.json").unlink()
    settings.save_pretrained(folder)
    return str(folder)


def ours(answer, jobs: list[Job]) -> list[str]:
    """The answers of `make_pairs.py llm`, in the order of the texts."""
    found = {job.number: text for answers in answer(jobs) for job, text in answers}
    return [found[job.number] for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="file of texts")
    parser.add_argument(
        "--model", dest="chat_model", default=str(ROOT / "models" / "tiny"), help="default: the bundled model, no chat model"
    )
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="of ours (default 64, as in make_pairs.py)")
    parser.add_argument("--loops", type=int, nargs="+", default=[8, 64], help="batch sizes of the loop (default 8 64)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--end-at", metavar="TEXT", help="end an answer at a token that holds this, for a model in a folder")
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    if args.end_at:
        args.chat_model = ending_at(args.end_at, Path(args.chat_model), Path(folder.name))
    args.seed, args.top_p, args.repetition_penalty = 0, 0.9, 1.0
    rng, texts = random.Random(0), read_texts(args.input)[0][: args.texts]
    jobs = [Job(i, source, text, rng.choice(sorted(TEMPLATES))) for i, (source, text) in enumerate(texts)]

    args.temperature, args.dtype = 0, "float32"
    few = jobs[:32]
    equal = [a == b for a, b in zip(ours(load_chat_model(args, TEMPLATES), few), Loop(args, torch.float32)(few, args, 8), strict=True)]
    print(f"likeliest tokens, float32: {sum(equal)} of {len(few)} answers are the loop's")

    args.temperature, args.dtype = 0.6, "auto"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype("auto", device)
    answer = load_chat_model(args, TEMPLATES)
    sides = {f"ours, batch {args.batch_size}, {dtype}": lambda: ours(answer, jobs)}
    for loop_dtype in dict.fromkeys((torch.float32, dtype)):
        loop = Loop(args, loop_dtype)
        for size in args.loops:
            sides[f"loop, batch {size}, {loop_dtype}"] = lambda loop=loop, size=size: loop(jobs, args, size)
    seconds = {name: [] for name in sides}
    words = {}
    for number in range(args.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            answers = sides[name]()
            seconds[name].append(time.perf_counter() - began)
            words[name] = statistics.mean(len(text.split()) for text in answers)
    our_seconds = statistics.median(seconds[next(iter(sides))])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append({"side": name, "texts_per_second": len(jobs) / median, "ours_is_faster": median / our_seconds, "words": words[name]})
        print(
            f"{name:36} {len(jobs) / median:7.2f} texts/s   ours x {median / our_seconds:4.2f}   {words[name]:5.1f} words an answer",
            flush=True,
        )
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {p: version(p) for p in ("torch", "transformers")} | {"python": platform.python_version()}
    about = {"date": str(date.today()), "device": where, "model": args.chat_model, "end_at": args.end_at, "versions": versions}
    print(json.dumps(about | {"equal": sum(equal), "rows": rows}))


if __name__ == "__main__":
    main()
