"""Format 1 of release bundles and of the runs' descriptions, converted in memory to format 2.

| | format 1 | format 2 |
|---|---|---|
| part, run, kind | `prior`, `pca` | `prior_diffusion`, `codec` |
| hashes of the networks a part was trained under | `clip: hash` | `frozen: {"clip": hash}` |
| CLIP's tokenizer | `tokenizer` of the bundle and of every run | `tokenizer` of the part `clip` |
| tokenizer of a part's own text encoder | `text_tokenizer` | `tokenizer` |
| network for an upsampler's last step | named `<upsampler>_last` | names the upsampler in `last_step_of` |

Every function returns new dictionaries and leaves its arguments as they are. What is already in the names of
format 2 stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"prior": "prior_diffusion", "pca": "codec"}  # of parts and runs
KINDS = {"pca": "codec"}
LAST = "_last"  # the end of a name in format 1


def part_name(name: str) -> str:
    """The name in format 2 of a part or run."""
    return NAMES.get(name, name)


def upgrade_bundle(top: Mapping[str, Any], configs: Mapping[str, Mapping]) -> tuple[dict, dict[str, dict]]:
    """The description of a bundle of format 1 in format 2.

    Args:
      top: what `bundle.json` holds.
      configs: what `config.json` holds, for all parts or some of them, by the name in format 1 or 2.

    Returns:
      `bundle.json` and the parts' configurations in format 2, both by the parts' new names.
    """
    provenance = dict(top.get("provenance", {}))
    if "training" in provenance:
        provenance["training"] = _renamed(provenance["training"])
    upgraded = {
        "format_version": 2,
        "system": "unclip",
        "parts": _renamed(top["parts"]),
        "sampling": _renamed(top["sampling"]),
        "provenance": provenance,
    }
    return upgraded, {part_name(n): _upgrade_part(n, c, top.get("tokenizer")) for n, c in configs.items()}


def upgrade_run_meta(meta: Mapping[str, Any]) -> dict:
    """The description (`meta`) of a training run in format 2; one that is in format 2 is returned unchanged.

    The recorded configuration (`config`) and the provenance stay as they were written.

    Args:
      meta: {"name", "part", "sampling", "config", "provenance", ...}, in format 1 also "tokenizer".
    """
    upgraded = dict(meta)
    tokenizer = upgraded.pop("tokenizer", None)
    if "part" in meta:
        upgraded["part"] = _upgrade_part(meta.get("name", ""), meta["part"], tokenizer)
    if "name" in meta:
        upgraded["name"] = part_name(meta["name"])
    return upgraded


def _renamed(by_part: Mapping[str, Any]) -> dict:
    return {part_name(name): value for name, value in by_part.items()}


def _upgrade_part(name: str, config: Mapping[str, Any], tokenizer: Mapping | None) -> dict:
    # `tokenizer` is CLIP's: it goes to the part `clip` alone.
    upgraded = dict(config)
    if "kind" in upgraded:
        upgraded["kind"] = KINDS.get(upgraded["kind"], upgraded["kind"])
    if "clip" in upgraded:
        upgraded["frozen"] = {"clip": upgraded.pop("clip")} | dict(upgraded.get("frozen", {}))
    if "text_tokenizer" in upgraded:
        upgraded.setdefault("tokenizer", upgraded.pop("text_tokenizer"))
    if upgraded.get("kind") == "clip" and tokenizer:
        upgraded.setdefault("tokenizer", dict(tokenizer))
    if upgraded.get("kind") == "upsampler" and name.endswith(LAST):
        upgraded.setdefault("last_step_of", name.removesuffix(LAST))
    return upgraded
