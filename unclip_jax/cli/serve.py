"""`unclip serve`: the images API and the page, on this machine or for others."""

from __future__ import annotations

import argparse
import socket

from unclip_jax.cli.options import number
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "--bundle",
        action="append",
        dest="bundles",
        metavar="DIR",
        help="a bundle's folder, or the name of a shipped one; give it several times for several (emoji)",
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="devices to draw on, as in unclip sample (all devices)"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="A", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0: any free one (8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send as a bearer token. The variable UNCLIP_API_KEY does the same and is not "
        "seen in the list of processes (none)",
    )
    parser.add_argument(
        "--no-auth", action="store_true", help="let other machines in without a key, with --host"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="most pictures at a time on each device (4 on CPU, else 16)"
    )
    parser.add_argument(
        "--compile",
        metavar="VERB,...",
        help="what to compile at start, of generations, stream, edits and variations; the rest is compiled "
        "when it is first asked for (all)",
    )
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="most pictures that wait (256)")
    parser.add_argument(
        "--deadline", type=number, default=300.0, metavar="S", help="seconds that a request may take (300)"
    )
    parser.add_argument("--upload", type=number, default=4.0, metavar="MIB", help="largest upload in MiB (4)")
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web site that may call the API and show the page in a frame (none)",
    )
    parser.add_argument(
        "--public-url", metavar="URL", help="what urls of pictures start with (the address that clients call)"
    )
    parser.add_argument(
        "--no-filter",
        action="store_true",
        help="keep the pictures that a bundle's safety checker flags, and would make black",
    )
    parser.add_argument("--log-prompts", action="store_true", help="write prompts into the log")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      OSError: in one line, where the address is not there, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"cannot listen on {host} port {port}: {reason}; choose others with --host, --port"
        ) from None


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import os

    from unclip_jax.cli.options import parse_mesh, save_memory_on_cpu, use_compilation_cache
    from unclip_jax.errors import MissingPackageError

    try:
        import uvicorn

        from unclip_jax.serve.app import create_app
    except ImportError as error:
        raise MissingPackageError(
            f'unclip serve needs {error.name}: pip install "unclip_jax[serve]"'
        ) from None
    from unclip_jax.serve.models import load_models
    from unclip_jax.serve.settings import MIB, VERBS, Settings

    settings = Settings(
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("UNCLIP_API_KEY") or None,
        no_auth=args.no_auth,
        batch=args.batch,
        compile=VERBS if args.compile is None else tuple(args.compile.split(",")),
        queue=args.queue,
        deadline=args.deadline,
        upload=int(args.upload * MIB),
        origins=tuple(args.cors),
        log_prompts=args.log_prompts,
        public_url=args.public_url,
    )
    settings.check()
    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    listening = listen(settings.host, settings.port)
    save_memory_on_cpu()
    use_compilation_cache()
    app = create_app(settings, load_models(args.bundles or ["emoji"], mesh, args.no_filter))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        server_header=False,
        limit_concurrency=2 * settings.connections,  # beyond what the application itself answers with 503
        timeout_graceful_shutdown=int(settings.drain),
        timeout_keep_alive=15,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"http://{shown}:{port}  the page; the API is below /v1; ready when /healthz says so", flush=True)
    server.run(sockets=[listening])
    if not server.started:
        raise InputError("the server did not start; its log says why")
