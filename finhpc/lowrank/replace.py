"""Replace the linear layers and embeddings of a Hugging Face model by low-rank ones.

`Ranks` maps each kind of layer to its rank (None: it stays dense), and perhaps single projections, which come first;
`make_low_rank` replaces modules in place under their own names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.lowrank.registry import DENSE, LAYERS, SLTRAIN, check_kind
from finhpc.settings.pretrain import LINEAR_KINDS, PROJECTIONS, Method

Ranks = dict[str, int | None]
KindOf = Callable[[str], str | None]  # a module's name -> a key of `Ranks`; None for any other module
BlocksOf = Callable[[str], int]  # a module's name -> the number of pairs in its place


def ranks_of(method: Method) -> Ranks:
    """Return the rank of each kind of layer, and of the projections that have their own; None if it stays dense.

    Raises `ConfigError` for an unknown kind of method or layer.
    """
    check_kind(method.kind)
    if problems := unused_ranks(method.ranks, method.head, method.embedding, "method."):
        raise ConfigError(problems)
    if method.kind == DENSE:
        return dict.fromkeys(LINEAR_KINDS)
    ranks: Ranks = {**dict.fromkeys(LINEAR_KINDS, method.rank), **method.ranks}
    if method.head == "dense":
        ranks["head"] = None
    if method.embedding == "dense":
        ranks["embedding"] = None
    return ranks


def unused_ranks(ranks: Mapping[str, int], head: str, embedding: str, section: str = "") -> list[str]:
    """Return a message for each key that names no kind of layer or projection, or a dense head or embedding."""
    known = [*LINEAR_KINDS, *PROJECTIONS]
    problems = [
        f"{section}ranks.{key}: unknown kind of layer; use one of {', '.join(known)}."
        for key in sorted({*ranks} - {*known})
    ]
    return problems + [
        f"{section}ranks.{kind}={ranks[kind]}, but {section}{kind}=dense; use {section}{kind}=low_rank, or remove the "
        "rank."
        for kind, structure in (("head", head), ("embedding", embedding))
        if kind in ranks and structure == "dense"
    ]


def dense_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out_features, in_features) of a dense linear layer or embedding, None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return None


def _is_other_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding that does more than look up rows, such as Gemma's."""
    return isinstance(module, nn.Embedding) and type(module) is not nn.Embedding


def block_shape(shape: tuple[int, int], blocks: int, name: str) -> tuple[int, int]:
    """Return (out, in) of each of the equal blocks of a layer's rows; raises `ConfigError` if they do not divide."""
    if shape[0] % blocks:
        raise ConfigError(f"{name} has {shape[0]} rows, which are not {blocks} equal blocks; use qkv=joint.")
    return shape[0] // blocks, shape[1]


def rank_problems(setting: str, layers: Iterable[tuple[str, int, tuple[int, int]]], remedy: str = "") -> list[str]:
    """Return a message for each rank that does not fit all its layers (name, rank, (out, in)), the smallest first."""
    misfits: dict[int, Counter[tuple[str, tuple[int, int]]]] = {}
    for name, rank, shape in layers:
        if not 1 <= rank <= min(shape):
            # The same layer of all blocks is named once: the names differ only in a number.
            misfits.setdefault(rank, Counter())[re.sub(r"\.\d+\.", ".*.", name), shape] += 1
    problems = []
    for rank, counts in misfits.items():
        smallest_first = sorted(counts.items(), key=lambda item: min(item[0][1]))
        where = ", ".join(f"{name} ({out} x {into}, layers: {count})" for (name, (out, into)), count in smallest_first)
        most = min(min(shape) for _, shape in counts)
        problems.append(f"{setting}={rank} does not fit {where}; use 1 to {most}{remedy}.")
    return problems


def target_ranks(
    model: nn.Module,
    ranks: Ranks,
    kind_of: KindOf,
    layers: Mapping[str, int] | None = None,
    blocks_of: BlocksOf = lambda name: 1,
) -> dict[str, int]:
    """Return name -> rank of every module that becomes low-rank: from `layers` by name, else from its kind.

    Raises `ConfigError` with a line for each rank that does not fit, naming every layer, the smallest first.
    """
    chosen: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        shape, kind = dense_shape(module), kind_of(name)
        rank = (layers or {}).get(name, ranks.get(kind) if kind else None)
        if shape is not None and rank is not None:
            chosen[name], shapes[name] = rank, block_shape(shape, blocks_of(name), name)
    remedy = " (method.ranks has one rank per kind of layer)"
    scaled = [name for name in chosen if _is_other_embedding(model.get_submodule(name))]
    if scaled:
        raise ConfigError(
            f"method.embedding=low_rank does not fit {', '.join(scaled)}, which also scales its rows; use "
            "method.embedding=dense."
        )
    if problems := rank_problems("method.rank", ((name, rank, shapes[name]) for name, rank in chosen.items()), remedy):
        raise ConfigError(problems)
    return chosen


def make_low_rank(
    model: nn.Module,
    ranks: Ranks,
    kind_of: KindOf,
    layers: Mapping[str, int] | None = None,
    kind: str = "low_rank",
    blocks_of: BlocksOf = lambda name: 1,
    sparse: Mapping[str, Any] | None = None,
) -> None:
    """Replace every chosen dense layer of `model` in place, uninitialized (method 1, FinGPT-HPC section IV.A).

    `layers`: ranks of single layers by name. `kind`: the registered way to be low-rank; embedding and head are plain
    factor pairs in all of them. `blocks_of`: how many pairs of that rank take the place of a layer.
    `sparse`: share, lora_alpha and seed of SLTrain's layers.
    """
    for name, rank in target_ranks(model, ranks, kind_of, layers, blocks_of).items():
        module = model.get_submodule(name)
        shape = dense_shape(module)
        assert shape is not None
        low_rank: nn.Module
        with next(module.parameters()).device:
            if isinstance(module, nn.Embedding):
                low_rank = LowRankEmbedding(module.num_embeddings, module.embedding_dim, rank)
            else:
                layer = LowRankLinear if kind_of(name) == "head" else LAYERS[kind]
                own = {"name": name, **(sparse or {})} if layer is LAYERS[SLTRAIN] else {}
                low_rank = layer(shape[1], shape[0], rank, module.bias is not None, blocks_of(name), **own)
        model.set_submodule(name, low_rank)
