"""`--format onnx`: a graph for ONNX Runtime with the factors intact, in a folder that onnxruntime-genai opens.

    FOLDER/model.onnx, model.onnx.data    graph and weights, with keys and values of earlier tokens as inputs
    FOLDER/genai_config.json              what onnxruntime-genai asks for
    FOLDER/NAME.onnx_adapter              a LoRA adapter, for its Adapters

A low-rank layer is two products. Attention is `GroupQueryAttention`, matrices in few bits are `MatMulNBits` and
`GatherBlockQuantized`: operators of ONNX Runtime (onnxruntime/docs/ContribOperators.md), the ones that the models of
onnxruntime-genai consist of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.export.onnx_graph import DATA, MICROSOFT, Graph
from finhpc.models.export.onnx_layers import ACTIVATIONS, KINDS, OnnxLayers
from finhpc.models.export.runtime import Layers, Runtime, Source
from finhpc.models.families.registry import context_of, family_of
from finhpc.models.lora.peft_format import Adapter
from finhpc.models.lora.targets import linear_shapes

INT64 = 7  # onnx.TensorProto.INT64
PAST = "past_key_values.{}.{}"
PRESENT = "present.{}.{}"


class Onnx(Runtime):
    merged, schemes, opens = False, {8: "MatMulNBits", 4: "MatMulNBits"}, "onnxruntime_genai.Model(FOLDER)"
    needs_tokenizer_files, layers = True, KINDS

    def check(self, model: Layers, source: Source) -> list[str]:
        need("onnx")
        if source.adapters:
            need("onnxruntime")
        config, problems = model.target_config, []
        kind = str(config.model_type).removeprefix("lowrank_")
        if kind not in BLOCKS:
            problems.append(f"model_type={kind}; it writes {', '.join(BLOCKS)}")
        odd = {type(each) for each in model.target.modules() if isinstance(each, LowRankLinear)} - {*self.layers}
        if odd:
            problems.append(f"a model of method.kind={config.low_rank_kind}; it writes low_rank and cola")
        act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        if act not in ("silu", *ACTIVATIONS):
            problems.append(f"the activation {act}; it writes silu, {', '.join(ACTIVATIONS)}")
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if kind != "gpt2" and width % 16:
            problems.append(f"heads of {width}: ONNX Runtime turns heads of multiples of 16")
        problems += [
            f"the adapter {name} with use_dora=true; merge it into its base"
            for name, adapter in source.adapters.items()
            if adapter.magnitudes
        ]
        if problems:
            other = "merged" if any(each.mergeable for each in odd) else "native"
            raise ConfigError([f"format=onnx does not fit {problem}; or use --format {other}." for problem in problems])
        layers = OnnxLayers(None, model, source.bits, {})  # type: ignore[arg-type]  # nothing is written yet
        matrices = [name for name, parameter in model.target.named_parameters() if parameter.dim() == 2]
        names = [name.removesuffix(".weight") for name in matrices]
        return [name for name in names if not layers.is_quantized(name)] if source.bits < 16 else []

    def write(self, model: Layers, source: Source, folder: Path) -> int:
        with Graph(folder) as graph:
            layers = OnnxLayers(graph, model, source.bits, _adapted(model, source))
            for tensors in model.layers():
                layers.store(tensors)
            _build(layers, model)
            graph.save(source.name)
        for name, adapter in source.adapters.items():
            _write_adapter(folder / f"{name}.onnx_adapter", adapter, layers)
        tree = genai_config(model, source)
        (folder / "genai_config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        return sum((folder / name).stat().st_size for name in ("model.onnx", DATA))


def need(package: str) -> None:
    """Raise `ConfigError` if a package of the extra `onnx` is not installed."""
    if find_spec(package) is None:
        raise ConfigError(
            f'format=onnx needs the package {package}, which is not installed; run pip install "finhpc[onnx]".'
        )


# -- the graph ------------------------------------------------------------------------------


def _build(layers: OnnxLayers, model: Layers) -> None:
    graph, config = layers.graph, model.target_config
    family = family_of(config)
    ids = graph.input("input_ids", INT64, ["batch", "seq"])
    graph.input("attention_mask", INT64, ["batch", "total"])
    lengths = _lengths(graph)
    x = layers.embedding(family.embedding, ids)
    if family.positions:
        positions = graph.input("position_ids", INT64, ["batch", "seq"])
        x = graph.node("Add", x, layers.embedding(family.positions, positions))
    tables = _rotary_tables(graph, family, config)
    block = BLOCKS[family.name]
    for i in range(config.num_hidden_layers):
        x = block(layers, config, f"{family.blocks}.{i}", x, Attention(layers, config, family, i, lengths, tables))
    x = NORMS[family.name](layers, config, family.norm, x)
    head = layers.tied_head(family.embedding, x) if model.tied else layers.linear(family.head, x)
    graph.node("Identity", head, out=graph.output("logits", ["batch", "seq", config.vocab_size]))
    layers.declare_adapters()


def _lengths(graph: Graph) -> tuple[str, str]:
    """Return the index of each sequence's last token (batch,) and the length of all, in int32, from the mask."""
    counted = graph.node("ReduceSum", "attention_mask", graph.numbers("axis", [1]), keepdims=0)
    last = graph.node("Cast", graph.node("Sub", counted, graph.numbers("one", [1])), to=6)
    shape = graph.node("Shape", "attention_mask")
    graph.weight("second", torch.tensor(1))
    return last, graph.node("Cast", graph.node("Gather", shape, "second", axis=0), to=6)


