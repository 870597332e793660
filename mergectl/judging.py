"""The judge of a search: scores settings by merging in memory and evaluating one live model on every task."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import settings as methods
from mergectl.components import Shelf
from mergectl.errors import WorkError
from mergectl.families import Family
from mergectl.first_token import first_token_only
from mergectl.in_memory import in_memory
from mergectl.lab import Lab
from mergectl.packing import one_more
from mergectl.plan import Recipe
from mergectl.preprocess import with_inputs
from mergectl.pruning import Answers, Verdict, Watch
from mergectl.recombine import Recombiner, linear_setting

if TYPE_CHECKING:
    import numpy as np

    from mergectl.benchmarks._contract import Task
    from mergectl.evaluate import Bench

_ROUNDS = 16  # at most, so that tasks of many batches keep step with those of few
_MASKED_ROUNDS = 4  # where every change of task costs as much as a merge, tasks take fewer and longer turns


class Judge:
    """Scores settings; whatever does not change between candidates is read, tokenised and merged once.

    The experts' weights stay mapped from their files where they are stored in float32, so that several processes share
    them. A setting that the method is linear in is recombined (see `recombine`); any other change is a merge in memory.
    Tasks are evaluated in turns, in an order that is always the same, so that candidates can be compared on the way.
    """

    def __init__(
        self,
        lab: Lab,
        recipe: Recipe,
        family: Family,
        tasks: Sequence[Task],
        *,
        split: str = "tune",
        limit: int | None = None,
        batch_size: int = 64,
        varying: Iterable[str] | None = None,
        again: bool = True,
        scratch: Path | None = None,
        share: float = 0.5,
        supplies: Mapping[str, Any] | None = None,
        inputs: str = "full",
    ) -> None:
        """Take the models, the tasks, and which settings vary (None: any may); recipe's own settings are not used.

        `again` says whether values of settings come again but for chance, as those of a grid do.

        `scratch` is a folder in which processes on this machine share what they merged; else it lies in memory, up to
        a share of what is free. `supplies` are what `merge_stream` takes of them.
        """
        from mergectl.heads import open_live
        from mergectl.tasks import answers

        self.recipe, self.supplies, population = recipe, supplies, family.population
        heads = {task: family.experts[name] for task, name in family.answering.items()}
        self.live = open_live(family.base, tasks, heads=heads, device=lab.torch_device())
        how: dict[str, Any] = {"split": split, "data": lab.data, "limit": limit, "batch_size": batch_size}
        if inputs == "full":  # else padding is read, so that all rows are of one length
            how["one_more"] = one_more(self.live.device)
        self.benches = self._benches(tasks, inputs, seed=lab.seed, **how)
        self._shorten()
        answering = family.answering.items()
        self.task_of = {task.id: name for task in tasks for head, name in answering if answers(head, task)}
        self.head = self.live.one_head(population.blended)  # what is merged of heads, to be set per candidate
        identity = repr([row["digest"] for row in family.inputs])
        shelf = None if scratch is None else Shelf(folder=scratch, share=share)
        self.base = in_memory(population.base, shelf, f"base of {identity}") if family.has_base else None
        self.experts = {task: in_memory(w, shelf, f"{task} of {identity}") for task, w in population.experts.items()}
        by_template = [each for bench in self.benches for each in (bench, *bench.others)]
        self.sheets = [Sheet(bench, visits(len(bench.batches))) for bench in by_template]
        masked = methods.describe(recipe.method).extra_bits > 0
        self.rounds = rounds([len(bench.batches) for bench in by_template], _MASKED_ROUNDS if masked else _ROUNDS)
        self.recombiner = self._recombiner(
            None if varying is None else frozenset(varying), again, identity, scratch, lab, share
        )

    def _benches(self, tasks: Sequence[Task], inputs: str, **how: Any) -> list[Bench]:
        from mergectl.bench import make_bench

        return [make_bench(task, with_inputs(self.live.preparer_of(task.id), inputs), **how) for task in tasks]

    def _shorten(self) -> None:
        """Let the model leave out what no head reads."""
        from mergectl.bench import batch_logits

        bench = self.benches[0]
        if bench.task.kind != "text_to_text" and bench.batches:
            model, last = self.live.use(bench.task.id), len(bench.batches) - 1  # the shortest rows
            first_token_only(model, lambda: batch_logits(model, bench, last))

    def _recombiner(
        self, varying: frozenset[str] | None, again: bool, identity: str, scratch: Path | None, lab: Lab, share: float
    ) -> Recombiner | None:
        """Return what recombines candidates, where the method is linear in something that varies."""
        from mergectl.naming import match

        linear = linear_setting(self.recipe, list(self.experts), varying)
        if linear is None or self.base is None:
            return None
        slots, _ = match(self.base, self.live.backbone, self.live.prefix)
        live = {name: self.live.backbone[slot] for slot, name in slots.items()} | self.head
        if not live or any(not x.is_contiguous() or x.shape != self.base[name].shape for name, x in live.items()):
            return None
        spill = lab.folder if lab.folder.exists() else None
        shelf = Shelf(device=self.live.device, folder=scratch, spill=spill, share=share)
        alone = varying is not None and varying <= {linear}
        how: dict[str, Any] = {"alone": alone, "again": again, "identity": identity, "supplies": self.supplies}
        return Recombiner(self.recipe, self.base, self.experts, live, linear, shelf=shelf, **how)

    def __call__(self, settings: dict[str, Any], watch: Watch | None = None) -> Verdict:
        """Merge with these settings and score the result on every task, as long as `watch` does not stop it.

        `watch` is asked after every round but the last, with what is known by then; never where the median over
        templates counts, of which a part of the rows says little. A verdict that was not stopped is the same with and
        without a watch.
        """
        self.put(settings)
        watch = None if len(self.sheets) > len(self.benches) else watch
        started = time.perf_counter()
        found: list[list[Any]] = [[] for _ in self.sheets]  # answers, batch by batch
        for step, turns in enumerate(self.rounds[:-1]):
            self._take(turns, found)
            if watch is not None and watch(step, so_far := self._verdict(found, time.perf_counter() - started)):
                return replace(so_far, pruned=True)
        self._take(self.rounds[-1], found)
        verdict = self._verdict(found, time.perf_counter() - started)
        if not all(score == score for score in verdict.scores.values()):
            raise WorkError(f"A candidate of the search scored not-a-number with {settings}.")
        return verdict

    def put(self, settings: Mapping[str, Any]) -> None:
        """Put the merge with these settings into the live model."""
        if self.recombiner is not None and self.recombiner(settings):
            return
        from mergectl.merging import merge_stream

        stream = merge_stream(replace(self.recipe, settings=settings), self.base, self.experts, supplies=self.supplies)
        weights, unified, masks = {}, {}, {}
        for piece in stream:
            weights[piece.name] = piece.weight
            if piece.masks is not None:
                unified[piece.name], masks[piece.name] = piece.delta, piece.masks
        self.live.load_backbone(weights, partial=True)
        for name, slot in self.head.items():
            slot.copy_(weights[name])
        if unified:
            self._keep(unified, masks, stream.rescalers or {})

    def _keep(self, unified: Mapping[str, Any], masks: Mapping[str, Any], rescalers: Mapping[str, float]) -> None:
        self.live.keep(unified, base=self.base)
        order = list(self.experts)
        for bench in self.benches:
            task = self.task_of[bench.task.id]
            own = {name: rows[order.index(task)] for name, rows in masks.items()}
            self.live.set_masks(bench.task.id, own, rescalers.get(task, 1.0))

    def _take(self, turns: Sequence[tuple[int, int]], found: list[list[Any]]) -> None:
        """Let the tasks take their turns of one round, and append their answers."""
        from mergectl.bench import batch_logits
        from mergectl.benchmarks._metrics import predictions

        for number, batches in turns:
            sheet, own = self.sheets[number], found[number]
            task, order = sheet.bench.task, self.live.order(sheet.bench.task.id)
            model = self.live.use(task.id)
            for batch in sheet.visits[len(own) : len(own) + batches]:
                outputs = batch_logits(model, sheet.bench, batch).cpu().numpy()
                own.append(predictions(task, outputs if order is None else outputs[:, list(order)]))

    def _verdict(self, found: Sequence[Sequence[Any]], seconds: float) -> Verdict:
        import numpy as np

        answers: dict[str, list[Answers]] = {}
        metrics: dict[str, list[dict[str, float]]] = {}
        for sheet, own in zip(self.sheets, found, strict=True):
            known, found_now = sheet.mark(own)
            answers.setdefault(sheet.bench.task.id, []).append(known)
            metrics.setdefault(sheet.bench.task.id, []).append(found_now)
        pooled = {task: {name: float(np.median([own[name] for own in rows])) for name in rows[0]}
                  for task, rows in metrics.items()}  # fmt: skip
        return Verdict(
            scores={task: pooled[task][known[0].metric] for task, known in answers.items()},
            metrics=pooled,
            seconds=seconds,
            rows=sum(len(known.found) for own in answers.values() for known in own),
            total=sum(len(sheet.bench) for sheet in self.sheets),
            looks=len(self.rounds) - 1,
            answers={task: own[0] for task, own in answers.items()},
        )


@dataclass(frozen=True)
class Measured:
    """A judge that also counts how much a merge changes."""

    judge: Judge

    def __call__(self, settings: dict[str, Any]) -> Verdict:
        """Score the settings, and count the bytes of the weights that now differ from the base."""
        verdict = self.judge(settings)
        base, live = self.judge.base or {}, self.judge.live
        changed = 0
        for name, weight in base.items():
            slot = live.slot(name)
            if slot is not None:
                now = live.backbone[slot]
                changed += int((now != weight.to(now)).sum()) * now.element_size()
        return replace(verdict, size=float(changed))


@dataclass(frozen=True)
class Sheet:
    """A bench with the order in which its batches are visited."""

    bench: Bench
    visits: tuple[int, ...]

    @functools.cached_property
    def asked(self) -> np.ndarray[Any, Any]:
        """The rows in the order in which they are asked."""
        import numpy as np

        ends = np.cumsum([0, *self.bench.sizes])
        order = np.asarray(self.bench.order, dtype=np.int64)
        return np.concatenate([order[ends[b] : ends[b + 1]] for b in self.visits])

    def mark(self, found: Sequence[np.ndarray[Any, Any]]) -> tuple[Answers, dict[str, float]]:
        """Put the answers to the batches so far beside the labels, and score them by the task's metrics."""
        import numpy as np

        from mergectl.benchmarks import _metrics

        answers = np.concatenate(found)
        rows = self.asked[: len(answers)]
        labels, task = np.asarray(self.bench.labels)[rows], self.bench.task
        place = np.argsort(rows)  # in the rows' own order, so that no digit differs from another evaluation
        scores = _metrics.scores(task, labels[place].tolist(), answers[place])
        return Answers(task.metric, labels, answers, len(self.bench), rows), scores


def visits(batches: int) -> tuple[int, ...]:
    """Return the order in which batches, sorted by length, are visited: the first ones already span all lengths.

    >>> visits(6)
    (0, 4, 2, 1, 5, 3)
    """
    bits = max(batches - 1, 1).bit_length()
    return tuple(b for b in (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)) if b < batches)


def rounds(batches: Sequence[int], most: int | None = None) -> list[list[tuple[int, int]]]:
    """Return for every round whose turn it is and for how many batches: one each, more where rounds are limited.

    >>> rounds([2, 1])
    [[(0, 1), (1, 1)], [(0, 1)]]
    >>> rounds([5, 1], most=2)
    [[(0, 3), (1, 1)], [(0, 2)]]
    """
    steps = [1 if most is None else -(-count // most) for count in batches]
    count = max(-(-all_ // step) for all_, step in zip(batches, steps, strict=True))
    left = [[max(0, all_ - turn * step) for all_, step in zip(batches, steps, strict=True)] for turn in range(count)]
    return [
        [(n, min(step, rest)) for n, (step, rest) in enumerate(zip(steps, row, strict=True)) if rest] for row in left
    ]
