"""A model exported with `--format gguf`, read back by finhpc, and in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import finhpc
from finhpc.bench.in_runtime import gguf_losses
from finhpc.errors import ConfigError
from finhpc.models.export.gguf_tokenizer import CONTRACTIONS, REST, tokenizer_of_llama_cpp
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.files.source import open_weights, tokenizer_of
from finhpc.models.files.tokenizer import PROBE
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.pretrain import Method, Model
from tests.models.folders import peft_adapter
from tests.models.runtimes import (
    IDS,
    apart,
    exported,
    greedy_in,
    greedy_of,
    llama_cpp,
    log_probabilities_in,
    logits_of,
    needs,
    request,
)
from tests.tiny import WORDS, tiny_shards, with_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2 untied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "llama 3 scaling": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES | GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | GEMMA | {"num_hidden_layers": 7})),
}
READ_BACK = ("gpt2", "gpt2 untied", "llama", "mistral", "qwen2")  # by finhpc's own reader


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards", blocks=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    """A model folder per family, with weights that are no longer as they were drawn."""
    made = {}
    for name, build in FAMILIES.items():
        torch.manual_seed(1)
        model = build().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        model.save_pretrained(made[name])
        with_tokenizer(made[name], shards)
    return made


@pytest.mark.parametrize("name", READ_BACK)
def test_the_weights_are_read_back_as_they_were(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    result = exported(folders[name], tmp_path / "out", "gguf")
    assert result["size_bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    found, wanted = open_weights(tmp_path / "out" / "model.gguf"), open_weights(folders[name])
    for key in wanted.skeleton.state_dict():
        assert torch.equal(found.read(key), wanted.read(key)), key
    model = finhpc.load_model(tmp_path / "out" / "model.gguf")
    torch.testing.assert_close(logits_of(model), logits_of(finhpc.load_model(folders[name])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    needs("xllamacpp")
    exported(folders[name], tmp_path / "out", "gguf")
    found = log_probabilities_in(llama_cpp(tmp_path / "out" / "model.gguf"), 300)
    wanted = logits_of(finhpc.load_model(folders[name])).log_softmax(-1)
    assert apart(found, wanted) < 2e-3  # llama.cpp looks up GELU in a table of float16, and caches keys in float16
    assert greedy_in("gguf", tmp_path / "out" / "model.gguf", 12) == greedy_of(folders[name], 12)


def test_the_losses_of_a_text_are_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """Some tokens are parts of characters, whose probability the server does not tell when they are forced."""
    needs("xllamacpp")
    exported(folders["llama"], tmp_path / "out", "gguf")
    found = gguf_losses(request(tmp_path / "out" / "model.gguf"))(IDS)
    wanted = cross_entropy(logits_of(finhpc.load_model(folders["llama"]))[:-1], torch.tensor(IDS[1:]), reduction="none")
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.05), (4, 0.5)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_few_bits(name: str, bits: int, bound: float, folders: dict[str, Path], tmp_path: Path) -> None:
    result = exported(folders[name], tmp_path / "out", "gguf", bits)
    path = tmp_path / "out" / "model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == result["scheme"] == {8: "Q8_0", 4: "Q4_0"}[bits]
    assert kinds["token_embd.weight" if name != "qwen2" else "output.weight"] == "Q8_0"  # the head
    model, plain = finhpc.load_model(path), finhpc.load_model(folders[name])
    assert apart(logits_of(model), logits_of(plain)) < bound
    needs("xllamacpp")
    in_llama_cpp = log_probabilities_in(llama_cpp(path), 300)
    assert apart(in_llama_cpp, logits_of(model).log_softmax(-1)) < 0.02  # llama.cpp rounds activations to 8 bits
    found, wanted = open_weights(path), open_weights(folders[name])
    key = next(key for key, tensor in wanted.skeleton.state_dict().items() if ".mlp." in key and tensor.dim() == 2)
    rows = wanted.read(key)
    rows = rows.T if name == "gpt2" else rows
    own = gguf.GGMLQuantizationType[result["scheme"]]
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(rows.contiguous().numpy(), own), own))
    assert torch.equal(found.read(key).T if name == "gpt2" else found.read(key), rounded)


def test_a_low_rank_model_is_merged_and_cola_is_refused(tmp_path: Path, shards: Path) -> None:
    shape = resolve_shape(Model(preset="llama-tiny", layers=2, width=64, vocab_size=300), 300)
    for kind in ("low_rank", "cola"):
        config = config_of_method(shape, Method(kind=kind, rank=8))
        model = initial_model(config, seed=1, scheme="spectral")
        weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_model(tmp_path / kind, config, weights.items(), shards / "tokenizer")
    exported(tmp_path / "low_rank", tmp_path / "out", "gguf")
    found = logits_of(finhpc.load_model(tmp_path / "out" / "model.gguf"))
    torch.testing.assert_close(found, logits_of(finhpc.load_model(tmp_path / "low_rank")), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"format=gguf does not fit a model of method\.kind=cola"):
        exported(tmp_path / "cola", tmp_path / "other", "gguf")


def test_an_adapter_is_a_file_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its pairs, multiplied out as llama.cpp does, give the difference of the exported merged weights."""
    base = folders["llama"]
    targets = ["q_proj", "k_proj", "down_proj"]
    folder = peft_adapter(base, tmp_path / "mine", target_modules=targets, r=4, rank_pattern={"k_proj": 2})
    result = exported(base, tmp_path / "out", "gguf", adapters=[f"mine={folder}"])
    assert result["adapters"] == ["mine"]
    reader = gguf.GGUFReader(tmp_path / "out" / "mine.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    exported(folder, tmp_path / "merged", "gguf")
    plain, merged = (
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path / "model.gguf").tensors}
        for path in (tmp_path / "out", tmp_path / "merged")
    )
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert sorted(f"{name}.lora_{key}" for name in changed for key in "ab") == sorted(tensors)
    for name in changed:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        added = fields["adapter.lora.alpha"] / len(a) * b @ a
        torch.testing.assert_close(plain[name] + added, merged[name], rtol=0, atol=1e-6)


