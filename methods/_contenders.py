"""Loops of PCB-Merging over very many numbers: the scores that can matter, and the average of their entries.

Most entries have too low a score to be kept, and a bound on a score is far cheaper than the score. Scores and averages
are those of the tensor operations in `_competition`: the same float32 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _fused, _kth
from mergectl.methods._fused import STRETCH, compiled
from mergectl.methods._order import Between, Bounds

Array: TypeAlias = "np.ndarray[Any, Any]"
Edges: TypeAlias = tuple[Sequence[float], Sequence[float]]  # per task the least score that counts, and the largest

TINY = 1e-30  # rounding of what is not far above the least float is no small part of it: no bound is trusted there


@dataclass(frozen=True)
class Contenders:
    """Of a weight of each task, the scores that may reach a least one: [task, entry], as many as `counts` says."""

    scores: torch.Tensor
    places: Array
    counts: Array

    def rows(self) -> list[torch.Tensor]:
        """Return each task's scores."""
        return [row[:count] for row, count in zip(self.scores, self.counts.tolist(), strict=True)]


@dataclass(frozen=True)
class Field:
    """Figures of the whole model that say who contends: bounds of magnitudes, and the least that may compete."""

    lows: Sequence[float]
    highs: Sequence[float]
    floors: Sequence[float]
    ranked: bool  # whether entries are pulled by all tasks' normalised entries, instead of the entries
    count: int  # elements of a task

    def suits(self, x: torch.Tensor) -> bool:
        """Say whether the loops can serve a weight, and are worth it."""
        return _fused.fits(x, self.count) and x[0].numel() < 1 << 31  # places have 32 bits

    def contenders(self, x: torch.Tensor, least: Sequence[float]) -> Contenders:
        """Return the scores of the released code that may reach each task's least one; others do not."""
        rows = _fused.rows_of(x)
        pulls, heats = torch.empty(rows.shape), torch.empty(rows.shape)
        found = Contenders(pulls, np.empty(rows.shape, np.int32), np.empty(len(rows), np.int64))
        needed = [value if value > TINY else -math.inf for value in least]
        figures = np.array([self.lows, self.highs, self.floors, needed], np.float32)
        _contenders(rows, figures, self.ranked, pulls.numpy(), heats.numpy(), found.places, found.counts)
        for score, heat in zip(found.rows(), heats, strict=True):
            score.tanh_().mul_(heat[: len(score)].exp_())
        return found

    def between(self, x: torch.Tensor, bounds: Sequence[Sequence[Bounds]]) -> list[list[Between]]:
        """Count and collect each task's scores between its pairs of bounds."""
        found = self.contenders(x, [min(low for low, _ in pairs) for pairs in bounds])
        return _kth.between(found.rows(), bounds, False, self.count)

    def average(self, x: torch.Tensor, edges: Edges, scales: Sequence[float], floor: float) -> torch.Tensor:
        """Return the average of clipped entries by their shares: a score's place between edges, from 0 to 1."""
        found, result = self.contenders(x, edges[0]), torch.empty_like(x[0])
        bounds = np.array([self.lows, self.highs, *edges], np.float32)
        given = _fused.rows_of(x), found.scores.numpy(), found.places, found.counts
        _average(*given, bounds, np.array(scales), floor, result.view(-1).numpy())
        return result


@compiled
def _contenders(
    rows: Array, figures: Array, ranked: bool, pulls: Array, heats: Array, places: Array, counts: Array
) -> None:
    """Give pull and heat of the entries whose score, tanh(pull) * exp(heat), may reach their task's least; and places.

    A pull is the entry times the sum over rows (with `ranked`, of signed u), and 0 below the floor; the heat is
    n (u^2 - 1), u the magnitude from 0 at a low to 1 at a high bound. Of each task the first `counts` are filled.
    `figures` has each task's low and high bound, floor and least score: [4, task].
    """
    lows, highs, floors, least = figures
    # exp(h) is at most 2**i * (1 + f), i and f the whole and the broken part of h / ln 2: the float that has the bits
    # of i and f side by side. Above -80 that is no subnormal number; the slack is far more than rounding takes away.
    one, bits, bias, log2e = np.float32(1), np.float32(2**23), np.float32(127), np.float32(1.44269504)
    deepest, slack = np.float32(-80), np.float32(1.0001)
    sums, rounded, power = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float32), np.float32(rows.shape[0])
    heat, pull, bound = np.empty((rows.shape[0], STRETCH), np.float32), np.empty_like(rounded), np.empty_like(rounded)
    reaches, chosen = np.empty(STRETCH, np.uint8), np.empty(STRETCH, np.int32)
    counts[:] = 0
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        sums[:size] = 0
        for task in range(rows.shape[0]):
            row, own = rows[task, start : start + size], heat[task]
            low, high = lows[task], highs[task]
            span, top = (high - low, high) if high > low else (np.float32(1), low)  # equal bounds: u = 0
            for i in range(size):
                u = (min(max(abs(row[i]), low), top) - low) / span
                own[i] = (u * u - np.float32(1)) * power
                if ranked:
                    sums[i] += (u if row[i] > 0 else np.float32(0)) - (u if row[i] < 0 else np.float32(0))
                else:
                    sums[i] += row[i]
        for i in range(size):
            rounded[i] = sums[i]
        for task in range(rows.shape[0]):
            row, own, floor, needed = rows[task, start : start + size], heat[task], floors[task], least[task]
            for i in range(size):
                pull[i] = row[i] * rounded[i] if abs(row[i]) >= floor else np.float32(0)
                most = pull[i] if pull[i] < one else one
                deep = own[i] if own[i] > deepest else deepest
                bound[i] = most * np.int32((deep * log2e + bias) * bits).view(np.float32) * slack
            for i in range(size):
                reaches[i] = not bound[i] < needed
            found, first = 0, counts[task]
            for i in range(size):
                chosen[found] = i
                found += reaches[i]
            for k in range(found):
                pulls[task, first + k] = pull[chosen[k]]
                heats[task, first + k] = own[chosen[k]]
                places[task, first + k] = start + chosen[k]
            counts[task] = first + found


@compiled
def _average(
    rows: Array, scores: Array, places: Array, counts: Array, bounds: Array, scales: Array, floor: float, out: Array
) -> None:
    """Average entries clipped in magnitude, by scores that count from 0 at a low to 1 at a high bound.

    Scores are given of the first `counts` places of each task; others have no share. `bounds` has each task's of
    magnitudes and of scores: [4, task]. The sum of shares is at least the floor.
    """
    top, shares = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float64)
    done = np.zeros(rows.shape[0], np.int64)
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        top[:size] = 0
        shares[:size] = 0
        for task in range(rows.shape[0]):
            low, high, first, last = bounds[:, task]
            span, flat, scale = last - first, not last > first, scales[task]
            number = done[task]
            while number < counts[task] and places[task, number] < start + size:
                place, score = places[task, number], scores[task, number]
                entry = rows[task, place]
                share = np.float32(0) if flat else (min(max(score, first), last) - first) / span
                clipped = min(max(abs(entry), low), high)
                value = (clipped if entry > 0 else np.float32(0)) - (clipped if entry < 0 else np.float32(0))
                top[place - start] += np.float64(value) * share * scale
                shares[place - start] += share
                number += 1
            done[task] = number
        for i in range(size):
            out[start + i] = top[i] / max(shares[i], floor)
