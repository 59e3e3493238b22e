"""Many clients at once, well-behaved and not: nothing hangs, leaks or crashes."""

import asyncio
import gc
import random
import socket
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.serve.running import run_async
from tests.serve.test_safety import HOSTILE, bomb, picture

pytestmark = pytest.mark.slow


def memory():
    """Resident memory of this process, which the server runs in, in MiB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


async def generate(client, rng):
    body = {"prompt": "a fox", "n": rng.randint(1, 3), "seed": rng.randrange(100), "response_format": "url"}
    answer = await client.post("/v1/images/generations", json=body)
    assert answer.status_code in (200, 429), answer.text
    if answer.status_code == 200:
        for one in answer.json()["data"]:
            assert (await client.get(one["url"])).content.startswith(b"\x89PNG")


async def vary(client, rng):
    answer = await client.post("/v1/images/variations", files={"image": picture()}, data={"n": "1"})
    assert answer.status_code in (200, 429), answer.text


BAD = [*HOSTILE.values(), bomb(60_000, 60_000), bytes(5 * 2**20)]


async def hostile(client, rng):
    data = rng.choice(BAD)
    answer = await client.post("/v1/images/variations", files={"image": ("../../x.png", data, "image/png")})
    assert answer.status_code in (400, 408, 413), answer.text  # 408 where this process is too busy to send


MANY_PARTS = b"".join(
    b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(10_000)
)


async def many_parts(client, rng):
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = await client.post("/v1/images/edits", content=MANY_PARTS + b"--b--\r\n", headers=kind)
    assert answer.status_code in (400, 408), answer.text


async def leave(client, rng):
    """A client that asks and goes."""
    try:
        await client.post(
            "/v1/images/generations", json={"prompt": "a fox", "n": 4}, timeout=rng.uniform(0.01, 0.3)
        )
    except httpx.TimeoutException:
        pass


async def read_slowly(client, rng):
    """A client that reads a few bytes of a stream, and goes."""
    body = {"prompt": "a fox", "n": 2, "stream": True, "partial_images": 3}
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        if answer.status_code == 200:
            async for _ in answer.aiter_bytes(100):
                await asyncio.sleep(rng.uniform(0.05, 0.2))
                break


async def half_a_request(client, rng):
    """A client that promises a body, sends some of it, and goes."""
    host, port = str(client.base_url).removeprefix("http://").strip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n")
    writer.write(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
    await writer.drain()
    await asyncio.sleep(rng.uniform(0, 0.2))
    writer.close()


MANNERS = [
    generate,
    generate,
    generate,
    vary,
    hostile,
    hostile,
    many_parts,
    leave,
    read_slowly,
    half_a_request,
]


def run(address, requests, clients, manners, seed=0):
    """Makes `requests` requests from `clients` clients, and returns how many raised what."""
    rng = random.Random(seed)
    todo = [rng.choice(manners) for _ in range(requests)]

    async def one():
        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            while todo:
                await asyncio.wait_for(todo.pop()(client, rng), 600)

    async def everyone():
        await asyncio.gather(*(one() for _ in range(clients)))

    run_async(everyone())


def test_two_hundred_requests_from_thirty_two_clients(server):
    """All are answered in the end, the queue is empty, and the server draws on."""
    address, service = server
    run(address, 200, 32, MANNERS)
    with httpx.Client(base_url=address, timeout=600) as client:
        assert client.post("/v1/images/generations", json={"prompt": "a fox"}).status_code == 200
        assert client.get("/healthz").json()["status"] == "ready"
        text = client.get("/metrics").text
    assert 'status="500"' not in text
    assert not service.worker._queue and service.worker._waiting() == 0
    host, port = address.removeprefix("http://").split(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def test_memory_is_flat_over_a_thousand_requests(server):
    """After the first 200, 800 more requests of all kinds add less than 5 % and 40 MiB."""
    address, service = server
    service.links.size = 2**20  # so that pictures by url fill their share in the first part
    run(address, 200, 16, MANNERS, seed=1)
    before = memory()
    run(address, 800, 16, MANNERS, seed=2)
    after = memory()
    assert after - before < min(40, 0.05 * before), f"{before:.0f} MiB, then {after:.0f} MiB"
    assert service.links.bytes <= 2**20
