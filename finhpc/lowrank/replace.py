"""Where low-rank layers go in a Hugging Face model.

`Ranks` says the rank of each kind of layer (None: stays dense); `make_low_rank` swaps the modules
in place, keeping every module's own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import FactorEmbedding, FactorLinear, LowRankEmbedding, LowRankLinear
from finhpc.lowrank.registry import DENSE, LAYERS, check_kind
from finhpc.plugins import require
from finhpc.settings.pretrain import LINEAR_KINDS, Method

Ranks = dict[str, int | None]

EMBEDDINGS = ("transformer.wte", "model.embed_tokens")


def ranks_of(method: Method) -> Ranks:
    """Rank of each kind of layer that `method` asks for; None where the layer stays dense.

    Raises `ConfigError` for a kind of method or layer that is not known.
    """
    check_kind(method.kind)
    unknown = sorted(set(method.ranks) - set(LINEAR_KINDS))
    if unknown:
        raise ConfigError(
            [f"method.ranks.{kind} is no kind of layer; valid: {', '.join(LINEAR_KINDS)}." for kind in unknown]
        )
    if method.kind == DENSE:
        return dict.fromkeys(LINEAR_KINDS)
    ranks: Ranks = {kind: method.ranks.get(kind, method.rank) for kind in LINEAR_KINDS}
    if method.head == "dense":
        ranks["head"] = None
    if method.embedding == "dense":
        ranks["embedding"] = None
    return ranks


def layer_kind(name: str) -> str | None:
    """Kind of the linear layer or embedding of that Hugging Face name; None for everything else."""
    if name == "lm_head":
        return "head"
    if name in EMBEDDINGS:
        return "embedding"
    if "attn" in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    return None


def dense_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer or embedding, else None."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return None


def targets(model: nn.Module, ranks: Ranks, layers: Mapping[str, int] | None = None) -> dict[str, int]:
    """Name -> rank of every module that becomes low-rank: as `layers` says for it, else for its kind.

    Raises `ConfigError` naming every layer that its rank does not fit.
    """
    chosen: dict[str, int] = {}
    misfits: dict[tuple[str, int, tuple[int, int], str], int] = {}
    for name, module in model.named_modules():
        shape, kind = dense_shape(module), layer_kind(name)
        rank = (layers or {}).get(name, ranks.get(kind) if kind else None)
        if shape is None or rank is None:
            continue
        if not 1 <= rank <= min(shape):
            # One line for the same layer of all blocks, which differ in a number alone.
            key = (re.sub(r"\.\d+\.", ".*.", name), rank, shape, str(kind))
            misfits[key] = misfits.get(key, 0) + 1
        chosen[name] = rank
    if misfits:
        raise ConfigError(
            [
                f"method.rank={rank} does not fit {name} ({shape[0]} x {shape[1]}, layers: {count}); "
                f"use 1 to {min(shape)} (method.ranks.{kind} sets this kind alone)."
                for (name, rank, shape, kind), count in misfits.items()
            ]
        )
    return chosen


def make_low_rank(
    model: nn.Module,
    ranks: Ranks,
    layers: Mapping[str, int] | None = None,
    *,
    kind: str = "low_rank",
    factor_modules: bool = False,
) -> None:
    """Replace every chosen dense layer of `model` in place (method 1, FinGPT-HPC section IV.A).

    `layers`: ranks of single layers by name. `kind` is the registered way to be low-rank; embedding and
    head are linear pairs whatever it is. With `factor_modules` A and B are modules of their own, as in a
    quantised model.
    """
    for name, rank in targets(model, ranks, layers).items():
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        layer = LowRankLinear if layer_kind(name) == "head" else LAYERS[kind]
        setattr(model.get_submodule(parent), child, low_rank_twin(module, rank, layer, factor_modules))


class LowRankModel(nn.Module):
    """Before a model class of transformers among a class's bases: its linear layers as its config's fields say."""

    def __init__(self, config: Any) -> None:
        require(getattr(config, "finhpc_plugins", None) or (), "this model")
        check_kind(config.low_rank_kind)
        super().__init__(config)
        make_low_rank(
            self,
            config.low_rank or {},
            config.low_rank_layers,
            kind=config.low_rank_kind,
            factor_modules=config.factor_modules,
        )


def low_rank_twin(
    module: nn.Module, rank: int, layer: type[LowRankLinear] = LowRankLinear, factor_modules: bool = False
) -> nn.Module:
    """The low-rank layer that takes the place of a dense one (uninitialised, same device)."""
    shape = dense_shape(module)
    assert shape is not None, type(module)
    out_features, in_features = shape
    device = next(module.parameters()).device
    with device:
        if isinstance(module, nn.Embedding):
            return (FactorEmbedding if factor_modules else LowRankEmbedding)(in_features, out_features, rank)
        bias = module.bias is not None
        if factor_modules:
            return FactorLinear(in_features, out_features, rank, bias, layer.between)
        return layer(in_features, out_features, rank, bias)
