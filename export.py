"""Export a run to the runtimes that serve it, and prove that they give its vectors.

    python export.py runs/mine --out exported                          # sentence-transformers; verified, or nothing is written
    python export.py runs/mine --to vllm --vllm-python ~/vllm/bin/python --out exported
    python export.py runs/mine --to onnx --out exported                # needs requirements-extras.txt
    python export.py runs/mine --to gguf --llama-cpp ~/llama.cpp --llama-python ~/llama/bin/python --out exported
    python export.py tiny --prompt cluster --out exported              # an untuned base

Leaves behind a folder that holds

    the model                          with the adapter added to it, in the files of the runtime (see serving/folder.py, onnx_folder.py
                                       and gguf_folder.py)
    tokenizer.json                     BOS, prompt and EOS as the template around every text, which no truncation reaches
    embedding.json                     the contract
    verification.json                  the table of smallest cosines, texts and versions
    README.md                          model card: how to load it, data, scores, how it was verified
    query/                             the same for queries, where these have another prompt; weights are hard links

Verification takes 32 texts of all lengths and scripts, empty and past the limit, one at a time and in batches, through our encoder with
the adapter unmerged in float32 (the truth), merged, and through every runtime asked for in a fresh process. Where a runtime's vectors
differ, the part that differs is named (tokens, BOS, EOS, prompt, cut, pooling, weights, normalization), and nothing is left behind.
`--push` uploads what was verified to a hub, after a question.
"""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from encoder.contract import POOLING_PRESETS, POOLINGS, SCOPES, Contract, trained_for
from encoder.names import DTYPES, PRESETS, is_run
from files.console import InputError, run_script, say, short_path, warn
from files.writing import check_absent, errors_of_writing, write_json, write_text
from prompts import PROMPTS
from serving import runtimes
from serving.card import About, how_to_load, licence_of_base, model_card, score_facts
from serving.folder import QUERY_FOLDER, RUNTIMES, check_expressible, roles_of, token_limit, write_folder
from serving.gguf_folder import GGUF_TYPES, REPACK_NOTE, check_gguf, context_tokens, plain_text_note, write_gguf_folder
from serving.hub import check_push, folder_bytes, push
from serving.onnx_folder import check_onnx, write_onnx_folder
from serving.verification import Truth

