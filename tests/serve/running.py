"""A server in this process, for tests: uvicorn in a thread, on a free port."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from unclip_jax.serve.app import create_app
from unclip_jax.serve.settings import Settings


@contextlib.contextmanager
def running(models, wait_for=True, **settings):
    """Runs a server of `models`; yields its address and its `Service`.

    wait_for: wait until all announced programs are compiled.
    """
    chosen = Settings(port=0, **settings)
    app = create_app(chosen, models)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=lambda: server.run(sockets=[socket]), daemon=True)
    thread.start()
    service = app.state.service
    service.server = server
    try:
        until = time.monotonic() + 900
        while not server.started or (wait_for and service.worker.compiling()):
            assert time.monotonic() < until and thread.is_alive(), "the server does not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not stop"


def run_async(task):
    """Runs a coroutine to its end, in a thread: Playwright leaves an event loop running in the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, task).result()
