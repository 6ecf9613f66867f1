"""Embed a file of any size, to a folder of vectors, search in it, or serve vectors over HTTP.

    python embed.py runs/mine texts.parquet --out vectors                    # parts of 65,536 rows: parquet with id and vector
    python embed.py runs/mine texts.jsonl.gz --out vectors --store int8 --keep-text
    python embed.py runs/mine texts.csv --out vectors --shard 2/8            # every eighth part, on one of eight machines
    torchrun --nproc-per-node 8 embed.py runs/mine texts.parquet --out vectors
    python embed.py runs/mine texts.parquet --out vectors --engine ray       # on all machines of a Ray cluster
    python embed.py index vectors                                            # for many vectors: search need not read all of them
    python embed.py search vectors "how do I read a csv in chunks" -k 5
    python embed.py serve runs/mine --port 8000                              # POST /v1/embeddings, as OpenAI has it

Killed at any moment, the same command goes on: a part is complete or absent, so no row is lost or doubled. Another model, contract or
file never continues a folder. A row without a text, or one that cannot be embedded, is set aside with its reason in
part-NNNNN.failed.jsonl. Files: see serving/vectors.py.

--store float32 (default), float16, int8 (a scale for each vector, column `scale`), or binary (a bit for each number, packed)
"""

import argparse
import bisect
import functools
import itertools
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from encoder.names import DTYPES, PRESETS, base_of, check_dtype, find_base
from encoder.processes import distributed, end_distributed, wait_for_all
from files.arguments import positive_int, shard
from files.console import InputError, Progress, run_script, say, short_path, warn
from files.reading import STDIN, Table, TextStream, excerpt
from prompts import ROLES
from serving.embedding import Model, Source, describe, vectors_of
from serving.vectors import FORMATS, ID_COLUMNS, STORES, Part, VectorFolder, read_parts

ENGINES = ("plain", "ray")
SHOWN = 200  # characters of a text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="also: embed.py search FOLDER QUESTION, embed.py index FOLDER, embed.py serve MODEL"
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
    add("--engine", choices=ENGINES, default=ENGINES[0], help="ray: workers of a Ray cluster share the parts (default plain: this process)")
    add("--workers", type=positive_int, metavar="N", help="of --engine ray (default: one for each GPU of the cluster, else for each CPU)")
    add_model_flags(add)
    return parser


def build_search_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embed.py search", description="The vectors of a folder that are nearest to a question.")
    add = parser.add_argument
    add("folder", type=Path, help="folder of vectors that embed.py has written")
    add("query", nargs="+", help="one question or several, each in quotes")
    add("-k", type=positive_int, default=5, help="rows to show for each question (default 5)")
    add("--model", help="where the model of the folder is now (default: where it was)")
    add("--exact", action="store_true", help="compare with every vector, also where there is an index (default: take the index)")
    add_model_flags(add)
    return parser


def build_index_parser() -> argparse.ArgumentParser:
    about = "Make an index of a folder of vectors (FAISS), so that search need not read all of them; also renews one that is out of date."
    parser = argparse.ArgumentParser(prog="embed.py index", description=about)
    parser.add_argument("folder", type=Path, help="folder of vectors that embed.py has written")
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


def model_of(name: str, args: argparse.Namespace) -> Model:
    return Model(name, args.dtype, args.device, args.trust_remote_code)


def load(model: Model):
    encoder = model.load()
    for note in encoder.notes:
        warn(note)
    return encoder


# --------------------------------------------------------------------------------------------------------------- embed


class Tally:
    """What has become of the rows of a job."""

    def __init__(self):
        from encoder import EncodingReport

        self.n_rows = self.n_failed = self.n_before = 0
        self.report = EncodingReport()

    def add(self, n_rows: int, n_failed: int = 0, *, before: bool = False) -> None:
        self.n_rows += n_rows
        self.n_failed += n_failed
        self.n_before += n_rows * before


def is_own(number: int, shard: tuple[int, int] | None) -> bool:
    """Whether a part belongs to this shard."""
    return shard is None or number % shard[1] == shard[0] - 1


