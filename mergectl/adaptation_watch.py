"""The supply `watch`: what a person sees of an adaptation, its checkpoint on disk, and what the run keeps of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.adaptation import FILE, AdaptOptions
from mergectl.errors import UserError
from mergectl.terminal import Progress, Terminal

if TYPE_CHECKING:
    import torch

    from mergectl.store import Run

POINTS, LOOKS = 100, 10  # of the entropy's course, and of that of ranks and coefficients
SECONDS = 30.0  # between two checkpoints
FALL = 0.02  # of a mean score that is more than chance
FORWARD, SHARE = 3, 0.1  # how much cheaper a row is that is only scored; how much of the work scores may be
FORMAT, SCORE = "1", "adapt_tune_score"
TABLE = "adaptation.json"


class LabWatch:
    """Follows one adaptation; after a kill it gives back what was learned, and the rest goes as if nothing had been."""

    def __init__(
        self, names: Mapping[str, str], path: Path | None, terminal: Terminal, begin: Path | None = None
    ) -> None:
        """Take the tasks' ids by the experts' names, and a checkpoint's path that is no other adaptation's.

        `begin` is a file of learned numbers to begin with.
        """
        shared = Counter(names.values())
        self.names = {name: task if shared[task] == 1 else name for name, task in names.items()}
        self.path, self.terminal, self.begin = path, terminal, begin
        self.progress: Progress = lambda done, total, text: None
        self.rows: list[tuple[str, float, str | None, int]] = []  # metrics: name, value, task, step
        self.learned: Any = None  # the last that was heard of the adaptation
        self.tune = dict[str, float]()  # the last scores by task
        self.resumed = 0  # steps that an earlier process had done
        self._since: list[dict[str, float]] = []  # entropies by task since the last point
        self._looked = self._scored = -1
        self._unscored = False  # there is nothing to score on
        self._saved = time.monotonic()

    def resume(self) -> dict[str, torch.Tensor] | None:
        """Return the state of the checkpoint, if there is a whole one, else what was learned elsewhere, if named."""
        from safetensors import SafetensorError

        state, facts = dict[str, Any](), dict[str, str]()
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError, SafetensorError):
                state, facts = _read(self.path)
        if facts.get("format") != FORMAT:
            return None if self.begin is None else self._begun(self.begin)
        self.rows, self._since = [tuple(row) for row in json.loads(facts["rows"])], json.loads(facts["since"])
        self.resumed = len(state["losses"])
        noted = {name.partition(":")[0]: step for name, _, _, step in self.rows}  # the last of each kind
        self._looked, self._scored = noted.get("coefficient", -1), noted.get(SCORE, -1)
        self.tune = {task: x for name, x, task, step in self.rows if task and (name, step) == (SCORE, self._scored)}
        self.terminal.say(f"goes on after step {self.resumed} of an adaptation that was cut short")
        return state

    def _begun(self, path: Path) -> dict[str, torch.Tensor]:
        """Return numbers that were learned elsewhere as those of an adaptation without a step."""
        import torch

        found, facts = _read(path)
        if (tasks := json.loads(facts["tasks"])) != [*self.names.values()]:
            raise UserError(f"{path} was learned for {', '.join(tasks)}; name these experts in this order.")
        numbers = found["numbers"]
        rest = {"first": torch.zeros_like(numbers), "second": torch.zeros_like(numbers)}
        return {"numbers": numbers, "losses": torch.zeros(0), **rest}

    def __call__(self, learned: Any) -> None:
        """Take note of a step, or of the end."""
        self.learned = learned
        every = score_every(learned.entropy.options, learned.steps)
        if learned.done:
            self._point(learned.step)
            if every and learned.steps >= every and self._scored != learned.step:
                self._score(learned)
            if self._looked != learned.step:
                self._look(learned)
            if learned.step < learned.steps:
                words = f": {self._line(learned)}" if learned.entropy.by_task else ""
                self.terminal.say(f"stopped after step {learned.step}/{learned.steps}, by --patience{words}")
            self._warn()
            return
        self._since.append(dict(learned.entropy.by_task))
        if _due(learned, POINTS):
            self._point(learned.step)
        if every and learned.steps >= every and (learned.step % every == 0 or learned.step == 1):
            self._score(learned)
        if _due(learned, LOOKS):
            self._look(learned)
        if learned.step in (self._looked, self._scored):
            self.terminal.say(f"step {learned.step}/{learned.steps}: {self._line(learned)}")
        self.progress(learned.step, learned.steps, self._line(learned))
        if self.path is not None and time.monotonic() - self._saved >= SECONDS:
            self.save(learned, self.path)

    @property
    def saw(self) -> str:
        """What was looked at, in the words that reports show."""
        return f"unlabelled {self.learned.entropy.options.on} inputs"

    def save(self, learned: Any, path: Path) -> None:
        """Write the checkpoint beside its place and rename it."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".{path.name}.{os.getpid()}")
        facts = {"format": FORMAT, "rows": json.dumps(self.rows), "since": json.dumps(self._since)}
        save_file(learned.state, work, metadata=facts)
        artefacts.sync(work)
        work.replace(path)
        self._saved = time.monotonic()

    def record(self, run: Run, folder: Path) -> None:
        """Put what was learned into the run and into the model's folder; the checkpoint has had its day."""
        for name, value, task, step in self.rows:
            run.metric(name, value, task=task, step=step)
        run.note("saw", self.saw)
        run.note("adaptation", {"steps": self.learned.step, "resumed_after": self.resumed})
        for path in self._write(folder):
            run.artifact("adaptation", str(path.absolute()), bytes=path.stat().st_size)
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, folder: Path) -> Iterator[Path]:
        """Write the learned numbers, and a table of them for people."""
        from safetensors.torch import save_file

        learned, tasks = self.learned, [self.names[name] for name in self.learned.tasks]
        parts = {"coefficient": learned.coefficients, "used": learned.used, "logits": learned.logits}
        numbers = {f"{kind}.{name}": x.cpu().contiguous() for kind, own in parts.items() for name, x in own.items()}
        numbers["numbers"] = learned.state["numbers"]
        save_file(numbers, folder / FILE, metadata={"tasks": json.dumps(tasks)})
        yield folder / FILE
        table = {
            "tasks": tasks, "steps": learned.step, "entropy": learned.losses[-1] if learned.losses else None,
            "saw": self.saw,
            "coefficients": {name: x.tolist() for name, x in learned.used.items()},
            "kept_rank": {name: (x > 0).sum(dim=1).tolist() for name, x in learned.logits.items()},
            "rank": learned.ranks,
        }  # fmt: skip
        artefacts.write_json(folder / TABLE, table)
        yield folder / TABLE

    def _add(self, name: str, value: float, task: str | None, step: int) -> None:
        self.rows.append((name, float(value), task, step))

    def _point(self, step: int) -> None:
        """Note the mean entropies since the last point."""
        for task in self._since[0] if self._since else ():
            self._add("adapt_entropy", math.fsum(one[task] for one in self._since) / len(self._since), task, step)
        self._since = []

    def _look(self, learned: Any) -> None:
        """Note ranks and coefficients, by task and weight."""
        self._looked = learned.step
        for name, x in learned.logits.items():
            for task, kept in zip(learned.tasks, (x > 0).sum(dim=1).tolist(), strict=True):
                self._add(f"kept_rank:{name}", kept, self.names[task], learned.step)
        for task, share in shares(learned).items():
            self._add("kept_share", share, self.names[task], learned.step)
        for name, x in learned.used.items():
            for task, value in zip(learned.tasks, x.tolist(), strict=True):
                self._add(f"coefficient:{name}", value, self.names[task], learned.step)

    def _score(self, learned: Any) -> None:
        """Score the weights of this moment on labelled rows of `tune`, for the eye alone."""
        self._scored = learned.step
        try:
            self.tune = learned.entropy.score(learned.weights())
        except UserError as error:
            if learned.entropy.options.score_every is not None:
                raise
            if not self._unscored:
                self.terminal.say(f"no scores on the way: {error}")
            self._unscored = True
            return
        for task, value in self.tune.items():
            self._add(SCORE, value, task, learned.step)

    def _warn(self) -> None:
        """Say it where the model answers worse than after the first step, however sure it has become."""
        scores = dict[int, list[float]]()
        for name, value, _, step in self.rows:
            if name == SCORE:
                scores.setdefault(step, []).append(value)
        means = [math.fsum(scores[step]) / len(scores[step]) for step in sorted(scores)]
        if len(means) > 1 and means[-1] < means[0] - FALL:
            self.terminal.warn(
                f"on tune the mean score fell from {means[0]:.3f} to {means[-1]:.3f}: a low entropy is no good answer. "
                "Take a lower lr, fewer steps, or a start that scores better."
            )

    def _line(self, learned: Any) -> str:
        """The entropy of a task, the last scores and what is kept; a terminal may cut off the end."""
        words = [f"entropy {learned.losses[-1] / max(1, len(learned.entropy.by_task)):.4f}"]
        if self.tune:
            places = {task: place for place, task in enumerate(self.names.values())}
            scores = sorted(self.tune.items(), key=lambda item: places.get(item[0], len(places)))
            own = " ".join(f"{_short(task)} {value:.3f}" for task, value in scores)
            words.append(f"tune {math.fsum(self.tune.values()) / len(self.tune):.3f} ({own})")
        if kept := shares(learned):
            own = " ".join(f"{_short(self.names[task])} {share:.0%}" for task, share in kept.items())
            words.append(f"kept {math.fsum(kept.values()) / len(kept):.0%} ({own})")
        return ", ".join(words)


def score_every(options: AdaptOptions, steps: int) -> int:
    """After how many steps to score; unless it was said, ten times, if that takes no more than a tenth of the work."""
    if options.score_every is not None:
        return options.score_every
    rows = options.score_limit / FORWARD  # of a step's price, which has a backward pass
    return max(1, steps // LOOKS, math.ceil(rows / options.batch_size / SHARE))


def _short(task: str) -> str:
    return task.rpartition("/")[2]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the facts of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _due(learned: Any, times: int) -> bool:
    """Whether one of so many moments has come, spread over the steps."""
    return bool(learned.step % max(1, learned.steps // times) == 0)


def shares(learned: Any) -> dict[str, float]:
    """The share of components that each task keeps, over all weights with masks."""
    logits, total = learned.logits, sum(learned.ranks.values())
    kept = {task: sum(int((x[i] > 0).sum()) for x in logits.values()) for i, task in enumerate(learned.tasks)}
    return {task: count / total for task, count in kept.items()} if total else {}
