"""Times `unclip serve` beside a bare loop of `text_to_image` on the same machine.

    python benchmarks/serving.py                       the shipped bundle
    python benchmarks/serving.py --requests 1000 --rounds 0        memory over many requests

1. In a process of its own: a loop of `text_to_image`, for four pictures and for the batch that draws most
   pictures per second.
2. The server, with nothing else running: p50 and p95 of requests of four pictures, one after another.
3. The server under load: requests of one picture from many clients at the same time; throughput, latencies,
   how full its batches are, and its memory.

The two must not run at the same time, so they take turns: bare, server, bare.
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


def bare(bundle: str, rounds: int, sizes: list[int]) -> dict[str, float]:
    """Seconds of `text_to_image` for each number of captions: the median of `rounds` calls."""
    code = f"""
import json, time
from unclip_jax.cli.options import save_memory_on_cpu, use_compilation_cache
save_memory_on_cpu(), use_compilation_cache()
import unclip_jax
from unclip_jax.checkpoint.load import stored_bytes
from unclip_jax.sharding import sampling_mesh
bundle = unclip_jax.load_bundle({bundle!r}, mesh=sampling_mesh(None, stored_bytes({bundle!r})))
sampler, seconds = unclip_jax.Sampler(bundle), {{}}
for size in {sizes}:
    times = []
    for seed in range({rounds} + 1):
        started = time.perf_counter()
        unclip_jax.text_to_image(sampler, [{CAPTION!r}] * size, seed=seed)
        times.append(time.perf_counter() - started)
    seconds[size] = sorted(times[1:])[len(times[1:]) // 2]
print(json.dumps(seconds))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return {int(size): value for size, value in json.loads(done.stdout.splitlines()[-1]).items()}


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
        "p95": statistics.quantiles(seconds, n=20)[-1],
        "fill": fill,
        "rows_per_batch": used("unclip_batch_rows_total") / used("unclip_batches_total"),
    }


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="emoji", metavar="DIR", help="a bundle (emoji)")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="clients at the same time (32)")
    parser.add_argument("--requests", type=int, default=128, metavar="N", help="their requests in all (128)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="calls of four pictures (7)")
    parser.add_argument("--batch", type=int, metavar="N", help="--batch of the server")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sizes = [1, 2, 4]
    loops = [bare(args.bundle, args.rounds, sizes)] if args.rounds else []
    server = Server(args.bundle, [] if args.batch is None else ["--batch", str(args.batch)])
    print(f"ready after {server.ready:.1f} s, all programs after {server.compiled:.1f} s")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        four = [server.draw(connection, 4, seed) for seed in range(args.rounds)]
        first = server.memory()
        loaded = load(server, args.clients, args.requests)
        memory = first, server.memory()
    finally:
        server.stop()
    if args.rounds:
        loops.append(bare(args.bundle, args.rounds, sizes))
        best = max(size / loop[size] for loop in loops for size in sizes)
        alone = statistics.median(loop[4] for loop in loops)
        p50, p95 = statistics.median(four), statistics.quantiles(four, n=20)[-1]
        print(f"bare loop: four pictures {alone:.2f} s, at best {best:.2f} pictures per second")
        print(f"n=4: p50 {p50:.2f} s, p95 {p95:.2f} s; p50 / bare {p50 / alone:.2f}")
        print(f"throughput / bare {loaded['pictures_per_second'] / best:.2f}")
    print(f"{args.clients} clients, {args.requests} requests of one picture:")
    print(f"  {loaded['pictures_per_second']:.2f} pictures per second")
    print(f"  p50 {loaded['p50']:.1f} s, p95 {loaded['p95']:.1f} s")
    print(f"  {loaded['rows_per_batch']:.2f} rows per batch, batch fill {loaded['fill']:.2f}")
    print(f"  memory {memory[0]:.0f} MiB before and {memory[1]:.0f} MiB after")


if __name__ == "__main__":
    main()