def test_llama_cpp_applies_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    needs("xllamacpp")
    base = folders["llama"]
    folder = peft_adapter(base, tmp_path / "mine", target_modules=["q_proj", "k_proj", "down_proj"], r=4, lora_alpha=32)
    exported(base, tmp_path / "out", "gguf", adapters=[f"mine={folder}"])
    found = log_probabilities_in(llama_cpp(tmp_path / "out" / "model.gguf", tmp_path / "out" / "mine.gguf"), 300)
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    assert apart(found, logits_of(wanted).log_softmax(-1)) < 2e-3
    assert apart(found, logits_of(finhpc.load_model(base)).log_softmax(-1)) > 0.02


# -- tokenizers -----------------------------------------------------------------------------


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of each kind that llama.cpp has, trained on a few words."""
    spaces = kind in ("sentencepiece", "gemma")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>") if spaces else models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    if spaces:
        if kind == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            replace = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            tokenizer.normalizer = normalizers.Sequence(replace)
        steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], []
    elif kind == "smollm":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    elif kind == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        numbers = r"\p{N}{1,3}" if kind == "llama-bpe" else r"\p{N}"
        split = pre_tokenizers.Split(Regex(CONTRACTIONS + numbers + REST), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if not spaces:
        tokenizer.decoder = decoders.ByteLevel()
    how: dict[str, Any] = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    text = " ".join(WORDS) + " Hello, how are you? In 2023 it's 12.5 % more"
    tokenizer.train_from_iterator([text] * 20, trainers.BpeTrainer(vocab_size=len(special) + 420, **how))
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["special"]]
    ends = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} if spaces else {"eos_token": special[0]}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **ends)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece", "gemma"])
def test_llama_cpp_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    named = tokenizer_of_llama_cpp(tokenizer)
    assert named == (("llama", "default") if kind in ("sentencepiece", "gemma") else ("gpt2", kind))
    needs("xllamacpp")
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer) + 3, "num_hidden_layers": 1}))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    exported(tmp_path / "model", tmp_path / "out", "gguf")
    llama = llama_cpp(tmp_path / "out" / "model.gguf")
    for text in (PROBE, "the bank rate rises 12345 times", "caf\u00e9 \U0001f600  x"):
        found = llama.ask("tokenize", content=text, add_special=False)["tokens"]
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text


def test_tokenizers_that_llama_cpp_has_not_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match=r"its model is WordLevel, which llama\.cpp does not"):
        tokenizer_of_llama_cpp(PreTrainedTokenizerFast(tokenizer_object=odd))
    odd = Tokenizer(models.BPE())
    odd.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"it splits text by .*Whitespace"):
        tokenizer_of_llama_cpp(PreTrainedTokenizerFast(tokenizer_object=odd))
    assert tokenizer_of(folders["llama"]).get_vocab()


def test_what_the_format_cannot_express_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shape = {key: SIZES[key] for key in SIZES if key != "pad_token_id"}
    Olmo2ForCausalLM(Olmo2Config(**shape)).save_pretrained(tmp_path / "olmo2")
    with pytest.raises(ConfigError, match=r"model_type=olmo2, .* it writes gpt2, llama, mistral, qwen2, qwen3, gemma"):
        exported(tmp_path / "olmo2", tmp_path / "out", "gguf")
    GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="relu")).save_pretrained(tmp_path / "relu")
    with pytest.raises(ConfigError, match="format=gguf does not fit the activation relu"):
        exported(tmp_path / "relu", tmp_path / "out", "gguf")
    for scheme, told in (("int8", "whose runtime has schemes of its own"),):
        with pytest.raises(ConfigError, match=told):
            exported(folders["llama"], tmp_path / "out", "gguf", quantization={"bits": 8, "scheme": scheme})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
        exported(folders["llama"], tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="adapters is for format=gguf and onnx"):
        exported(folders["llama"], tmp_path / "other", "merged", adapters=["x=y"])
    assert not (tmp_path / "other").exists()
