"""Times `unclip serve` beside a bare loop of `text_to_image` on the same machine.

    python benchmarks/serving.py                       the shipped bundle
    python benchmarks/serving.py --requests 1000 --rounds 1        memory over many requests

The server and the bare loop are two processes that take turns, so that both meet the same load.

1. Four pictures: a bare call, then a request, `--rounds` times. The ratio is the median of the pairs'.
2. Throughput: bare calls of 1, 2 and 4 captions, of which the best counts; then requests of one picture from
   many clients at the same time; `--turns` times. Also the latencies, how full batches are, and memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

CAPTION = "a 3d emoji of a fox"
SIZES = (1, 2, 4)  # captions of a bare call


class Bare:
    """A loop of `text_to_image` in a process of its own, which draws when it is told to."""

    CODE = """
import sys, time
from unclip_jax.cli.options import save_memory_on_cpu, use_compilation_cache
save_memory_on_cpu(), use_compilation_cache()
import unclip_jax
from unclip_jax.checkpoint.load import load_bundle, stored_bytes
from unclip_jax.sharding import sampling_mesh
name, caption = sys.argv[1:]
sampler = unclip_jax.Sampler(load_bundle(name, mesh=sampling_mesh(None, stored_bytes(name))))
for seed, line in enumerate(sys.stdin):
    started = time.perf_counter()
    unclip_jax.text_to_image(sampler, [caption] * int(line), seed=seed)
    print(time.perf_counter() - started, flush=True)
"""

    def __init__(self, bundle: str):
        command = [sys.executable, "-c", self.CODE, bundle, CAPTION]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for size in SIZES:
            self.draw(size)  # compiles

    def draw(self, size: int) -> float:
        """Seconds of one call with `size` captions."""
        self.process.stdin.write(f"{size}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def all_sizes(self) -> dict[int, float]:
        """Seconds of a call of each size."""
        return {size: self.draw(size) for size in SIZES}

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(60)


class Server:
    """`unclip serve` in a process of its own, ready and with all its programs compiled."""

    def __init__(self, bundle: str, arguments: list[str]):
        command = [sys.executable, "-m", "unclip_jax.cli.main", "serve", "--bundle", bundle, "--port", "0"]
        command += ["--compile", "generations"]  # nothing else is measured
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.port = int(re.search(r":(\d+)", self.process.stdout.readline())[1])
        self.ready = self.wait(lambda status, health: status == 200)
        self.compiled = self.wait(lambda status, health: health["programs_to_compile"] == 0)

    def wait(self, done) -> float:
        """Seconds from the start until `done` holds for the answer of /healthz."""
        while not done(*self.get("/healthz")):
            if self.process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.1)
        return time.perf_counter() - self.started

    def get(self, path: str) -> tuple[int, dict]:
        """The status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def metrics(self) -> dict[str, float]:
        """The metrics without labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def memory(self) -> float:
        """The server's resident memory in MiB; 0 where the system does not say."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0) / 1024

    def draw(self, connection: http.client.HTTPConnection, n: int, seed: int) -> float:
        """Seconds of one request of n pictures."""
        body = json.dumps({"prompt": CAPTION, "n": n, "seed": seed, "response_format": "b64_json"})
        started = time.perf_counter()
        connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        data = json.loads(answer.read())
        assert answer.status == 200 and len(data["data"]) == n, data
        return time.perf_counter() - started

    def stop(self) -> None:
        """Ends the server with SIGTERM."""
        self.process.terminate()
        self.process.wait(60)


def at(values: list[float], share: float) -> float:
    """The value below which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def load(server: Server, clients: int, requests: int) -> dict[str, float]:
    """Requests of one picture from `clients` clients: pictures per second, latencies, and batch fill."""
    todo: queue.Queue[int] = queue.Queue()
    for seed in range(requests):
        todo.put(seed)
    seconds: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        while True:
            try:
                seed = todo.get_nowait()
            except queue.Empty:
                return
            seconds.append(server.draw(connection, 1, seed))

    before, started = server.metrics(), time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, after = time.perf_counter() - started, server.metrics()
    assert len(seconds) == requests, f"{requests - len(seconds)} requests failed"
    used = lambda name: after[name] - before[name]
    fill = used("unclip_batch_rows_total") / used("unclip_batch_slots_total")
    return {
        "pictures_per_second": requests / took,
        "p50": statistics.median(seconds),
        "p95": at(seconds, 0.95),
        "fill": fill,
        "rows_per_batch": used("unclip_batch_rows_total") / used("unclip_batches_total"),
    }


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="emoji", metavar="DIR", help="a bundle (emoji)")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="clients at the same time (32)")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="their requests per turn (64)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="pairs of four pictures (9)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="pairs of throughputs (3)")
    parser.add_argument("--batch", type=int, metavar="N", help="--batch of the server")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    bare, server = Bare(args.bundle), None
    try:
        server = Server(args.bundle, [] if args.batch is None else ["--batch", str(args.batch)])
        print(f"ready after {server.ready:.1f} s, all programs after {server.compiled:.1f} s", flush=True)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        pairs = [(bare.draw(4), server.draw(connection, 4, seed)) for seed in range(args.rounds)]
        memory = [server.memory()]
        turns = [(bare.all_sizes(), load(server, args.clients, args.requests)) for _ in range(args.turns)]
        memory.append(server.memory())
    finally:
        bare.stop()
        if server is not None:
            server.stop()
    alone, four = ([pair[i] for pair in pairs] for i in range(2))
    print(f"four pictures, bare: p50 {statistics.median(alone):.2f} s")
    print(f"four pictures, server: p50 {statistics.median(four):.2f} s, p95 {at(four, 0.95):.2f} s")
    print(f"  server / bare {statistics.median(b / a for a, b in pairs):.2f}")
    loaded = {key: statistics.median(found[key] for _, found in turns) for key in turns[0][1]}
    rates = {size: size / statistics.median(found[size] for found, _ in turns) for size in SIZES}
    best = max(rates, key=rates.get)
    print(f"throughput, bare: {rates[best]:.2f} pictures per second, by {best} at a time")
    print(f"  server / bare {loaded['pictures_per_second'] / rates[best]:.2f}")
    print(f"{args.clients} clients, {args.requests} requests of one picture:")
    print(f"  {loaded['pictures_per_second']:.2f} pictures per second")
    print(f"  p50 {loaded['p50']:.1f} s, p95 {loaded['p95']:.1f} s")
    print(f"  {loaded['rows_per_batch']:.2f} rows per batch, batch fill {loaded['fill']:.2f}")
    print(f"  memory {memory[0]:.0f} MiB before and {memory[1]:.0f} MiB after")


if __name__ == "__main__":
    main()
