"""Where a search looks next: Optuna's samplers, and CMA-ES by whole generations.

Every sampler is a function of the seed and of what is finished, so that a search that was killed and started again
proposes what it would have proposed without the interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError

if TYPE_CHECKING:
    import optuna

    from mergectl.space import Dimension

# A search sends each candidate's score back; a candidate is a full set of parameters, or None: let Optuna draw it.
Proposals = Generator[dict[str, Any] | None, float, None]


def _number(seed: int, candidate: int) -> int:
    """One seed for each candidate of a search."""
    import numpy as np

    return int(np.random.SeedSequence([seed, candidate]).generate_state(1)[0])


def _by_optuna(make: Callable[[int], Any]) -> Callable[[optuna.Study, Sequence[Dimension], int, int], Proposals]:
    def propose(study: optuna.Study, dimensions: Sequence[Dimension], seed: int, trials: int) -> Proposals:
        for candidate in range(trials):
            study.sampler = make(_number(seed, candidate))
            yield None

    return propose


def _random(seed: int) -> Any:
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(seed: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(seed=seed)


def fixed(params: dict[str, Any]) -> Any:
    """A sampler that gives exactly these parameters."""
    import optuna

    class Fixed(optuna.samplers.BaseSampler):  # type: ignore[misc]  # the library is untyped
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return params[param_name]

    return Fixed()


def grid(study: optuna.Study, dimensions: Sequence[Dimension], seed: int, trials: int) -> Proposals:
    """Every combination in order; numbers without a step get as many points as the trials allow."""
    import itertools

    each = max(2, int(trials ** (1 / len(dimensions)) + 1e-9))
    combinations = list(itertools.product(*(d.points(each) for d in dimensions)))
    if len(combinations) > trials:
        raise UserError(
            f"The grid has {len(combinations)} points: give --trials {len(combinations)}, or coarser steps."
        )
    for values in combinations:
        yield {d.name: value for d, value in zip(dimensions, values, strict=True)}


def cmaes(study: optuna.Study, dimensions: Sequence[Dimension], seed: int, trials: int) -> Proposals:
    """CMA-ES on the unit cube: starts at the defaults, sigma 1/6 of each range, restarts with twice the population.

    A generation is proposed whole before its scores are used, so the path does not depend on who evaluates it.
    """
    import numpy as np
    from cmaes import CMA

    words = [d.name for d in dimensions if d.kind == "word"]
    if words:
        raise UserError(f"cmaes searches numbers; '{words[0]}' is a word. Fix it with --fix, or take --sampler tpe.")
    mean = np.array([_unit(d) for d in dimensions])
    population, restart, left = 4 + int(3 * np.log(len(dimensions))), 0, trials
    bounds = np.tile([0.0, 1.0], (len(dimensions), 1))
    # The cmaes package needs two dimensions; a lone one gets a companion that scores nothing.
    pad = 1 if len(dimensions) == 1 else 0
    if pad:
        mean, bounds = np.append(mean, 0.5), np.tile([0.0, 1.0], (2, 1))
    while left > 0:
        cma = CMA(mean=mean, sigma=1 / 6, bounds=bounds, population_size=population, seed=_number(seed, restart))
        while left > 0 and not cma.should_stop():
            points = [cma.ask() for _ in range(population)]
            scores = []
            for point in points[:left]:
                scores.append((yield {d.name: _value(d, u) for d, u in zip(dimensions, point, strict=False)}))
            left -= len(points)
            if len(scores) == population:
                cma.tell([(point, -score) for point, score in zip(points, scores, strict=True)])
        restart, population = restart + 1, population * 2
        mean = np.random.default_rng(_number(seed, restart)).uniform(size=len(mean))


def _unit(d: Dimension) -> float:
    start = d.start if d.start is not None and d.low <= d.start <= d.high else (d.low + d.high) / 2
    return (start - d.low) / (d.high - d.low)


def _value(d: Dimension, unit: float) -> float | int:
    value = d.low + float(unit) * (d.high - d.low)
    if d.step:
        value = min(d.high, d.low + round((value - d.low) / d.step) * d.step)
    return round(value) if d.kind == "int" else value


SAMPLERS: Mapping[str, Callable[..., Proposals]] = {
    "random": _by_optuna(_random),
    "tpe": _by_optuna(_tpe),
    "cmaes": cmaes,
    "grid": grid,
}
