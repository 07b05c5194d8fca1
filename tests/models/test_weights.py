"""Dense models read one weight at a time: every way they lie on disk, and every way that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from finhpc.commands.decompose.moments import second_moments
from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.source import locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolder, TensorFolderWriter
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.gguf_file import write_gguf


def assert_same(path: Path, model: PreTrainedModel) -> None:
    weights = open_weights(path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, lambda: tiny_llama(tied=False)])
def test_folders_of_one_file_and_of_several(tmp_path: Path, make: Any, how: dict[str, str]) -> None:
    model = make()
    saved(model, tmp_path, **how)
    assert (tmp_path / "model.safetensors.index.json").is_file() == bool(how)
    assert_same(tmp_path, model)


def test_a_checkpoint_of_the_bare_transformer_with_old_buffers(tmp_path: Path) -> None:
    model = tiny_gpt2()
    saved(model, tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(tmp_path, model)


def test_matrices_are_out_times_in_whatever_is_stored(tmp_path: Path) -> None:
    model = tiny_gpt2()
    weights = open_weights(saved(model, tmp_path))
    found = {linear.name: linear for linear in weights.linears()}
    fused = found["transformer.h.0.attn.c_attn"]
    assert (fused.kind, fused.out_features, fused.in_features) == ("attention", 96, 32)
    torch.testing.assert_close(weights.matrix(fused), model.transformer.h[0].attn.c_attn.weight.T)
    torch.testing.assert_close(weights.matrix(found["transformer.wte"]), model.transformer.wte.weight.T)
    assert {linear.kind for linear in found.values()} == {"attention", "mlp", "head", "embedding"}
    assert "transformer.wpe" not in found


def test_large_numbers_are_finite_and_a_single_nan_or_infinity_is_not(tmp_path: Path) -> None:
    saved(tiny_gpt2(), tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "transformer.h.0.mlp.c_fc.weight"
    tensors[name].view(-1)[:2] = 3e38  # together more than float32 holds
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(open_weights(tmp_path).read(name), tensors[name], rtol=0, atol=0)
    for number in (float("nan"), float("inf"), float("-inf")):
        tensors[name].view(-1)[7] = number
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            open_weights(tmp_path).read(name)


def damaged(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(name: str, path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def changed(path: Path, **new: Tensor) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | new, path / "model.safetensors", {"format": "pt"})


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"pickle")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, r"model\.safetensors is cut short, damaged or another format"),
        (lambda path: without("model.layers.1.mlp.up_proj.weight", path), r"has no model\.layers\.1\.mlp\.up_proj\."),
        (lambda path: changed(path, **{"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight is 7, but its con"),
        (lambda path: changed(path, strange=torch.ones(1)), "holds strange, which no llama model has"),
        (pickled, "pickled weights are not opened"),
        (lambda path: (path / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
        (lambda path: (path / "config.json").write_text("{}"), "is not a model's config"),
    ],
)
def test_a_spoilt_folder_says_what_is_wrong(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(saved(tiny_llama(), tmp_path))
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-00002-*"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {gone.name}"):
        open_weights(tmp_path)


def test_integer_weights_are_no_dense_model(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    changed(tmp_path, **{"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I8, so the model is quantized"):
        open_weights(tmp_path)


def test_an_unknown_family_names_the_known(tmp_path: Path) -> None:
    config = OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type=opt is not supported; supported: gpt2, llama, mistral, qwen2"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "model is not set"),
        ("/no/such/folder", "does not exist"),
        ("missing.gguf", "does not exist"),
        (__file__, r"is not a \.gguf file"),
    ],
)
def test_what_is_no_model_is_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_weights(locate(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_reads_as_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    path = write_gguf(model, tmp_path / "tiny.gguf", mlp_bits=8)
    weights = open_weights(path)
    assert weights.tied == tied
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=weights.skeleton)["tensors"]
    assert read.keys() | {"lm_head.weight"} == model.state_dict().keys()
    for name, tensor in read.items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=0, atol=0)
    query = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(weights.read(query), model.state_dict()[query], rtol=0, atol=0)
    rounded = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(weights.read(rounded), model.state_dict()[rounded], rtol=0, atol=0.01)


def test_a_gguf_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is cut short, damaged or no GGUF file"):
        open_weights(path)


def test_tensors_become_one_file_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{f"{i}.{name}": torch.randn(4 + i, 3) for name in ("x", "y")} for i in range(3)]
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    for out, limit in (("one", 1 << 30), ("two", sum(tensor.nbytes for tensor in parts[0].values()) + 1)):
        monkeypatch.setattr("finhpc.models.files.tensor_folder.FILE_BYTES", limit)
        with TensorFolderWriter(tmp_path / out) as writer:
            for part in parts:
                writer.add(part)
            assert writer.finish() > sum(tensor.nbytes for tensor in expected.values())
            assert not (tmp_path / out).exists()
            writer.publish()
        assert writer.names == set(expected)
        folder = TensorFolder(tmp_path / out)
        assert all(torch.equal(folder.read(name), tensor) for name, tensor in expected.items())
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_tensor_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    writer = TensorFolderWriter(tmp_path / "out")
    with writer:
        writer.add({"x": torch.ones(3)})
        writer.finish()
        writer.__exit__(KeyError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, lambda: tiny_llama(tied=False)])
def test_moments_are_those_of_the_whole_models_inputs(tmp_path: Path, make: Any) -> None:
    model = make()
    weights = open_weights(saved(model, tmp_path))
    wanted = {linear.name for linear in weights.linears() if linear.kind != "embedding"}
    tokens = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(2))
    seen: dict[str, Tensor] = {}
    for name in wanted:

        def keep(module: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).double()

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(tokens)
    found: dict[str, Tensor] = {}
    for moments in second_moments(weights, tokens, wanted, torch.device("cpu")):
        found |= moments
    assert found.keys() == wanted
    for name, moment in found.items():
        x = seen[name]
        assert moment.dtype == torch.float64
        expected = x.T @ x / len(x)
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))
    if "model.layers.0.self_attn.q_proj" in found:
        assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]


def test_parts_without_wanted_layers_yield_nothing(tmp_path: Path) -> None:
    weights = open_weights(saved(tiny_gpt2(), tmp_path))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    found = list(second_moments(weights, tokens, {"transformer.h.1.mlp.c_fc"}, torch.device("cpu")))
    assert [set(moments) for moments in found] == [{"transformer.h.1.mlp.c_fc"}]
    assert np.isfinite(found[0]["transformer.h.1.mlp.c_fc"].numpy()).all()


def test_weights_in_a_second_layout_are_not_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from finhpc.models.files.source import FETCHED, NOT_FETCHED

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    twice = ["consolidated.safetensors", "consolidated.00.pth", "original/params.json", "pytorch_model.bin"]
    found = filter_repo_objects([*wanted, *twice], allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED)
    assert list(found) == wanted
