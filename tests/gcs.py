"""A stand-in for Google Cloud Storage on loopback: buckets in memory.

It serves the JSON API that TensorFlow and TensorStore use. The variable TENSORSTORE_GCS_HTTP_URL directs
TensorStore to it. TensorFlow's hosts are compiled in, so the server is also the HTTPS proxy that
`https_proxy` names: it accepts CONNECT, and answers in place of the host with a certificate of its own
authority (CURL_CA_BUNDLE).
"""

from __future__ import annotations

import json
import ssl
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import trustme

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Gcs:
    """The server.

    objects: {(bucket, name): (bytes, generation)}.
    log: the method and path of every request.
    """

    def __init__(self, folder, buckets=("bucket",)):
        self.buckets, self.objects, self.uploads, self.log = set(buckets), {}, {}, []
        self.lock, self.generation = threading.Lock(), 1
        authority = trustme.CA()
        self.authority = str(folder / "authority.pem")
        authority.cert_pem.write_to_path(self.authority)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.tls)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def env(self):
        """The environment variables that make a process use this server as the cloud."""
        return {
            "https_proxy": self.url,
            "CURL_CA_BUNDLE": self.authority,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_ROOT": "127.0.0.1:9",
        }

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def put(self, bucket, name, data):
        with self.lock:
            self.generation += 1
            self.objects[bucket, name] = (
                data,
                self.generation,
                time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            )
            return self.describe(bucket, name)

    def describe(self, bucket, name):
        data, generation, updated = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": updated,
            "timeCreated": updated,
        }

    def list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for where, name in sorted(self.objects):
            if where != bucket or not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            elif name >= query.get("startOffset", "") and (
                not query.get("endOffset") or name < query["endOffset"]
            ):
                items.append(self.describe(bucket, name))
        return {"items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # headers and body are written one after the other: 40 ms a request otherwise
    )
    gcs: Gcs

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.connection = self.gcs.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb", -1), _Writer(self.connection)
        self.close_connection = False
        while not self.close_connection:
            self.handle_one_request()
        self.close_connection = True

    def reply(self, status, value=b"", headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in dict(headers).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self):
        gcs, split = self.gcs, urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(split.query, keep_blank_values=True).items()}
        body = self.body()
        gcs.log.append(f"{self.command} {self.path}")
        parts = split.path.split("/")
        if split.path.startswith("/upload/"):
            return self.upload(unquote(parts[parts.index("b") + 1]), query, body)
        if split.path.startswith("/session/"):
            return self.session(parts[2], body)
        if split.path.startswith("/storage/v1/b/"):
            bucket = unquote(parts[4])
            if bucket not in gcs.buckets:
                return self.reply(404, {"error": {"code": 404, "message": "no such bucket"}})
            if len(parts) == 5:
                return self.reply(200, {"kind": "storage#bucket", "name": bucket, "location": "NOWHERE"})
            if len(parts) == 6:
                return self.reply(200, gcs.list(bucket, query))
            return self.object(bucket, unquote(parts[6]), query, parts[7:])
        bucket, _, name = split.path[1:].partition("/")  # storage.googleapis.com/bucket/object
        return self.object(bucket, unquote(name), {"alt": "media"}, [])

    def object(self, bucket, name, query, rest):
        gcs = self.gcs
        with gcs.lock:
            stored = gcs.objects.get((bucket, name))
        if stored is None:
            return self.reply(404, {"error": {"code": 404, "message": "no such object"}})
        data, generation, _ = stored
        if self.command == "DELETE":
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self.reply(412)
            with gcs.lock:
                gcs.objects.pop((bucket, name), None)
            return self.reply(204)
        if rest and rest[0] in ("rewriteTo", "copyTo"):
            made = gcs.put(unquote(rest[2]), unquote(rest[4]), data)
            return self.reply(200, {"done": True, "resource": made})
        if query.get("alt") != "media":
            return self.reply(200, gcs.describe(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.reply(304)
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = self.headers.get("Range")
        if not asked:
            return self.reply(200, data, headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1 if first and last else len(data), len(data))
        if start >= len(data):
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self.reply(
            206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        )

    def upload(self, bucket, query, body):
        gcs, name = self.gcs, query["name"]
        if bucket not in gcs.buckets:
            return self.reply(404, {"error": {"code": 404, "message": "no such bucket"}})
        expected = query.get("ifGenerationMatch")
        with gcs.lock:
            now = gcs.objects.get((bucket, name), (b"", 0))[1]
        if expected is not None and int(expected) != now:
            return self.reply(412, {"error": {"code": 412, "message": "precondition"}})
        if query.get("uploadType") == "resumable":
            session = uuid.uuid4().hex
            gcs.uploads[session] = [bucket, name, b""]
            host = self.headers.get("Host", "")
            scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
            return self.reply(200, b"", {"Location": f"{scheme}://{host}/session/{session}"})
        return self.reply(200, gcs.put(bucket, name, body))

    def session(self, session, body):
        bucket, name, had = self.gcs.uploads[session]
        span = self.headers.get("Content-Range", "")
        total = span.rpartition("/")[2]
        data = self.gcs.uploads[session][2] = had + body
        if total in ("", "*") or len(data) < int(total):
            return self.reply(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        return self.reply(200, self.gcs.put(bucket, name, data))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer


class _Writer:
    closed = False

    def __init__(self, connection):
        self.connection = connection

    def write(self, data):
        self.connection.sendall(data)
        return len(data)

    def flush(self):
        pass

    def close(self):
        pass
