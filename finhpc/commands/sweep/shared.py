"""What the trials of a sweep share, made once: a dense model, its factors at each rank, a base quantised."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from finhpc.commands.pretrain import decompose_start
from finhpc.commands.sweep.plan import REFERENCE, Planned, free_bytes
from finhpc.commands.sweep.trial import outcome_of
from finhpc.errors import ConfigError, FinhpcError
from finhpc.lowrank.registry import STARTED
from finhpc.planning.init import DECOMPOSED, needs_decomposing
from finhpc.runs.folder import RunFolder
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig

log = logging.getLogger(__name__)


def prepare_shared(plan: Planned) -> None:
    """Train the dense reference where trials start from it; factorise, or quantise, once what several would."""
    if plan.reference is not None:
        _train_reference(plan)
    pending = [trial for trial in plan.trials if "status" not in outcome_of(plan.run_folder(trial.name))]
    configs = {trial.name: plan.config_of(trial) for trial in pending}
    _share_bases(plan, {name: c for name, c in configs.items() if isinstance(c, FinetuneConfig)})
    for name, config in configs.items():
        if isinstance(config, PretrainConfig) and needs_decomposing(config):
            shared = plan.shared / f"decomposed-{_key(config)}"
            if not (shared / DECOMPOSED / "result.json").is_file():
                log.info(f"factorising the dense model for {name} and those of its rank")
            decompose_start(config, shared)
            _link(plan.run_folder(name) / DECOMPOSED, shared / DECOMPOSED)


def _share_bases(plan: Planned, configs: dict[str, FinetuneConfig]) -> None:
    """Quantise each base at each of its bits, where two trials or more that have not ended take it so."""
    from finhpc.models.lora.targets import scheme_of

    alike: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for name, config in configs.items():
        said = config.quantization
        if said.bits < 16:
            alike[scheme_of(said), said.bits, str(config.model.path)].append(name)
    for (scheme, bits, path), names in alike.items():
        try:
            _share_base(plan, scheme, configs[names[0]], names)
        except FinhpcError as error:
            log.info(f"{path} is not quantised once for all trials at {bits} bits ({error}); each of them does it.")


def _share_base(plan: Planned, scheme: str, config: FinetuneConfig, names: list[str]) -> None:
    from finhpc.commands.finetune import QUANTIZED, base_fingerprint, open_base
    from finhpc.models.lora.model import LoraModel
    from finhpc.models.lora.quantized_cache import quantized_cache_bytes, write_quantized_cache
    from finhpc.screen import Progress

    weights = open_base(config)
    shared = plan.shared / f"base-{_hash([base_fingerprint(weights.path), scheme, config.quantization.bits])}"
    lora_model = LoraModel.of(config, weights)
    if not shared.is_dir():
        if len(names) == 1:
            return
        needed, free = quantized_cache_bytes(lora_model), free_bytes(plan.folder) - plan.disk_bytes
        if needed > free:
            raise ConfigError(f"it takes {needed / 1e9:.1f} GB, and beside the trials' own there are {free / 1e9:.1f}")
    label = f"quantising {weights.path.name} at {config.quantization.bits} bits, for {len(names)} trials"
    with Progress(label, len(lora_model.quantized_matrices()), bytes_=False) as progress:
        write_quantized_cache(lora_model, shared, progress.advance)
    for name in names:
        _link(plan.run_folder(name) / QUANTIZED, shared)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(target)


def _train_reference(plan: Planned) -> None:
    from finhpc.commands.pretrain import pretrain

    assert plan.reference is not None
    run = plan.reference
    before = RunFolder(run.run.storage, run.run.name).result()
    if before and before["status"] == "finished" and before["steps"] >= run.train.steps:
        return
    log.info(f"the dense model that {' and '.join(STARTED)} start from, trained once: {plan.reference.run.name}")
    try:
        pretrain(run)
    except FinhpcError as error:
        raise type(error)(f"the dense reference {REFERENCE} of the sweep: {error}") from None


def _key(config: PretrainConfig) -> str:
    """The same for trials that start from the same factors."""
    method = config.method
    said: list[Any] = [config.model.path, method.rank, sorted(method.ranks.items()), method.embedding, method.head]
    return _hash(said)


def _hash(said: list[Any]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
