"""Embed a file of any size, to a folder of vectors, search in it, or serve vectors over HTTP.

    python embed.py runs/mine texts.parquet --out vectors                    # parts of 65,536 rows: parquet with id and vector
    python embed.py runs/mine texts.jsonl.gz --out vectors --store int8 --keep-text
    python embed.py runs/mine texts.csv --out vectors --shard 2/8            # every eighth part, on one of eight machines
    torchrun --nproc-per-node 8 embed.py runs/mine texts.parquet --out vectors
    python embed.py search vectors "how do I read a csv in chunks" -k 5
    python embed.py serve runs/mine --port 8000                              # POST /v1/embeddings, as OpenAI has it

Killed at any moment, the same command goes on: a part is complete or absent, so no row is lost or doubled. Another model, contract or
file never continues a folder. A row without a text, or one that cannot be embedded, is set aside with its reason in
part-NNNNN.failed.jsonl. Files: see serving/vectors.py.

--store float32 (default), float16, int8 (a scale for each vector, column `scale`), or binary (a bit for each number, packed)
"""

import argparse
import itertools
import os
import socket
import sys
from pathlib import Path

from encoder.names import DTYPES, PRESETS, base_of, check_dtype, find_base
from encoder.processes import distributed, end_distributed, wait_for_all
from files.arguments import positive_int, shard
from files.console import InputError, Progress, run_script, say, short_path, warn
from files.reading import STDIN, Table, TextStream, excerpt
from prompts import ROLES
from serving.vectors import FORMATS, ID_COLUMNS, STORES, Part, VectorFolder, read_parts

SHOWN = 200  # characters of a text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="also: embed.py search FOLDER QUESTION, embed.py serve MODEL"
    )
    add = parser.add_argument
    add("model", help=f"folder of a run, or an untuned base: {', '.join(PRESETS)}, folder, hub id")
    add("input", type=Path, help="the texts: txt, csv, tsv, jsonl, json (also .gz), parquet, or - for standard input")
    add("--out", type=Path, required=True, help="folder of vectors to write, or to go on with")
    add("--column", help="column with the text (default: guessed, and printed)")
    add("--id", metavar="COLUMN", help=f"column with the id (default: {' or '.join(ID_COLUMNS)} where there is one, else the row's number)")
    add("--role", choices=ROLES, default="document", help="under which of the contract's prompts (default document)")
    add("--store", choices=STORES, default=STORES[0], help="how the numbers are stored (default float32)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="of the parts (default parquet)")
    add("--keep-text", action="store_true", help="store the texts as well, for search to show them (default: no)")
    add("--rows-per-part", type=positive_int, default=65536, metavar="N", help="rows of the input for each part (default 65536)")
    add("--shard", type=shard, metavar="I/N", help="only every N-th part, from the I-th on; shards may share a folder (default: all)")
    add_model_flags(add)
    return parser


def build_search_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embed.py search", description="The vectors of a folder that are nearest to a question.")
    add = parser.add_argument
    add("folder", type=Path, help="folder of vectors that embed.py has written")
    add("query", nargs="+", help="one question or several, each in quotes")
    add("-k", type=positive_int, default=5, help="rows to show for each question (default 5)")
    add("--model", help="where the model of the folder is now (default: where it was)")
    add_model_flags(add)
    return parser


def build_serve_parser() -> argparse.ArgumentParser:
    about = "Serve vectors over HTTP, as OpenAI has it: POST /v1/embeddings; also GET /v1/models, /health, /metrics."
    parser = argparse.ArgumentParser(
        prog="embed.py serve", description=about, epilog="Requests must bear the key in EMBED_API_KEY, if set."
    )
    add = parser.add_argument
    add("model", help=f"folder of a run, or an untuned base: {', '.join(PRESETS)}, folder, hub id")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="0 takes any that is free (default 8000)")
    add("--name", help="what requests call the model (default: the last part of its name)")
    add("--max-texts", type=positive_int, default=2048, help="of a request (default 2048)")
    add("--max-megabytes", type=positive_int, default=8, help="of a request (default 8)")
    add("--max-waiting", type=positive_int, default=1024, help="requests that may wait, before others are told to come back (default 1024)")
    add_model_flags(add)
    return parser


def add_model_flags(add) -> None:
    add("--dtype", help=f"the model's: auto, {', '.join(DTYPES)} (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: never)")


def load(model: str, args: argparse.Namespace):
    from encoder import Encoder

    encoder = Encoder.load(model, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code)
    encoder.merge()
    for note in encoder.notes:
        warn(note)
    return encoder


