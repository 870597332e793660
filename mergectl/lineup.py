"""Line up checkpoints of one family: which names are the shared backbone, which are a task's head.

No table of architectures: names are compared. An expert saved as a classifier carries its backbone under one
prefix (`bert.`, `vit.`, `transformer.`); everything outside it is the head, and so is what the base does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.headers import FLOATING
from mergectl.naming import common_names
from mergectl.prefixes import DISTILLED, LAYER, headed_prefix_of, prefixes, within_modules
from mergectl.reheading import HeadedModel
from mergectl.tied import HEAD, head_notes, repeated
from mergectl.views import TOKENS, Grown, Renamed, grown
from mergectl.vocabulary import Vocabulary, as_told

TEXT_SIDE = re.compile(r"(clip\.)?(text_model\.|text_projection\.|logit_scale$)")  # of CLIP
Hidden = frozenset[str]  # names that are not lined up


@dataclass(frozen=True)
class Population:
    """A base and its experts under common names: `base` and `experts` hold exactly the weights to merge."""

    base: Renamed
    experts: dict[str, Renamed]
    heads: dict[str, tuple[str, ...]]  # task -> the expert's own names of its head
    carried: tuple[str, ...]  # names of the base that no expert has, or that hold no real numbers
    tied: dict[str, str] = field(default_factory=dict)  # name of the base -> the merged weight that it copies
    copies: dict[str, dict[str, str]] = field(default_factory=dict)  # the same of each expert, by task
    notes: tuple[str, ...] = ()  # what a person should know, in sentences
    blended: tuple[str, ...] = ()  # merged names that are heads: what comes of them answers every task


def line_up(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Population:
    """Pair every weight of the base with those of the experts; refuse another architecture or shape."""
    for checkpoint in (base, *experts.values()):
        if checkpoint.config.get("quantization_config"):
            raise UserError(f"{checkpoint.ref} is quantised, and only real numbers can be merged. Name the full model.")
    hidden = _frozen_texts(base, list(experts.values()))
    strip = _own_prefix(base, list(experts.values()), hidden)
    views, heads = {}, {}
    for task, expert in experts.items():
        views[task], heads[task] = _pair(base, strip, expert, hidden)
    _set_aside_copies(base, strip, experts, views, heads)
    blended = _blended(base, strip, experts, views, heads)
    shared = _shared_names(base, strip, views, hidden)
    merged = {name: own for name, own in shared.items() if base.dtype(own) in FLOATING}
    _same_kinds(base, shared, experts, views)
    if not merged:
        raise UserError(f"{base.ref} holds whole numbers only, and only real numbers can be merged.")
    grown = _grown(base, merged, experts, views)
    models = [Renamed(base, merged), *(Renamed(experts[t], views[t]) for t in experts)]
    twice = {} if base.config.get("tie_word_embeddings") is False else repeated(models)
    merged = {name: own for name, own in merged.items() if name not in twice}
    by_task = {t: Renamed(experts[t], {n: views[t][n] for n in merged}, grown) for t in experts}
    ours = Renamed(base, merged, grown)
    carried = [n for n in base.names if n not in merged.values()]
    tied = _copies(base, [n for n in carried if n not in shared.values()], ours)
    notes = [*_grown_notes(ours, by_task), *_whole_notes(base, shared, experts, views)]
    copies = {task: _copies(expert, heads[task], by_task[task]) for task, expert in experts.items()}
    own_heads = {
        task: tuple(name for name in names if name not in copies[task] and not DISTILLED.search(name))
        for task, names in heads.items()
    }
    notes += [f"'{n}' of '{task}' only repeats '{of}': left out." for task in copies for n, of in copies[task].items()]
    notes += [f"'{n}' of the base repeats '{of}' and goes on to, as it is merged." for n, of in tied.items()]
    if hidden:
        notes.append("The text tower makes the heads of a CLIP model. No expert changes it: kept from the base.")
    notes += [*_distilled_notes(heads), *head_notes(base, own_heads), *_body_notes(own_heads, views, experts)]
    dropped = {name for task, expert in experts.items() if expert is base for name in heads[task]}  # there is no base
    told = {*shared.values(), *tied, *hidden, *dropped}
    if lone := [n for n in carried if n not in told]:
        notes.append(f"No expert has {_some(lone)}: kept from the base.")
    tied |= {shared[name]: of for name, of in twice.items()}
    copies = {task: found | {views[task][name]: of for name, of in twice.items()} for task, found in copies.items()}
    rest = tuple(name for name in carried if name not in tied)
    return Population(ours, by_task, own_heads, rest, tied, copies, tuple(notes), blended)


def _blended(
    base: Checkpoint,
    strip: str,
    experts: Mapping[str, Checkpoint],
    views: dict[str, dict[str, str]],
    heads: dict[str, tuple[str, ...]],
) -> tuple[str, ...]:
    """Count the heads of experts that ask for it among the weights to merge; return their names."""
    asking = [task for task, expert in experts.items() if isinstance(expert, HeadedModel) and expert.blends]
    own = [name for name in common_names(base.names, strip) if strip and not name.startswith(strip)]
    for task in asking:
        found = [name for name in own if name in heads[task]]
        if not found:
            raise UserError(
                f"A head is interpolated where both models have one, but {base.ref} and expert '{task}' have no head "
                "weight in common. Keep the expert's: --head small"
            )
        views[task] |= {name: name for name in found}
        heads[task] = tuple(name for name in heads[task] if name not in found)
    return tuple(name for name in own if any(name in views[task] for task in asking))


def _set_aside_copies(
    base: Checkpoint,
    strip: str,
    experts: Mapping[str, Checkpoint],
    views: dict[str, dict[str, str]],
    heads: dict[str, tuple[str, ...]],
) -> None:
    """Take out of the pairs what some files repeat of another weight over the tokens, and others store once."""
    import torch

    ours = {name: own for own, name in common_names(base.names, strip).items() if TOKENS.search(name)}
    everywhere = [name for name in ours if all(name in view for view in views.values())]
    for name, own in ours.items():
        having = [task for task, view in views.items() if name in view]
        if len(having) in (0, len(views)):
            continue
        pairs = [(base, ours), *((experts[task], views[task]) for task in having)]
        for of in (of for of in everywhere if base.shape(ours[of]) == base.shape(own)):
            if all(torch.equal(model[names[name]], model[names[of]]) for model, names in pairs):
                for task in having:
                    heads[task] = (*heads[task], views[task].pop(name))
                break


def _frozen_texts(base: Checkpoint, experts: Sequence[Checkpoint]) -> Hidden:
    """The text side of CLIP models, if no expert changes it: then a merge has nothing to do with it."""
    import torch

    if base.config.get("model_type") != "clip":
        return frozenset()
    ours = {name.removeprefix("clip."): name for name in base.names if TEXT_SIDE.match(name)}
    found = set(ours.values())
    for expert in experts:
        for name in filter(TEXT_SIDE.match, expert.names):
            own = ours.get(name.removeprefix("clip."))
            if own is None or not torch.equal(base[own], expert[name]):
                return frozenset()
            found.add(name)
    return frozenset(found)


def _shared_names(
    base: Checkpoint, strip: str, views: Mapping[str, Mapping[str, str]], hidden: Hidden
) -> dict[str, str]:
    """Common name -> the base's own name, for the weights that every expert has."""
    shared = {}
    for own, name in _common_names(base, strip, hidden).items():
        having = [task for task, view in views.items() if name in view]
        lacking = [task for task in views if task not in having]
        if having and lacking:
            raise UserError(f"Expert '{lacking[0]}' has no weight '{name}', which the base and '{having[0]}' have.")
        if having:
            shared[name] = own
    return shared


