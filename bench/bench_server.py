"""How `embed.py serve` holds up: many clients at the same time, every vector compared with the offline one.

    .extras/bin/python bench/bench_server.py --input texts.jsonl.gz
    .extras/bin/python bench/bench_server.py --input texts.jsonl.gz --model runs/mine --clients 64 --seconds 60 --texts-per-request 8

The server is a process of its own; the clients are threads of this one, each with a connection that it keeps. First the same texts are
encoded offline, in this process and dtype, for their vectors and for the speed to compare with.
"""

import argparse
import base64
import http.client
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from encoder import Encoder
from files.reading import read_texts

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="file of texts")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts-per-request", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    texts = [text for _, text in read_texts(args.input)[0][: args.texts]]
    encoder = Encoder.load(args.model, dtype=args.dtype)
    encoder.merge()
    encoder.encode(texts[:256])
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        truth = encoder.encode(texts)
        seconds.append(time.perf_counter() - began)
    offline = len(texts) / sorted(seconds)[1]

    command = [sys.executable, str(ROOT / "embed.py"), "serve", args.model, "--port", "0", "--dtype", args.dtype]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={k: v for k, v in os.environ.items() if k != "EMBED_API_KEY"})
    host, _, port = server.stdout.readline().rpartition("http://")[2].partition("/")[0].partition(":")
    latencies, errors, smallest, lock = [], [], [1.0], threading.Lock()
    while True:
        try:
            probe = http.client.HTTPConnection(host, int(port), timeout=5)
            probe.request("GET", "/health")
            probe.getresponse().read()
            break
        except OSError:
            assert server.poll() is None
    end = time.perf_counter() + args.seconds

    def client(number: int) -> None:
        chance, connection = random.Random(number), http.client.HTTPConnection(host, int(port), timeout=120)
        while time.perf_counter() < end:
            rows = [chance.randrange(len(texts)) for _ in range(args.texts_per_request)]
            body = json.dumps({"input": [texts[i] for i in rows], "encoding_format": "base64"})
            began = time.perf_counter()
            try:
                connection.request("POST", "/v1/embeddings", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                took = time.perf_counter() - began
                vectors = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]])
                cosine = float((vectors * truth[rows]).sum(1).min())
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                with lock:
                    errors.append(repr(error))
                connection.close()
                continue
            with lock:
                latencies.append(took)
                smallest[0] = min(smallest[0], cosine)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(latencies) * args.texts_per_request / (time.perf_counter() - began)
    server.terminate()
    server.wait()
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    versions = {name: version(name) for name in ("torch", "transformers", "starlette", "uvicorn")} | {"python": platform.python_version()}
    result = {"requests": len(latencies), "errors": len(errors), "smallest_cosine": round(smallest[0], 6)}
    result |= {"p50_ms": round(1e3 * p50), "p99_ms": round(1e3 * p99), "texts_per_second": round(rate), "offline": round(offline)}
    result |= {"share_of_offline": round(rate / offline, 3), "clients": args.clients, "texts_per_request": args.texts_per_request}
    print(json.dumps(result | {"seconds": args.seconds, "model": args.model, "date": str(date.today()), "versions": versions}))
    if errors:
        print(errors[0])


if __name__ == "__main__":
    main()
