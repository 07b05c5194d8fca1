"""Which runs a study is made of: their settings, their names, and which variants go on to the finals."""

from __future__ import annotations

from typing import Any

from finhpc.commands.study.report import WITHOUT_W, Trained
from finhpc.errors import ConfigError, TrainingFailedError, collect
from finhpc.lowrank.registry import BLEND, SVD
from finhpc.planning.plan import make_plan
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build, nearest
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.study import StudyConfig, Variant


def check(config: StudyConfig) -> None:
    """Raise one `ConfigError` with every problem of the study and of each of its runs."""
    variants, problems = config.study.variants, []
    if config.study.reference not in variants:
        problems.append(
            f"study.reference={config.study.reference} is no variant; {nearest(config.study.reference, list(variants))}"
        )
    if len({len(variant.lr) for variant in variants.values()}) > 1:
        counts = ", ".join(f"{name} {len(variant.lr)}" for name, variant in variants.items())
        problems.append(f"study.variants have unequal numbers of learning rates ({counts}); give each as many.")
    for name, variant in variants.items():
        if variant.start is not None and (variant.start not in variants or variants[variant.start].start):
            problems.append(
                f"study.variants.{name}.start={variant.start} is no variant that begins from nothing; use another."
            )
        found: list[str] = []
        with collect(found):
            run = run_config(config, "final", name, variant.lr[0], config.study.seeds[0])
            RunFolder(run.run.storage, run.run.name)  # whether it can be named so
            if variant.start is None:  # the others are checked once the model they start from is there
                make_plan(run)
        problems += [f"study.variants.{name}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)


def shortened(config: StudyConfig) -> list[str]:
    """What to tell of warm-ups that are too long for the screening's steps or for the finals'."""
    found: dict[str, None] = {}
    for name, variant in config.study.variants.items():
        for phase in ("screen", "final"):
            run = run_config(config, phase, name, variant.lr[0], config.study.seeds[0])
            if note := run.optimizer.shortened(run.train.steps):
                found[f"{'screening' if phase == 'screen' else 'finals'}: {note}"] = None
    return list(found)


def run_config(
    config: StudyConfig, phase: str, name: str, lr: float, seed: int, start: str | None = None
) -> PretrainConfig:
    """Settings of one run. `phase`: screen or final. `start`: the model folder it starts from."""
    tree = config.model_dump(mode="json", exclude={"study"})
    screening = {"steps": config.study.screen_steps, "eval_every": 0, "checkpoint_every": 0}
    own: dict[str, Any] = {
        "optimizer": {"lr": lr},
        "train": {"seed": seed} | (screening if phase == "screen" else {}),
        "run": {"name": f"{config.run.name}-{phase}-{name}-lr{_plain(lr)}-s{seed}"},
    }
    if start:
        tree["model"] = {"path": start}  # it brings its own shape
    for sections in (config.study.variants[name].settings, own):
        for section, values in sections.items():
            if not isinstance(values, dict) or not isinstance(tree.get(section, {}), dict):
                raise ConfigError(f"settings.{section} must hold settings of that section, as `{section}: {{...}}`.")
            tree[section] = tree.get(section, {}) | values
    return build(PretrainConfig, tree)


def _plain(lr: float) -> str:
    """A learning rate as part of a run's name, which holds no plus sign."""
    return f"{lr:g}".replace("+", "")


def finalists(config: StudyConfig, screened: list[Trained]) -> dict[str, float]:
    """Variant -> its best learning rate: the reference, then the best of the others (without a screening: all)."""
    variants, reference = config.study.variants, config.study.reference
    if not screened:
        return {name: variant.lr[0] for name, variant in variants.items()}
    best = best_of(screened)
    if reference not in best:
        raise TrainingFailedError(
            f"every learning rate of {reference} diverged: {variants[reference].lr}; give lower ones."
        )
    others = sorted((name for name in best if name != reference), key=lambda name: best[name].loss)
    others = others[: config.study.finalists or None]
    needed = {str(variants[name].start) for name in others if variants[name].start}
    names = dict.fromkeys([reference, *sorted(needed & set(best)), *others])
    return {name: best[name].lr for name in names}


def best_of(trained: list[Trained]) -> dict[str, Trained]:
    """Variant -> its run of the lowest final validation loss; diverged ones left out."""
    best: dict[str, Trained] = {}
    for one in trained:
        if one.curve and (one.variant not in best or one.loss < best[one.variant].loss):
            best[one.variant] = one
    return best


def in_order(variants: dict[str, Variant]) -> list[str]:
    """Those that begin from nothing before those that start from their models."""
    return sorted(variants, key=lambda name: variants[name].start is not None)


def kinds_of_steps(finals: list[Trained]) -> dict[str, PretrainConfig]:
    """Name -> a run whose step is measured: each finalist, and method 3 once its W are gone."""
    found = {trained.variant: trained.config for trained in reversed(finals)}
    for name, run in list(found.items()):
        if run.method.kind == BLEND:
            found[name + WITHOUT_W] = run.model_copy(update={"method": run.method.model_copy(update={"kind": SVD})})
    return found
