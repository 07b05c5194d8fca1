"""EVA: adapters that begin with the directions in which the inputs of their layers vary most.

F. Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024 (arXiv 2410.07170),
algorithm 1: A is the first principal components of a layer's inputs, B is zero. The incremental analysis is peft's;
every layer has the same rank (rho = 1). Inputs are those of all tokens of the first examples; of the last block's
second half only those that predict a token, because it computes no others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.models.lora.layers import LoraLinear
from finhpc.settings.training import Parallel
from finhpc.training.finetuning.batches import PackedBatches

if TYPE_CHECKING:
    from finhpc.data.examples.batches import Batches
    from finhpc.data.examples.examples import Arrays
    from finhpc.training.engine import Engine

PACKS, EXAMPLES = 16, 16  # packs, each of so many examples


def _packing(packing: Batches) -> Batches:
    """Return how the first examples are packed, whatever a step is, so that any placement sees the same packs."""
    return replace(packing, parallel=Parallel(micro_batch_size=EXAMPLES), share_prefix=False, candidates=None)


def check_inputs(train: Arrays, packing: Batches, rank: int) -> None:
    """Raise `ConfigError` if layers that see only answers have too few inputs for components of that rank."""
    first = np.concatenate([_packing(packing).samples(len(train), step) for step in range(PACKS)])
    inputs = sum(int(train.example(int(index))[1][1:].sum()) for index in first)
    if inputs < 2 * rank:
        raise ConfigError(
            f"lora.init=eva needs twice as many inputs of a layer as lora.rank={rank}, and {PACKS * EXAMPLES} examples "
            f"have {inputs} tokens of answers; use lora.rank={inputs // 2} or less, or lora.init=default."
        )


def begin_with_inputs(engine: Engine, source: PackedBatches) -> None:
    """Set A of every adapter of this stage; all replicas see the same packs, so they begin alike."""
    found: dict[str, tuple[LoraLinear, Inputs]] = {}
    for layer in engine.layers:
        for prefix, whole in zip(layer.part.names, layer.part_modules, strict=True):
            for name, module in whole.named_modules(prefix=prefix):
                if isinstance(module, LoraLinear):
                    found[name] = module, Inputs(*module.A.shape)
    hooks = [module.register_forward_pre_hook(inputs) for module, inputs in found.values()]
    packs = _packing(source.packing).stream(source.examples.train, 0)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not run the hooks
            engine.evaluate([torch.from_numpy(next(packs)["pack"]) for _ in range(PACKS)])
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for module, inputs in found.values():
            module.A.copy_(inputs.components)


class Inputs:
    """The principal components of a layer's inputs; a hook before its passes."""

    def __init__(self, rank: int, features: int) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        quick: dict[str, Any] = {"lowrank": True, "lowrank_seed": 42} if 2 * rank <= features else {}
        self.rank, self.analysis = rank, IncrementalPCA(n_components=rank, **quick)
        self.waiting: list[Tensor] = []  # rows, until there are enough of them for a step of the analysis

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.waiting.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())
        if sum(map(len, self.waiting)) >= 2 * self.rank:
            self.analysis.partial_fit(torch.cat(self.waiting))
            self.waiting.clear()

    @property
    def components(self) -> Tensor:
        """(rank, in); fewer rows than a step's at the end do not count."""
        components: Tensor = self.analysis.components_
        return components
