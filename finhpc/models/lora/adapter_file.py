"""Read an adapter's folder in peft's format for a base: it is applied completely, or refused with the reasons.

    FOLDER/adapter_config.json          peft's LoraConfig
    FOLDER/adapter_model.safetensors    base_model.model.NAME.lora_A.weight (rank, in), .lora_B.weight (out, rank);
                                        of DoRA .lora_magnitude_vector (out,), too
    FOLDER/base_quantization.json       bits and scheme of the base it was trained with, if that was quantized
    FOLDER/base_fingerprint.json        the base: its path, and one hash of its config and weights

Every command reads adapters through `load_adapter`, so that all apply the same or refuse the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.files.config import is_adapter, quantizer_of, read_config
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import locate, tokenizer_of
from finhpc.models.files.tokenizer import has_tokenizer
from finhpc.models.files.tokens import pad_alone
from finhpc.models.lora.peft_format import CONFIG, FINGERPRINT, MAGNITUDE, PREFIX, QUANTIZED, TENSORS, Adapter
from finhpc.models.lora.targets import linear_shapes
from finhpc.quantization.schemes import check_scheme

MERGE = "merge it into its base with peft (merge_and_unload, save_pretrained) and give the merged model"
# Settings of peft's LoraConfig that `load_adapter` applies, ...
APPLIED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
}
APPLIED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "revision"}
# ... that describe how it was trained or written and do not change what is added to the base, ...
INERT = {"task_type", "inference_mode", "lora_dropout", "auto_mapping", "peft_version", "runtime_config"}
INERT |= {"fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
INERT |= {"qalora_group_size", "megatron_core", "ensure_weight_tying"}
# ... and initializations after which the base differs from the base on disk.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    "layers_to_transform": (int, list),
}
KINDS = {  # part of a tensor's name -> what it is
    "lora_embedding_": "LoRA of an embedding",
    "lora_magnitude_vector": "DoRA's magnitudes, and use_dora is not set or their layers have no pairs",
    ".lora_B.bias": "a bias of B",
    "bias": "biases of the base",
    "token_adapter": "rows of the embedding",
    "lora_": "LoRA tensors under other names than peft's",
    "weight": "whole layers in place of the base's",
}


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read an adapter for `model`, which may be on the meta device.

    Raises one `ConfigError` with every setting and tensor that is not applied or does not fit the model,
    `CheckpointError` if a file is missing or damaged.
    """
    tree = _read_config(folder)
    problems = _odd_settings(folder, tree)
    if problems:
        raise ConfigError(problems)
    tensors = _read_tensors(folder)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    left = set(tensors)
    for key in sorted(tensors):
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        other = key.replace(".lora_A.", ".lora_B.")
        if key != f"{PREFIX}{name}.lora_A.weight":
            continue
        if other not in tensors:
            raise CheckpointError(f"{folder / TENSORS} holds {key} but no {other}; fetch or write it again.")
        pairs[name] = tensors[key], tensors[other]
        left -= {key, other}
    dora = {name: f"{PREFIX}{name}{MAGNITUDE}" for name in pairs} if tree.get("use_dora") else {}
    magnitudes = {name: tensors[key] for name, key in dora.items() if key in tensors}
    left -= set(dora.values())
    problems = _unread(folder, left) + _misfits(folder, pairs, model)
    problems += _odd_magnitudes(folder, magnitudes, dora, model)
    if not problems:
        problems = _targets(folder, tree, pairs, model)
    scales = {}
    for name, (a, _) in pairs.items():
        rank, scales[name] = _scale(tree, name)
        if len(a) != rank and not problems:
            problems.append(
                f"adapter={folder}: {name} has rank {len(a)}, and {CONFIG} says {rank}; write the adapter again."
            )
    if problems:
        more = [f"... and {len(problems) - 20} more."] if len(problems) > 20 else []
        raise ConfigError(problems[:20] + more)
    return Adapter(pairs, scales, *_read_quantization(folder), magnitudes)


