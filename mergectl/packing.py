"""Cut rows that are sorted by length into batches that waste little on padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# What a batch costs beside its tokens, as so many tokens: on a processor the weights are read anew and each operation
# is called; an accelerator is idle unless batches are large.
ONE_MORE = {"cpu": 64, "cuda": 8192}


def one_more(device: str) -> int:
    """Return how many tokens one more batch costs on a device.

    >>> one_more("cuda:1")
    8192
    """
    return ONE_MORE.get(device.partition(":")[0], ONE_MORE["cuda"])


def cuts(lengths: Sequence[int], most: int, cost: int) -> list[tuple[int, int]]:
    """Return where batches of at most `most` rows begin and end, so that tokens, padding and batches cost least.

    Rows are padded to the first of their batch, the longest. Of ways that cost the same the one with the longest first
    batches is taken, so that rows of one length are cut into whole batches.

    >>> cuts([9, 9, 2, 2, 2], most=4, cost=3)
    [(0, 2), (2, 5)]
    >>> cuts([5, 5, 5, 5, 5], most=2, cost=100)
    [(0, 2), (2, 4), (4, 5)]
    """
    count = len(lengths)
    least, ends = [0] * (count + 1), [0] * count
    for start in reversed(range(count)):
        width = max(lengths[start], 1)
        found = (
            (cost + (end - start) * width + least[end], -end) for end in range(start + 1, min(start + most, count) + 1)
        )
        least[start], end = min(found)
        ends[start] = -end
    places = [0]
    while places[-1] < count:
        places.append(ends[places[-1]])
    return list(itertools.pairwise(places))
