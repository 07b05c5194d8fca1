"""The screening of a study: every variant at its learning rates on few steps, with grids that widen by themselves.

A grid whose best rate is the lowest or the highest that was tried does not show where the optimum is. As long as any
variant is in that state, and at most `study.widen` times, every variant gets one more run: the next rate beyond the
best one, at the ratio of the grid's last step on that side, if the best one is at an edge; else the middle, by ratio,
between the best rate and a neighbor: the one further away, or the better one if they are as far. So all variants, the
reference among them, are tuned with the same number of runs. The rates follow from the losses alone: the same command,
run again, asks for the same runs, which have ended.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from finhpc.commands.study.trained import Trained, by_variant, train
from finhpc.commands.study.variants import SCREEN, trial_of
from finhpc.errors import TrainingFailedError
from finhpc.settings.sweep import StudyConfig

log = logging.getLogger(__name__)

Edge = Literal["lowest", "highest", "only"]  # what the best rate is among those that were tried


def screen(config: StudyConfig) -> list[Trained]:
    """Every variant at its learning rates, on the first seed; empty if there is nothing to choose.

    Variants that start from another's model are screened after all others, from its best run then. Raises
    `TrainingFailedError` if a run fails, or if a variant that another one starts from diverged at every rate.
    """
    variants, screened = config.study.variants, list[Trained]()
    if not screens(config):
        return []
    scratch = [name for name, variant in variants.items() if variant.start is None]
    started = [name for name in variants if name not in scratch]
    screened += _at(config, {name: variants[name].lr for name in scratch}, screened)
    rounds = 0
    while rounds < config.study.widen and _edges(screened, scratch):
        screened += _next(config, screened, scratch)
        rounds += 1
    if started:
        starts = list(screened)  # as they are now: later runs of these variants change no start
        screened += _at(config, {name: variants[name].lr for name in started}, starts)
        for i in range(config.study.widen):
            if i >= rounds and not _edges(screened, started):
                break
            screened += _next(config, screened, started, starts)
            if i >= rounds:
                screened += _next(config, screened, scratch)
    return screened


def screens(config: StudyConfig) -> bool:
    """Whether there is something to choose: finalists, or a learning rate."""
    variants = config.study.variants
    everyone = config.study.finalists in (0, len(variants) - 1)
    return not everyone or any(len(variant.lr) > 1 for variant in variants.values())


def _edges(screened: list[Trained], names: list[str]) -> list[str]:
    """The variants among `names` whose grid can be widened and whose best rate is at its edge."""
    return [name for name in names if edge_of(rates_of(screened, name)) in ("lowest", "highest")]


def _next(
    config: StudyConfig, screened: list[Trained], names: list[str], starts: list[Trained] | None = None
) -> list[Trained]:
    """Train each variant at one more rate."""
    more = {}
    for name in names:
        rates = rates_of(screened, name)
        edge, lr = edge_of(rates), next_rate(rates)
        why = f"the best is the {edge} rate tried" if edge else "between the best rate and a neighbor"
        log.info(f"{name}: lr {lr:g} is screened too ({why})")
        more[name] = [lr]
    return _at(config, more, starts or screened)


def _at(config: StudyConfig, rates: dict[str, list[float]], starts: list[Trained]) -> list[Trained]:
    """Train each variant at its rates; `starts`: the runs among which the models are that some start from."""
    seed, best = config.study.seeds[0], best_of(starts)
    named = []
    for name, lrs in rates.items():
        start = config.study.variants[name].start
        if start and start not in best:
            raise TrainingFailedError(f"{name} starts from {start}, which diverged; lower its learning rates.")
        trial = best[start].trial if start else None
        named += [(name, trial_of(config, SCREEN, name, lr, seed, trial)) for lr in lrs]
    return train(config, named)


def rates_of(screened: list[Trained], name: str) -> dict[float, float]:
    """Learning rate -> final validation loss of a variant, the rates in rising order; infinite where it diverged."""
    return dict(sorted((one.lr, one.loss) for one in screened if one.variant == name))


def edge_of(rates: dict[float, float]) -> Edge | None:
    """Whether the best rate is at an edge of those that were tried; None if worse ones are on both sides of it.

    A variant that diverged at every rate counts as best at the lowest one.
    """
    tried, best = list(rates), min(rates, key=lambda lr: rates[lr])
    if len(tried) == 1:
        return "only"
    return "lowest" if best == tried[0] else "highest" if best == tried[-1] else None


def next_rate(rates: dict[float, float]) -> float:
    """The rate to try next, with six digits, as names of runs have them; see above. `rates`: two or more, rising."""
    tried, edge = list(rates), edge_of(rates)
    best = min(rates, key=lambda lr: rates[lr])
    if edge == "lowest":
        lr = tried[0] ** 2 / tried[1]
    elif edge == "highest":
        lr = tried[-1] ** 2 / tried[-2]
    else:  # halfway to the neighbor that is farther away or, of two at the same distance, has the lower loss
        at = tried.index(best)
        below, above = tried[at - 1], tried[at + 1]
        farther = round(math.log(best / below) - math.log(above / best), 3)
        is_below = farther > 0 or (farther == 0 and rates[below] <= rates[above])
        lr = math.sqrt(best * (below if is_below else above))
    return float(f"{lr:g}")


def best_of(trained: list[Trained]) -> dict[str, Trained]:
    """Variant -> its run with the lowest final validation loss; diverged runs are left out."""
    best: dict[str, Trained] = {}
    for one in trained:
        if one.curve and (one.variant not in best or one.loss < best[one.variant].loss):
            best[one.variant] = one
    return best


def finalists(config: StudyConfig, screened: list[Trained]) -> dict[str, float]:
    """Variant -> its best learning rate: the reference and the best of the others; all without a screening."""
    variants, reference = config.study.variants, config.study.reference
    if not screened:
        return {name: variant.lr[0] for name, variant in variants.items()}
    best = best_of(screened)
    if reference not in best:
        rates = list(rates_of(screened, reference))
        raise TrainingFailedError(f"every learning rate of {reference} diverged: {rates}; give lower ones.")
    others = sorted((name for name in best if name != reference), key=lambda name: best[name].loss)
    others = others[: config.study.finalists or None]
    needed = {str(variants[name].start) for name in others if variants[name].start}
    names = dict.fromkeys([reference, *sorted(needed & set(best)), *others])
    return {name: best[name].lr for name in names}


def tuning_rows(config: StudyConfig, screened: list[Trained]) -> list[dict[str, Any]]:
    """A row per variant: the runs and tokens that were spent on its rates, the best one, and whether it is at an edge.

    `lr_edge`: lowest or highest of those tried, only if none else was, null if it is inside; `val_loss`: null if all
    of its runs diverged, or none was made.
    """
    groups, rows = by_variant(screened), []
    for name, variant in config.study.variants.items():
        runs = groups.get(name, [])
        rates = rates_of(runs, name) or {lr: float("inf") for lr in sorted(variant.lr)}
        best = best_of(runs).get(name)
        rows.append(
            {
                "variant": name,
                "runs": len(runs),
                "tokens": sum(one.config.train.steps * one.tokens_per_step for one in runs),
                "lrs": list(rates),
                "lr": best.lr if best else None if runs else variant.lr[0],
                "lr_edge": edge_of(rates),
                "val_loss": best.loss if best else None,
            }
        )
    return rows
