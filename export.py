"""Export a run to the runtimes that serve it, and prove that they give its vectors.

    python export.py runs/mine --out exported                          # sentence-transformers; verified, or nothing is written
    python export.py runs/mine --to vllm --vllm-python ~/vllm/bin/python --out exported
    python export.py tiny --prompt cluster --out exported              # an untuned base

Leaves behind a folder that holds (see serving/folder.py)

    model.safetensors, config.json     the base with the adapter added to it, in --merge-dtype
    tokenizer.json                     BOS, prompt and EOS as the template around every text, which no truncation reaches
    modules.json, 1_Pooling/, ...      pooling, dimensions and normalization for sentence-transformers
    embedding.json                     the contract
    verification.json                  the table of smallest cosines, texts and versions
    README.md                          model card: how to load it, data, how it was verified
    query/                             the same for queries, where these have another prompt; weights are hard links

Verification takes 32 texts of all lengths and scripts, empty and past the limit, one at a time and in batches, through our encoder with
the adapter unmerged in float32 (the truth), merged, and through every runtime asked for in a fresh process. Where a runtime's vectors
differ, the part that differs is named (tokens, BOS, EOS, prompt, cut, pooling, weights, normalization), and nothing is left behind.
"""

import argparse
import json
import os
import platform
import shutil
from datetime import date
from importlib.metadata import version
from pathlib import Path

from encoder.contract import POOLINGS, SCOPES
from encoder.names import DTYPES, PRESETS, is_run
from files.console import InputError, run_script, say, short_path, warn
from files.writing import check_absent, errors_of_writing, write_json, write_text
from prompts import PROMPTS

RUNTIMES = ("sentence-transformers", "vllm", "tei")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", help=f"folder of a run, or an untuned base: {', '.join(PRESETS)}, folder, hub id")
    add("--to", choices=RUNTIMES, default=RUNTIMES[0], help="the runtime that will serve it (default sentence-transformers)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--merge-dtype", choices=DTYPES, help="of the exported weights; the sum itself is in float32 (default: the base's on disk)")
    add("--prompt", help=f"of an untuned base: {', '.join(PROMPTS)}, or a string with {{text}} (default none)")
    add("--query-prompt", metavar="PROMPT", help="of its queries, beside --prompt for documents (default: that of --prompt)")
    add("--pooling", choices=[p for p in POOLINGS if p != "query"], help="of an untuned base (default by its prompt)")
    add("--scope", choices=SCOPES, help="of an untuned base: which tokens are pooled (default by its pooling)")
    add("--dims", type=int, help="keep the first numbers of a vector, such as a run was trained for with --matryoshka (default: all)")
    add("--vllm-python", metavar="PATH", help="Python of an environment with vLLM, which then takes part in the verification")
    add("--no-verify", action="store_true", help="write without proof (default: verify)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    return parser


def stored_dtype(source: str, revision: str | None) -> str:
    """The dtype of a base's weights on disk, as its config says."""
    from encoder.base_models import fetch

    folder = Path(source) if Path(source).is_dir() else fetch(source, revision, False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in DTYPES else "float32"


def verify(args: argparse.Namespace, truth, folders: list[tuple[str, Path]], dtype: str) -> list:
    """A check for each role and runtime. Raises VerificationFailed."""
    from serving.folder import token_limit
    from serving.runtimes import sentence_transformers_vectors, vllm_vectors

    checks = []

    def check(role: str, what: str, vectors, weights: str) -> None:
        checks.append(truth.check(role, what, vectors, weights))
        say(checks[-1].line())

    for role, folder in folders:
        truth.check_tokens(role, folder)
        if truth.encoder.peft is not None:
            check(role, "our encoder, adapter merged, float32", truth.encoder.encode(truth.texts, role), "float32")
        for way, vectors in sentence_transformers_vectors(folder, truth.texts).items():
            check(role, f"sentence-transformers, {dtype}, {way}", vectors, dtype)
        if args.to == "vllm" and args.vllm_python:
            for way, vectors in vllm_vectors(args.vllm_python, folder, truth.texts, dtype, token_limit(truth.encoder, role)).items():
                check(role, f"vLLM's server, {dtype}, {way}", vectors, dtype)
    return checks


def main(args: argparse.Namespace) -> None:
    check_absent(args.out)
    contract_flags = {name: getattr(args, name) for name in ("prompt", "query_prompt", "pooling", "scope")}
    if is_run(args.model) and (given := [name for name, value in contract_flags.items() if value is not None]):
        raise InputError(f"--{given[0].replace('_', '-')}: a run is exported under the contract of its training: leave the flag out")
    if args.vllm_python and args.to != "vllm":
        raise InputError("--vllm-python takes part in the verification of --to vllm: add that, or leave it out")
    if args.vllm_python and not shutil.which(args.vllm_python):
        raise InputError(f"--vllm-python {args.vllm_python}: no such program")

    import transformers

    from encoder import Encoder
    from serving.card import how_to_load, model_card
    from serving.folder import QUERY_FOLDER, check_expressible, roles_of, write_folder
    from serving.verification import Truth

    transformers.logging.set_verbosity_error()
    encoder = Encoder.load(args.model, dtype="float32", device=args.device, dims=args.dims, **contract_flags)
    check_expressible(encoder.contract, args.to)
    for note in encoder.notes:
        warn(note)
    dtype = args.merge_dtype or stored_dtype(encoder.source, encoder.contract.revision)
    say(f"{args.model}: fingerprint {encoder.fingerprint}, weights in {dtype}")
    truth = None if args.no_verify else Truth(encoder, roles_of(encoder.contract))
    encoder.merge()
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    with errors_of_writing(args.out):
        try:
            folders = write_folder(encoder, temporary, dtype)
            checks = verify(args, truth, folders, dtype) if truth else []
            versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
            record = {"date": str(date.today()), "fingerprint": encoder.fingerprint, "dtype": dtype, "to": args.to}
            record |= {"versions": versions | {"python": platform.python_version()}}
            record |= {"checks": [check._asdict() for check in checks], "texts": truth.texts if truth else []}
            for role, folder in folders:
                write_json(folder / "verification.json", record)
                write_text(folder / "README.md", model_card(args.to, encoder, role, args.out.name, dtype, checks))
            os.replace(temporary, args.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if not truth:
        warn("not verified: nothing says that a runtime gives this run's vectors")
    elif args.to == "vllm" and not args.vllm_python:
        warn("not verified in vLLM: name the Python of an environment that has it with --vllm-python")
    elif args.to == "tei":
        warn("not verified in TEI, which cannot be started from here: compare a few of its vectors with those of sentence-transformers")
    say(f"{args.out}: {sum(p.stat().st_size for p in args.out.rglob('*') if p.is_file()) / 1e6:,.0f} MB")
    for role, _ in folders:
        folder = args.out / QUERY_FOLDER if role == "query" else args.out
        say(f"{'queries: ' if role == 'query' else ''}{how_to_load(args.to, encoder, role, short_path(folder), dtype)}")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
