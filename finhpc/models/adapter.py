"""Adapters on disk in peft's format, and what they add to a base's weights.

    FOLDER/adapter_config.json          peft's LoraConfig
    FOLDER/adapter_model.safetensors    base_model.model.NAME.lora_A.weight (rank, in), .lora_B.weight (out, rank)
    FOLDER/base_quantization.json       bits and scheme of the base it was trained beside, where that was quantised
    FOLDER/base_fingerprint.json        which model the base was: its folder, and one hash of its config and weights

For a Llama or GPT-2 base of transformers, `peft.PeftModel.from_pretrained(base, FOLDER)` opens it. peft does not know
the layers of finhpc's low-rank models: adapters beside those are written, and nothing opens them yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.config.finetune import FinetuneQuantization, Lora
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.lora_start import ALL, MOVES_BASE, is_pattern, linear_shape, scheme_of, taken_from
from finhpc.models.manifest import weights_fingerprint
from finhpc.models.weights import Weights, read_config
from finhpc.quantization.frozen import freeze

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
QUANTIZED = "base_quantization.json"
FINGERPRINT = "base_fingerprint.json"


@dataclass(frozen=True)
class Adapter:
    """`pairs`: name of a layer -> A (rank, in), B (out, rank); `scale`: what B A is multiplied by.

    `bits`, `scheme`: how the linear layers of the base were quantised in training.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    bits: int = 16
    scheme: str = ""

    def delta(self, name: str) -> Tensor | None:
        """What is added to the layer's W (out, in), in float32; None where it has no adapter."""
        if name not in self.pairs:
            return None
        a, b = self.pairs[name]
        return self.scale * b.float() @ a.float()

    def merged(self, name: str, rows: Tensor) -> Tensor:
        """W (out, in) of the base's linear layer as the adapter was trained beside it, with what the adapter adds.

        A base that was quantised then is quantised and dequantised here, too: the adapter has learned to mend its
        rounding. The head never was. As it came where nothing is to be done.
        """
        delta = self.delta(name)
        if self.bits < 16 and name != "lm_head":
            rows = freeze(rows.float(), None, self.bits, self.scheme, torch.float32, name).matrix(torch.float32)
        return rows if delta is None else rows.float() + delta.to(rows.device)