def vectors_of(encoder, part: Part, role: str, report) -> tuple[Part, object]:
    """The part with the texts that cannot be embedded set aside, and the vectors (N, D) of the others."""
    import numpy as np

    failed = []

    def encode(rows: list[int]) -> tuple[list[int], np.ndarray]:
        try:
            return rows, encoder.encode([part.texts[i] for i in rows], role, report=report)
        except InputError as error:
            if distributed().world_size > 1:  # the others could not follow
                raise
            if len(rows) == 1:
                failed.append({"row": part.rows[rows[0]], "id": part.ids[rows[0]], "error": str(error)})
                return [], np.empty((0, encoder.width), np.float32)
            halves = [encode(half) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
            return halves[0][0] + halves[1][0], np.concatenate([half[1] for half in halves])

    places, vectors = encode(list(range(len(part.texts))))
    return part.take(places, failed), vectors


def embed(args: argparse.Namespace) -> None:
    check_dtype(args.dtype)
    find_base(base_of(args.model))
    stream = TextStream(args.input, args.column)
    table: Table = stream.table
    if args.id:
        table.check_column(args.id, "one with --id")
    id_column = args.id or next((name for name in ID_COLUMNS if name in table.columns), None)
    say(f"{stream.name}: texts in {stream.choice}, ids {f'in column {id_column!r}' if id_column else 'are the numbers of the rows'}")
    parts = read_parts(table, stream.column, id_column, args.rows_per_part)
    first = next(parts, None)  # what is wrong with it is said before anything is written
    if first is None or not (first.texts or len(first.failed) == args.rows_per_part):
        raise InputError(f"{stream.name}: column {excerpt(stream.column)} holds no text")
    from encoder import EncodingReport

    encoder, report = load(args.model, args), EncodingReport()
    size = None if args.input == STDIN else args.input.stat().st_size
    job = {"fingerprint": encoder.fingerprint, "width": encoder.width, "model": args.model, "role": args.role, "dtype": str(encoder.dtype)}
    job |= {"input": args.input.name, "bytes": size, "column": stream.column, "id": id_column, "rows_per_part": args.rows_per_part}
    job |= {"store": args.store, "format": args.format, "keep_text": args.keep_text}
    if not distributed().rank:
        VectorFolder.begin(args.out, job)
    wait_for_all()
    folder = VectorFolder.open(args.out)
    say(f"{args.model}, fingerprint {encoder.fingerprint}, {encoder.width} numbers a vector, stored as {args.store}")
    n_rows = n_failed = n_before = 0
    with Progress(None, "embedded", "row") as progress:
        for part in itertools.chain([first], parts):
            if args.shard and part.number % args.shard[1] != args.shard[0] - 1:
                continue
            if folder.has(part.number):
                n_before += part.size
            else:
                part, vectors = vectors_of(encoder, part, args.role, report)
                if not distributed().rank:
                    folder.write(part, vectors)
                n_failed += len(part.failed)
            n_rows += part.size
            progress.update(part.size)
    for line in report.warnings():
        warn(line)
    if n_failed:
        warn(f"{n_failed} of {n_rows:,} rows have no vector: see {short_path(args.out)}/part-*.failed.jsonl")
    before = f", {n_before:,} of them before" if n_before else ""
    say(f"{args.out}: {n_rows:,} rows in {len(folder.numbers())} parts{before}")
    say(f'next: python embed.py search {short_path(args.out)} "a question"')


def search(args: argparse.Namespace) -> None:
    folder = VectorFolder.open(args.folder)
    check_dtype(args.dtype)
    model = args.model or folder.job["model"]
    find_base(base_of(model))
    from encoder.nearest import nearest

    encoder = load(model, args)
    if encoder.fingerprint != folder.job["fingerprint"]:
        raise InputError(f"{args.folder} was made by fingerprint {folder.job['fingerprint']}, {model} has {encoder.fingerprint}")
    numbers = folder.numbers()
    if not numbers:
        raise InputError(f"{args.folder} holds no part yet: embed.py has to finish one first")
    starts, total = [], 0

    def blocks():
        nonlocal total
        for number in numbers:
            starts.append(total)
            vectors = folder.read(number).vectors
            total += len(vectors)
            yield vectors

    result = nearest(encoder.encode(args.query, "query"), blocks(), args.k)
    kept = {}
    for query, places, values in zip(args.query, result.numbers.tolist(), result.cosines.tolist(), strict=True):
        say(excerpt(query, SHOWN))
        for place, value in zip(places, values, strict=True):
            index = max(i for i, start in enumerate(starts) if start <= place)
            if index not in kept:
                kept[index] = folder.read(numbers[index])
            part = kept[index]
            text = f"  {excerpt(part.texts[place - starts[index]], SHOWN)}" if part.texts else ""
            say(f"  {value:.3f}  {part.ids[place - starts[index]]}{text}")


def serve(args: argparse.Namespace) -> None:
    check_dtype(args.dtype)
    find_base(base_of(args.model))
    try:
        import uvicorn

        from serving.server import Limits, make_app
    except ImportError as error:
        raise InputError(f"serving needs the package {error.name}: pip install -r requirements-extras.txt") from None
    encoder, key = load(args.model, args), os.environ.get("EMBED_API_KEY")
    name = args.name or Path(args.model).name
    app = make_app(encoder, name, key, Limits(args.max_texts, args.max_megabytes * 2**20, args.max_waiting))
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((args.host, args.port))
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot listen at {args.host}:{args.port} ({error}): take another --host or --port") from None
        say(f"{args.model}, fingerprint {encoder.fingerprint}, as model {name!r} at http://{args.host}:{listening.getsockname()[1]}/v1")
        if not key and args.host not in ("127.0.0.1", "::1", "localhost"):
            warn("anybody who reaches this address may ask: set EMBED_API_KEY")
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30, access_log=False)
        uvicorn.Server(settings).run(sockets=[listening])  # until SIGINT or SIGTERM; what has been asked is answered
        app.state.batcher.close()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["search"]:
        search(build_search_parser().parse_args(arguments[1:]))
    elif arguments[:1] == ["serve"]:
        serve(build_serve_parser().parse_args(arguments[1:]))
    else:
        embed(build_parser().parse_args(arguments))
        end_distributed()


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
