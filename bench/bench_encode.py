"""Encoding: our encoder beside sentence-transformers and the plain loop of the paper's code, correctness first, then speed.

    python bench/bench_encode.py                             # on a CPU: the bundled model and the SmolLM2-135M shape
    python bench/bench_encode.py --models qwen3-0.6b mistral-7b --dtype bfloat16     # shapes for a GPU, random weights
    python bench/bench_encode.py --ablate --no-rivals        # ours, and ours with each execution option off
    python bench/bench_encode.py --workloads short --prompts cluster --compile --vllm-python ~/vllm/bin/python
    python bench/bench_encode.py --stream 1000000            # memory while a million short lines go through one layer

Sides: ours; sentence-transformers on the same weights, at its best (the same dtype, the fastest of several batch sizes, its
unpadding where it has it), at its defaults (32 texts a batch, the dtype of the stored weights) and on a CPU in float32;
`AutoModelForCausalLM` as published evaluation loops have it (32 texts a batch in the order given, padding, every hidden state
kept, logits computed); with --vllm-python vLLM's offline engine (with --compile compiled as well) and with --llama-python llama.cpp's
library on the exported folder, in processes of their own (encode_worker.py).

Texts are drawn from the bundled tasks and cut to length: `short` 10 to 20 tokens, `long` 150 to 300, `mixed` half of each.
Prompts: none, 8 or 30 tokens before the text, and `cluster` of prompts.py, before and behind it. Every side's vectors must agree
with ours in float32, one text at a time (cosine above 0.99999 in float32, above 0.999 in bfloat16), before anything is timed. Sides
alternate A B B A; a ratio is the median of the rounds' ratios. tokens/s counts every token of every sequence, however often it was
really computed. All sides of this process that compute in one dtype share one copy of the weights; a side that runs out of memory is a
row that says so.
"""

import argparse
import atexit
import contextlib
import functools
import gzip
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen3Config

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from encoder import Encoder  # noqa: E402, the folder above
from encoder.runtime import empty_cache, is_out_of_memory, pick_device, pick_dtype  # noqa: E402
from files.console import run_script  # noqa: E402
from prompts import get_prompt  # noqa: E402
from serving.folder import write_folder  # noqa: E402
from serving.gguf_folder import SEQUENCES, check_gguf, write_gguf_folder  # noqa: E402
from serving.runtimes import check_python  # noqa: E402

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
# the published configurations, with the bundled tokenizer's vocabulary: an embedding's rows cost no time
SHAPES = {
    "smollm2-135m": LlamaConfig(**SMOLLM),
    "qwen3-0.6b": Qwen3Config(**QWEN, head_dim=128),
    "llama-3.2-1b": LlamaConfig(**LLAMA_1B, head_dim=64),
    "mistral-7b": MistralConfig(**MISTRAL, sliding_window=None),
}
DEFAULTS, DISAGREES = "sentence-transformers, defaults", "disagrees with the plain path"
LENGTHS = {"short": (10, 20), "long": (150, 300), "mixed": None}
PROMPTS = {
    "none": "{text}",
    "short": "Group this by its topic:\n{text}",
    "cluster": get_prompt("cluster").template,
    "30 tokens": "Instruction: read the following text with care, then find the one topic, among a hundred, to which it belongs best.\n"
    "{text}",
}


