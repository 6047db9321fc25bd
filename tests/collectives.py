"""Count what a compiled program sends between devices, in the text of its HLO."""

import re
from collections import Counter

_NAMES = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
# An operation that runs in the background has a start and a done; the start counts.
_PATTERN = re.compile(rf"= \S.*?\s({_NAMES})(?:-start)?\(")


def count(text: str) -> dict[str, int]:
    """How many collectives of each name a program holds."""
    return dict(Counter(match[1] for line in text.splitlines() if (match := _PATTERN.search(line))))
