"""What `embed.py index` saves, and what it misses: each question by the index and by comparing it with every vector.

    PYTHONPATH=.extras python bench/bench_index.py --folder vectors --questions questions.txt
    PYTHONPATH=.extras python bench/bench_index.py --folder vectors --questions questions.txt --model runs/mine --n 100

The folder needs an index. Times are those of the processor, one question at a time; what starts and loads the model is left out.
"""

import argparse
import json
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from encoder import Encoder
from encoder.nearest import nearest
from files.reading import read_texts
from serving.index import open_index
from serving.vectors import VectorFolder

K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of vectors with its index")
    parser.add_argument("--questions", type=Path, required=True, help="file of texts")
    parser.add_argument("--model", help="default: that of the folder")
    parser.add_argument("--n", type=int, default=100, help="questions (default 100)")
    args = parser.parse_args()
    folder = VectorFolder.open(args.folder)
    index, numbers = open_index(folder), folder.numbers()
    if index is None:
        sys.exit(f"no index that covers {args.folder}: python embed.py index {args.folder}")
    texts = [text for _, text in read_texts(args.questions)[0]]
    encoder = Encoder.load(args.model or folder.job["model"])
    encoder.merge()
    queries = encoder.encode(texts[:: max(1, len(texts) // args.n)][: args.n], "query")

    def exact(some: np.ndarray):
        return nearest(some, (folder.read(number).vectors for number in numbers), K)

    truth = exact(queries)
    began = time.process_time()
    exact(queries[:1])
    exact_seconds = time.process_time() - began
    index.nearest(queries[:1], K)
    began = time.process_time()
    found = [index.nearest(queries[i : i + 1], K) for i in range(len(queries))]
    index_seconds = (time.process_time() - began) / len(queries)
    hits = [len(set(ours.numbers[0].tolist()) & set(theirs.tolist())) for ours, theirs in zip(found, truth.numbers, strict=True)]
    result = {"vectors": sum(map(folder.length, numbers)), "width": folder.job["width"], "store": folder.job["store"]}
    result |= {"questions": len(queries), "recall@10": round(float(np.mean(hits)) / K, 4)}
    result |= {"lists": index.faiss_index.nlist, "lists_read": index.faiss_index.nprobe}
    result |= {"exact_seconds": round(exact_seconds, 2), "index_seconds": round(index_seconds, 4)}
    machine = {"machine": platform.machine(), "faiss": version("faiss-cpu"), "date": str(date.today())}
    print(json.dumps(result | machine))


if __name__ == "__main__":
    main()