def make_model(name: str, folder: Path, device: torch.device) -> str:
    """The bundled model, or a published shape with random weights drawn on the device, as a folder that every side loads."""
    if name == "tiny":
        return str(HERE / "models" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(HERE / "models" / "tiny")
    config = SHAPES[name]
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 2048
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    with device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if name == "mistral-7b" else torch.float32).save_pretrained(folder)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_texts(tokenizer, workload: str, n: int) -> list[str]:
    """Texts of a workload's length in tokens; each starts and ends with a letter, so that the tokens of its prompt stay what they are."""
    rows = []
    for path in sorted((HERE / "tasks").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            rows += [json.loads(line)["text"] for line in f]
    words = np.array(" ".join(rows).split())
    rng, texts = np.random.default_rng(0), []
    for i in range(n):
        low, high = LENGTHS[workload] or LENGTHS["short" if i % 2 else "long"]
        start, wanted = rng.integers(len(words) - high), rng.integers(low, high + 1)
        ids = tokenizer(" ".join(words[start : start + high]), add_special_tokens=False)["input_ids"][:wanted]
        texts.append(re.sub(r"\W+$", "", "The " + tokenizer.decode(ids).strip()))
    return texts


# ------------------------------------------------------------------------------------------------------------- sides

Encode = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (N, D)


class Worker:
    """Vectors by another runtime, in a process of its own environment: see encode_worker.py."""

    def __init__(self, python: str, scratch: str, *arguments):
        command = [python, Path(__file__).with_name("encode_worker.py"), *arguments]
        scratch = Path(tempfile.mkdtemp(dir=scratch))
        self.log, self.out = scratch / "log.txt", scratch / "vectors.npy"
        with open(self.log, "w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(list(map(str, command)), **pipes, text=True)
        atexit.register(self.process.kill)
        self.wait_for("ready")

    def wait_for(self, answer: str) -> None:
        if self.process.stdout.readline().strip() != answer:
            raise SystemExit(f"{' '.join(self.process.args)} failed:\n{self.log.read_text()[-2000:]}")

    def __call__(self, texts: list[str]) -> np.ndarray:
        print(json.dumps({"texts": texts, "out": str(self.out)}), file=self.process.stdin, flush=True)
        self.wait_for("done")
        vectors = np.load(self.out)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Sides:
    """The sides of one comparison, by name. They read one folder, and share their weights where they compute in one dtype."""

    def __init__(self, folder: str, prompt: str, pooling: str, dtype: torch.dtype, device: torch.device):
        self.folder, self.prompt, self.pooling, self.dtype, self.device = folder, prompt, pooling, dtype, device
        self.encoder = self.load_encoder(dtype)
        self.weights = dict(self.encoder.decoder.named_parameters())

    def load_encoder(self, dtype: torch.dtype) -> Encoder:
        settings = {"pooling": self.pooling, "scope": "all", "keep_bos": self.pooling == "mean" or None}
        return Encoder.load(self.folder, prompt=self.prompt, dtype=dtype, device=str(self.device), **settings)

    def around(self, texts: list[str]) -> list[str]:
        """Texts with the prompt, for sides that tokenize both at once."""
        before, after = self.prompt.split("{text}")
        return [before + text + after for text in texts]

    def exact(self, texts: list[str]) -> np.ndarray:
        """The plain path: float32, one text at a time, every execution option off."""
        encoder = self.load_encoder(torch.float32)
        encoder.share_prefix = encoder.trim_last_layer = False
        return np.concatenate([encoder.encode([text]) for text in texts])

    def with_shared_weights(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, loaded on the CPU, moved to the device; weights that are there already are not copied again."""
        for name, weight in model.named_parameters():
            shared = self.weights.get(name.removeprefix("model."))
            if shared is not None and shared.dtype == weight.dtype:
                weight.data = shared.data
        return model.eval().to(self.device)

    def ours(self, **options) -> Encode:
        def encode(texts: list[str]) -> np.ndarray:
            before = {name: getattr(self.encoder, name) for name in options}
            vars(self.encoder).update(options)
            try:
                return self.encoder.encode(texts)
            finally:
                vars(self.encoder).update(before)

        return encode

    def ours_compiled(self) -> Encode:
        encoder = self.load_encoder(self.dtype)
        encoder.compile()
        return encoder.encode

    def sentence_transformer(self, dtype: torch.dtype | None) -> Callable[[int], Encode]:
        """By batch size. dtype None: that of the stored weights."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        body = Transformer(self.folder, max_seq_length=2048, **({} if dtype is None else {"model_kwargs": {"dtype": dtype}}))
        self.with_shared_weights(body.model)
        pool = Pooling(body.get_embedding_dimension(), pooling_mode="lasttoken" if self.pooling == "last" else "mean")
        model = SentenceTransformer(modules=[body, pool], device=str(self.device))

        def encode(texts: list[str], batch_size: int) -> np.ndarray:
            vectors = model.encode(self.around(texts), batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
            return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()

        return lambda batch_size: functools.partial(encode, batch_size=batch_size)

    def plain_loop(self) -> Encode:
        model = self.with_shared_weights(AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype))
        tokenizer = AutoTokenizer.from_pretrained(self.folder)

        @torch.no_grad()
        def encode(texts: list[str]) -> np.ndarray:
            batches = []
            for at in range(0, len(texts), 32):
                inputs = tokenizer(self.around(texts[at : at + 32]), padding=True, return_tensors="pt").to(self.device)
                states = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
                mask = inputs["attention_mask"]
                if self.pooling == "last":
                    vectors = states[torch.arange(len(states)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]
                else:
                    vectors = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
                batches.append(torch.nn.functional.normalize(vectors, dim=-1).cpu())
            return torch.cat(batches).numpy()

        return encode

    def llama_cpp(self, python: str, scratch: str, source: Path, kind: str, texts: list[str]) -> Encode:
        longest = max(map(len, self.encoder.tokenize(texts).ids))
        n_tokens = -(-longest // SEQUENCES) * SEQUENCES  # of larger contexts it computes the attention as well, and is slower
        encoder, exported = self.load_encoder(torch.float32), Path(tempfile.mkdtemp(dir=scratch)) / "exported"
        exported.mkdir()
        write_gguf_folder(encoder, exported, kind, source, python)
        return Worker(python, scratch, "llama.cpp", exported, n_tokens)

    def vllm(self, python: str, scratch: str, *compiled: str) -> Encode:
        exported, dtype = Path(tempfile.mkdtemp(dir=scratch)) / "exported", str(self.dtype).removeprefix("torch.")
        write_folder(self.load_encoder(self.dtype), exported, dtype)
        return Worker(python, scratch, "vllm", exported, dtype, *compiled)


def make_sides(sides: Sides, args: argparse.Namespace, texts: list[str]) -> tuple[dict[str, Encode], list[str]]:
    """The sides that were asked for and the names of those that ran out of memory; of the library's batch sizes the fastest."""
    made: dict[str, Encode] = {"ours": sides.ours()}
    if args.ablate:
        made["ours, prompt not shared"] = sides.ours(share_prefix=False)
        if sides.pooling == "last":
            made["ours, whole last layer"] = sides.ours(trim_last_layer=False)
    out_of_memory = []

    def add(name: str, make: Callable[[], tuple[str, Encode]]) -> None:
        try:
            full_name, encode = make()
            encode(texts[:64])
            made[full_name] = encode
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory.append(name)
            empty_cache(sides.device)

    def library_at_its_best() -> tuple[str, Encode]:
        by_size, seconds = sides.sentence_transformer(sides.dtype), {}
        for size in args.batch_sizes:
            with contextlib.suppress(torch.OutOfMemoryError):
                by_size(size)(texts[:64])
                seconds[size] = min(clock(by_size(size), texts, sides.device) for _ in range(2))
        if not seconds:
            raise torch.OutOfMemoryError("out of memory with every batch size")
        best = min(seconds, key=seconds.get)
        return f"sentence-transformers, best (batch {best})", by_size(best)

    if args.compile:
        add("ours, compiled", lambda: ("ours, compiled", sides.ours_compiled()))
    if args.vllm_python:
        made["vLLM"] = sides.vllm(args.vllm_python, args.scratch)
        if args.compile:
            made["vLLM, compiled"] = sides.vllm(args.vllm_python, args.scratch, "compiled")
    if args.llama_python:
        for kind in ("f16", "q8_0"):
            made[f"llama.cpp, {kind}"] = sides.llama_cpp(args.llama_python, args.scratch, args.llama_cpp, kind, texts)
    if args.no_rivals:
        return made, out_of_memory
    if importlib.util.find_spec("sentence_transformers"):
        add("sentence-transformers, best", library_at_its_best)
        add(DEFAULTS, lambda: (DEFAULTS, sides.sentence_transformer(None)(32)))
        if sides.dtype == torch.bfloat16 and sides.device.type == "cpu":  # what its defaults are where the weights are stored so
            float32 = "sentence-transformers, float32"
            add(float32, lambda: (float32, sides.sentence_transformer(torch.float32)(32)))
    else:
        print("sentence-transformers is not installed: left out", file=sys.stderr)
    add("AutoModelForCausalLM", lambda: ("AutoModelForCausalLM", sides.plain_loop()))
    return made, out_of_memory


# ------------------------------------------------------------------------------------------------------- measurement


def clock(encode, texts: list[str], device: torch.device) -> float:
    began = time.perf_counter()
    encode(texts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(encode, texts: list[str], device: torch.device) -> float | None:
    """MiB above what the weights take, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encode(texts)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times[1:])


def closeness(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).min())


def compare(sides: dict, texts: list[str], rounds: int, device: torch.device) -> dict[str, dict]:
    """Seconds of each side, and the median over rounds of its time as a multiple of ours; every other round runs backwards."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for encode in sides.values():
        encode(texts[: max(64, len(texts) // 4)])  # warm
    for r in range(rounds):
        for name in list(sides) if r % 2 == 0 else reversed(sides):
            times[name].append(clock(sides[name], texts, device))
    first = times["ours"]
    return {
        name: {"seconds": float(np.median(t)), "times_ours": float(np.median(np.array(t) / np.array(first)))} for name, t in times.items()
    }


def case(name: str, folder: str, workload: str, prompt_name: str, pooling: str, args, dtype, device) -> list[dict]:
    sides = Sides(folder, PROMPTS[prompt_name], pooling, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = make_texts(tokenizer, workload, args.texts or (1024 if name == "tiny" else 512) // (8 if workload != "short" else 1))
    tokens = sum(len(ids) for ids in tokenizer(sides.around(texts))["input_ids"])
    checked = texts[:: max(1, len(texts) // 24)]
    expected = sides.exact(checked)
    made, out_of_memory = make_sides(sides, args, texts)
    untimed = [f"{side}: out of memory" for side in out_of_memory]
    for side, cosine in {side: closeness(encode(checked), expected) for side, encode in made.items()}.items():
        exact = dtype == torch.float32 and side != DEFAULTS  # which computes in the dtype of the stored weights
        if cosine < (0.99999 if exact else 0.999):
            if side == "ours":
                raise SystemExit(f"ours {DISAGREES}: cosine {cosine:.6f} on {name}, {workload}, prompt {prompt_name}")
            untimed.append(f"{side} {DISAGREES}, not timed: cosine {cosine:.6f}")
            stop(made.pop(side))
    about = {"model": name, "workload": workload, "prompt": prompt_name, "pooling": pooling}
    rows, parameters = [], sum(p.numel() for n, p in sides.weights.items() if "embed" not in n)
    peak = matmul_peak(dtype, device)
    for side, row in compare(made, texts, args.rounds, device).items():
        speed = {"texts_per_second": len(texts) / row["seconds"], "tokens_per_second": tokens / row["seconds"]}
        share = 2 * parameters * speed["tokens_per_second"] / peak
        memory = peak_memory(made[side], texts, device)
        measured = row | speed | {"matmul_share": share, "peak_mib": memory, "cosine": closeness(made[side](checked), expected)}
        rows.append(about | {"side": side} | measured)
    for encode in made.values():
        stop(encode)
    return rows + [about | {"side": side} for side in untimed]


def stop(encode) -> None:
    if isinstance(encode, Worker):
        encode.process.kill()


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['model']}, {first['workload']} texts, prompt {first['prompt']}, {first['pooling']} pooling")
    for row in rows:
        if "seconds" not in row:
            print(f"  {row['side']}", flush=True)
            continue
        memory = "" if row["peak_mib"] is None else f", {row['peak_mib']:,.0f} MiB"
        print(
            f"  {row['side']:42} {row['texts_per_second']:9,.1f} texts/s {row['tokens_per_second']:10,.0f} tokens/s"
            f"  {100 * row['matmul_share']:5.1f} % of matmul  ours is {row['times_ours']:5.2f} x{memory}  cosine {row['cosine']:.6f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------ stream


def resident_mib() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def stream(n: int, args) -> dict:
    """Short lines, made as they are read, through the bundled model cut to one layer; resident memory on the way."""
    with tempfile.TemporaryDirectory() as folder:
        base = HERE / "models" / "tiny"
        config = AutoConfig.from_pretrained(base)
        config.num_hidden_layers = 1
        if hasattr(config, "layer_types"):
            config.layer_types = (config.layer_types or [])[:1] or None
        AutoModelForCausalLM.from_pretrained(base, config=config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        encoder = Encoder.load(folder, prompt=PROMPTS["30 tokens"], dtype=args.dtype or "auto")
    words = make_texts(encoder.tokenizer, "long", 64)
    words = " ".join(words).split()
    lines = (" ".join(words[(i * 7) % 9000 :][: 6 + i % 9]) for i in range(n))
    began, done, levels = time.perf_counter(), 0, []
    for (block,) in encoder.stream(lines):
        done += len(block)
        levels.append(resident_mib())
        if len(levels) % 8 == 1 or done == n:
            speed = done / (time.perf_counter() - began)
            print(f"{done:10,} lines, {speed:8,.0f} lines/s, {levels[-1]:,.0f} MiB resident", flush=True)
    return {"lines": done, "seconds": time.perf_counter() - began, "mib_first": levels[0], "mib_last": levels[-1], "mib_max": max(levels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=("tiny", *SHAPES), help="default: tiny and smollm2-135m on a CPU, else qwen3-0.6b and mistral-7b")
    add("--workloads", nargs="+", choices=tuple(LENGTHS), default=list(LENGTHS))
    add("--prompts", nargs="+", choices=tuple(PROMPTS), default=list(PROMPTS))
    add("--pooling", nargs="+", choices=("last", "mean"), default=["last"])
    add("--texts", type=int, help="of a workload (default 1024 for the bundled model, 512 else; an eighth of that where they are long)")
    add("--rounds", type=int, default=5)
    add("--batch-sizes", nargs="+", type=int, default=[8, 32, 128], help="that sentence-transformers may choose from")
    add("--dtype", help="default auto: bfloat16 where it is fast")
    add("--device")
    add("--ablate", action="store_true", help="ours with each trick off as well")
    add("--no-rivals", action="store_true", help="ours alone, for --ablate and --compile (default: beside the others)")
    add("--compile", action="store_true", help="ours with compiled layers as well")
    add("--vllm-python", metavar="PATH", help="Python of an environment with vLLM, as a further side")
    add("--llama-python", metavar="PATH", help="Python of an environment with llama-cpp-python, as further sides: f16 and q8_0")
    add("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's source, beside --llama-python")
    add("--stream", type=int, metavar="N", help="only: N lines through one layer, and memory")
    add("--json", type=Path)
    args = parser.parse_args()
    if args.vllm_python:
        check_python("--vllm-python", args.vllm_python, ("vllm",))
    if args.llama_python or args.llama_cpp:
        check_gguf(args.llama_cpp, args.llama_python)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or "auto", device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {p: version(p) for p in ("torch", "transformers")} | {"python": platform.python_version()}
    about = {"date": str(date.today()), "device": where, "dtype": str(dtype), "versions": versions}
    print(json.dumps(about))
    if args.stream:
        result = {"stream": stream(args.stream, args)}
    else:
        rows = []
        for name in args.models or (["tiny", "smollm2-135m"] if device.type == "cpu" else ["qwen3-0.6b", "mistral-7b"]):
            with tempfile.TemporaryDirectory() as folder:
                args.scratch = folder
                source = make_model(name, Path(folder), device)
                for workload in args.workloads:
                    for prompt in args.prompts:
                        for pooling in args.pooling:
                            rows += (of_case := case(name, source, workload, prompt, pooling, args, dtype, device))
                            show(of_case)
        result = {"rows": rows}
    print(json.dumps(about | result))
    if args.json:
        args.json.write_text(json.dumps(about | result, indent=1) + "\n")
    if any(DISAGREES in row["side"] for row in result.get("rows", [])):
        sys.exit(1)  # after all that could be measured has been printed


if __name__ == "__main__":
    run_script(main)
