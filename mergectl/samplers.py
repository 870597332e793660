"""Where a search looks next: generations of candidates, each a function of the seed and of the scores before it.

A generation is proposed whole before its scores are used, so the path depends neither on who evaluates it nor on
interruptions. tpe, gp, nsga2 and nsga3 are Optuna's and look at whatever is finished when a candidate is begun.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.errors import UserError
from mergectl.space import Dimension
from mergectl.trials import Plan

if TYPE_CHECKING:
    import numpy as np

# A candidate is a full set of parameters, or None: Optuna draws it when it is begun. A search sends back the scores.
Proposals: TypeAlias = Generator[Sequence[Mapping[str, Any] | None], Sequence[float], None]
# Evaluations of one run of COBYLA without a restart, and the step at which it counts as settled.
COBYLA_SETTLED = 1e-3


def number(seed: int, candidate: int) -> int:
    """One seed for each candidate of a search."""
    import numpy as np

    return int(np.random.SeedSequence([seed, candidate]).generate_state(1)[0])


def random(plan: Plan) -> Proposals:
    """Independent draws."""
    import optuna

    from mergectl.space import distributions

    made = []
    for candidate in range(plan.trials):
        draw: Any = optuna.samplers.RandomSampler(seed=number(plan.seed, candidate)).sample_independent
        made.append({name: draw(None, None, name, kind) for name, kind in distributions(plan.dimensions).items()})
    yield _begun(plan, made)


def _begun(plan: Plan, made: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Candidates of which the first, where the plan asks for them, are the defaults and the ends of all ranges."""
    known = [{d.name: d.first for d in plan.dimensions}] if plan.default else []
    if plan.endpoints:
        known += [{d.name: d.points(2)[at] for d in plan.dimensions} for at in (0, -1)]
    return [*known[: plan.trials], *made[len(known) :]]


def qmc(plan: Plan) -> Proposals:
    """Scrambled Sobol points: they fill the space more evenly than random ones."""
    from scipy.stats import qmc as library

    sobol = library.Sobol(len(plan.dimensions), scramble=True, rng=plan.seed)
    points = sobol.random_base2(max(0, (plan.trials - 1).bit_length()))
    yield _begun(plan, [_params(plan.dimensions, point) for point in points[: plan.trials]])


def grid(plan: Plan) -> Proposals:
    """Every combination in order; numbers without a step get as many points as the trials allow."""
    each = max(2, int(plan.trials ** (1 / len(plan.dimensions)) + 1e-9))
    combinations = list(itertools.product(*(d.points(each) for d in plan.dimensions)))
    if len(combinations) > plan.trials:
        raise UserError(
            f"The grid has {len(combinations)} points: give --trials {len(combinations)}, or coarser steps."
        )
    names = [d.name for d in plan.dimensions]
    yield [dict(zip(names, values, strict=True)) for values in combinations]


def cmaes(plan: Plan) -> Proposals:
    """CMA-ES from the defaults; when it stagnates it begins anew elsewhere with twice the population.

    Each dimension is measured in steps, so that sigma is 1; samples outside the box are drawn again, then clipped.
    """
    import numpy as np
    from cmaes import CMA

    steps, mean = _steps(plan), _start(plan)
    if len(steps) == 1:  # the cmaes package needs two dimensions; a lone one gets a companion that scores nothing
        steps, mean = np.append(steps, 1 / 6), np.append(mean, 0.5)
    bounds = np.stack([np.zeros(len(steps)), 1 / steps], axis=1)
    population, restart, left = plan.population or 4 + int(3 * np.log(len(plan.dimensions))), 0, plan.trials
    while left > 0:
        cma = CMA(
            mean=mean / steps, sigma=1.0, bounds=bounds, population_size=population, seed=number(plan.seed, restart)
        )
        while left > 0 and not cma.should_stop():
            points = [cma.ask() for _ in range(population)]
            scores = yield [_params(plan.dimensions, point * steps) for point in points[:left]]
            left -= len(points)
            if len(scores) == population:
                cma.tell([(point, -score) for point, score in zip(points, scores, strict=True)])
        restart, population = restart + 1, population * 2
        mean = np.random.default_rng(number(plan.seed, restart)).uniform(size=len(mean))


def cobyla(plan: Plan) -> Proposals:
    """COBYLA from the defaults, one candidate at a time; when it has settled it begins anew elsewhere."""
    import numpy as np

    start, restart, left = _start(plan), 0, plan.trials
    while left > 0:
        scores: list[float] = []
        while left > 0 and (point := _after(plan, start, scores)) is not None:
            (score,) = yield [_params(plan.dimensions, point)]
            # A refused candidate is worse than any: by how much, linear models must not be told.
            scores.append(score if score > float("-inf") else min(scores, default=0.0) - 1.0)
            left -= 1
        restart += 1
        start = np.random.default_rng(number(plan.seed, restart)).uniform(size=len(start))


class _Next(Exception):  # noqa: N818  # not an error: COBYLA asks for a score that is not known yet
    def __init__(self, point: np.ndarray[Any, Any]) -> None:
        self.point = point