def _same_kinds(
    base: Checkpoint,
    shared: Mapping[str, str],
    experts: Mapping[str, Checkpoint],
    views: Mapping[str, Mapping[str, str]],
) -> None:
    """Refuse types that cannot be merged, and real numbers where another model has whole ones."""
    for name, own in shared.items():
        for who, word in [
            (base.ref, base.dtype(own)),
            *((experts[t].ref, experts[t].dtype(views[t][name])) for t in views),
        ]:
            if word.startswith(("F8", "C")) or (word in FLOATING) != (base.dtype(own) in FLOATING):
                raise UserError(
                    f"'{name}' is of the type {word} in {who} and {base.dtype(own)} in {base.ref}. "
                    f"Only {', '.join(FLOATING)} can be merged."
                )


def _grown(
    base: Checkpoint,
    merged: Mapping[str, str],
    experts: Mapping[str, Checkpoint],
    views: Mapping[str, Mapping[str, str]],
) -> dict[str, Grown]:
    """The weights in which only the number of tokens differs; any other difference of shape is refused."""
    found: dict[str, Grown] = {}
    known: dict[str | None, Vocabulary | None] = {}
    for name, own in merged.items():
        shapes = {task: experts[task].shape(view[name]) for task, view in views.items()}
        odd = next((task for task, shape in shapes.items() if shape != base.shape(own)), None)
        if odd is None:
            continue
        if not known:
            known[None] = as_told(base)
            known |= {task: as_told(expert) for task, expert in experts.items()}
        fitting = grown(name, base.shape(own), shapes, known)
        if fitting is None or fitting.common < min(map(_tokens, (base, *experts.values()))):
            raise UserError(
                f"'{name}' has shape {list(base.shape(own))} in {base.ref} but {list(shapes[odd])} in expert '{odd}' "
                f"({experts[odd].ref}). Experts must be fine-tuned copies of the base."
            )
        found[name] = fitting
    return found


