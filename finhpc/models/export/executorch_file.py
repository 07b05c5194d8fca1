"""`--format executorch`: a program for ExecuTorch, PyTorch's runtime for phones, with the factors intact.

    FOLDER/model.pte    weights and graph, `forward`: ids (1, n), positions (n,) -> logits of the last (1, 1, tokens)

Keys and values of earlier tokens are the program's own state. Inputs and the methods that tell its sizes are those that
ExecuTorch's text runner asks for (executorch, `extension/llm/runner`, constants.h). XNNPACK computes the linear layers.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.export.onnx_layers import KINDS
from finhpc.models.export.runtime import Layers, Runtime, Source
from finhpc.models.families.registry import context_of

FAMILIES = ("gpt2", "llama", "mistral", "qwen2")
CONTEXT, PROMPT = 2048, 128  # tokens that the program has room for, and that it takes at a time; it reserves memory
GROUP = 32  # weights of a row that share a scale, in 4 bits


class Executorch(Runtime):
    merged, schemes, adapters = False, {8: "8da8w", 4: "8da4w"}, False  # bits of activations and weights
    opens = "executorch.runtime.Runtime.get().load_program(FILE)"
    needs_tokenizer_files, layers = True, KINDS

    def check(self, model: Layers, source: Source) -> list[str]:
        for package in ("executorch", "torchao"):
            if find_spec(package) is None:
                raise ConfigError(
                    f"format=executorch needs the package {package}, which is not installed; run pip install finhpc "
                    "executorch in an environment of its own, and finhpc export there."
                )
        config, problems = model.target_config, []
        kind = str(config.model_type).removeprefix("lowrank_")
        if kind not in FAMILIES:
            problems.append(f"model_type={kind}; it writes {', '.join(FAMILIES)}")
        odd = {type(each) for each in model.target.modules() if isinstance(each, LowRankLinear)} - {*self.layers}
        if odd:
            problems.append(f"a model of method.kind={config.low_rank_kind}; it writes low_rank and cola")
        if problems:
            raise ConfigError(
                [f"format=executorch does not fit {problem}; or use --format native." for problem in problems]
            )
        matrices = [name for name, parameter in model.target.named_parameters() if parameter.dim() == 2]
        modules = dict(model.target.named_modules())
        names = [name.removesuffix(".weight") for name in matrices]
        return [name for name in names if not _fits(modules[name], source.bits)] if source.bits < 16 else []

    def write(self, model: Layers, source: Source, folder: Path) -> int:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        program = Program(_opened(model, source.bits), min(CONTEXT, context_of(model.target_config)))
        prompt = min(PROMPT, program.length - 1)
        length = torch.export.Dim("length", min=1, max=prompt)
        example = (torch.zeros(1, 5, dtype=torch.long), torch.arange(5))
        shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
        with torch.no_grad():
            graph = torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
        few = [XnnpackDynamicallyQuantizedPartitioner()] if source.bits < 16 else []
        lowered = to_edge_transform_and_lower(
            graph,
            partitioner=[*few, XnnpackPartitioner()],
            constant_methods=_sizes(model, source, prompt, program.length),
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        path = folder / "model.pte"
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
        return path.stat().st_size


def _sizes(model: Layers, source: Source, prompt: int, length: int) -> dict[str, Any]:
    """Return what the runner asks a program for: method -> what it returns."""
    begin = None if source.tokenizer is None else source.tokenizer.bos_token_id
    return {
        "get_max_seq_len": prompt,
        "get_max_context_len": length,
        "get_vocab_size": model.target_config.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        **({} if begin is None else {"get_bos_id": begin}),
        **({"get_eos_ids": source.stops} if source.stops else {}),
    }


def _fits(module: nn.Module, bits: int) -> bool:
    """Return whether a matrix is stored in few bits: linear layers, in 4 bits those of rows of whole groups."""
    if isinstance(module, nn.Linear):
        return bits == 8 or module.in_features % GROUP == 0
    return isinstance(module, Conv1D) and (bits == 8 or module.weight.shape[0] % GROUP == 0)


def _opened(model: Layers, bits: int) -> nn.Module:
    """Return the exported model in float32 with its weights, which are rounded if they are to take few bits."""
    state: dict[str, Tensor] = {}
    for tensors in model.layers():
        state |= tensors
    kind: Any = type(model.target)
    opened: Any = kind.from_pretrained(
        None, config=model.target_config, state_dict=state, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    opened.set_attn_implementation("sdpa")
    opened.requires_grad_(False)
    if bits == 16:
        return opened  # type: ignore[no-any-return]
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    for name, module in [*opened.named_modules()]:
        if isinstance(module, Conv1D):  # the quantizer takes linear layers
            linear = nn.Linear(module.weight.shape[0], module.nf).requires_grad_(False)
            linear.weight.copy_(module.weight.T)
            linear.bias.copy_(module.bias)
            opened.set_submodule(name, linear)
    granularity = PerAxis(0) if bits == 8 else PerGroup(GROUP)
    kind = getattr(torch, f"int{bits}")
    scheme = Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity)
    quantize_(opened, scheme, lambda module, _: isinstance(module, nn.Linear) and _fits(module, bits))
    return opened  # type: ignore[no-any-return]


class Program(nn.Module):
    """A model with room for `length` tokens' keys and values, one sequence at a time."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, self.length, config = model, length, model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for i in range(config.num_hidden_layers):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{i}", torch.zeros(1, heads, length, size))

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        count = range(self.model.config.num_hidden_layers)
        layers = [_Layer(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), cache_position) for i in count]
        sees = torch.arange(self.length)[None] <= cache_position[:, None]
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
        logits: Tensor = self.model(
            input_ids=input_ids,
            position_ids=cache_position[None],
            attention_mask=mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits


class _Layer(CacheLayerMixin):
    """Keys and values of one layer (1, heads, length, size), in which those of new tokens take their places `at`."""

    is_compileable, is_sliding = True, False

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at, self.is_initialized = keys, values, at, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("keys and values exist already")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.at[0]

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length
