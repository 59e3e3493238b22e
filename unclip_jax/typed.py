"""Compares values from outside (a JSON file, a command line) with the types that a dataclass declares.

A JSON list fits a tuple, and an integer fits a float. A truth value is no number, and a number is no text.
NaN and infinity fit nothing.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from typing import Any

from unclip_jax.errors import InputError

NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", dict: "an object"}
SHOWN = 60  # characters of a wrong value that a message shows


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type: int, float, bool, str, dict, None, tuple[...], or a union of these."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if inner[-1] is Ellipsis:
            return all(fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if kind in (None, type(None)):
        return value is None
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, Mapping if kind is dict else kind)


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(one) for one in inner)
    if origin is tuple:
        many = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"a list of {many}{NAMES[inner[0]].split()[-1]}s"
    return "null" if kind in (None, type(None)) else NAMES[kind]


def shown(value: Any) -> str:
    """A value as a message shows it: in ASCII, and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_value(value: Any, kind: Any, where: str) -> None:
    """Raises an InputError that begins with `where` if a value does not have the type."""
    if not fits(value, kind):
        raise InputError(f"{where} must be {describe(kind)}, not {shown(value)}")


@functools.cache
def fields_of(kind: type, without: tuple[str, ...] = ()) -> dict[str, tuple[Any, bool]]:
    """The fields of a dataclass that have a type from `fits`: name -> (type, whether it has no default)."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in dataclass_fields(kind)
        if field.init and field.name not in without
    }


def check_fields(
    values: Any, fields: Mapping[str, tuple[Any, bool]], where: str, partial: bool = False
) -> None:
    """Checks a JSON object against fields from `fields_of`.

    Args:
      values: the object.
      fields: name -> (type, whether it is required).
      where: what the object is, for messages.
      partial: whether required fields may be absent.

    Raises:
      InputError: when it is no object, or naming the first field that is unknown, missing or of a wrong type.
    """
    check_value(values, dict, where)
    unknown = sorted(ascii(name) for name in values.keys() - fields.keys())
    if unknown:
        raise InputError(f"{where}: unknown key {', '.join(unknown[:3])}; known: {listed(fields)}")
    for name, (kind, required) in fields.items():
        if name in values:
            check_value(values[name], kind, f"{where}: {name}")
        elif required and not partial:
            raise InputError(f"{where} lacks {name!r}")


def listed(names: Iterable[str]) -> str:
    """The names, joined by commas."""
    return ", ".join(map(str, names))
