"""BPE dropout (Provilkov et al. 2020, section 3): a word is split in another way each time that it is read.

Byte-pair encoding joins the pair of neighbours whose merge comes first in its table, until no pair is in the
table. With dropout, every pair that could be joined is left out of a step with a given probability, anew in
each step, and the first of the others is joined. The word is done when a step has no pair left (algorithm 1).
So a model learns what the parts of a word mean. DALL-E trains with 10 % (Ramesh et al. 2021, section 2.2).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np


def merge_with_dropout(
    characters: Sequence[str], ranks: Mapping[tuple[str, str], int], dropout: float, rng: np.random.Generator
) -> list[str]:
    """Splits a word into tokens.

    Args:
      characters: of the word, the last one with its mark of a word's end.
      ranks: pair of tokens -> its place in the table of merges; merges of a low place come first.
      dropout: the probability in [0, 1] that a pair is left out of a step. 0 is byte-pair encoding; 1 leaves
        the characters.
      rng: the randomness.

    Returns:
      The tokens; joined, they are the word. The time is n log n in the number of characters, times
      1 / (1 - dropout) for the pairs that are left out.
    """
    parts: list[str | None] = list(characters)  # None where a token was joined to the one before it
    count = len(parts)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))

    def rank(i: int) -> int | None:
        return ranks.get((parts[i], parts[after[i]])) if after[i] < count else None

    waiting = [(place, i) for i in range(count) if (place := rank(i)) is not None]
    heapq.heapify(waiting)
    dropped: list[tuple[int, int]] = []  # in the present step
    while waiting:
        place, i = heapq.heappop(waiting)
        if rank(i) != place:  # one of the two tokens is another one by now
            continue
        if rng.random() < dropout:
            dropped.append((place, i))
            continue
        joined = after[i]
        parts[i], parts[joined] = parts[i] + parts[joined], None
        after[i] = after[joined]
        if after[i] < count:
            before[after[i]] = i
        news = [(new, k) for k in (before[i], i) if k >= 0 and (new := rank(k)) is not None]
        for entry in news + dropped:
            heapq.heappush(waiting, entry)
        dropped.clear()
    return [part for part in parts if part is not None]
