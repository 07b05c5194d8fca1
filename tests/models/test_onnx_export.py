"""A model exported with `--format onnx`, in ONNX Runtime and onnxruntime-genai, compared with the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import finhpc
from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.export import onnx_file
from finhpc.models.export.onnx_graph import quantized
from finhpc.models.export.onnx_layers import block_of
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.files.source import tokenizer_of
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.pretrain import Method, Model
from tests.models.dense import saved, tiny_llama
from tests.models.folders import peft_adapter
from tests.models.runtimes import IDS, apart, exported, greedy_in, greedy_of, logits_in_onnx, logits_of, needs
from tests.tiny import tiny_shards

needs("onnxruntime_genai")

VOCAB, WIDTH = 300, 64
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2-tiny", {"rank": 40}),
    "gpt2-separate": ("gpt2-tiny", {"rank": 32, "qkv": "separate", "head": "dense"}),
    "gpt2-dense": ("gpt2-tiny", {"kind": "dense"}),
    "gpt2-cola": ("gpt2-tiny", {"kind": "cola", "rank": 32, "qkv": "separate"}),
    "llama": ("llama-tiny", {"rank": 32, "embedding": "low_rank"}),
    "llama-tied": ("llama-tiny", {"kind": "dense"}),
    "llama-cola": ("llama-tiny", {"kind": "cola", "rank": 32}),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
DENSE: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards", blocks=8)


def preset_model(preset: str, method: dict[str, Any], tied: bool) -> Any:
    sizes = {"layers": 2, "width": WIDTH, "vocab_size": VOCAB, "tie_embeddings": tied or None}
    shape = resolve_shape(Model.model_validate({"preset": preset} | sizes), VOCAB)
    return initial_model(config_of_method(shape, Method(**method)), seed=1, scheme="spectral")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Make:
    """A model folder with weights as large as trained ones are."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(3)
            model = DENSE[name]() if name in DENSE else preset_model(*MODELS[name], tied="tied" in name)
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms too are no longer 0 and 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[name] = tmp_path_factory.mktemp(name) / "model"
            weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
            save_model(made[name], model.config, weights.items(), shards / "tokenizer")
        return made[name]

    return folder