def _after(plan: Plan, start: np.ndarray[Any, Any], scores: Sequence[float]) -> np.ndarray[Any, Any] | None:
    """The point that COBYLA asks for after these scores, found by running it again; None once it has settled."""
    from scipy.optimize import minimize

    known, steps = iter(scores), _steps(plan)

    def loss(point: np.ndarray[Any, Any]) -> float:
        score = next(known, None)
        if score is None:
            raise _Next(point * steps)
        return -score

    options = {"rhobeg": 1.0, "maxiter": plan.trials + 1, "tol": COBYLA_SETTLED}
    try:
        minimize(loss, start / steps, method="COBYLA", bounds=[(0.0, 1 / step) for step in steps], options=options)
    except _Next as asked:
        return asked.point
    return None


def _steps(plan: Plan) -> np.ndarray[Any, Any]:
    """The first step in each dimension, as a share of its range: a sixth, or what `--sigma` says.

    On a range in equal factors sigma is a logarithm: 0.7 is a factor of two.
    """
    import numpy as np

    if plan.sigma is None:
        return np.full(len(plan.dimensions), 1 / 6)
    return np.array([min(1.0, plan.sigma / max(d.width, 1e-12)) for d in plan.dimensions])


def _start(plan: Plan) -> np.ndarray[Any, Any]:
    """Where to begin, as shares of the ranges: what `--start` says, the default, or the middle."""
    import numpy as np

    words = [d.name for d in plan.dimensions if d.kind == "word"]
    if words:
        raise UserError(
            f"{plan.sampler} searches numbers; '{words[0]}' is a word. Fix it with --fix, or take --sampler tpe."
        )
    starts = []
    for d in plan.dimensions:
        given = plan.start.get(d.name, plan.start.get(d.setting, d.start))
        inside = given is not None and d.low <= given <= d.high
        starts.append(d.share(given) if inside and given is not None else 0.5)
    return np.array(starts)


def _params(dimensions: Sequence[Dimension], point: Iterable[float]) -> dict[str, Any]:
    return {d.name: d.at(float(share)) for d, share in zip(dimensions, point, strict=False)}


def by_optuna(plan: Plan) -> Proposals:
    """Leave every candidate to Optuna."""
    yield [None] * plan.trials


def drawing(plan: Plan, candidate: int) -> Any:
    """The Optuna sampler that draws a candidate: a new one each time, so that nothing is remembered but the study."""
    import optuna

    kinds = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
        "nsga3": optuna.samplers.NSGAIIISampler,
    }
    more = {"population_size": plan.population} if plan.population and plan.sampler.startswith("nsga") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # NSGA-III's interface may change
        return kinds[plan.sampler](seed=number(plan.seed, candidate), **more)


@dataclass(frozen=True)
class Sampler:
    """A way of choosing candidates, and what it can do."""

    propose: Callable[[Plan], Proposals]
    objectives: bool = True  # takes several objectives
    population: bool = False  # takes --population
    start: bool = False  # takes --start and --sigma


SAMPLERS: Mapping[str, Sampler] = {
    "random": Sampler(random),
    "qmc": Sampler(qmc),
    "tpe": Sampler(by_optuna),
    "gp": Sampler(by_optuna),
    "cmaes": Sampler(cmaes, objectives=False, population=True, start=True),
    "cobyla": Sampler(cobyla, objectives=False, start=True),
    "grid": Sampler(grid),
    "nsga2": Sampler(by_optuna, population=True),
    "nsga3": Sampler(by_optuna, population=True),
}


def check_sampler(name: str) -> str:
    """Refuse an unknown sampler."""
    from mergectl.errors import did_you_mean

    if name not in SAMPLERS:
        raise UserError(f"No sampler '{name}'.{did_you_mean(name, SAMPLERS)}")
    return name


def check_plan(plan: Plan) -> None:
    """Refuse what a sampler cannot do, before anything is loaded."""
    sampler = SAMPLERS[check_sampler(plan.sampler)]
    if len(plan.objectives) > 1 and not sampler.objectives:
        raise UserError(
            f"{plan.sampler} takes one objective, and {', '.join(plan.objectives)} are {len(plan.objectives)}. "
            "Take --sampler nsga2, tpe, random or qmc."
        )
    if plan.prune is not None and plan.objectives != ("mean",):
        raise UserError(f"--prune compares means: it cannot serve the objective {', '.join(plan.objectives)}.")
    given = {"--population": plan.population, "--sigma": plan.sigma, "--start": plan.start or None}
    for option, value in given.items():
        if value is not None and not (sampler.population if option == "--population" else sampler.start):
            able = [name for name, s in SAMPLERS.items() if (s.population if option == "--population" else s.start)]
            raise UserError(f"{option} is for {', '.join(able)}, not for {plan.sampler}.")
    if plan.endpoints and plan.sampler not in ("random", "qmc"):
        raise UserError(f"--include-endpoints is for random and qmc, not for {plan.sampler}.")
    if plan.default and plan.sampler in ("grid", "cmaes", "cobyla"):
        raise UserError(f"--include-default is for samplers that draw their first candidate, not for {plan.sampler}.")
    known = {name for d in plan.dimensions for name in (d.name, d.setting)}
    for name in plan.start:
        if name not in known:
            raise UserError(f"--start {name}: this is not searched. Searched: {', '.join(sorted(known))}.")
    for d in plan.dimensions:
        value = plan.start.get(d.name, plan.start.get(d.setting))
        if value is not None and not d.low <= value <= d.high:
            raise UserError(f"--start {d.name}={value:g} lies outside its range, {d.low:g} to {d.high:g}.")
    next(sampler.propose(plan))  # a grid too large, or words where only numbers are searched
