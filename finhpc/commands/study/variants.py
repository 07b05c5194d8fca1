"""The runs of a study: each variant at its learning rates and seeds, as trials of a sweep."""

from __future__ import annotations

import json
from typing import Any

from finhpc.commands.sweep.estimate import Estimate
from finhpc.commands.sweep.plan import SweepPlan, check_trials
from finhpc.commands.sweep.trial import Trial, read_record
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, collect
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import nearest
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig, Sweep
from finhpc.tracking.describe import model_name

SCREEN, FINAL = "screen", "final"


def trial_of(config: StudyConfig, phase: str, variant: str, lr: float, seed: int, start: Trial | None = None) -> Trial:
    """One run of a study. `start`: the run whose model it starts from."""
    tree = config.model_dump(mode="json", exclude={"study"})
    targets = config.data.seq_len - 1  # per sample; its first token is not predicted
    own: dict[str, Any] = {"optimizer": {"lr": lr}, "train": {"seed": seed}, "data": {"final_samples": 0}}
    if phase == SCREEN:
        own["train"] |= {"steps": config.study.screen_steps, "eval_every": 0, "checkpoint_every": 0}
    else:
        own["data"]["final_samples"] = -(-config.study.final_tokens // targets)
    if start:
        tree["model"] = {"path": str(RunFolder(config.run.storage, start.name).path / "model")}
    for sections in (config.study.variants[variant].settings, own):
        for section, values in sections.items():
            if not isinstance(values, dict) or not isinstance(tree.get(section, {}), dict):
                raise ConfigError(f"settings.{section} must hold settings of that section, as `{section}: {{...}}`.")
            tree[section] = tree.get(section, {}) | values
    name = f"{config.run.name}-{phase}-{variant}-lr{f'{lr:g}'.replace('+', '')}-s{seed}"  # a name has no plus sign
    # In MLflow, the model of the study and not the one it starts from, which differs with every seed.
    return Trial(name, {"model": model_name(config)}, PretrainConfig, tree, start=start.name if start else None)


def final_trials(config: StudyConfig, lr_of: dict[str, float], seed: int) -> dict[str, Trial]:
    """Variant -> its final run on one seed; those that others start from come first."""
    variants, trials = config.study.variants, dict[str, Trial]()
    for name in sorted(lr_of, key=lambda name: variants[name].start is not None):
        trials[name] = trial_of(config, FINAL, name, lr_of[name], seed, trials.get(str(variants[name].start)))
    return trials


def plan_trials(config: StudyConfig, trials: list[Trial]) -> SweepPlan:
    """The plan of some runs of a checked study; raises `ConfigError` if one of them ended with other settings."""
    plan = _plan(config, trials)
    problems = list(check_trials(plan, timed=False))
    for trial in trials:
        folder = RunFolder(config.run.storage, trial.name)
        if read_record(folder.path).get("status") in ("finished", "diverged"):  # others start again
            fingerprints = json.loads((folder.path / "identity.json").read_text(encoding="utf-8"))
            data, model = fingerprints["dataset_fingerprint"], fingerprints["model_fingerprint"]
            with collect(problems):  # the settings alone: the run itself checks what it reads
                folder.check_resume(plan.config_of(trial), data, model)
    if problems:
        raise ConfigError(problems)
    return plan


def _plan(config: StudyConfig, trials: list[Trial]) -> SweepPlan:
    folder = RunFolder(config.run.storage, config.run.name).path
    return SweepPlan(config, folder, folder.parent, trials, Sweep())


def check(config: StudyConfig) -> dict[str, Estimate]:
    """Variant -> what is known of its final run; raises one `ConfigError` with every problem of the study."""
    variants, problems = config.study.variants, []
    if config.study.reference not in variants:
        problems.append(
            f"study.reference={config.study.reference} is not a variant; "
            f"{nearest(config.study.reference, list(variants))}"
        )
    if len({len(variant.lr) for variant in variants.values()}) > 1:
        counts = ", ".join(f"{name} {len(variant.lr)}" for name, variant in variants.items())
        problems.append(
            f"study.variants have unequal numbers of learning rates ({counts}), so that some would be tuned more than "
            "others; give each as many."
        )
    trials: dict[str, Trial] = {}
    for name in sorted(variants, key=lambda name: variants[name].start is not None):
        start = variants[name].start
        if start is not None and (start not in variants or variants[start].start):
            problems.append(f"study.variants.{name}.start={start} is not a variant that starts from scratch.")
        found: list[str] = []
        rates = [f"{lr:g}" for lr in variants[name].lr]
        if twice := sorted({lr for lr in rates if rates.count(lr) > 1}):
            found.append(f"lr has {', '.join(twice)} twice; give each learning rate once.")
        if low := [lr for lr in variants[name].lr if lr <= 0]:
            found.append(f"lr has {low[0]:g}; learning rates are above 0.")
        if "data" in variants[name].settings:
            found.append("settings.data would score it on other text than the others; set data for the whole study.")
        with collect(found):
            trial = trial_of(config, FINAL, name, variants[name].lr[0], config.study.seeds[0], trials.get(str(start)))
            trial.config()
            trials[name] = trial
        problems += [f"study.variants.{name}: {problem}" for problem in found]
    names = {trial.name: name for name, trial in trials.items()}
    plan = _plan(config, list(trials.values()))
    for problem, of in (check_trials(plan, timed=False) if trials else {}).items():
        problems += [f"study.variants.{names[name]}: {problem}" for name in of]
    if problems:
        raise ConfigError(problems)
    return {names[trial]: estimate for trial, estimate in plan.estimates.items()}


def epoch_tokens(config: StudyConfig) -> int:
    """The tokens of the training text, in whole samples."""
    shards, seq_len = Shards.open(str(config.data.shards)), config.data.seq_len
    return shards.num_samples("train", seq_len) * seq_len


def shortened(config: StudyConfig) -> list[str]:
    """Notes on warm-ups that are too long for the steps of the screening or of the finals."""
    notes: dict[str, None] = {}
    for name, variant in config.study.variants.items():
        for phase, title in ((SCREEN, "screening"), (FINAL, "finals")):
            run = trial_of(config, phase, name, variant.lr[0], config.study.seeds[0]).config()
            if note := run.optimizer.shortened(run.train.steps):
                notes[f"{title}: {note}"] = None
    return list(notes)
