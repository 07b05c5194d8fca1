"""Which layers get adapters and how adapters are initialized: peft's rules, from (seed, name of the layer) alone."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear, is_factor
from finhpc.lowrank.registry import SLTRAIN
from finhpc.lowrank.replace import rank_problems
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models.initialize import generator_of
from finhpc.quantization.schemes import AUTO, SCHEMES, check_scheme

if TYPE_CHECKING:
    from finhpc.settings.finetune import FinetuneQuantization, Lora

ALL = "all-linear"
CHANGES_BASE = ("pissa", "olora")  # initializations that subtract the adapter from the base
OF_BASE = (*CHANGES_BASE, "loftq")  # those that are computed from the base's weights


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, dense or low-rank; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Linear | LowRankLinear):
        return module.out_features, module.in_features
    return None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> every linear layer, dense or low-rank; the factors of low-rank layers are not listed.

    Raises `ConfigError` for a model of SLTrain's layers, which take no adapter.
    """
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ConfigError(
            f"a model of method.kind={SLTRAIN} takes no adapter; make it dense with `finhpc export --format merged`, "
            "and finetune that."
        )
    return {
        name: module
        for name, module in model.named_modules()
        if linear_shape(module) is not None and not is_factor(model, name)
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return name -> (out, in) of `linear_layers`."""
    return {name: shape for name, module in linear_layers(model).items() if (shape := linear_shape(module))}


def target_shapes(model: nn.Module, settings: Lora, bits: int) -> dict[str, tuple[int, int]]:
    """Return name -> (out, in) of every layer that gets an adapter, in the order of the model.

    `all-linear` is every linear layer except the head; other targets are ends of module names, as in peft, or regular
    expressions that a whole module name must match, as peft treats a string. Raises one `ConfigError` with every
    problem: targets that match nothing, a rank that does not fit, an initialization that does not fit the base.
    """
    linear = linear_shapes(model)
    blocks = {name: shape for name, shape in linear.items() if name != "lm_head"}
    targets = settings.targets
    problems = []
    for target in targets:
        try:
            re.compile(target if is_pattern(target) else "")
        except re.error as error:
            problems.append(
                f"lora.targets={target} is neither a module name nor a regular expression ({error}); correct it."
            )
    if problems:
        raise ConfigError(problems)
    chosen = {
        name: shape
        for name, shape in linear.items()
        if (ALL in targets and name in blocks) or any(_matches(name, target) for target in targets if target != ALL)
    }
    ends = sorted({name.rpartition(".")[2] for name in blocks})
    problems = [
        f"lora.targets={target} matches no linear layer; those there are: {', '.join(ends)}, lm_head (or {ALL})."
        for target in targets
        if target != ALL and not any(_matches(name, target) for name in linear)
    ]
    if not targets:
        problems.append(f"lora.targets is empty; name some of {', '.join(ends)}, or use {ALL}.")
    if "lm_head" in chosen and getattr(model.config, "tie_word_embeddings", False):
        problems.append("lora.targets=lm_head does not fit a model whose head is its embedding; leave it out.")
    problems += _misfits(model, settings, bits, chosen)
    if problems:
        raise ConfigError(problems)
    return chosen


def _misfits(model: nn.Module, settings: Lora, bits: int, chosen: dict[str, tuple[int, int]]) -> list[str]:
    """Describe what of rank, initialization and kind does not fit the layers chosen, or the base's bits."""
    problems = []
    if settings.rank < 1:
        problems.append(f"lora.rank={settings.rank} is too small; use 1 or more.")
    else:
        problems += rank_problems("lora.rank", ((name, settings.rank, shape) for name, shape in chosen.items()))
    if settings.init == "orthogonal" and settings.rank % 2:
        problems.append(f"lora.rank={settings.rank} does not go with lora.init=orthogonal; use an even rank.")
    if settings.init in CHANGES_BASE and bits < 16:
        problems.append(
            f"lora.init={settings.init} changes the base's weights, and quantized ones cannot be changed exactly; "
            "use quantization.bits=16 or lora.init=default."
        )
    if settings.init == "eva" and "lm_head" in chosen:
        problems.append(
            "lora.init=eva does not analyze the inputs of lm_head, which lora.targets names; leave it out, or use "
            "lora.init=default."
        )
    if settings.init == "loftq" and bits == 16:
        problems.append(
            "lora.init=loftq starts from what quantizing the base lost, and quantization.bits=16 loses nothing; use "
            "quantization.bits=8 or 4, or lora.init=default."
        )
    low_rank = [name for name in chosen if isinstance(model.get_submodule(name), LowRankLinear)]
    needs_dense = {f"init={settings.init}": settings.init in OF_BASE, "dora=true": settings.dora}
    problems += [
        f"lora.{setting} needs dense layers, and {len(low_rank)} of the adapted ones are low-rank; leave it out."
        for setting, chosen_here in needs_dense.items()
        if chosen_here and low_rank
    ]
    return problems


def is_pattern(target: str) -> bool:
    """Return whether a target is a regular expression: it has characters that no module name has."""
    return target != ALL and re.fullmatch(r"[\w.]*", target) is None


def _matches(name: str, target: str) -> bool:
    if is_pattern(target):
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith("." + target)


def initial_factors(
    settings: Lora, shape: tuple[int, int], seed: int, name: str, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) in float32, drawn as in peft.

    `rows`: what they are computed from for `OF_BASE`: the matrix, or for loftq the matrix minus the quantized one; a
    matrix that stays in float has none of these, and its adapter begins as by default.
    """
    out, into = shape
    rank, generator = settings.rank, generator_of(seed, f"{name}.lora")
    if settings.init in ("default", "eva") or (settings.init == "loftq" and rows is None):
        a = torch.empty(rank, into)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return a, torch.zeros(out, rank)
    if settings.init == "gaussian":
        return torch.randn(rank, into, generator=generator) / rank, torch.zeros(out, rank)
    if settings.init == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        a = torch.randn(into, rank // 2, generator=generator).mm(q[0::2]).T / 10.0
        b = torch.randn(rank // 2, out, generator=generator).T.mm(q[1::2]) / 10.0
        return a.contiguous(), b.contiguous()
    assert rows is not None
    return factors_from_base(rows.float(), settings)


def factors_from_base(rows: Tensor, settings: Lora) -> tuple[Tensor, Tensor]:
    """Return A and B of a matrix (out, in): of its largest singular values, or for olora of the first columns of QR.

    pissa, olora: peft's `pissa_init` and `olora_init`. loftq: one step of Y. Li et al., "LoftQ", 2023, algorithm 1, on
    a base that is quantized already, as peft's `replace_lora_weights_loftq`, but divided by the adapter's scale, so
    that base and adapter together come closest to the matrix for any `lora_alpha`.
    """
    rank = settings.rank
    if settings.init == "olora":
        q, r = torch.linalg.qr(rows)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    roots = (s[:rank] / scale_of(settings)).sqrt()
    return roots[:, None] * vh[:rank], u[:, :rank] * roots


def scale_of(settings: Lora) -> float:
    """Return the factor of B A; rslora: D. Kalajdzievski, "A Rank Stabilization Scaling Factor for LoRA", 2023."""
    return settings.lora_alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def scheme_of(quantization: FinetuneQuantization) -> str:
    """Return the scheme's name; raises `ConfigError` if it is unknown or does not have the bits."""
    bits, scheme = quantization.bits, quantization.scheme
    if scheme == "auto":
        return AUTO[bits]
    check_scheme(bits, scheme)
    SCHEMES.check_workers_see(scheme)
    return scheme