def check_base(folder: Path, base: Path) -> None:
    """Raise `ConfigError` if the adapter in `folder` was trained with another model than `base`, naming both.

    Adapters without a fingerprint and quantized exports of the base cannot be checked. If the adapter has a tokenizer,
    its ids must be the base's.
    """
    if (folder / FINGERPRINT).is_file() and not (base.is_dir() and quantizer_of(read_config(base))):
        try:
            recorded = json.loads((folder / FINGERPRINT).read_bytes())
            path, sha256 = str(recorded["path"]), str(recorded["sha256"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{folder / FINGERPRINT} is damaged; fetch or write the adapter again.") from None
        actual = weights_fingerprint(base)
        if actual != sha256:
            raise ConfigError(
                f"adapter={folder} was trained with {path} (sha256 {sha256[:12]}), and model={base} "
                f"({actual[:12]}) is another model; give its own base, or remove {FINGERPRINT} from the adapter's "
                "folder to use it all the same."
            )
    _check_tokenizer(folder, base)


def _check_tokenizer(folder: Path, base: Path) -> None:
    files = [place / "tokenizer.json" for place in (folder, base)]
    if not has_tokenizer(folder) or (base.is_dir() and not has_tokenizer(base)):
        return
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    tokenizer, base_tokenizer = tokenizer_of(folder), tokenizer_of(base)
    ours, theirs = tokenizer.get_vocab(), base_tokenizer.get_vocab()
    # A padding token that only one of them has changes no text's ids.
    fillers = {pad_alone(tokenizer)} - theirs.keys() | {pad_alone(base_tokenizer)} - ours.keys()
    both = ours.keys() | theirs.keys()
    other = sorted(token for token in both - fillers if ours.get(token) != theirs.get(token))
    if other:
        shown = ", ".join(f"{token!r} ({ours.get(token)}, there {theirs.get(token)})" for token in other[:3])
        raise ConfigError(
            f"adapter={folder} brings a tokenizer with other ids than that of model={base}: {len(other)} "
            f"tokens differ, such as {shown}; give the base it was trained with, or {MERGE}."
        )


def base_of(folder: Path) -> Path:
    """Return the base that an adapter names: a folder, a .gguf file, or a model of the hub.

    A relative path is relative to the current folder. Raises `ConfigError` if there is no such base,
    `CheckpointError` if the hub does not answer.
    """
    tree = _read_config(folder)
    named = tree.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(
            f"adapter={folder} does not name its base; write its path into {CONFIG} (base_model_name_or_path)."
        )
    try:
        base = locate(named, tree.get("revision"))
    except (ConfigError, CheckpointError) as error:
        where = f" ({Path(named).expanduser().absolute()})" if not Path(named).is_absolute() else ""
        raise type(error)(
            f"adapter={folder} names the base {named}{where}, which is not there; put it there, or name another in "
            f"{CONFIG} (base_model_name_or_path)."
        ) from None
    if is_adapter(base):
        raise ConfigError(
            f"adapter={folder} names the base {named}, which is an adapter's folder itself (it has an {CONFIG}); put "
            f"the base into a folder of its own, or merge that adapter into its base first, and name the base in "
            f"{CONFIG} (base_model_name_or_path)."
        )
    return base


def _odd_settings(folder: Path, tree: dict[str, Any]) -> list[str]:
    """Describe the settings that change what the adapter computes and are not applied."""
    if tree.get("peft_type") != "LORA":
        return [f"adapter={folder} has peft_type={tree.get('peft_type')}, and finhpc applies only LORA; {MERGE}."]
    odd = [
        f"{key}={json.dumps(value)[:60]}"
        for key, value in tree.items()
        if key not in APPLIED | INERT and value not in (None, False, 0, "", "none", [], {})
    ]
    start = tree.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        odd.append(f"init_lora_weights={start}, which changed the base's weights")
    if not odd:
        return []
    return [f"adapter={folder} has {', '.join(odd)} in {CONFIG}, which finhpc does not apply; {MERGE}."]


def _unread(folder: Path, left: Iterable[str]) -> list[str]:
    """Return one problem per kind of tensor that is not a layer's A or B."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(left):
        kind = next((kind for part, kind in KINDS.items() if part in key), "tensors of unknown names")
        kinds.setdefault(kind, []).append(key)
    return [
        f"adapter={folder} holds {kind} ({len(keys)}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}), which "
        f"finhpc does not apply; {MERGE}."
        for kind, keys in kinds.items()
    ]


def _misfits(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], model: nn.Module) -> list[str]:
    shapes = linear_shapes(model)
    problems = []
    for name, (a, b) in pairs.items():
        if name == "lm_head" and getattr(model.config, "tie_word_embeddings", False):
            problems.append(f"adapter={folder} adapts lm_head, which is the embedding of this base, too; {MERGE}.")
        elif name not in shapes:
            problems.append(f"adapter={folder} adapts {name}, which the base does not have; it is of another model.")
        elif a.dim() != 2 or b.dim() != 2 or (*b.shape, *a.shape) != (shapes[name][0], len(a), len(a), shapes[name][1]):
            actual = f"{' x '.join(map(str, b.shape))} by {' x '.join(map(str, a.shape))}"
            wanted = " x ".join(map(str, shapes[name]))
            problems.append(f"adapter={folder}: {name} is {actual}, in the base {wanted}; it is of another model.")
    if not pairs:
        problems.append(f"adapter={folder} has no LoRA tensors; give the folder of an adapter.")
    return problems


def _odd_magnitudes(folder: Path, magnitudes: dict[str, Tensor], dora: Iterable[str], model: nn.Module) -> list[str]:
    """Describe the layers in `dora` whose magnitudes are missing, of another shape, or of no matrix."""
    shapes, problems = linear_shapes(model), []
    known = [name for name in dora if name in shapes]
    if low_rank := [name for name in known if isinstance(model.get_submodule(name), LowRankLinear)]:
        problems.append(
            f"adapter={folder} has use_dora=true, and {len(low_rank)} of its layers are low-rank in the base, such as "
            f"{low_rank[0]}: no matrix has the rows whose lengths it sets; merge the base first (finhpc export)."
        )
    for name in known:
        wanted = shapes[name][0]
        if name not in magnitudes:
            problems.append(f"adapter={folder} has use_dora and no magnitudes of {name}; fetch or write it again.")
        elif tuple(magnitudes[name].shape) != (wanted,):
            actual = " x ".join(map(str, magnitudes[name].shape))
            problems.append(
                f"adapter={folder}: {name} has {actual} magnitudes, in the base {wanted} rows; it is of another model."
            )
    return problems


def _targets(folder: Path, tree: dict[str, Any], pairs: Iterable[str], model: nn.Module) -> list[str]:
    """Describe layers that only the settings or only the tensors name: peft would drop both."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if tree.get("target_modules") == "all-linear":
        tree = tree | {"target_modules": r".*(?<!lm_head)"}
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    chosen = SimpleNamespace(target_parameters=None, **{key: tree.get(key) for key in keys})
    if chosen.target_modules is None:
        return [f"adapter={folder} has no target_modules in {CONFIG}; write the adapter again."]
    wanted = {name for name in linear_shapes(model) if check_target_module_exists(chosen, name)}
    problems = []
    for other, words in (
        (wanted - set(pairs), "names layers without tensors"),
        (set(pairs) - wanted, "does not choose layers whose tensors are there"),
    ):
        if other:
            shown = sorted(other)
            problems.append(
                f"adapter={folder}: {CONFIG} {words} ({len(shown)}: {', '.join(shown[:3])}"
                f"{', ...' if len(shown) > 3 else ''}); one of the two files is of another adapter."
            )
    return problems


def _scale(tree: dict[str, Any], name: str) -> tuple[int, float]:
    """Return a layer's rank and the factor of its B A."""
    rank, alpha = (
        next((value for pattern, value in (tree.get(key) or {}).items() if _matches(pattern, name)), tree[default])
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return int(rank), float(alpha) / (float(rank) ** 0.5 if tree.get("use_rslora") else float(rank))


def _matches(pattern: str, name: str) -> bool:
    """Return whether peft applies an entry of `rank_pattern` or `alpha_pattern` to a layer."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "is not a folder on this machine"
        model = folder / "model"  # of a run's folder
        remedy = f"its adapter is {model}" if is_adapter(model) else "give the folder of an adapter in peft's format"
        raise ConfigError(f"adapter={folder} {problem}; {remedy}.")
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        tree.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{file} is cut short or damaged; fetch or write the adapter again.") from None
    if tree.get("peft_type", "LORA") == "LORA":
        bad = [
            f"{key}={json.dumps(tree[key])[:60]}" for key, kinds in TYPES.items() if not _is_of(tree.get(key), kinds)
        ]
        if bad:
            raise CheckpointError(f"{file} is damaged: {', '.join(bad)}; fetch or write the adapter again.")
        numbers = {f"{key}={tree.get(key)}": tree.get(key) for key in ("r", "lora_alpha")}
        for key in ("rank_pattern", "alpha_pattern"):
            numbers |= {f"{key}.{name}={value}": value for name, value in (tree.get(key) or {}).items()}
        bad = [text for text, value in numbers.items() if not _is_size(value, text)]
        if bad:
            raise CheckpointError(f"{file} is damaged: {', '.join(bad)}; fetch or write the adapter again.")
    return tree


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a setting is absent, or of one of these types and, if peft compiles it, a regular expression."""
    if value is None:
        return True
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error:
        return False
    return isinstance(value, kinds)


def _is_size(value: Any, text: str) -> bool:
    """Return whether a value is a number, and positive if it is a rank."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value > 0 or text.startswith("lora_alpha") or text.startswith("alpha"))


def _read_quantization(folder: Path) -> tuple[int, str]:
    """Return bits and scheme of the base in training."""
    file = folder / QUANTIZED
    if not file.is_file():
        return 16, ""
    try:
        tree = json.loads(file.read_bytes())
        bits, scheme = int(tree["bits"]), str(tree["scheme"])
        check_scheme(bits, scheme)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged; fetch or write the adapter again.") from None
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return bits, scheme


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {TENSORS}; pickled adapters are not opened; convert it first.")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} is cut short or damaged ({error}); fetch or write the adapter again.") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}; give an adapter in floats.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity; train the adapter again.")
    return tensors
