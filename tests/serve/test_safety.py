"""What a server does about clients that mean it harm, or nothing good."""

import asyncio
import io
import json
import logging
import socket
import struct
import time
import zipfile
import zlib

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.running import run_async, running
from unclip_jax.serve.links import Links
from unclip_jax.serve.settings import Settings

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="file:///etc/passwd"/></svg>'


def picture(size=(20, 20), kind="PNG"):
    """An encoded picture."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, format=kind)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A PNG of a few kilobytes that claims to have width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3 * 1000 * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb():
    """A PNG with a text chunk that unpacks to a gigabyte."""
    data = b"k\0\0" + zlib.compress(bytes(2**26))
    return picture()[:33] + chunk(b"zTXt", data) + picture()[33:]


def archive():
    """A GIF's head on a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("../../evil", "x")
    return b"GIF89a" + file.getvalue()


HOSTILE = {
    "nothing": b"",
    "SVG": SVG,
    "SVG behind a BOM": b"\xef\xbb\xbf" + SVG,
    "PDF": b"%PDF-1.4\n%",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "TIFF": picture(kind="TIFF"),
    "HTML": b"<html><script>alert(1)</script>",
    "zip": archive(),
    "cut off": picture()[:200],
    "head alone": b"\x89PNG\r\n\x1a\n",
    "JPEG cut off": picture(kind="JPEG")[:100],
    "WebP cut off": picture(kind="WEBP")[:60],
    "pixels that are not there": bomb(1000, 4000),
    "text bomb": text_bomb()[:-20],
    "random": np.random.default_rng(1).bytes(2000),
}


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server[0], timeout=600) as client:
        yield client


