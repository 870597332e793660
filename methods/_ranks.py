"""How many directions of a layer each expert keeps: a share of the full rank, or what a common budget leaves it.

>>> rank_of(0.875, 36), rank_of(0.01, 24)  # 31.5 is rounded to even; one direction is always kept
(32, 1)
>>> allocate([[4.0, 2.0, 1.0, 0.4], [4.0, 3.0, 2.0, 2.0]], 0.5)  # dropped: .1 .25 .5 of the first, .5 .5 of the second
[1, 2]
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def rank_of(share: float, full: int) -> int:
    """Return a share of the full rank, rounded half to even, at least 1."""
    return max(1, round(full * share))


def least_rank(share: float, full: int) -> int:
    """Return what an expert keeps at least: none loses more than one and a half times its share."""
    return full - round((full - round(full * share)) * 3 / 2)


def allocate(spectra: Sequence[Sequence[float]], share: float) -> list[int]:
    """Return how many singular values each expert keeps, so that fewer than a share of all are left.

    Each spectrum is a layer's singular values, largest first. Values are dropped one by one, the smallest of all that
    are next in line, measured by the largest of its expert; of equal ones the earlier expert's.
    """
    full = len(spectra[0])
    kept, least = [full] * len(spectra), max(least_rank(share, full), 0)
    measured = [[value / (spectrum[0] or 1.0) for value in spectrum] for spectrum in spectra]
    in_line = [(spectrum[-1], expert) for expert, spectrum in enumerate(measured)] if full > least else []
    heapq.heapify(in_line)
    while in_line and sum(kept) / (full * len(spectra)) >= share:
        _, expert = heapq.heappop(in_line)
        kept[expert] -= 1
        if kept[expert] > least:
            heapq.heappush(in_line, (measured[expert][kept[expert] - 1], expert))
    return kept
