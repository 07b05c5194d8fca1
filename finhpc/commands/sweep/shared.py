"""What several trials of a sweep use and is made once: factors of a dense model at each rank, a quantized base."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from finhpc.commands.pretrain import decompose_start
from finhpc.commands.sweep.plan import SweepPlan, free_bytes
from finhpc.commands.sweep.trial import Trial
from finhpc.errors import ConfigError, FinhpcError
from finhpc.files import json_sha256
from finhpc.planning.model import DECOMPOSED, RANK_KEYS, needs_decomposing
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig

log = logging.getLogger(__name__)


def prepare_shared(plan: SweepPlan, trials: Sequence[Trial]) -> None:
    """Factorize or quantize once what several of `trials`, which have not ended, need."""
    configs = {trial.name: plan.config_of(trial) for trial in trials}
    _share_bases(plan, {name: c for name, c in configs.items() if isinstance(c, FinetuneConfig)})
    for name, config in configs.items():
        if isinstance(config, PretrainConfig) and needs_decomposing(config):
            method = config.method
            ranks = [config.model.path, method.model_dump(include={*RANK_KEYS})]
            shared = plan.shared / f"decomposed-{json_sha256(ranks)[:12]}"
            if not (shared / DECOMPOSED / "result.json").is_file():
                log.info(f"factorizing the dense model for {name} and other trials of the same ranks")
            decompose_start(config, shared)
            _link(plan.run_folder(name) / DECOMPOSED, shared / DECOMPOSED)


def _share_bases(plan: SweepPlan, configs: dict[str, FinetuneConfig]) -> None:
    """Quantize each base at each of its bits if two or more trials need it so."""
    from finhpc.models.lora.targets import scheme_of

    same_base: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for name, config in configs.items():
        quantization = config.quantization
        if quantization.bits < 16:
            same_base[scheme_of(quantization), quantization.bits, str(config.model.path)].append(name)
    for (scheme, bits, path), names in same_base.items():
        try:
            _share_base(plan, scheme, configs[names[0]], names)
        except FinhpcError as error:
            log.info(f"{path} is not quantized once for all trials at {bits} bits ({error}); each of them does it.")


def _share_base(plan: SweepPlan, scheme: str, config: FinetuneConfig, names: list[str]) -> None:
    from finhpc.commands.finetune import QUANTIZED, open_base
    from finhpc.models.files.manifest import weights_fingerprint
    from finhpc.models.lora.model import LoraModel
    from finhpc.models.lora.quantized_cache import quantized_cache_bytes, write_quantized_cache
    from finhpc.screen import Progress

    weights = open_base(config)
    same = [weights_fingerprint(weights.path), scheme, config.quantization.bits]
    shared = plan.shared / f"base-{json_sha256(same)[:12]}"
    lora_model = LoraModel.of(config, weights)
    if not shared.is_dir():
        if len(names) == 1:
            return
        needed, free = quantized_cache_bytes(lora_model), free_bytes(plan.folder) - plan.disk_bytes
        if needed > free:
            raise ConfigError(
                f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free in addition to what the trials need"
            )
    label = f"quantizing {weights.path.name} at {config.quantization.bits} bits, for {len(names)} trials"
    with Progress(label, len(lora_model.quantized_matrices()), "matrices") as progress:
        write_quantized_cache(lora_model, shared, progress.advance)
    for name in names:
        _link(plan.run_folder(name) / QUANTIZED, shared)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(target)