@pytest.mark.parametrize("name", [*MODELS, *DENSE])
def test_the_graph_computes_what_the_model_computes(name: str, make: Make, tmp_path: Path) -> None:
    source, out = make(name), tmp_path / "out"
    result = exported(source, out, "onnx")
    assert result["size_bytes"] == sum((out / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    torch.testing.assert_close(logits_in_onnx(out), logits_of(finhpc.load_model(source)), rtol=0, atol=2e-5)
    assert greedy_in("onnx", out, 16) == greedy_of(source, 16)


def stored_numbers(folder: Path) -> int:
    """How many numbers the file of the graph's weights holds in 16 bits."""
    import onnx

    tables = ("cos", "sin")  # of rotary positions
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    floats = [each for each in graph.initializer if each.data_type != onnx.TensorProto.INT64]
    return sum(int(torch.tensor(list(each.dims)).prod()) for each in floats if each.name not in tables)


@pytest.mark.parametrize("name", [*MODELS, *DENSE])
def test_factors_stay_factors(name: str, make: Make, tmp_path: Path) -> None:
    result = exported(make(name), tmp_path / "out", "onnx", dtype="float16")
    model = finhpc.load_model(make(name))
    assert stored_numbers(tmp_path / "out") == model.num_parameters() == result["params_total"]
    assert any(isinstance(module, LowRankLinear) for module in model.modules()) == (
        result["params_total"] < result["params_dense"]
    )


def round_as_stored(model: nn.Module, bits: int, floats: list[str]) -> None:
    """Round each matrix of a model in place to the numbers that the file holds."""
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() < 2 or name in floats:
                continue
            rows = weight.T if type(module).__name__ == "Conv1D" else weight
            own = 8 if name.startswith(("lm_head", "model.embed_tokens", "transformer.wte")) else bits
            q, scales = quantized(rows, own, block_of(rows.shape[1], own))
            if own == 4:
                q = torch.stack((q & 15, q >> 4), -1).flatten(-2)
            values = (q.float() - (1 << (own - 1))) * scales.float()[..., None]
            rows.copy_(values.flatten(1)[:, : rows.shape[1]])


@pytest.mark.parametrize("name", [*MODELS, *DENSE])
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_compute_with_the_stored_numbers(name: str, bits: int, make: Make, tmp_path: Path) -> None:
    """What is left between the two are activations, which ONNX Runtime rounds to 8 bits in blocks."""
    result = exported(make(name), tmp_path / "out", "onnx", bits)
    model = finhpc.load_model(make(name))
    plain = logits_of(model)
    round_as_stored(model, bits, result["not_quantised"])
    found, wanted = logits_in_onnx(tmp_path / "out"), logits_of(model)
    assert apart(found, wanted) < 0.03
    assert apart(found, plain) < (0.06 if bits == 8 else 0.6)
    assert len(greedy_in("onnx", tmp_path / "out", 8)) == 8


def test_sizes_in_few_bits(make: Make, tmp_path: Path) -> None:
    """A rank of 40 fills two blocks of 32, and a scale takes 16 bits for each block."""
    rows = torch.randn(8, 40)
    packed, scales = quantized(rows, 4, 32)
    assert (packed.shape, scales.shape) == ((8, 2, 16), (8, 2))
    for columns, block in ((384, 128), (1600, 64), (96, 32), (40, 32)):
        assert block_of(columns, 8) == block
        assert block_of(columns, 4) == 32
    q, scales = quantized(torch.tensor([[-3.0] + [1.0] * 31]), 4, 32)
    assert (q[0, 0, 0] & 15, scales.item()) == (0, 0.375)


def test_the_tokenizer_gives_the_same_ids(make: Make, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    exported(make("gpt2"), tmp_path / "out", "onnx")
    text = "the bank rate rises, and 1234 don't\n\n fall"
    found = og.Tokenizer(og.Model(str(tmp_path / "out"))).encode(text)
    assert [int(token) for token in found] == tokenizer_of(make("gpt2"))(text).input_ids


def test_adapters_are_switched_while_the_model_runs(make: Make, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime_genai as og

    base = make("llama-tied")
    kinds: dict[str, dict[str, Any]] = {
        "one": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8},
        "two": {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 30, "use_rslora": True},
    }
    for name, kind in kinds.items():
        peft_adapter(base, tmp_path / name, **kind)
    result = exported(base, tmp_path / "out", "onnx", adapters=[f"{name}={tmp_path / name}" for name in kinds])
    assert result["adapters"] == [*kinds]
    torch.testing.assert_close(logits_in_onnx(tmp_path / "out"), logits_of(finhpc.load_model(base)), rtol=0, atol=2e-5)
    model = og.Model(str(tmp_path / "out"))
    adapters = og.Adapters(model)
    for name in kinds:
        adapters.load(str(tmp_path / "out" / f"{name}.onnx_adapter"), name)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(IDS) + 8)
        generator = og.Generator(model, parameters)
        generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([IDS], dtype=np.int32))
        wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / name)).eval()
        logits = torch.from_numpy(generator.get_logits()).float().reshape(-1, wanted.config.vocab_size)[-1]
        torch.testing.assert_close(logits, logits_of(wanted)[-1], rtol=0, atol=2e-5)
        assert apart(logits_of(wanted), logits_of(finhpc.load_model(base))) > 0.01


def test_what_the_format_cannot_express_is_named(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="heads of 8: ONNX Runtime turns heads of multiples of 16"):
        exported(saved(tiny_llama(layers=1), tmp_path / "narrow"), tmp_path / "out", "onnx")
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=32, vocab_size=VOCAB), VOCAB)
    for kind, other in (("half", "native"), ("sltrain", "merged")):
        config = config_of_method(shape, Method(kind=kind, rank=8))
        model = initial_model(config, seed=1, scheme="spectral")
        weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
        save_model(tmp_path / kind, config, weights.items(), None)
        words = rf"method\.kind={kind}; it writes low_rank and cola; or use --format {other}"
        with pytest.raises(ConfigError, match=words):
            exported(tmp_path / kind, tmp_path / "out", "onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package onnx, .*pip install "finhpc\[onnx\]"'):
        exported(make("gpt2"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
