"""Reads in a compiled program's text which data it moves between devices, and between a chip and its memory.

The compiler's own cost analysis counts a loop's body once, and counts arrays that never leave the chip as
memory traffic. This module counts a loop's body as often as the loop runs, and only arrays in main memory.

XLA for TPU writes some collectives in other forms, which this module reads as follows:

- A collective that runs in the background of several fusions appears in each of them, with the same channel.
  It counts once.
- A fusion of an all-reduce and of a device's slice of the sum ("all-reduce-scatter") is a reduce-scatter.
- Hosts send and receive the data that moves from slice to slice.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*|token)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_RECEIVED = "recv"
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}


@dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    line: str
    root: bool

    @functools.cached_property
    def called(self) -> list[str]:
        return [
            name
            for many, one in _CALLED.findall(self.line)
            for name in (many or one).replace("%", "").split(", ")
        ]

    @functools.cached_property
    def collective(self) -> str:  # its kind; "" if it is not a collective
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""

    @functools.cached_property
    def channel(self) -> str:  # the same wherever one collective appears
        channel = re.search(r"channel_id=(\d+)", self.line)
        return channel[1] if channel else self.name

    @functools.cached_property
    def sizes(self) -> list[tuple[float, bool]]:
        # Of every array: its size in bytes, and whether it is in main memory.
        def size(dtype: str, dims: str) -> float:
            bits = re.search(r"\d+", {"pred": "8", "token": "0"}.get(dtype, dtype))[0]
            return math.prod(int(n) for n in dims.split(",") if n) * int(bits) / 8

        return [(size(dtype, dims), space in ("", "0")) for dtype, dims, space in _ARRAY.findall(self.shape)]

    @property
    def made(
        self,
    ) -> list[tuple[float, bool]]:  # of a collective: its results among `sizes`
        count = len(self.operands)
        if (
            self.kind in ("all-gather-start", "collective-permute-start", "reduce-scatter-start")
            and len(self.sizes) > count
        ):
            return self.sizes[count : 2 * count]  # the results among (operands, results, flags)
        return self.sizes

    @functools.cached_property
    def size(self) -> float:
        return sum(size for size, _ in self.sizes)

    @functools.cached_property
    def main(self) -> float:  # bytes in main memory
        return sum(size for size, main in self.sizes if main)


class Program:
    """A compiled program, parsed into its operations.

    Args:
      text: the program's text, from `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._bodies: dict[str, dict[str, _Op]] = {}
        self._entry, body = "", {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(" "):
                body = self._bodies.setdefault(head[2], {})
                self._entry = head[2] if head[1] else self._entry
            elif operation := _LINE.match(line):
                root, name, shape, kind, rest = operation.groups()
                operands = (
                    (rest.partition(")")[0],)
                    if kind == "parameter"
                    else tuple(re.findall(r"%([\w.\-]+)", rest[: _closing(rest)]))
                )
                body[name] = _Op(name, shape, kind, operands, line, bool(root))

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Kind -> (how often a device takes part in it in a step, bytes that arrive at the device)."""
        totals: dict[str, tuple[int, int]] = {}
        for (kind, _), (times, size) in self._links(self._entry).items():
            if kind != _RECEIVED:
                before = totals.get(kind, (0, 0))
                totals[kind] = before[0] + times, before[1] + times * size
        return totals

    def between_slices(self) -> tuple[int, int]:
        """How often a device receives data from other slices in a step, and how many bytes arrive at it.

        `collectives` does not include this data.
        """
        received = [link for (kind, _), link in self._links(self._entry).items() if kind == _RECEIVED]
        return sum(times for times, _ in received), sum(times * size for times, size in received)

    def traffic(self) -> float:
        """Bytes that a device reads from and writes to its main memory in a step."""
        return self._bytes(self._entry, set())

    def padding(self) -> float:
        """The share of the products' and convolutions' work on a TPU that is padding, in [0, 1].

        A matrix unit takes the axes that are summed, and those of the result's features, in multiples of 128
        lanes, and the other axes in multiples of 8. This reckons from the shapes. The compiler may swap lanes
        and rows, so that less is padded.
        """
        useful, padded = self._work(self._entry)
        return 1 - useful / padded if padded else 0.0

    # -------------------------------------------------------------------------------------- products
    def _work(self, name: str) -> tuple[float, float]:
        # (multiply-adds, the same with padding).
        body, total = self._bodies.get(name, {}), (0.0, 0.0)
        for op in body.values():
            work = _padded(op, body) if op.kind in ("dot", "convolution") else (0.0, 0.0)
            turns = self._turns(op) if op.kind == "while" else 1
            for inner in op.called:
                more = self._work(inner)
                work = work[0] + turns * more[0], work[1] + turns * more[1]
            total = total[0] + work[0], total[1] + work[1]
        return total

    # -------------------------------------------------------------------------------------- collectives
    def _links(self, name: str) -> dict[tuple[str, str], tuple[int, int]]:
        # (kind, channel) -> (number of times, bytes each time).
        links: dict[tuple[str, str], tuple[int, int]] = {}
        body = self._bodies.get(name, {})
        for op in body.values():
            if op.collective:
                kind = (
                    "reduce-scatter"
                    if op.collective == "all-reduce" and self._scattered(body, op)
                    else op.collective
                )
                links[kind, op.channel] = 1, int(_arriving(op, kind))
            elif op.kind == _RECEIVED and "megascale" in op.line:  # (array, flags, token)
                links[op.kind, op.channel] = 1, int(op.sizes[0][0])
            turns = self._turns(op) if op.kind == "while" else 1
            for inner in op.called:
                for key, (times, size) in self._links(inner).items():
                    links[key] = max(links.get(key, (0, 0))[0], turns * times), size
        return links

    def _scattered(self, body: dict[str, _Op], op: _Op) -> bool:
        # Whether only a slice of the operation's result leaves the fusion.
        users = [user for user in body.values() if op.name in user.operands]
        return bool(users) and all(
            user.kind == "dynamic-slice"
            or (user.kind in ("bitcast", "copy", "reshape") and self._scattered(body, user))
            for user in users
        )

    def _turns(self, loop: _Op) -> int:
        # How often a loop runs. The compiler may have written this down. Otherwise it is the constant with
        # which the loop's condition compares its counter, which starts at 0.
        trip_count = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.line)
        if trip_count:
            return int(trip_count[1])
        condition = self._bodies.get(re.search(r"condition=%?([\w.\-]+)", loop.line)[1], {})
        for op in condition.values():
            if op.root and op.kind == "compare" and "direction=LT" in op.line:
                limit = re.search(r"constant\((\d+)\)", condition[op.operands[1]].line)
                return int(limit[1]) if limit else 1
        return 1

    # -------------------------------------------------------------------------------------- memory
    def _bytes(self, name: str, seen: set[str]) -> float:
        body, total = self._bodies.get(name, {}), 0.0
        for op in body.values():
            if op.kind == "while":
                total += self._turns(op) * sum(self._bytes(inner, seen) for inner in op.called)
            elif op.kind in ("call", "async-start"):
                total += sum(self._bytes(inner, seen) for inner in op.called)
            elif op.kind == "conditional":
                total += max((self._bytes(inner, seen) for inner in op.called), default=0.0)
            else:
                total += self._exchanged(body, op, seen)
                total += self._written(body, op) + sum(
                    self._read(body, op, i) for i in range(len(op.operands))
                )
        return total

    def _exchanged(self, body: dict[str, _Op], op: _Op, seen: set[str]) -> float:
        # Bytes that a collective, in a fusion or by itself, reads and writes. It counts once, in however many
        # fusions it appears.
        if op.kind == "fusion":
            inside = self._bodies.get(op.called[0], {})
            return sum(self._exchanged(inside, inner, seen) for inner in inside.values())
        if not op.collective or op.channel in seen:
            return 0.0
        seen.add(op.channel)
        return sum(size for size, main in op.made if main) + sum(
            body[name].main for name in op.operands if name in body
        )

    def _read(self, body: dict[str, _Op], op: _Op, i: int) -> float:
        # Bytes that an operation reads from main memory for its operand i.
        operand = body.get(op.operands[i])
        if (
            operand is None
            or not operand.main
            or op.kind in _FREE
            or op.kind.endswith(("-done", "-update"))
            or op.collective
        ):
            return 0.0
        if op.kind in _SLICES and i == 0:
            return min(operand.main, op.sizes[1][0] if op.kind == "slice-start" else op.size)
        if op.kind == "dynamic-update-slice" and i == 0:
            return 0.0  # in place
        if op.kind != "fusion":
            return operand.main
        inside = self._bodies.get(op.called[0], {})
        inner = next((p for p in inside.values() if p.kind == "parameter" and p.operands[0] == str(i)), None)
        return 0.0 if inner is None else min(operand.main, self._used(inside, inner))

    def _used(self, body: dict[str, _Op], value: _Op) -> float:
        total = 0.0
        for user in body.values():
            for i in (
                i for i, name in enumerate(user.operands) if name == value.name and user.kind != "parameter"
            ):
                total += self._used(body, user) if user.kind == "bitcast" else self._read(body, user, i)
        return total

    def _written(self, body: dict[str, _Op], op: _Op) -> float:
        # Bytes that an operation writes to main memory.
        if op.kind in _FREE or op.kind == "send" or op.kind.endswith(("-done", "-update")) or op.collective:
            return 0.0
        if op.kind in ("copy-start", "slice-start"):  # (result, operand, flags); (operand, result, flags)
            size, main = op.sizes[op.kind == "slice-start"]
            return size if main else 0.0
        if op.kind == "dynamic-update-slice":
            return min(op.main, body[op.operands[1]].size)
        if op.kind != "fusion":
            return op.main
        inside = self._bodies.get(op.called[0], {})
        root = next((inner for inner in inside.values() if inner.root), None)
        if root is None:
            return op.main
        leaves = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
        return min(op.main, sum(self._made(inside, leaf) for leaf in leaves))

    def _made(self, body: dict[str, _Op], leaf: _Op) -> float:
        while leaf.kind == "bitcast":
            leaf = body[leaf.operands[0]]
        if leaf.kind == "dynamic-update-slice":
            return min(leaf.main, body[leaf.operands[1]].size)
        return 0.0 if leaf.kind == "parameter" or leaf.collective else leaf.main


def _dims(op: _Op) -> list[int]:
    return [int(n) for n in _ARRAY.search(op.shape)[2].split(",") if n]


def _padded(op: _Op, body: dict[str, _Op]) -> tuple[float, float]:
    # A product's or a convolution's multiply-adds, and the same with padding.
    if not all(name in body for name in op.operands[:2]):
        return 0.0, 0.0
    left, right, out = _dims(body[op.operands[0]]), _dims(body[op.operands[1]]), _dims(op)
    if not math.prod([*left, *right]):
        return 0.0, 0.0
    batch, window = 1, 1
    if op.kind == "dot":
        axes = lambda key: [
            int(n) for n in (re.search(key + r"=\{([\d,]*)\}", op.line) or ["", ""])[1].split(",") if n
        ]
        summed = math.prod(left[axis] for axis in axes("lhs_contracting_dims"))
        batch = math.prod(left[axis] for axis in axes("lhs_batch_dims"))
        features = math.prod(right) // (summed * batch)
    else:
        kernel = re.search(r"dim_labels=\w+_(\w+)->", op.line)[1]
        summed, features = right[kernel.index("i")], right[kernel.index("o")]
        window = math.prod(right) // (summed * features)
    rows = math.prod(out) // (batch * features)
    whole = lambda n, multiple: -(-n // multiple) * multiple
    padded = batch * window * whole(rows, 8) * whole(summed, 128) * whole(features, 128)
    return float(batch * window * rows * summed * features), float(padded)


def _closing(text: str) -> int:
    # The position at which the parenthesis that is open at the beginning closes.
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    return len(text)


def _arriving(op: _Op, kind: str) -> float:
    ways = _ways(op.line)
    share = (ways - 1) / ways if ways > 1 else 1.0
    if kind == "reduce-scatter" and op.collective == "reduce-scatter":
        share *= ways  # its result is only one device's share of the reduced array
    factor = {"all-gather": share, "reduce-scatter": share, "all-reduce": 2 * share, "all-to-all": share}.get(
        kind, 1.0
    )
    return sum(size for size, _ in op.made) * factor


def _ways(line: str) -> int:
    # How many devices exchange data. Groups are written {{0,1},{2,3}}, [2,8]<=[16] or mesh['a'=8,'b'=2], ...
    # {'a'}.
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? ?\{([^}]*)\}", line):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 1
