"""Examples built from components: different combinations of them, drawn at random."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def draw(sizes: Sequence[int], n: int, seed: int | str) -> list[tuple[int, ...]]:
    """`n` different combinations of one index below each of `sizes`, n <= prod(sizes), all equally likely."""
    found = []
    for number in random.Random(seed).sample(range(math.prod(sizes)), n):
        rest, indices = number, []
        for size in sizes:
            rest, index = divmod(rest, size)
            indices.append(index)
        found.append(tuple(indices))
    return found