def error_of(response, status):
    """The error of an answer, which must be whole and of one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    assert response.headers["x-should-retry"] == ("true" if status in (429, 503) else "false")
    assert response.headers["x-request-id"].startswith("req_")
    return error


# ---------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", ["/v1/images/variations", "/v1/images/edits"])
def test_hostile_pictures_are_refused(http, path, data):
    fields = {"prompt": "x"} if path.endswith("edits") else {}
    response = http.post(path, data=fields, files={"image": ("a.png", data, "image/png")})
    error = error_of(response, 400)
    assert error["param"] in ("image", "mask")
    if path.endswith("edits"):
        response = http.post(path, data=fields, files={"image": picture(), "mask": data})
        assert error_of(response, 400)["param"] == "mask"


def test_decompression_bombs(http, server):
    """What a header claims is read before anything is decoded."""
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (5000, 5000)):
        started = time.perf_counter()
        response = http.post("/v1/images/variations", files={"image": bomb(width, height)})
        assert response.status_code in (400, 413), response.text
        assert time.perf_counter() - started < 5
    assert error_of(response, 413)["param"] == "image"


def test_what_hides_in_a_picture_stays_there(http, models):
    """A picture that is a page, an archive or both at the same time gives a picture and nothing else."""
    plain = picture()
    for tail in (SVG, archive(), b"<?php system('id') ?>"):
        response = http.post(
            "/v1/images/variations",
            files={"image": plain + tail},
            data={"response_format": "b64_json", "seed": "1"},
        )
        assert response.status_code == 200 and b"script" not in response.content


def test_pictures_of_other_formats(http):
    for kind in ("JPEG", "WEBP", "GIF", "BMP"):
        files = {"image": picture(kind=kind)}
        assert http.post("/v1/images/variations", files=files).status_code == 200, kind


# -------------------------------------------------------------------------------------------------- forms
@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "C:\\windows\\a.png", "a\0b.png", "x" * 5000, "a;b=c\r\nd"]
)
def test_file_names_mean_nothing(http, name, tmp_path, monkeypatch):
    """No name of an upload reaches the file system: nothing is opened but what the server opens itself."""
    opened = []
    import builtins

    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *args, **kw: opened.append(args[0]) or original(*args, **kw))
    response = http.post("/v1/images/variations", files={"image": (name, SVG, "image/png")})
    error_of(response, 400)
    assert not [path for path in opened if "passwd" in str(path) or "xxxx" in str(path)]


def test_forms_with_too_much_in_them(http, server):
    """10,000 parts, fields twice, files in place of text and text in place of files, and a field of 1 MB."""
    parts = [(f"f{i}", (None, "x")) for i in range(10_000)]
    assert "Too many" in error_of(http.post("/v1/images/variations", files=parts), 400)["message"]
    many = [("image", (f"{i}.png", b"x", "image/png")) for i in range(1000)]
    assert "Too many" in error_of(http.post("/v1/images/variations", files=many), 400)["message"]
    image = ("image", ("a.png", picture(), "image/png"))
    twice = [image, ("n", (None, "1")), ("n", (None, "2"))]
    assert "twice" in error_of(http.post("/v1/images/variations", files=twice), 400)["message"]
    assert "at most 1" in error_of(http.post("/v1/images/variations", files=[image, image]), 400)["message"]
    error_of(http.post("/v1/images/variations", files=[("image", (None, "text"))]), 400)
    error_of(http.post("/v1/images/variations", files=[image, ("n", ("n.txt", b"1", "text/plain"))]), 400)
    long = [image, ("user", (None, "x" * 100_000))]
    error_of(http.post("/v1/images/variations", files=long), 400)
    error_of(http.post("/v1/images/variations", files=[("n", (None, "1"))]), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
        b"--b\r\n\r\nabc\r\n--b--\r\n",
        b"\xff" * 100,
        b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n\xff\xfe\r\n--b--\r\n',
    ],
)
def test_damaged_forms(http, body):
    for kind in (
        "multipart/form-data; boundary=b",
        "multipart/form-data",
        "multipart/form-data; charset=x; boundary=b",
    ):
        response = http.post("/v1/images/variations", content=body, headers={"content-type": kind})
        error_of(response, 400)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"prompt": NaN}', b"\xff", b"[" * 60_000, b'{"prompt": "\\ud800"}', b"null"]
)
def test_damaged_json(http, body):
    response = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    error_of(response, 400)


def test_bodies_that_are_too_long(http, server):
    """By their stated length, and as they come when they state none."""
    error = error_of(http.post("/v1/images/generations", json={"prompt": "x" * 100_000}), 413)
    assert "longer than" in error["message"]
    big = picture((2000, 1000))
    assert len(big) > 4 * 2**20
    assert error_of(http.post("/v1/images/variations", files={"image": big}), 413)
    some = b"x" * (4 * 2**20 + 1000)  # within the form's limit, and above that of a picture
    assert error_of(http.post("/v1/images/variations", files={"image": some}), 413)["param"] == "image"

    def endless():
        for _ in range(200):
            yield b"x" * 2**16

    kind = {"content-type": "application/json"}
    assert http.post("/v1/images/generations", content=endless(), headers=kind).status_code == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error_of(http.post("/v1/images/generations", content=b"{}", headers={"content-type": kind}), 415)


def test_paths(http):
    """Neither pictures' urls nor the page lead to files of this machine."""
    for path in (
        "/images/x.png",
        "/images/..%2f..%2fetc%2fpasswd.png",
        "/..%2f..%2fsetup.py",
        "/%2e%2e/app.py",
        "/nothing",
    ):
        assert http.get(path).status_code == 404, path
    assert http.post("/healthz").status_code == 405
    assert http.get("/v1/images/generations").status_code in (404, 405)


# ------------------------------------------------------------------------------------- who may do what
def test_keys(models):
    """With a key, the API and the metrics ask for it; health, the page and pictures' urls do not."""
    with running(models, wait_for=False, api_key="correct horse") as (address, service):
        get = lambda path, **headers: httpx.get(address + path, headers=headers)
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "correct horse"},
            {"authorization": "Basic correct horse"},
        ):
            error = error_of(get("/v1/models", **given), 401)
            assert error["code"] == "invalid_api_key"
            assert get("/metrics", **given).status_code == 401
        assert get("/v1/models", authorization="Bearer correct horse").status_code == 200
        assert get("/healthz").status_code in (200, 503)
        name = service.links.add(b"picture")
        assert get(f"/images/{name}.png").content == b"picture"


