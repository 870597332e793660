"""Measure how far experts are in each other's way: opposite signs of their task vectors, and who changed what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl import __version__
from mergectl.adapter_modes import apart, factor_views
from mergectl.adapters import AdapterCheckpoint
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.families import Family, open_family
from mergectl.lab import Lab
from mergectl.layers import NUMBERED
from mergectl.refs import ref_of
from mergectl.terminal import print_table
from mergectl.verbs import Result, record_inputs

if TYPE_CHECKING:
    import torch

Pair: TypeAlias = tuple[str, str]
Weights: TypeAlias = "Mapping[str, torch.Tensor]"
Part: TypeAlias = tuple[str, int | None]
OTHER = "other"  # weights outside of layers: embeddings, last norms
WHOLE: Part = ("", None)


@dataclass
class Counts:
    """Of some weights: elements in all, and how many are opposed, by pair and by any pair, and changed, by expert."""

    elements: int = 0
    opposed: dict[Pair, int] = field(default_factory=dict)
    any_opposed: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    changed_by: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("none", "one", "several"), 0))

    def add(self, tasks: Sequence[str], signs: torch.Tensor) -> None:
        """Count one weight, given the signs of its task vectors, [task, *shape]."""
        changes = (signs != 0).sum(0)
        self.elements += changes.numel()
        for task, row in zip(tasks, signs, strict=True):
            self.changed[task] = self.changed.get(task, 0) + int((row != 0).sum())
        for (one, a), (two, b) in itertools.combinations(zip(tasks, signs, strict=True), 2):
            self.opposed[one, two] = self.opposed.get((one, two), 0) + int((a * b < 0).sum())
        self.any_opposed += int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
        for word, count in (("none", changes == 0), ("one", changes == 1), ("several", changes > 1)):
            self.changed_by[word] += int(count.sum())

    def shares(self) -> Iterator[tuple[str, str | None, float]]:
        """Name, expert or pair, and share of the elements."""
        total = max(self.elements, 1)
        yield "sign_conflict", None, self.any_opposed / total
        for pair, count in self.opposed.items():
            yield "sign_conflict", "|".join(pair), count / total
        for task, count in self.changed.items():
            yield "changed_share", task, count / total
        for word, count in self.changed_by.items():
            yield f"changed_by_{word}", None, count / total


def measure(base: Weights, experts: Mapping[str, Weights]) -> dict[Part, Counts]:
    """Count by stack of layers and number of the layer, and of the whole model."""
    import torch

    tasks = list(experts)
    found: dict[Part, Counts] = {WHOLE: Counts()}
    for name in base:
        start = base[name].float()
        signs = torch.stack([(experts[task][name].float() - start).sign().to(torch.int8) for task in tasks])
        match = NUMBERED.match(name)
        part: Part = (match[1].rstrip("."), int(match[2])) if match else (OTHER, None)
        for key in (WHOLE, part):
            found.setdefault(key, Counts()).add(tasks, signs)
    return found


def measure_factors(family: Family) -> dict[Part, Counts]:
    """Count likewise of the factors of LoRA adapters that were begun alike; of other experts nothing."""
    found = {task: expert for task, expert in family.experts.items() if isinstance(expert, AdapterCheckpoint)}
    plain = all(expert.kind == "LORA" and expert.has_start for expert in found.values())
    if len(found) < len(family.experts) or not plain or apart(found):
        return {}
    return measure(*factor_views(found))


def family_of(lab: Lab, model: str, experts: Sequence[tuple[str | None, str]]) -> Family:
    """The experts that a merged model was made of, or those named, with the model as their base."""
    if experts:
        return open_family(model, experts, lab.find_run)
    inputs: list[dict[str, Any]] = open_checkpoint(model, lab.find_run).meta.get("inputs", [])
    rows = [row for row in inputs if row["role"] == "expert"]
    base = next((ref_of(row) for row in inputs if row["role"] == "base"), None)
    if not rows or base is None:
        raise UserError(
            f"{model} does not say from which base and experts it was merged. Name the base, and --experts."
        )
    return open_family(base, [(row["task"], ref_of(row)) for row in rows], lab.find_run)


def store_conflict(lab: Lab, model: str, experts: Sequence[tuple[str | None, str]], *, reuse: bool = False) -> Result:
    """Measure the conflict of experts and store it: of the whole model, and by layer under `<name>/<stack>`.

    That of the factors of LoRA adapters is stored likewise, its names beginning with `factors/`.
    """
    family = family_of(lab, model, experts)
    if len(family.experts) < 2:
        raise UserError("A conflict takes at least two experts. Name more of them: --experts A B")
    inputs = [{"role": row["role"], "task": row["task"], "digest": row["digest"]} for row in family.inputs]
    config = {"conflict": True, "inputs": inputs, "version": __version__}
    if reuse and (done := lab.done("eval", config)):
        return {"run": done["run_id"], "again": True}
    with lab.start("eval", config, name="conflict") as run:
        record_inputs(run, family)
        found = {"": measure(family.population.base, family.population.experts), "factors/": measure_factors(family)}
        for what, parts in found.items():
            for (stack, number), counts in parts.items():
                for name, task, share in counts.shares():
                    run.metric(f"{what}{name}/{stack}" if stack else f"{what}{name}", share, task=task, step=number)
    return {"run": run.id, "parts": found[""], "factors": found["factors/"], "again": False}


def show_conflict(
    lab: Lab, model: str, experts: Sequence[tuple[str | None, str]], *, asked: bool, others: Sequence[str] = ()
) -> None:
    """Measure, store and print, if that and nothing else is asked for."""
    if not asked:
        raise UserError("--experts names models whose conflict is measured. Add --conflict; heads have --heads.")
    if others:
        raise UserError(f"--conflict measures weights, not answers. Leave out --{others[0]}.")
    result = store_conflict(lab, model, experts)
    found = {"": _told(result["parts"]), "factors": _told(result["factors"])}

    def show() -> None:
        for what, (facts, layers) in found.items():
            if not facts:
                continue
            rows = [(row["name"], row["of"], f"{100 * float(str(row['share'])):.2f}") for row in facts]
            title = f"Of all {'elements of LoRA factors' if what else 'elements'} (run {result['run']})"
            print_table(title, ("what", "of", "percent"), rows, left=2)
            by_layer = [(row["stack"], row["layer"], f"{100 * float(str(row['sign_conflict'])):.2f}") for row in layers]
            print_table("Opposite signs by layer", ("stack", "layer", "percent"), by_layer, left=1)

    (whole, layers), (factors, factor_layers) = found.values()
    told = {"run": result["run"], "whole": whole, "layers": layers}
    lab.terminal.give(told | ({"factors": factors, "factor_layers": factor_layers} if factors else {}), show)


def _told(parts: Mapping[Part, Counts]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was counted of the whole, and by layer, as rows."""
    layers = [
        {"stack": stack, "layer": number, "sign_conflict": counts.any_opposed / max(counts.elements, 1)}
        for (stack, number), counts in sorted(parts.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        if stack
    ]
    shares = parts[WHOLE].shares() if parts else ()
    return [{"name": name, "of": task, "share": share} for name, task, share in shares], layers
