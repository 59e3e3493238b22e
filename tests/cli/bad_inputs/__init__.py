"""Bad inputs, a module for each kind: every row is a command and the words of the one line that it must give.

Each module exports `rows(box)`. It makes its bad files in the empty folder `box` and returns its rows. The
command runs in that folder, so a row may name files by paths relative to it.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A command with a bad input.

    name: what is bad about it, in a few words. argv: the command's arguments. says: words of its message.
    """

    name: str
    argv: list[str]
    says: str