def _rotary_tables(graph: Graph, family: Any, config: Any) -> tuple[str, ...]:
    """Store cosines and sines (context, head size / 2) of all positions, as the model itself computes them."""
    rotary = family.rotary(config)
    if rotary is None:
        return ()
    cos, sin = rotary(torch.zeros(1), torch.arange(context_of(config))[None])
    half = cos.shape[-1] // 2
    return tuple(graph.weight(name, table[0, :, :half].float()) for name, table in (("cos", cos), ("sin", sin)))


class Attention:
    """Attention over earlier and new tokens of block `i`, (queries, keys, values) -> (batch, seq, width)."""

    def __init__(
        self, layers: OnnxLayers, config: Any, family: Any, i: int, lengths: tuple[str, str], tables: tuple[str, ...]
    ) -> None:
        self.graph, self.i, self.lengths, self.tables = layers.graph, i, lengths, tables
        self.module: Any = layers.modules[f"{family.blocks}.{i}.{family.attention[1]}"]
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)

    def __call__(self, q: str, k: str, v: str) -> str:
        shape = ["batch", self.kv_heads]
        for key in ("key", "value"):
            self.graph.input(PAST.format(self.i, key), 1, [*shape, "past", self.module.head_dim])
            self.graph.output(PRESENT.format(self.i, key), [*shape, "total", self.module.head_dim])
        past, present = ([name.format(self.i, key) for key in ("key", "value")] for name in (PAST, PRESENT))
        how = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "scale": float(self.module.scaling),
            "do_rotary": int(bool(self.tables)),
        }
        inputs = (q, k, v, *past, *self.lengths, *self.tables)
        outs = [f"attention.{self.i}", *present]
        return self.graph.several("GroupQueryAttention", *inputs, outs=outs, domain=MICROSOFT, **how)[0]


def _llama_norm(layers: OnnxLayers, config: Any, name: str, x: str) -> str:
    return layers.rms_norm(name, x, config.rms_norm_eps)