def begin_folder(args: argparse.Namespace, source: Source, first: Part, described: dict) -> VectorFolder:
    """The folder of this job, new or begun by the same one; `described`: see `describe`.

    The first part says whether it is the same file: name and size may be those of another, and standard input has neither.
    """
    job = {"fingerprint": described["fingerprint"], "width": described["width"], "model": args.model, "role": args.role}
    job |= {"dtype": described["dtype"], "input": args.input.name, "bytes": None if args.input == STDIN else args.input.stat().st_size}
    job |= {"column": source.column, "id": source.id_column, "rows_per_part": args.rows_per_part}
    job |= {"store": args.store, "format": args.format, "keep_text": args.keep_text, "content": first.digest}
    if not distributed().rank:
        VectorFolder.begin(args.out, job)
    wait_for_all()
    say(f"{args.model}, fingerprint {job['fingerprint']}, {job['width']} numbers a vector, stored as {args.store}")
    return VectorFolder.open(args.out)


def embed_here(args: argparse.Namespace, source: Source, table: Table, first: Part, others: Iterable[Part]) -> Tally:
    """The parts that are missing, one after the other, in this process or those that torchrun has started."""
    encoder, tally, n_read = load(model_of(args.model, args)), Tally(), 0
    folder = begin_folder(args, source, first, describe(encoder))
    with Progress(None, "embedded", "row") as progress:
        for part in itertools.chain([first], others):
            n_read += part.size
            expected = table.expected_rows(n_read)
            progress.expect(expected and expected // (args.shard[1] if args.shard else 1))
            if not is_own(part.number, args.shard):
                continue
            if folder.has(part.number):
                tally.add(part.size, before=True)
                progress.skip(part.size)
                continue
            part, vectors = vectors_of(encoder, part, args.role, tally.report, progress.update)
            if not distributed().rank:
                folder.write(part, vectors)
            tally.add(part.size, len(part.failed))
            progress.update(tally.n_rows - progress.done)  # with those that were set aside, and without those that were tried twice
    return tally


def embed_on_cluster(args: argparse.Namespace, source: Source, first: Part) -> Tally:
    """The parts that are missing, by the workers of a Ray cluster."""
    from serving.ray_engine import Cluster, Work

    name = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    model, tally, cluster = model_of(name, args), Tally(), Cluster(args.workers, args.device)
    n = source.length()  # and that every row can be read
    described, notes = cluster.describe(model)
    for note in notes:
        warn(note)
    folder = begin_folder(args, source, first, described)
    sizes = {k: min(args.rows_per_part, n - k * args.rows_per_part) for k in range(-(-n // args.rows_per_part)) if is_own(k, args.shard)}
    missing = sorted(sizes.keys() - folder.numbers())
    tally.add(sum(sizes.values()) - sum(sizes[k] for k in missing), before=True)
    with Progress(sum(sizes.values()), "embedded", "row") as progress:
        progress.skip(tally.n_before)
        for done in cluster.embed(Work(model, source, args.role, args.out.resolve()), missing):
            tally.add(done.n_rows, done.n_failed)
            tally.report.n_truncated += done.n_truncated
            tally.report.max_tokens = done.max_tokens or tally.report.max_tokens
            tally.report.notes += done.notes
            progress.update(done.n_rows)
    return tally


def embed(args: argparse.Namespace) -> None:
    check_dtype(args.dtype)
    find_base(base_of(args.model))
    check_engine(args)
    stream = TextStream(args.input, args.column)
    table: Table = stream.table
    if args.id:
        table.check_column(args.id, "one with --id")
    id_column = args.id or next((name for name in ID_COLUMNS if name in table.columns), None)
    say(f"{stream.name}: texts in {stream.choice}, ids {f'in column {id_column!r}' if id_column else 'are the numbers of the rows'}")
    parts = read_parts(table.rows, stream.column, id_column, args.rows_per_part)
    first = next(parts, None)  # what is wrong with it is said before anything is written
    if first is None or not (first.texts or len(first.failed) == args.rows_per_part):
        raise InputError(f"{stream.name}: column {excerpt(stream.column)} holds no text")
    source = Source(args.input.absolute(), stream.column, id_column, args.rows_per_part)
    tally = embed_on_cluster(args, source, first) if args.engine == "ray" else embed_here(args, source, table, first, parts)
    for line in tally.report.warnings():
        warn(line)
    if tally.n_failed:
        warn(f"{tally.n_failed} of {tally.n_rows:,} rows have no vector: see {short_path(args.out)}/part-*.failed.jsonl")
    before = f", {tally.n_before:,} of them before" if tally.n_before else ""
    say(f"{args.out}: {tally.n_rows:,} rows in {len(VectorFolder.open(args.out).numbers())} parts{before}")
    say(f'next: python embed.py search {short_path(args.out)} "a question"')


def check_engine(args: argparse.Namespace) -> None:
    """Raise InputError where the input cannot be read by several processes, or --workers would do nothing."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.input == STDIN and (several or args.engine == "ray"):
        raise InputError("several processes cannot share standard input: name a file")
    if args.engine == "ray" and several:
        raise InputError("--engine ray starts its workers itself: leave torchrun out")
    if args.workers and args.engine != "ray":
        raise InputError("--workers is for --engine ray")


# -------------------------------------------------------------------------------------------------------------- search


def index(args: argparse.Namespace) -> None:
    from serving.index import build_index

    folder = VectorFolder.open(args.folder)
    say(build_index(folder))
    say(f'next: python embed.py search {short_path(args.folder)} "a question"')


def search(args: argparse.Namespace) -> None:
    folder = VectorFolder.open(args.folder)
    check_dtype(args.dtype)
    queries = [query.strip() for query in args.query]
    if not all(queries):
        raise InputError("nothing to look for: ask with some words")
    model = args.model or folder.job["model"]
    find_base(base_of(model))
    numbers = folder.numbers()
    if not numbers:
        raise InputError(f"{args.folder} holds no part yet: embed.py has to finish one first")
    from encoder.nearest import nearest
    from serving.index import open_index

    found = None if args.exact else open_index(folder)
    encoder = load(model_of(model, args))
    if encoder.fingerprint != folder.job["fingerprint"]:
        raise InputError(f"{args.folder} was made by fingerprint {folder.job['fingerprint']}, {model} has {encoder.fingerprint}")
    vectors = encoder.encode(queries, "query")
    result = found.nearest(vectors, args.k) if found else nearest(vectors, (folder.read(n).vectors for n in numbers), args.k)
    starts = list(itertools.accumulate((folder.length(number) for number in numbers), initial=0))
    read_names = functools.cache(folder.read_names)
    for query, places, values in zip(queries, result.numbers.tolist(), result.cosines.tolist(), strict=True):
        say(excerpt(query, SHOWN))
        for place, value in zip(places, values, strict=True):
            part = bisect.bisect_right(starts, place) - 1
            ids, texts = read_names(numbers[part])
            text = f"  {excerpt(texts[place - starts[part]], SHOWN)}" if texts else ""
            say(f"  {value:.3f}  {ids[place - starts[part]]}{text}")


# --------------------------------------------------------------------------------------------------------------- serve


def serve(args: argparse.Namespace) -> None:
    check_dtype(args.dtype)
    find_base(base_of(args.model))
    try:
        import uvicorn

        from serving.server import Limits, make_app
    except ImportError as error:
        raise InputError(f"serving needs the package {error.name}: pip install -r requirements-extras.txt") from None
    encoder, key = load(model_of(args.model, args)), os.environ.get("EMBED_API_KEY")
    name = args.name or Path(os.path.abspath(args.model)).name  # also of the folder .
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
    elif arguments[:1] == ["index"]:
        index(build_index_parser().parse_args(arguments[1:]))
    elif arguments[:1] == ["serve"]:
        serve(build_serve_parser().parse_args(arguments[1:]))
    else:
        embed(build_parser().parse_args(arguments))
        end_distributed()


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
