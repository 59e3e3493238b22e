"""Errors that unclip_jax raises on purpose, because of something that its user can fix.

Each error has a message of one line, which names what is wrong and how to fix it. The `unclip` command prints
that line and exits with status 1. It treats any other exception as a bug of this package and shows its
traceback. Each class also derives from the builtin exception that describes it, so that `except ValueError`
and the like work in programs that call the package. Errors about files and networks are the builtin `OSError`
and `FileNotFoundError`. The command prints these in one line as well.

| class                 | builtin              | raised when                                              |
|-----------------------|----------------------|----------------------------------------------------------|
| `InputError`          | `ValueError`         | an argument, a setting or a file's content is not usable |
| `MissingError`        | `KeyError`           | something asked for by name does not exist               |
| `MissingPackageError` | `ImportError`        | an optional package is not installed                     |
| `MemoryNeededError`   | `MemoryError`        | a program does not fit into the memory of the devices    |
| `NumericalError`      | `FloatingPointError` | a computation is no longer finite                        |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """The base class of all errors in this module. Raise one of its subclasses."""


class InputError(UserError, ValueError):
    """An argument, a setting or the content of a file is not usable."""


class MissingError(UserError, KeyError):
    """Something that the user asked for by name does not exist.

    `str(error)` is the message itself. (`str` of a plain `KeyError` gives the message's repr.)
    """

    def __str__(self) -> str:
        return Exception.__str__(self)


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed."""


class MemoryNeededError(UserError, MemoryError):
    """A program needs more memory than the devices have."""


class NumericalError(UserError, FloatingPointError):
    """A computation is no longer finite."""


def one_line(error: BaseException, length: int = 300) -> str:
    """Returns an exception's message in one line of at most `length` characters.

    An exception without a message gives the name of its class.
    """
    message = error.args[0] if type(error) is KeyError and error.args else error
    return " ".join(str(message).split())[:length] or type(error).__name__


@contextlib.contextmanager
def input_errors(name: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Converts what another library raises about a user's input to an `InputError` that begins with `name`.

    Args:
      name: the file, argument or setting at fault.
      kinds: the exceptions to convert. A `UserError` or an `OSError` passes through unchanged.

    Raises:
      InputError: "name: the first exception's message", in one line.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except kinds as error:
        raise InputError(f"{name}: {one_line(error)}") from error
