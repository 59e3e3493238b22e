"""The fields of requests: one table checks them and describes them in the OpenAPI document.

The published fields keep their names and limits. What OpenAI's later image models take and nothing here uses
(`quality`, `style`, ...) is accepted with the values that ask for nothing special, and refused otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclip_jax.serve.errors import ApiError

LARGEST_SIDE = 2048  # of a picture that is resized for a client, in pixels
SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Field:
    """What a field takes.

    kind: string, integer, number or boolean. words: what it means. least, most: of a number, or of the length
    of text. choices: the allowed values. pattern: of text. default: the value when it is absent.
    """

    kind: str
    words: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    default: Any = None
    required: bool = False

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        found: dict[str, Any] = {"type": self.kind, "description": self.words}
        names = ("minLength", "maxLength") if self.kind == "string" else ("minimum", "maximum")
        found |= {name: value for name, value in zip(names, (self.least, self.most)) if value is not None}
        if self.choices:
            found["enum"] = list(self.choices)
        if self.pattern:
            found["pattern"] = self.pattern
        if self.default is not None:
            found["default"] = self.default
        return found

    def read(self, name: str, value: Any) -> Any:
        """A value of the field.

        Raises:
          ApiError: 400, naming the field and what it takes.
        """
        kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
        if not isinstance(value, kinds[self.kind]) or isinstance(value, bool) != (self.kind == "boolean"):
            raise ApiError(400, f"{name} must be of type {self.kind}, got {shown(value)}", name)
        if self.kind == "number" and not math.isfinite(value):
            raise ApiError(400, f"{name} must be a finite number, got {value}", name)
        if self.choices and value not in self.choices:
            raise ApiError(400, f"{name} must be one of {', '.join(self.choices)}, got {shown(value)}", name)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ApiError(400, f"{name} must look like {self.words}, got {shown(value)}", name)
        if self.kind == "string" and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            raise ApiError(400, f"{name} is not text: it has half of a character", name)
        measure = len(value) if self.kind == "string" else value
        unit = " characters" if self.kind == "string" else ""
        if self.least is not None and measure < self.least:
            raise ApiError(400, f"{name} must have or be at least {self.least:g}{unit}, got {measure}", name)
        if self.most is not None and measure > self.most:
            raise ApiError(400, f"{name} must have or be at most {self.most:g}{unit}, got {measure}", name)
        return value

    def from_text(self, name: str, text: str) -> Any:
        """A value of the field from the text of a form.

        Raises:
          ApiError: as `read`.
        """
        value: Any = text
        if self.kind == "boolean":
            value = {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
        elif self.kind in ("integer", "number") and re.fullmatch(
            r"[-+]?[0-9.]{1,30}(e[-+]?[0-9]{1,3})?", text
        ):
            try:
                value = int(text) if self.kind == "integer" else float(text)
            except ValueError:
                value = text
        return self.read(name, value)


def shown(value: Any) -> str:
    """A value as short JSON, for messages."""
    return json.dumps(value, default=str)[:80]


PROMPT = Field("string", "what to draw", least=1, most=1000, required=True)
NOTHING = "accepted for other clients; has no effect"
COMMON: dict[str, Field] = {
    "model": Field("string", "a name from /v1/models; dall-e-2 is the first one", most=200),
    "n": Field("integer", "number of pictures", 1, 10, default=1),
    "size": Field("string", "a size such as 64x64, or auto", pattern=r"auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3}"),
    "response_format": Field("string", "how pictures come", choices=("url", "b64_json"), default="url"),
    "user": Field("string", "a name of the end user; it is not used", most=500),
    "seed": Field("integer", "random seed; the answer says which one was used", 0, SEEDS),
    "steps": Field("integer", "the decoder's sampling steps; the bundle's if absent", 1, 250),
    "guidance_scale": Field("number", "the decoder's guidance scale; the bundle's if absent", -100, 100),
}
PRIOR: dict[str, Field] = {
    "prior": Field(
        "string",
        "where the image embedding comes from",
        choices=("prior_diffusion", "prior_ar", "none", "null"),
    ),
    "prior_guidance_scale": Field("number", "the prior's guidance scale", -100, 100),
    "candidates": Field("integer", "embeddings that the prior draws; the best is kept", 1, 16),
    "negative_prompt": Field("string", "what not to draw, for systems that take it", most=1000),
}
STREAM: dict[str, Field] = {
    "stream": Field("boolean", "send server-sent events", default=False),
    "partial_images": Field("integer", "pictures to send before the last one, with stream", 0, 3, default=0),
}
ETA = {"eta": Field("number", "noise of DDIM, from 0 to 1", 0, 1)}
LATER: dict[str, Field] = {
    "quality": Field("string", NOTHING, choices=("auto", "standard")),
    "style": Field("string", NOTHING, choices=("natural",)),
    "background": Field("string", NOTHING, choices=("auto", "opaque")),
    "moderation": Field("string", NOTHING, choices=("auto", "low")),
    "output_format": Field("string", NOTHING, choices=("png",)),
    "output_compression": Field("integer", NOTHING, 100, 100),
    "safety_identifier": Field("string", NOTHING, most=500),
    "input_fidelity": Field("string", NOTHING, choices=("low",)),
}
CHANGED = {"eta": Field("number", "0 gives the picture itself, 1 changes it most", 0, 1, default=1.0)}
PATH = {**COMMON, "n": Field("integer", "number of pictures, with both ends", 2, 10, default=8)}
VERBS: dict[str, dict[str, Field]] = {
    "generations": {"prompt": PROMPT, **COMMON, **PRIOR, **ETA, **STREAM, **LATER},
    "edits": {"prompt": PROMPT, **COMMON, **PRIOR, **STREAM, **LATER},
    "variations": {**COMMON, **CHANGED, **STREAM},
    "interpolate": {
        **PATH,
        "noise": Field(
            "string", "whether the noise turns, too, or stays", choices=("slerp", "fixed"), default="slerp"
        ),
        **STREAM,
    },
    "text_diff": {
        "source": Field("string", "a caption of the picture as it is", most=1000, default=""),
        "target": Field(
            "string", "a caption of the picture as it should become", least=1, most=1000, required=True
        ),
        **PATH,
        "max_theta": Field("number", "how far the last picture turns", 0.01, 1, default=0.5),
        **STREAM,
    },
    "reconstruct": {
        "dims": Field(
            "string",
            "numbers of principal components such as 20,40,80; at most ten",
            pattern=r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5}){0,9}",
        ),
        **{name: field for name, field in COMMON.items() if name != "n"},
        **STREAM,
    },
}


def check_fields(verb: str, values: Mapping[str, Any], *, text: bool = False) -> dict[str, Any]:
    """Checks the fields of a request, and fills in defaults. A field that is null counts as absent.

    Args:
      verb: of VERBS.
      values: the fields; with `text`, as a form has them.

    Raises:
      ApiError: 400, naming the first field that is unknown, missing or out of range.
    """
    fields = VERBS[verb]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        known = ", ".join(fields)
        raise ApiError(
            400, f"unknown field {shown(unknown[0])}; known: {known}", unknown[0][:80], "unknown_parameter"
        )
    found = {}
    for name, field in fields.items():
        value = values.get(name)
        if value is None:
            if field.required:
                raise ApiError(400, f"{name} is missing: {field.words}", name, "missing_parameter")
            found[name] = field.default
        else:
            found[name] = field.from_text(name, value) if text else field.read(name, value)
    return found


def read_size(text: str | None) -> int | None:
    """The side of a square size such as 64x64 in pixels; None for auto.

    Raises:
      ApiError: 400, where it is not square, or too large.
    """
    if text in (None, "auto"):
        return None
    width, height = map(int, text.split("x"))
    if width != height or not 8 <= width <= LARGEST_SIDE:
        raise ApiError(
            400, f"size must be square, from 8x8 to {LARGEST_SIDE}x{LARGEST_SIDE}, got {text}", "size"
        )
    return width


def schema(verb: str, files: Mapping[str, Any] | None = None, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON schema of a request.

    files: schemas of the files that a form has beside its fields. needed: those that it must have.
    """
    fields = VERBS[verb]
    required = [*needed, *(name for name, field in fields.items() if field.required)]
    properties = {**(files or {}), **{name: field.schema() for name, field in fields.items()}}
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