def save_adapter(
    folder: Path,
    settings: Lora,
    trained: dict[str, Tensor],
    weights: Weights,
    quantization: FinetuneQuantization | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write an adapter from `trained`: name of an adapted layer + .A or .B -> tensor, as the engine names them.

    pissa and olora trained beside a base that they had moved: what is written is the difference, of twice the rank,
    beside the base as it lies on disk. `fingerprint`: of the base's folder (`finhpc.models.manifest`): `check_base`.
    """
    names = sorted({name.rpartition(".")[0] for name in trained})
    tensors, rank, alpha = {}, settings.rank, settings.lora_alpha
    for name in names:
        a, b = trained[f"{name}.A"].float().cpu(), trained[f"{name}.B"].float().cpu()
        if settings.init in MOVES_BASE:
            first_a, first_b = taken_from(_rows(weights, name), settings)
            a, b = torch.cat((a, first_a)), torch.cat((b, -first_b), 1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    if settings.init in MOVES_BASE:
        rank, alpha = 2 * rank, 2 * alpha
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    _peft_config(settings, weights, names, rank, alpha).save_pretrained(str(folder))
    if quantization is not None and quantization.bits < 16:
        how = {"bits": quantization.bits, "scheme": scheme_of(quantization)}
        (folder / QUANTIZED).write_text(json.dumps(how) + "\n", encoding="utf-8")
    if fingerprint is not None and weights.path.is_dir():
        which = {"path": str(weights.path), "sha256": fingerprint}
        (folder / FINGERPRINT).write_text(json.dumps(which) + "\n", encoding="utf-8")


def _peft_config(settings: Lora, weights: Weights, names: list[str], rank: int, alpha: float) -> Any:
    from peft import LoraConfig

    turned = any(isinstance(weights.skeleton.get_submodule(name), Conv1D) for name in names)
    targets: Any = settings.targets
    if len(targets) == 1 and (targets == [ALL] or is_pattern(targets[0])):
        (targets,) = targets
    elif any(target == ALL or is_pattern(target) for target in targets):  # peft knows such alone
        targets = names
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=settings.dropout,
        fan_in_fan_out=turned,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(weights.path),
        inference_mode=True,
    )


def _rows(weights: Weights, name: str) -> Tensor:
    weight = weights.read(f"{name}.weight")
    return weight.T if isinstance(weights.skeleton.get_submodule(name), Conv1D) else weight


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read an adapter for `model`, whose layers may lie on the meta device.

    Raises `ConfigError` where it is of another architecture, or of a kind of peft's that is not LoRA alone;
    `CheckpointError` where a file is missing or damaged.
    """
    tree = _read_config(folder)
    odd = [
        key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias") if tree.get(key)
    ]
    if tree.get("peft_type") != "LORA" or odd:
        what = ", ".join(odd) or f"peft_type={tree.get('peft_type')}"
        raise ConfigError(f"adapter={folder} has {what}, which finhpc does not know; give a plain LoRA adapter.")
    rank, alpha = int(tree["r"]), float(tree["lora_alpha"])
    scale = alpha / rank**0.5 if tree.get("use_rslora") else alpha / rank
    held = _read_tensors(folder)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in held:
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in held:
                raise CheckpointError(f"{folder / TENSORS} holds {key} but no {other}; fetch or write it again.")
            pairs[name.removesuffix(".lora_A.weight")] = held[key], held[other]
    _check_fits(folder, pairs, model)
    how = json.loads((folder / QUANTIZED).read_bytes()) if (folder / QUANTIZED).is_file() else {}
    return Adapter(pairs, scale, **how)


def check_base(folder: Path, base: Path) -> None:
    """Raise `ConfigError` where the adapter in `folder` was trained beside another model than `base`, naming both.

    Shapes alone do not tell models apart. Of an adapter that does not say, and of a quantised export of its base,
    nothing is known.
    """
    if not (folder / FINGERPRINT).is_file() or not base.is_dir():
        return
    if getattr(read_config(base), "quantization_config", None) is not None:
        return
    said, found = json.loads((folder / FINGERPRINT).read_bytes()), weights_fingerprint(base)
    if found != said["sha256"]:
        raise ConfigError(
            f"adapter={folder} was trained beside {said['path']} (sha256 {said['sha256'][:12]}), and model={base} "
            f"({found[:12]}) is another model; give its own base, or remove {FINGERPRINT} from the adapter's folder to "
            "use it all the same."
        )


def base_of(folder: Path) -> Path:
    """The base that an adapter names; raises `ConfigError` where it names none, or none that lies here."""
    named = _read_config(folder).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise ConfigError(
            f"adapter={folder} names the base {named}, which is no folder here; put it there, or name another in "
            f"{CONFIG} (base_model_name_or_path)."
        )
    return Path(named)


def _check_fits(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], model: nn.Module) -> None:
    shapes = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module)) is not None}
    problems = []
    for name, (a, b) in pairs.items():
        if name not in shapes:
            problems.append(f"adapter={folder} adapts {name}, which the base does not have; it is of another model.")
        elif (b.shape[0], a.shape[1]) != shapes[name] or a.shape[0] != b.shape[1]:
            held = f"{b.shape[0]} x {a.shape[1]}"
            wanted = " x ".join(map(str, shapes[name]))
            problems.append(f"adapter={folder}: {name} is {held}, in the base {wanted}; it is of another model.")
    if not pairs:
        problems.append(f"adapter={folder} holds no LoRA tensors; give the folder of an adapter.")
    if problems:
        raise ConfigError(problems[:20] + ([f"... and {len(problems) - 20} more."] if len(problems) > 20 else []))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if {"r", "lora_alpha"} <= set(tree):
            return tree
    except OSError:
        raise ConfigError(
            f"adapter={folder} has no {CONFIG}; give the folder of an adapter in peft's format."
        ) from None
    except (ValueError, TypeError):
        pass
    raise CheckpointError(f"{folder / CONFIG} is cut short or damaged; fetch or write the adapter again.")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {TENSORS}; pickled adapters are not opened; convert it first.")
    try:
        with safe_open(file, framework="pt") as opened:
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} is cut short or damaged ({error}); fetch or write the adapter again.") from None
    for name, tensor in held.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity; train the adapter again.")
    return held


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter to the weights of a dense model in memory, in place; exact in float32.

    Raises `ConfigError` where an adapted layer is low-rank: B A has no room for what is added.
    """
    pairs = [name for name in adapter.pairs if isinstance(model.get_submodule(name), LowRankLinear)]
    if pairs:
        raise ConfigError(
            f"the adapter's base is low-rank ({pairs[0]} and {len(pairs) - 1} more layers), which cannot take it up in "
            "memory; use `finhpc export --format merged`."
        )
    for name, module in model.named_modules():
        if linear_shape(module) is None or not (name in adapter.pairs or adapter.bits < 16):
            continue
        weight, turned = module.weight, isinstance(module, Conv1D)
        assert isinstance(weight, Tensor)
        rows = adapter.merged(name, weight.T if turned else weight)
        weight.copy_((rows.T if turned else rows).to(weight.dtype))
