"""Findings of the doctor: one figure of one stage with its usual range, a verdict, and what to change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OK, WARN, FAULT = "ok", "warn", "fault"
VERDICTS = (OK, WARN, FAULT)


class Limits(NamedTuple):
    """Two ranges of a figure: inside `usual` it is sound; outside `bearable` the stage has a fault."""

    usual: tuple[float, float]
    bearable: tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    stage: the part's name. figure: what was measured, in words. value: the figure; None where it cannot be
      computed. usual: the range of sound parts, in words. verdict: `ok`, `warn` or `fault`.
    change: what to change; "" where nothing is wrong.
    needs: other parts whose output the figure depends on. A fault of one of them explains this one.
    more: further figures by name, which explain the value.
    """

    stage: str
    figure: str
    value: float | None
    usual: str
    verdict: str
    change: str = ""
    needs: tuple[str, ...] = ()
    more: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values; a value that is not finite is None."""
        fields = dataclasses.asdict(self) | {"needs": list(self.needs)}
        finite = lambda value: None if value is None or not math.isfinite(value) else round(float(value), 6)
        return fields | {"value": finite(self.value), "more": {k: finite(v) for k, v in self.more.items()}}


def finding(
    stage: str,
    figure: str,
    value: float,
    limits: Limits,
    change: str,
    needs: tuple[str, ...] = (),
    more: Mapping[str, float] | None = None,
) -> Finding:
    """Judges a value by its limits. A value that is not finite is a fault."""
    value = float(value)
    verdict = FAULT
    if limits.bearable[0] <= value <= limits.bearable[1]:
        verdict = OK if limits.usual[0] <= value <= limits.usual[1] else WARN
    return Finding(
        stage, figure, value, range_words(limits.usual), verdict, "" if verdict == OK else change, needs,
        {name: float(number) for name, number in (more or {}).items()},
    )  # fmt: skip


def range_words(usual: tuple[float, float]) -> str:
    """A range in words: "0.5 to 2", "at least 0.5", "at most 2"."""
    low, high = usual
    if math.isinf(low):
        return f"at most {high:g}"
    return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def explained(findings: Sequence[Finding]) -> list[Finding]:
    """Turns a fault that a fault of another part explains into a warning that names that part."""
    broken = {found.stage for found in findings if found.verdict == FAULT and not found.needs}
    broken |= {
        found.stage
        for found in findings
        if found.verdict == FAULT and not broken & set(found.needs) - {found.stage}
    }
    return [_explained(found, [name for name in found.needs if name in broken]) for found in findings]


def _explained(found: Finding, causes: Sequence[str]) -> Finding:
    if found.verdict == OK or not causes:
        return found
    change = f"this figure depends on {', '.join(causes)}: mend that first, then run the doctor again"
    return dataclasses.replace(found, verdict=WARN, change=change)


def worst(findings: Iterable[Finding]) -> str:
    """The worst verdict; `ok` where there are no findings."""
    return max((found.verdict for found in findings), key=VERDICTS.index, default=OK)


@dataclass(frozen=True)
class Report:
    """All findings, stage by stage.

    name: what was examined. data: the source, in words. findings: in the order of the stages.
    untested: what could not be tested, in words.
    """

    name: str
    data: str
    findings: Sequence[Finding]
    untested: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """The worst verdict of all stages."""
        return worst(self.findings)

    def stages(self) -> dict[str, list[Finding]]:
        """The findings by stage."""
        grouped: dict[str, list[Finding]] = {}
        for found in self.findings:
            grouped.setdefault(found.stage, []).append(found)
        return grouped

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "examined": self.name,
            "data": self.data,
            "verdict": self.verdict,
            "stages": {
                stage: {"verdict": worst(found), "findings": [one.to_json() for one in found]}
                for stage, found in self.stages().items()
            },
            "untested": list(self.untested),
        }

    def describe(self) -> list[str]:
        """The report as lines of text: a verdict for each stage, then its figures and what to change."""
        lines = [f"{self.name} on {self.data}"]
        for stage, found in self.stages().items():
            lines += ["", f"{stage}: {worst(found)}"]
            for one in found:
                value = "-" if one.value is None else f"{one.value:.4g}"
                lines.append(f"  {one.verdict:6}{one.figure:62}{value:>10}   usual {one.usual}")
                if one.more:
                    more = ", ".join(f"{name} {number:.3g}" for name, number in one.more.items())
                    lines.append(f"        {more}")
                if one.change:
                    lines.append(f"        -> {one.change}")
        lines += [""] * bool(self.untested) + [f"not tested: {words}" for words in self.untested]
        return lines
