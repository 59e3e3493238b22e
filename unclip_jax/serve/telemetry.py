"""What a server reports: Prometheus metrics, and a line of log for every request."""

from __future__ import annotations

import logging

LOG = logging.getLogger("unclip_jax.serve")
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """The metrics of one server, in a registry of their own."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        shared = {"registry": self.registry}
        self.requests = Counter(
            "unclip_requests", "Requests by path and status", ["path", "status"], **shared
        )
        self.seconds = Histogram(
            "unclip_request_seconds", "Seconds from request to answer", ["path"], buckets=SECONDS, **shared
        )
        self.pictures = Counter("unclip_pictures", "Pictures drawn", ["model", "verb"], **shared)
        self.waiting = Gauge("unclip_queue_pictures", "Pictures that wait to be drawn", **shared)
        self.batches = Counter("unclip_batches", "Batches drawn", **shared)
        self.slots = Counter("unclip_batch_slots", "Rows of all batches, with padding", **shared)
        self.rows = Counter("unclip_batch_rows", "Rows of all batches that were pictures", **shared)
        self.batch_seconds = Histogram(
            "unclip_batch_seconds", "Seconds that a batch took", buckets=SECONDS, **shared
        )
        self.compiled = Counter("unclip_compiled_programs", "Programs compiled", **shared)
        self.compile_seconds = Counter("unclip_compile_seconds", "Seconds spent on compilation", **shared)
        self.links = Gauge("unclip_link_bytes", "Bytes of pictures kept for their urls", **shared)

    def text(self) -> bytes:
        """All metrics in the format of Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
