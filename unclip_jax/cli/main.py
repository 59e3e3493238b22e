"""`unclip VERB ...`: parses the command line, runs the verb, and decides how to show an error.

For an error that the user can fix, the command prints one line and exits with status 1. Such errors are
`UserError`, `OSError`, the errors of a store, and XLA's errors about a program. Any other exception is a bug
of this package: the command shows the traceback and what to put into an issue, and exits with status 70.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import shlex
import sys
import traceback

import unclip_jax
from unclip_jax.errors import UserError, one_line
from unclip_jax.paths import is_store_error

# XLA's errors about a program (its others are about another host) start with one of these.
PROGRAM_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
NO_DEVICES = "Unable to initialize backend"  # JAX's error if a requested kind of device is missing
SOFTWARE = 70  # EX_SOFTWARE of sysexits.h

# verb -> (module, what it does)
VERBS = {
    "train": ("unclip_jax.cli.train", "train one stage of the cascade"),
    "embed": ("unclip_jax.cli.embed", "embed a dataset once with CLIP, for the priors to train on"),
    "compile": (
        "unclip_jax.cli.compile",
        "compile a stage's train step for a pod, without the pod, and say what it needs",
    ),
    "bundle": ("unclip_jax.cli.bundle", "collect trained stages into a release bundle"),
    "convert": (
        "unclip_jax.cli.convert",
        "convert public weights (Karlo, Stable Diffusion, CLIP) or an older bundle to a bundle",
    ),
    "export": (
        "unclip_jax.cli.export",
        "write a bundle of the topology of public weights as a diffusers folder",
    ),
    "fetch": ("unclip_jax.cli.fetch", "download the weights of the network that FID is computed with"),
    "evaluate": (
        "unclip_jax.cli.evaluate",
        "measure a bundle: its samples, or its CLIP by retrieval, zero-shot classification or a linear probe",
    ),
    "doctor": ("unclip_jax.cli.doctor", "test every stage of a bundle, and say which one is to blame"),
    "sample": ("unclip_jax.cli.sample", "draw pictures from captions"),
    "vary": ("unclip_jax.cli.vary", "draw variations of a picture"),
    "interpolate": ("unclip_jax.cli.interpolate", "draw pictures between two pictures"),
    "edit": ("unclip_jax.cli.edit", "change a picture in the direction from one caption to another"),
    "reconstruct": (
        "unclip_jax.cli.reconstruct",
        "draw a picture again from more and more principal components of its embedding",
    ),
    "inpaint": ("unclip_jax.cli.inpaint", "draw part of a picture anew"),
    "complete": ("unclip_jax.cli.complete", "keep the upper rows of a picture and draw the rest"),
    "upscale": ("unclip_jax.cli.upscale", "enlarge pictures with a bundle's upsamplers"),
    "img2img": ("unclip_jax.cli.img2img", "draw a picture again for a caption, from its noised copy"),
    "mix": ("unclip_jax.cli.mix", "draw mixtures of pictures and captions"),
    "serve": ("unclip_jax.cli.serve", "serve the images API and a page to draw on"),
}


class Parser(argparse.ArgumentParser):
    """A parser that shows an error in one line."""

    def error(self, message: str):
        """Prints the message and ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all verbs. Each verb's module adds its arguments."""
    parser = Parser(prog="unclip", description="unCLIP (DALL-E 2) in JAX.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {unclip_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        importlib.import_module(module).add_arguments(verb)
    return parser


def is_text(word: str) -> bool:
    """Whether a word of the command line was valid UTF-8 without NUL characters."""
    return "\0" not in word and not any(0xD800 <= ord(character) <= 0xDFFF for character in word)


def is_expected(error: Exception, distributed: bool) -> bool:
    """Whether the user can fix the cause of an exception, so that one line of message is enough.

    Missing devices count only if there is one host. With several hosts, an earlier process may hold a host's
    devices for a moment longer.
    """
    program = PROGRAM_ERRORS if distributed else (*PROGRAM_ERRORS, NO_DEVICES)
    return isinstance(error, (UserError, OSError)) or is_store_error(error) or str(error).startswith(program)


def bug_report(argv: list[str]) -> str:
    """The line under the traceback of a bug: what to report, including the command and the versions."""
    from importlib import metadata

    try:
        jax = metadata.version("jax")
    except metadata.PackageNotFoundError:
        jax = "not installed"
    versions = f"unclip_jax {unclip_jax.__version__}, jax {jax}, Python {platform.python_version()}"
    return (
        "This is a bug in unclip_jax. Please open an issue with the traceback above and this line: "
        f"`{shlex.join(['unclip', *argv])}`, {versions}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0; 1 for an error shown in one line, or for a fault that `unclip doctor` found; 70 for
      a bug of this package; 130 if interrupted. On a wrong command line the parser itself exits with status
      2. A training run exits with status 75 if it gets SIGTERM or hangs. It has then saved its state, and the
      same command resumes it.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    for word in argv:
        if not is_text(word):
            parser.error(f"{word!a} is not text in UTF-8, or has NUL characters")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    debug = bool(os.environ.get("UNCLIP_DEBUG"))
    for noisy in ("absl", "asyncio", "jax", "orbax", "tensorflow"):
        # Errors in Orbax's threads also reach this function, which prints them in one line.
        silent = noisy in ("absl", "asyncio") and not debug
        logging.getLogger(noisy).setLevel(logging.CRITICAL if silent else logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module(VERBS[args.verb][0]).run(args) or 0
    except KeyboardInterrupt:
        print("unclip: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        distributed = getattr(args, "distributed", False)
        if is_expected(error, distributed):
            if debug:
                raise
            print(
                f"unclip {args.verb}: error: {one_line(error, 500)} (UNCLIP_DEBUG=1 shows the traceback)",
                file=sys.stderr,
            )
            return 1
        if not isinstance(error, RuntimeError) or not distributed:
            traceback.print_exception(error)
            print(bug_report(argv), file=sys.stderr)
            return SOFTWARE
        from unclip_jax.run.hosts import RESTART

        end = "another host is gone or does not answer; start the same command again"
        line = one_line(error, 500)  # JAX's message about a collective or the hosts' service
        print(f"unclip {args.verb}: error: {end} ({line})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(RESTART)  # a normal exit would make JAX wait for the other hosts


if __name__ == "__main__":
    sys.exit(main())
