"""Configurations of other libraries, key by key: each key is read, asked to have our value, or listed as one
that changes nothing. A key that is none of these is refused, so that nothing a file asks for is passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from unclip_jax.errors import InputError
from unclip_jax.typed import check_value, shown

MOST_LAYERS, LARGEST = 1000, 2**20  # more is a mistake, and would take all memory
STATED = object()  # in place of a default: the file must say it


@dataclass(frozen=True)
class Settings:
    """What one library's configuration may say.

    read: key -> (type, the library's default or STATED). Integers are sizes and counts.
    same: key -> the values under which our network computes the same. An absent key stands for the library's
      default, which is one of them.
    stated: as `same`, but the library's default is another value, so the file must say it.
    free: keys that do not change what is computed in sampling. Keys that begin with "_" need not be listed,
      except `_class_name`.
    """

    read: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    same: Mapping[str, Collection[Any]] = field(default_factory=dict)
    stated: Mapping[str, Collection[Any]] = field(default_factory=dict)
    free: Collection[str] = ()

    def take(self, config: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The values of `read`, with the library's defaults.

        A key that is not known is passed over only where its value is off: null, false or empty.

        Raises:
          ValueError: naming `name`, the first key that does not fit, and its value.
        """
        check_value(config, dict, name)
        for key, allowed in {**self.same, **self.stated}.items():
            if key not in config and key in self.stated:
                raise InputError(f"{name}: a configuration lacks {key!r}; copy the folder again")
            if key in config and not any(_equal(config[key], one) for one in allowed):
                ours = " or ".join(repr(one) for one in allowed)
                raise InputError(f"{name}: {key} is {shown(config[key])}, but the network here has {ours}")
        taken = {}
        for key, (kind, default) in self.read.items():
            if key not in config and default is STATED:
                raise InputError(f"{name}: a configuration lacks {key!r}; copy the folder again")
            taken[key] = config.get(key, default)
            check_value(taken[key], kind, f"{name}: {key}")
            counts = {int: lambda n: [n], tuple[int, ...]: list}.get(kind, lambda n: [])(taken[key])
            largest = MOST_LAYERS if "layers" in key else LARGEST
            if any(not 1 <= n <= largest for n in counts):
                raise InputError(f"{name}: {key} must be between 1 and {largest}, not {shown(taken[key])}")
        known = self.read.keys() | self.same.keys() | self.stated.keys() | set(self.free)
        for key, value in config.items():
            if key in known or (key.startswith("_") and key != "_class_name"):
                continue
            if not (value is None or value is False or value in ("", [], {})):
                raise InputError(
                    f"{name}: {shown(key)} is {shown(value)}, a setting that is not known here; "
                    "the network would be another one"
                )
        return taken


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        return isinstance(value, (list, tuple)) and list(value) == list(wanted)
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