def _llama(layers: OnnxLayers, config: Any, at: str, x: str, attend: Attention) -> str:
    add = layers.graph.node
    normed = _llama_norm(layers, config, f"{at}.input_layernorm", x)
    q, k, v = (layers.linear(f"{at}.self_attn.{key}_proj", normed) for key in "qkv")
    x = add("Add", x, layers.linear(f"{at}.self_attn.o_proj", attend(q, k, v)))
    normed = _llama_norm(layers, config, f"{at}.post_attention_layernorm", x)
    gate = layers.activation(config.hidden_act, layers.linear(f"{at}.mlp.gate_proj", normed))
    wide = add("Mul", gate, layers.linear(f"{at}.mlp.up_proj", normed))
    return add("Add", x, layers.linear(f"{at}.mlp.down_proj", wide))


def _gpt2_norm(layers: OnnxLayers, config: Any, name: str, x: str) -> str:
    return layers.layer_norm(name, x, config.layer_norm_epsilon)


def _gpt2(layers: OnnxLayers, config: Any, at: str, x: str, attend: Attention) -> str:
    add = layers.graph.node
    joint = layers.linear(f"{at}.attn.c_attn", _gpt2_norm(layers, config, f"{at}.ln_1", x))
    x = add("Add", x, layers.linear(f"{at}.attn.c_proj", attend(*layers.graph.split(joint, 3))))
    wide = layers.linear(f"{at}.mlp.c_fc", _gpt2_norm(layers, config, f"{at}.ln_2", x))
    return add("Add", x, layers.linear(f"{at}.mlp.c_proj", layers.activation(config.activation_function, wide)))


Block = Callable[[OnnxLayers, Any, str, str, Attention], str]
BLOCKS: dict[str, Block] = {"gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama}
NORMS = {"gpt2": _gpt2_norm, "llama": _llama_norm, "mistral": _llama_norm, "qwen2": _llama_norm}


# -- adapters -------------------------------------------------------------------------------


def _adapted(model: Layers, source: Source) -> dict[str, tuple[int, int]]:
    """Return name -> (out, in) of every layer that an adapter changes."""
    names = {name for adapter in source.adapters.values() for name in adapter.pairs}
    return {name: shape for name, shape in linear_shapes(model.target).items() if name in names} if names else {}


def _write_adapter(path: Path, adapter: Adapter, layers: OnnxLayers) -> None:
    """Write the transposed factors, the scale in B, and empty ones for layers that only other adapters change."""
    import onnxruntime as ort

    values = {}
    for name, (wide, narrow) in layers.adapted.items():
        a, b = adapter.pairs.get(name, (torch.zeros(0, narrow), torch.zeros(wide, 0)))
        scaled = adapter.scales.get(name, 1.0) * b.float()
        for key, factor in ((f"{name}.lora_A", a.float().T), (f"{name}.lora_B", scaled.T)):
            values[key] = ort.OrtValue.ortvalue_from_numpy(factor.contiguous().numpy())
    written = ort.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(values)
    written.export_adapter(str(path))


# -- onnxruntime-genai ----------------------------------------------------------------------


def genai_config(model: Layers, source: Source) -> dict[str, Any]:
    """Return the content of genai_config.json."""
    config, tokenizer = model.target_config, source.tokenizer
    family = family_of(config)
    attention: Any = dict(model.target.named_modules())[f"{family.blocks}.0.{family.attention[1]}"]
    heads = config.num_attention_heads
    stops = source.stops or [config.eos_token_id if isinstance(config.eos_token_id, int) else 0]
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": PAST.format("%d", "key"),
        "past_value_names": PAST.format("%d", "value"),
    } | ({"position_ids": "position_ids"} if family.positions else {})
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": attention.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": PRESENT.format("%d", "key"),
            "present_value_names": PRESENT.format("%d", "value"),
        },
    }
    begin = None if tokenizer is None else tokenizer.bos_token_id
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return {
        "model": {
            "type": "decoder",  # onnxruntime-genai's name for a model that it need not know
            "context_length": context_of(config),
            "vocab_size": config.vocab_size,
            "bos_token_id": stops[0] if begin is None else begin,
            "eos_token_id": stops,
            "pad_token_id": stops[0] if pad is None else pad,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context_of(config),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