def _tokens(checkpoint: Checkpoint) -> int:
    """The size of the vocabulary, as far as the configuration tells."""
    config = checkpoint.config
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size", 0))
    return size if isinstance(size, int) else 0


def _grown_notes(base: Renamed, experts: Mapping[str, Renamed]) -> Iterator[str]:
    for name, rows in base.grown.items():
        kept = " and ".join(
            f"{start} to {end - 1} kept from {'the base' if task is None else repr(task)}"
            for task, start, end in rows.parts
        )
        unused = f"; those of {_some(rows.unused)} are not used" if rows.unused else ""
        yield f"Vocabularies differ: of '{name}', rows 0 to {rows.common - 1} are merged, rows {kept}{unused}."


def _whole_notes(
    base: Checkpoint,
    shared: Mapping[str, str],
    experts: Mapping[str, Checkpoint],
    views: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    """Say which whole numbers (counters, positions) differ in an expert."""
    import torch

    whole = [(name, own) for name, own in shared.items() if base.dtype(own) not in FLOATING]
    for task, expert in experts.items():
        other = [name for name, own in whole if not torch.equal(base[own], expert[views[task][name]])]
        if other:
            yield f"Whole numbers of '{task}' differ from the base's, which are kept: {_some(other)}."


def _distilled_notes(heads: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for task, names in heads.items():
        if odd := [name for name in names if DISTILLED.search(name)]:
            yield f"'{task}' holds projections of its distillation, {_some(odd)}: left out."


def _body_notes(
    heads: Mapping[str, Sequence[str]], views: Mapping[str, Mapping[str, str]], experts: Mapping[str, Checkpoint]
) -> Iterator[str]:
    """Say whose weights are no part of the result, though they belong to no task's head."""
    for task, names in heads.items():
        others = [name for name in names if not HEAD.search(name)]  # of these head_notes speaks
        headed = experts[task].config.get("architectures") is None or headed_prefix(experts[task])
        if odd := within_modules(names, views[task].values()) if headed else others:
            yield f"The base has no {_some(odd)}, so '{task}' has them merged with none: kept in tasks/{task} alone."


def _copies(model: Checkpoint, names: Sequence[str], merged: Renamed) -> dict[str, str]:
    """Those of the names that only repeat a merged weight, as tied embeddings do; with that weight's name."""
    import torch

    found = {}
    sources = [name for name in merged if TOKENS.search(name)]
    for own in (name for name in names if TOKENS.search(name)):
        alike = [n for n in sources if model.shape(merged.own_name[n]) == model.shape(own)]
        if match := next((n for n in alike if torch.equal(model[merged.own_name[n]], model[own])), None):
            found[own] = match
    return found


def _some(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _own_prefix(base: Checkpoint, experts: Sequence[Checkpoint], hidden: Hidden) -> str:
    """The prefix of the base's names under which it has most in common with every one of the experts."""

    def shared(strip: str) -> tuple[int, int]:
        counts = [len(_nearest(base, strip, expert, hidden)) for expert in experts]
        return min(counts), sum(counts)

    return max(prefixes([name for name in base.names if name not in hidden]), key=shared)


def _nearest(base: Checkpoint, strip: str, expert: Checkpoint, hidden: Hidden) -> dict[str, str]:
    """Common name -> expert's name, by that prefix of the expert's names which gives most of them."""
    fixed = headed_prefix(expert)
    names = [name for name in expert.names if name not in hidden]
    choices = [fixed] if fixed else sorted(prefixes(names), key=lambda prefix: prefix != strip)
    return max((_common(base, strip, expert, prefix, hidden) for prefix in choices), key=len)


def _pair(base: Checkpoint, strip: str, expert: Checkpoint, hidden: Hidden) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return common name -> expert's name, and the expert's head names."""
    common = _nearest(base, strip, expert, hidden)
    backbone = [name for own, name in _common_names(base, strip, hidden).items() if own.startswith(strip)]
    if 2 * len(common) < len(backbone):
        missing = next(n for n in backbone if n not in common)
        raise UserError(
            f"{expert.ref} is no fine-tuned copy of {base.ref}: it has {len(common)} of its {len(backbone)} weights "
            f"(not '{missing}', for example)."
        )
    head = tuple(n for n in expert.names if n not in common.values() and n not in hidden)
    repeated = {_shape_of_name(own) for own in common.values()} | {_shape_of_name(name) for name in common}
    for more, less, names in ((base, expert, [n for n in backbone if n not in common]), (expert, base, head)):
        if extra := next((n for n in names if "#" in _shape_of_name(n) and _shape_of_name(n) in repeated), None):
            layer = LAYER.match(extra)
            if layer is not None and any(layer[0] in name for name in less.names):
                raise UserError(
                    f"{less.ref} has no '{extra}', as {more.ref} has, though other weights of that layer: "
                    "its files are not whole, or it is no fine-tuned copy."
                )
            raise UserError(
                f"{more.ref} has '{extra}', which {less.ref} has in its other layers only. "
                "Experts must be fine-tuned copies of the base. Those of another depth need a map: --layer-map prefix"
            )
    return common, head


def _shape_of_name(name: str) -> str:
    """A weight's name without its layer's number: `encoder.layer.#.output.dense.bias`."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "#", name)


def _common(base: Checkpoint, strip: str, expert: Checkpoint, prefix: str, hidden: Hidden) -> dict[str, str]:
    ours = {name for own, name in _common_names(base, strip, hidden).items() if own.startswith(strip)}
    theirs = {name: own for own, name in _common_names(expert, prefix, hidden).items() if own.startswith(prefix)}
    return {name: own for name, own in theirs.items() if name in ours}


def _common_names(checkpoint: Checkpoint, prefix: str, hidden: Hidden) -> dict[str, str]:
    """Own name -> the name without the prefix and in today's spelling."""
    return common_names([own for own in checkpoint.names if own not in hidden], prefix)


def headed_prefix(checkpoint: Checkpoint) -> str:
    """The backbone's prefix in a model saved with a task head, or '' when it has none."""
    return headed_prefix_of(checkpoint.config, checkpoint.names)