def test_pages_of_other_sites(server, models):
    """CORS is off, another site's page may not post, and a name that points here is not this server."""
    post = lambda **headers: httpx.post(
        f"{server[0]}/v1/images/generations", json={"prompt": ""}, headers=headers
    )
    error_of(post(origin="https://evil.example"), 403)
    error_of(post(origin="http://["), 403)
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[",
        "",
    ):
        error_of(post(host=host), 403)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"):
        assert post(host=host).status_code == 400, host
    assert post(origin=server[0]).status_code == 400  # its own page gets as far as the fields
    answer = httpx.get(f"{server[0]}/healthz", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    with running(models, wait_for=False, origins=("https://good.example",)) as (address, _):
        answer = httpx.post(
            f"{address}/v1/images/generations",
            json={"prompt": ""},
            headers={"origin": "https://good.example"},
        )
        assert answer.status_code == 400
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in: set a key"),
        ({"host": "::"}, "lets other machines in"),
        ({"host": "example.org"}, "lets other machines in"),
        ({"api_key": "short"}, "at least 8 characters"),
        ({"api_key": "long enough", "no_auth": True}, "exclude each other"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"upload": 0}, "upload must be at least"),
        ({"deadline": float("nan")}, "deadline must be a positive number"),
        ({"wait": -1.0}, "wait must be between"),
        ({"port": 70_000}, "--port must be between"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).check()
    for allowed in (
        {},
        {"host": "::1"},
        {"host": "0.0.0.0", "no_auth": True},
        {"host": "::", "api_key": "12345678"},
    ):
        Settings(**allowed).check()


# ------------------------------------------------------------------------------------------ slow and gone
def test_a_body_that_does_not_come(models):
    """A client that sends its body a byte at a time is given up."""
    with running(models, wait_for=False, body_time=0.5) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            answer = connection.recv(1000)
        assert b" 408 " in answer.splitlines()[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_no_job(server, stream):
    """The rows that nobody waits for are not drawn."""

    async def ask():
        reader, writer = await asyncio.open_connection(*server[0].removeprefix("http://").split(":"))
        fields = {"prompt": "a fox", "n": 10, "stream": stream, "partial_images": 2 * stream}
        body = json.dumps(fields).encode()
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        await writer.drain()
        while not server[1].worker._queue:
            await asyncio.sleep(0.001)
        writer.close()
        for _ in range(2000):
            if not server[1].worker._queue:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the job is still there")

    before = server[1].telemetry.rows._value.get()
    run_async(ask())
    assert server[1].telemetry.rows._value.get() - before < 10


# --------------------------------------------------------------------------------------------- links, logs
def test_links_end_and_are_bounded():
    now = [0.0]
    links = Links(60, 100, clock=lambda: now[0])
    first = links.add(b"x" * 40)
    now[0] = 30
    second = links.add(b"y" * 40)
    assert links.get(first) == b"x" * 40 and links.bytes == 80
    third = links.add(b"z" * 40)  # the oldest one makes room
    assert links.get(first) is None and links.get(second) and links.get(third) and links.bytes == 80
    now[0] = 91
    assert links.get(second) is None and links.get(third) is None and links.bytes == 0
    assert links.get("nothing") is None and len(first) >= 32


def test_logs_and_metrics(server, http, caplog):
    """The log has no prompts; the metrics count requests, pictures and batches."""
    with caplog.at_level(logging.INFO, "unclip_jax.serve"):
        assert http.post("/v1/images/generations", json={"prompt": "a secret wish"}).status_code == 200
        http.get("/secret-path")
    text = "\n".join(caplog.messages)
    assert "generations" in text and "secret wish" not in text and "req_" in text
    metrics = http.get("/metrics").text
    for name in (
        "unclip_requests_total",
        "unclip_pictures_total",
        "unclip_batch_rows_total",
        "unclip_queue_pictures",
    ):
        assert f"\n{name}" in metrics
    assert 'path="/v1/images/generations",status="200"' in metrics
    assert "secret-path" not in metrics  # a path that is not there does not become a label


def test_a_server_that_is_told_to_stop_finishes_first(models):
    """The request in progress gets its pictures; new ones are refused. So are those beyond the limit."""
    import threading

    with running(models, wait_for=False, batch=1, connections=1) as (address, service):
        drawing, gate, draw = threading.Event(), threading.Event(), service.worker._draw
        service.worker._draw = lambda *args: (drawing.set(), gate.wait(600), draw(*args))
        answers = []
        ask = lambda: answers.append(
            httpx.post(f"{address}/v1/images/generations", json={"prompt": "x"}, timeout=600)
        )
        thread = threading.Thread(target=ask)
        thread.start()
        assert drawing.wait(600)
        error = error_of(httpx.get(f"{address}/v1/models"), 503)
        assert "too many requests" in error["message"]
        assert httpx.get(f"{address}/healthz").json()["status"] == "ready"
        service.server.should_exit = True
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")
        gate.set()
        thread.join(600)
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 1
