"""`unclip VERB ...`: parses the command line and turns expected errors into one line and exit status 1."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

import unclip_jax
from unclip_jax.paths import is_store_error

OURS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # what XLA says of a program, and not of another host
EXPECTED = (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError, MemoryError, ArithmeticError)

# verb -> (module, what it does)
VERBS = {
    "train": ("unclip_jax.cli.train", "train one stage of the cascade"),
    "embed": ("unclip_jax.cli.embed", "embed a dataset with CLIP, once, for the priors to train from"),
    "compile": ("unclip_jax.cli.compile", "compile a stage's train step for a pod that is not there, and say what it needs"),
    "bundle": ("unclip_jax.cli.bundle", "collect trained stages into a release bundle"),
    "convert": ("unclip_jax.cli.convert", "make a bundle of public weights: Karlo, CLIP"),
    "export": ("unclip_jax.cli.export", "write a bundle of Karlo's topology as diffusers' folder"),
    "measure": ("unclip_jax.cli.measure", "measure a bundle on held-out rows"),
    "evaluate": ("unclip_jax.cli.evaluate", "measure a bundle's CLIP on a dataset: retrieval, zero-shot classes, a linear probe"),
    "sample": ("unclip_jax.cli.sample", "draw pictures from captions"),
    "vary": ("unclip_jax.cli.vary", "draw variations of a picture"),
    "interpolate": ("unclip_jax.cli.interpolate", "draw the way from one picture to another"),
    "edit": ("unclip_jax.cli.edit", "change a picture in the direction from one caption to another"),
    "reconstruct": ("unclip_jax.cli.reconstruct", "draw a picture from more and more principal components of its embedding"),
    "inpaint": ("unclip_jax.cli.inpaint", "draw part of a picture anew"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each verb's module adds its own arguments."""
    parser = argparse.ArgumentParser(prog="unclip", description="unCLIP (DALL-E 2) in JAX.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {unclip_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, words) in VERBS.items():
        verb = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        importlib.import_module(module).add_arguments(verb)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for an error told in one line, 2 for a wrong command line, 130 when interrupted, 75
    when a training run was told to stop (SIGTERM) or hangs: what was done is saved, and the same command goes on."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    debug = bool(os.environ.get("UNCLIP_DEBUG"))
    for noisy in ("absl", "asyncio", "jax", "orbax", "tensorflow"):  # the errors of Orbax's threads come to us as well, in one line
        logging.getLogger(noisy).setLevel(logging.CRITICAL if noisy in ("absl", "asyncio") and not debug else logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        importlib.import_module(VERBS[args.verb][0]).run(args)
    except KeyboardInterrupt:
        print("unclip: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, EXPECTED) or is_store_error(error) or str(error).startswith(OURS):
            if debug:
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            line = " ".join(str(text).split())
            print(f"unclip {args.verb}: error: {line[:500] or type(error).__name__} (UNCLIP_DEBUG=1 shows the traceback)", file=sys.stderr)
            return 1
        if not isinstance(error, RuntimeError) or not getattr(args, "distributed", False):
            raise
        from unclip_jax.train.common import RESTART

        line = " ".join(str(error).split())[:500]  # jax's, of a collective or of the hosts' service
        print(f"unclip {args.verb}: error: another host is gone or does not answer; start the same command again ({line})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(RESTART)  # jax would wait for the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