PACKAGES = ("torch", "transformers", "sentence-transformers", "onnx", "onnxruntime")  # whose versions are recorded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", help=f"folder of a run, or an untuned base: {', '.join(PRESETS)}, folder, hub id")
    add("--to", choices=RUNTIMES, default="sentence-transformers", help="the runtime that will serve it (default sentence-transformers)")
    add("--out", type=Path, required=True, help="folder to write")
    add(
        "--merge-dtype",
        choices=DTYPES,
        help="of the exported weights; the sum itself is in float32 (default: the base's on disk, for onnx float32)",
    )
    add("--prompt", help=f"of an untuned base: {', '.join(PROMPTS)}, or a string with {{text}} (default none)")
    add("--query-prompt", metavar="PROMPT", help="of its queries, beside --prompt for documents (default: that of --prompt)")
    poolings = [*(p for p in POOLINGS if p != "query"), *POOLING_PRESETS]
    add("--pooling", choices=poolings, help="of an untuned base (default by its prompt)")
    add("--scope", choices=SCOPES, help="of an untuned base: which tokens are pooled (default by its pooling)")
    add("--dims", type=int, help="keep the first numbers of a vector, such as a run was trained for with --matryoshka (default: all)")
    add("--vllm-python", metavar="PATH", help="Python of an environment with vLLM, which then takes part in the verification")
    # GGUF
    add("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's source, which holds convert_hf_to_gguf.py")
    add("--llama-python", metavar="PATH", help="Python of an environment with llama-cpp-python and what the converter imports")
    add("--gguf-type", choices=GGUF_TYPES, help="of the weights in a GGUF (default f16)")
    # proof and hub
    add("--no-verify", action="store_true", help="write without proof (default: verify)")
    add("--push", metavar="REPO", help="upload to this repository of the hub, after a question; the token is in HF_TOKEN (default: do not)")
    add("--private", action="store_true", help="of a repository that --push makes (default: public)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for what can be refused before a model is loaded."""
    check_absent(args.out)
    contract_flags = [name for name in ("prompt", "query_prompt", "pooling", "scope") if getattr(args, name) is not None]
    if is_run(args.model) and contract_flags:
        raise InputError(
            f"--{contract_flags[0].replace('_', '-')}: a run is exported under the contract of its training: leave the flag out"
        )
    if is_run(args.model) and args.dims is not None:
        lengths = [n for n in (Contract.read(args.model).dims, *trained_for(args.model)["dims"]) if n]
        if args.dims not in lengths:
            known = f"for {', '.join(map(str, lengths))} numbers" if lengths else "for whole vectors, without --matryoshka"
            raise InputError(f"--dims {args.dims}: this run was trained {known}: leave the flag out, or train one")
    check_runtime_flags(args)
    check_push_flags(args)


def check_runtime_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags of another runtime, and where a program or package that this one needs is missing."""
    if args.vllm_python and args.to != "vllm":
        raise InputError("--vllm-python takes part in the verification of --to vllm: add that, or leave it out")
    if args.vllm_python:
        runtimes.check_python("--vllm-python", args.vllm_python, ("vllm",))
    of_gguf = [name for name in ("llama_cpp", "llama_python", "gguf_type") if getattr(args, name) is not None]
    if args.to != "gguf" and of_gguf:
        raise InputError(f"--{of_gguf[0].replace('_', '-')} belongs to --to gguf: add that, or leave it out")
    if args.to == "gguf":
        if args.merge_dtype:
            raise InputError("--merge-dtype: weights of a GGUF are stored by --gguf-type")
        check_gguf(args.llama_cpp, args.llama_python)
    if args.to == "onnx":
        check_onnx(args.merge_dtype)


def check_push_flags(args: argparse.Namespace) -> None:
    """Raise InputError for a --push of what would not be verified in its runtime, and where it cannot ask or has no token."""
    if args.private and not args.push:
        raise InputError("--private is of the repository that --push makes: add that, or leave it out")
    if not args.push:
        return
    if args.no_verify:
        raise InputError("--push: nothing is pushed that was not verified: leave --no-verify out")
    if args.to == "vllm" and not args.vllm_python:
        raise InputError(
            "--push: nothing is pushed that was not verified in its runtime: add --vllm-python, or push --to sentence-transformers"
        )
    if args.to == "tei":
        raise InputError("--push: TEI cannot be verified from here: push --to sentence-transformers, which is the same folder")
    check_push(args.push)


def stored_dtype(source: str, revision: str | None) -> str:
    """The dtype of a base's weights on disk, as its config says."""
    from encoder.base_models import fetch

    folder = Path(source) if Path(source).is_dir() else fetch(source, revision, False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in DTYPES else "float32"


def weights_dtype(args: argparse.Namespace, encoder) -> str:
    """The dtype of the exported weights, by the name that the runtime has for it."""
    if args.to == "gguf":
        return args.gguf_type or "f16"
    if args.to == "onnx":
        return args.merge_dtype or "float32"
    return args.merge_dtype or stored_dtype(encoder.source, encoder.contract.revision)


def write(args: argparse.Namespace, encoder, folder: Path, dtype: str) -> list[tuple[str, Path]]:
    """Write the files of the runtime -> each role and its folder."""
    if args.to == "onnx":
        return write_onnx_folder(encoder, folder, dtype)
    if args.to == "gguf":
        return write_gguf_folder(encoder, folder, dtype, args.llama_cpp, args.llama_python)
    return write_folder(encoder, folder, dtype)


def vectors_by_runtime(
    args: argparse.Namespace, truth, role: str, folder: Path, dtype: str, notes: list[str]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The runtimes that take part and, by each way of asking, their vectors (N, D). Adds to `notes` what the card has to say."""
    if args.to == "onnx":
        yield "ONNX Runtime", runtimes.onnx_vectors(folder, truth.texts)
    elif args.to == "gguf":
        size = context_tokens(truth.encoder)
        vectors, same, as_stored = runtimes.llama_cpp_vectors(args.llama_python, folder, truth.texts, size)
        notes.append(plain_text_note(truth.encoder, truth.texts, same))
        if as_stored:
            warn(REPACK_NOTE)
            notes.append(REPACK_NOTE)
        yield "llama.cpp", vectors
    else:
        yield "sentence-transformers", runtimes.sentence_transformers_vectors(folder, truth.texts)
        if args.to == "vllm" and args.vllm_python:
            limit = token_limit(truth.encoder, role)
            yield "vLLM's server", runtimes.vllm_vectors(args.vllm_python, folder, truth.texts, dtype, limit)


def verify(args: argparse.Namespace, truth, folders: list[tuple[str, Path]], dtype: str, notes: dict[str, list[str]]) -> list:
    """A check for each role and runtime. Raises VerificationFailed."""
    checks = []

    def check(role: str, what: str, vectors: np.ndarray, weights: str) -> None:
        checks.append(truth.check(role, what, vectors, weights))
        say(checks[-1].line())

    for role, folder in folders:
        truth.check_tokens(role, folder)
        if truth.encoder.peft is not None:
            check(role, "our encoder, adapter merged, float32", truth.encoder.encode(truth.texts, role), "float32")
        for runtime, ways in vectors_by_runtime(args, truth, role, folder, dtype, notes[role]):
            for way, vectors in ways.items():
                check(role, f"{runtime}, {dtype}, {way}", vectors, dtype)
    return checks


def write_proof(args: argparse.Namespace, encoder, truth, folders: list[tuple[str, Path]], dtype: str) -> None:
    """Verify, and write the proof and the card into each folder."""
    notes = {role: [] for role, _ in folders}
    checks = verify(args, truth, folders, dtype, notes) if truth else []
    record = {"date": str(date.today()), "fingerprint": encoder.fingerprint, "dtype": dtype, "to": args.to, "versions": versions()}
    record |= {"checks": [check._asdict() for check in checks], "texts": truth.texts if truth else []}
    about = About(args.out.name, args.to, dtype, score_facts(args.model), licence_of_base(encoder))
    for role, folder in folders:
        write_json(folder / "verification.json", record | {"notes": notes[role]})
        write_text(folder / "README.md", model_card(about, encoder, role, checks, notes[role]))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the optional ones
            continue
    return found


def remove_leavings(out: Path) -> None:
    """Remove the temporary folders of exports to this folder that were killed."""
    for path in out.parent.glob(".*.tmp"):
        name, _, process = path.name.removesuffix(".tmp").rpartition(".")
        if name == f".{out.name}" and process.isdecimal() and path.is_dir() and not is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or no process at all: not ours to judge
        return True
    return True


def warn_of_unverified(args: argparse.Namespace) -> None:
    if args.no_verify:
        warn("not verified: nothing says that a runtime gives this run's vectors")
    elif args.to == "vllm" and not args.vllm_python:
        warn("not verified in vLLM: name the Python of an environment that has it with --vllm-python")
    elif args.to == "tei":
        warn("not verified in TEI, which cannot be started from here: compare a few of its vectors with those of sentence-transformers")


def main(args: argparse.Namespace) -> None:
    check_flags(args)

    import transformers

    from encoder import Encoder

    transformers.logging.set_verbosity_error()
    contract_flags = {name: getattr(args, name) for name in ("prompt", "query_prompt", "pooling", "scope")}
    encoder = Encoder.load(args.model, dtype="float32", device=args.device, dims=args.dims, **contract_flags)
    check_expressible(encoder.contract, args.to)
    for note in encoder.notes:
        warn(note)
    dtype = weights_dtype(args, encoder)
    say(f"{args.model}: fingerprint {encoder.fingerprint}, weights in {dtype}")
    truth = None if args.no_verify else Truth(encoder, roles_of(encoder.contract))
    encoder.merge()
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    with errors_of_writing(args.out):
        remove_leavings(args.out)
        try:
            folders = write(args, encoder, temporary, dtype)
            write_proof(args, encoder, truth, folders, dtype)
            os.replace(temporary, args.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    warn_of_unverified(args)
    say(f"{args.out}: {folder_bytes(args.out) / 1e6:,.0f} MB")
    for role, _ in folders:
        folder = args.out / QUERY_FOLDER if role == "query" else args.out
        say(f"{'queries: ' if role == 'query' else ''}{how_to_load(args.to, encoder, role, short_path(folder), dtype)}")
    if args.push:
        push(args.out, args.push, args.private)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
