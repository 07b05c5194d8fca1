"""Export: the same model in another form, opened by those it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import finhpc
from finhpc.cli import main
from finhpc.commands.export import export
from finhpc.errors import CheckpointError, ConfigError, NonFiniteError
from finhpc.models.families.registry import config_of_method, make_config, parameter_count, resolve_shape
from finhpc.models.files import tensor_folder as folder_module
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.quantization.fake import TRAINED, round_weights
from finhpc.quantization.minmax import MINMAX, QuantizedMatrix
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.pretrain import LINEAR_KINDS, Method, Model
from tests.tiny import word_tokenizer

VOCAB = 101
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # shape, method, width
    "gpt2": ("gpt2-tiny", {"rank": 6}, 32),
    "gpt2-dense-tied": ("gpt2-tiny", {"kind": "dense"}, 32),
    "gpt2-embedding": ("gpt2-tiny", {"rank": 6, "ranks": {"mlp": 5}, "embedding": "low_rank", "head": "dense"}, 32),
    "gpt2-tied": ("gpt2-tiny", {"rank": 6, "head": "dense"}, 32),
    "gpt2-separate": ("gpt2-tiny", {"rank": 6, "qkv": "separate", "head": "dense", "ranks": {"out": 4}}, 32),
    "llama": ("llama-tiny", {"rank": 6, "embedding": "low_rank"}, 32),
    "llama-dense": ("llama-tiny", {"kind": "dense"}, 32),
}
WIDE: dict[str, tuple[str, dict[str, Any], int]] = {
    "gpt2-64": ("gpt2-tiny", {"rank": 32}, 64),
    "gpt2-64-tied": ("gpt2-tiny", {"rank": 32, "head": "dense"}, 64),
    "gpt2-64-separate": ("gpt2-tiny", {"rank": 32, "qkv": "separate"}, 64),
    "llama-64": ("llama-tiny", {"rank": 32, "embedding": "low_rank"}, 64),
}
NONLINEAR: dict[str, tuple[str, dict[str, Any], int]] = {
    "cola": ("gpt2-tiny", {"kind": "cola", "rank": 6}, 32),
    "cola-separate": ("gpt2-tiny", {"kind": "cola", "rank": 6, "qkv": "separate"}, 32),
    "half": ("llama-tiny", {"kind": "half", "rank": 6}, 32),
}
SPARSE: dict[str, tuple[str, dict[str, Any], int]] = {
    "sltrain": ("gpt2-tiny", {"kind": "sltrain", "rank": 6, "qkv": "separate", "sparse_share": 0.1}, 32),
    "sltrain-llama": ("llama-tiny", {"kind": "sltrain", "rank": 6, "head": "dense"}, 32),
}
TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model folder as training writes it, with a tokeniser; weights as large as trained ones are."""
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("data") / "tokenizer", VOCAB)
    made: dict[str, Path] = {}

    def folder(name: str, bits: int = 16) -> Path:
        key = f"{name}-{bits}"
        if key not in made:
            preset, method, width = (MODELS | WIDE | NONLINEAR | SPARSE)[name]
            shape = resolve_shape(Model(preset=preset, layers=2, width=width), VOCAB)
            config = config_of_method(shape, Method(**method), seed=5)
            if bits < 16:
                setattr(config, TRAINED, {"bits": bits, "scheme": "minmax"})
            torch.manual_seed(3)
            model = initial_model(config, seed=1, scheme="spectral")
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms too are no longer 0 and 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[key] = tmp_path_factory.mktemp(key) / "model"
            weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
            save_model(made[key], config, weights.items(), tokenizer)
        return made[key]

    return folder


def settings(
    source: Path | str, out: Path, format: str = "native", bits: int = 16, scheme: str = "minmax", **more: Any
) -> Any:
    tree = {"model": str(source), "out": str(out), "format": format, "quantization": {"bits": bits, "scheme": scheme}}
    return build(ExportConfig, tree | more)


def opened(folder: Path) -> Any:
    """By transformers' own door; every weight must be found, and none left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def rounded_model(folder: Path, bits: int) -> Any:
    model = finhpc.load_model(folder)
    round_weights(model, bits)
    return model


@pytest.mark.parametrize("name", [*MODELS, *SPARSE])
@pytest.mark.parametrize("format", ["native", "merged"])
def test_16_bits_give_the_same_logits(name: str, format: str, make: Make, tmp_path: Path) -> None:
    source = make(name)
    result = export(settings(source, tmp_path / "out", format))
    model = opened(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(finhpc.load_model(source)), rtol=0, atol=1e-4)
    if format == "merged":
        assert type(model) in (GPT2LMHeadModel, LlamaForCausalLM)
        assert model.num_parameters() == result["params_total"]
    else:
        assert type(model) is type(finhpc.load_model(source))
        assert model.num_parameters() == result["params_total"]
    twin = make_config(
        resolve_shape(Model(preset=(MODELS | SPARSE)[name][0], layers=2, width=32), VOCAB), dict.fromkeys(LINEAR_KINDS)
    )
    assert result["params_dense"] == parameter_count(twin)
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


TIED = {"gpt2": False, "gpt2-tied": True, "gpt2-separate": True, "gpt2-embedding": False, "gpt2-dense-tied": True}


def test_the_head_is_tied_only_where_it_was(make: Make, tmp_path: Path) -> None:
    for name, tied in TIED.items():
        export(settings(make(name), tmp_path / name, "merged"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.tie_word_embeddings is tied, name
        assert (model.lm_head.weight is model.transformer.wte.weight) is tied, name


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("bits", [8, 4])
def test_minmax_native_computes_with_the_rounded_weights(name: str, bits: int, make: Make, tmp_path: Path) -> None:
    export(settings(make(name), tmp_path / "out", bits=bits))
    model, expected = opened(tmp_path / "out"), rounded_model(make(name), bits)
    for layer, module in model.named_modules():
        if isinstance(module, QuantizedMatrix):
            weight = _weight_of(expected, layer)
            assert torch.equal(module.dequantized(), weight), layer
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
    assert model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 8)


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_nonlinear_model_keeps_its_nonlinearity_and_is_never_merged(name: str, make: Make, tmp_path: Path) -> None:
    source, kind = make(name), NONLINEAR[name][1]["kind"]
    export(settings(source, tmp_path / "out", bits=8))
    expected = logits(rounded_model(source, 8))
    torch.testing.assert_close(logits(opened(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    others = "native or onnx( or [a-z]+)*" if kind == "cola" else "native"
    for form in ("merged", "gguf"):
        words = rf"format={form} does not fit a model of method\.kind={kind}: .*; use --format {others}\."
        with pytest.raises(ConfigError, match=words):
            export(settings(source, tmp_path / form, format=form))


def test_a_sparse_model_is_quantized_only_merged(make: Make, tmp_path: Path) -> None:
    words = r"quantization\.bits=4 does not fit a model of method\.kind=sltrain: .*; use --format merged"
    with pytest.raises(ConfigError, match=words):
        export(settings(make("sltrain"), tmp_path / "out", bits=4))
    export(settings(make("sltrain"), tmp_path / "out", "merged", bits=4))


def _weight_of(model: Any, layer: str) -> Tensor:
    """The float matrix (out, in) of a packed layer, from the same model with floats."""
    weight: Tensor = model.get_submodule(layer).weight
    return weight.T if type(model.get_submodule(layer)).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("name", ["gpt2", "gpt2-separate", "llama", "sltrain"])
@pytest.mark.parametrize("bits", [8, 4])
def test_minmax_merged_rounds_the_product(name: str, bits: int, make: Make, tmp_path: Path) -> None:
    export(settings(make(name), tmp_path / "dense", "merged"))
    export(settings(make(name), tmp_path / "out", "merged", bits=bits))
    expected = rounded_model(tmp_path / "dense", bits)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(WIDE))
@pytest.mark.parametrize("format", ["native", "merged"])
@pytest.mark.parametrize(("scheme", "bits", "near"), [("int8", 8, 0.01), ("nf4", 4, 0.12)])
def test_bitsandbytes_opens_what_was_exported_for_it(
    name: str, format: str, scheme: str, bits: int, near: float, make: Make, tmp_path: Path
) -> None:
    import bitsandbytes
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    result = export(settings(make(name), tmp_path / "out", format, bits, scheme))
    export(settings(make(name), tmp_path / "floats", format))
    model, exact = opened(tmp_path / "out"), finhpc.load_model(tmp_path / "floats")
    kind = bitsandbytes.nn.Linear8bitLt if scheme == "int8" else bitsandbytes.nn.Linear4bit
    replaced = {layer: module for layer, module in model.named_modules() if isinstance(module, kind)}
    pairs = 2 if format == "native" else 1
    linears = (4 if name.startswith("gpt2") else 7) * 2 * pairs
    head = 0 if name == "gpt2-64-tied" else pairs
    embedding = pairs - 1 if name == "llama-64" else 0  # its factor B is a linear layer
    odd = 1 if scheme == "nf4" and head else 0  # the vocabulary is no multiple of 32
    assert len(replaced) == linears + head + embedding - odd
    assert (("lm_head.B" if format == "native" else "lm_head") in result["not_quantised"]) == bool(odd)
    for layer, module in replaced.items():
        weight = _weight_of(exact, layer)
        held = dequantize_bnb_weight(module.weight, module.weight if scheme == "int8" else None)
        assert 0 < (held - weight).norm() / weight.norm() < near, layer
    assert (logits(model) - logits(exact)).norm() / logits(exact).norm() < 6 * near, "errors add up over the layers"


# A process that cannot import finhpc, as that of lm-eval or a converter.
WITHOUT_FINHPC = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "finhpc":
            raise ImportError("no finhpc here")

sys.meta_path.insert(0, Absent())
try:
    import finhpc
except ImportError:
    pass
else:
    raise SystemExit("finhpc must not be importable")
import torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
with torch.no_grad():
    print(json.dumps([AutoModelForCausalLM.from_pretrained(f)(tokens).logits.tolist() for f in sys.argv[2:]]))
"""
AFTER_FINHPC = """
import json, sys
import finhpc
assert "torch" not in sys.modules
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
tokens = torch.tensor(json.loads(sys.argv[1]))
with torch.no_grad():
    found = [AutoModelForCausalLM.from_pretrained(f)(tokens).logits.tolist() for f in sys.argv[2:]]
    found.append(GPT2LMHeadModel.from_pretrained(sys.argv[-1])(tokens).logits.tolist())
print(json.dumps(found))
"""


def in_a_process(code: str, *folders: Path) -> list[Tensor]:
    words = [sys.executable, "-I", "-c", code, json.dumps(TOKENS.tolist()), *map(str, folders)]
    if code == AFTER_FINHPC:  # from the checkout, whatever is installed
        words[3] = f"import sys; sys.path.insert(0, {str(Path(finhpc.__file__).parents[1])!r})\n{code}"
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.tensor(values) for values in json.loads(done.stdout.splitlines()[-1])]


def test_merged_opens_where_finhpc_cannot_be_imported(make: Make, tmp_path: Path) -> None:
    exports = {"gpt2": (16, "minmax"), "llama": (16, "minmax"), "gpt2-tied": (8, "int8"), "llama-64": (4, "nf4")}
    for name, (bits, scheme) in exports.items():
        export(settings(make(name), tmp_path / name, "merged", bits, scheme))
    found = in_a_process(WITHOUT_FINHPC, *(tmp_path / name for name in exports))
    for name, values in zip(exports, found, strict=True):
        torch.testing.assert_close(values, logits(opened(tmp_path / name)), rtol=0, atol=1e-4)


def test_native_and_minmax_open_after_import_finhpc(make: Make, tmp_path: Path) -> None:
    export(settings(make("llama"), tmp_path / "native"))
    export(settings(make("sltrain"), tmp_path / "sparse"))
    export(settings(make("gpt2"), tmp_path / "merged-4", "merged", 4))
    folders = tmp_path / "native", tmp_path / "sparse", tmp_path / "merged-4"
    native, sparse, merged, by_class = in_a_process(AFTER_FINHPC, *folders)
    torch.testing.assert_close(native, logits(finhpc.load_model(make("llama"))), rtol=0, atol=1e-4)
    torch.testing.assert_close(sparse, logits(finhpc.load_model(make("sltrain"))), rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, logits(opened(tmp_path / "merged-4")), rtol=0, atol=1e-5)
    assert torch.equal(merged, by_class)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_trained_with_rounded_weights_is_exported_as_it_was_trained(
    bits: int, make: Make, tmp_path: Path
) -> None:
    source = make("gpt2", bits)
    trained = finhpc.load_model(source)
    expected = logits(trained)
    torch.testing.assert_close(expected, logits(rounded_model(make("gpt2"), bits)), rtol=0, atol=0)
    export(settings(source, tmp_path / "same", bits=bits))
    for layer, module in opened(tmp_path / "same").named_modules():
        if isinstance(module, QuantizedMatrix):
            assert torch.equal(module.dequantized(), _weight_of(trained, layer)), layer
    for format in ("native", "merged"):
        export(settings(source, tmp_path / format, format))
        model = opened(tmp_path / format)
        assert not hasattr(model.config, TRAINED), "its weights are rounded already"
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_are_counted_exactly(bits: int, make: Make, tmp_path: Path) -> None:
    result = export(settings(make("gpt2"), tmp_path / "out", bits=bits))
    file = tmp_path / "out" / "model.safetensors"
    assert result["size_bytes"] == file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    source = finhpc.load_model(make("gpt2"))
    expected = 0
    for module in source.modules():
        for parameter in module.parameters(recurse=False):
            rows, columns = (*parameter.shape, 0)[:2]
            if type(module).__name__ == "Conv1D":
                rows, columns = columns, rows
            # A matrix: its codes, and 8 bytes a row; a vector: as it is.
            expected += rows * (-(-columns * bits // 8)) + 8 * rows if parameter.dim() == 2 else 4 * rows
    assert file.stat().st_size - header == expected
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert result["size_ratio"] == 2 * result["params_dense"] / result["size_bytes"]


def test_a_large_model_is_cut_into_files(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "FILE_BYTES", 20_000)
    result = export(settings(make("gpt2"), tmp_path / "out"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert result["size_bytes"] == sum(file.stat().st_size for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(opened(tmp_path / "out")), logits(finhpc.load_model(make("gpt2"))))
    export(settings(tmp_path / "out", tmp_path / "again", "merged"))  # and read again
    torch.testing.assert_close(
        logits(opened(tmp_path / "again")), logits(finhpc.load_model(make("gpt2"))), rtol=0, atol=1e-4
    )


def test_16_bit_floats_and_the_tokeniser(make: Make, tmp_path: Path) -> None:
    export(settings(make("gpt2"), tmp_path / "out", "merged", dtype="bfloat16"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert opened(tmp_path / "out").dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(make("gpt2"))("the bank rate").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the bank rate").input_ids == ids
    export(settings(tmp_path / "out", tmp_path / "packed", bits=8))  # norms and biases stay bfloat16
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16, torch.uint8, torch.float32}
    model = opened(tmp_path / "packed")
    assert model.lm_head.scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_what_does_not_fit_together_is_named_at_once(make: Make, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        export(settings("", tmp_path / "full", bits=4, scheme="int8"))
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "model is not set" in text
    assert "exists already, and nothing is overwritten" in text
    assert (
        "quantization.scheme=int8 has 8 bits, not quantization.bits=4; use quantization.bits=8, or a scheme of 4"
        in text
    )
    with pytest.raises(ConfigError, match=r"use quantization\.bits=4, or a scheme of 8 bits: minmax, int8"):
        export(settings(make("gpt2"), tmp_path / "out", bits=8, scheme="nf4"))
    with pytest.raises(ConfigError, match=r"quantization\.bits=16 quantizes nothing; use quantization\.bits=4"):
        export(settings(make("gpt2"), tmp_path / "out", bits=16, scheme="nf4"))
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def copy_of(folder: Path, to: Path, **tensors: Tensor | None) -> Path:
    """A copy of a model folder with some tensors changed, or (None) left out."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(folder, to)
    held = load_file(to / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, to / "model.safetensors")
    return to


def test_damaged_models_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.A.weight"
    weight = load_file(make("gpt2") / "model.safetensors")[name]
    weight[2, 1] = float("nan")
    bad: list[tuple[Path, type[Exception], str]] = [
        (copy_of(make("gpt2"), tmp_path / "nan", **{name: weight}), NonFiniteError, rf"{name} .*holds NaN"),
        (copy_of(make("gpt2"), tmp_path / "less", **{name: None}), CheckpointError, f"has no {name}"),
        (
            copy_of(make("gpt2"), tmp_path / "shape", **{name: torch.zeros(3, 3)}),
            CheckpointError,
            f"{name} is 3 x 3, but its config says",
        ),
        (copy_of(make("gpt2"), tmp_path / "short"), CheckpointError, "cut short, damaged"),
        (
            copy_of(make("gpt2"), tmp_path / "other"),
            ConfigError,
            "model_type=bert is not supported; supported: gpt2",
        ),
        (copy_of(make("gpt2"), tmp_path / "pickle"), CheckpointError, "only pytorch_model.bin; pickled weights"),
        (tmp_path / "nothing", ConfigError, "does not exist"),
    ]
    short = tmp_path / "short" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-100])
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({name: weight}, tmp_path / "pickle" / "pytorch_model.bin")
    for folder, kind, message in bad:
        for bits in (16, 8):
            with pytest.raises(kind, match=message):
                export(settings(folder, tmp_path / "out", bits=bits))
            assert not list(tmp_path.glob("*out*")), "complete or absent"
    export(settings(make("gpt2"), tmp_path / "packed", bits=8))
    with pytest.raises(ConfigError, match="quantized already"):
        export(settings(tmp_path / "packed", tmp_path / "out", bits=8))


def test_a_conv1d_that_nf4_cannot_quantise_stays_as_it_is(make: Make, tmp_path: Path) -> None:
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=32, mlp_width=40), VOCAB)
    GPT2LMHeadModel(make_config(shape, dict.fromkeys(LINEAR_KINDS))).save_pretrained(tmp_path / "model")
    result = export(settings(tmp_path / "model", tmp_path / "out", "merged", 4, "nf4"))
    model, exact = opened(tmp_path / "out"), finhpc.load_model(tmp_path / "model")
    name = "transformer.h.0.mlp.c_fc"
    assert name in result["not_quantised"]
    assert "transformer.h.0.attn.c_attn" not in result["not_quantised"]
    assert torch.equal(model.get_submodule(name).weight, exact.get_submodule(name).weight)
    assert (logits(model) - logits(exact)).norm() / logits(exact).norm() < 0.2


def test_a_model_that_nf4_cannot_quantise_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32, and this model has none; use quantization\.scheme=minmax"):
        export(settings(make("gpt2"), tmp_path / "out", bits=4, scheme="nf4"))


def test_an_export_that_is_interrupted_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module.TensorFolderWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        export(settings(make("gpt2"), tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    partial = tmp_path / ".out.partial"  # as a killed export leaves it
    partial.mkdir()
    (partial / "0.tmp").write_bytes(b"half")
    export(settings(make("gpt2"), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_the_command(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--model", str(make("gpt2")), "--format", "merged", "--out", str(tmp_path / "out"), "--json"]
    assert main([*words, "--dry_run"]) == 0
    dry = json.loads(capfd.readouterr().out)
    assert dry["status"] == "dry_run"
    assert dry["size_bytes"] is None
    assert not list(tmp_path.iterdir())
    assert main([*words, "--quantization.bits", "8"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["status"] == "finished"
    assert (result["format"], result["bits"], result["scheme"]) == ("merged", 8, "minmax")
    assert f"{result['size_bytes']:,} bytes" in err
    readable = [path for path in (tmp_path / "out").iterdir() if path.stat().st_mode & 0o077]
    assert not readable, "what a command writes is its user's alone, whatever the shell's umask"
    assert main([*words, "--quantization.bits", "8"]) == 2, "nothing is overwritten"
    assert main([*words, "--quantization.bits", "5"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_transformers_alone_opens_no_packed_model(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It only warns of a scheme that it does not know; codes must not pass for weights there."""
    for name in ("gpt2-dense-tied", "llama-dense"):
        for bits in (8, 4):
            out = tmp_path / f"{name}-{bits}"
            export(settings(make(name), out, bits=bits))
            with monkeypatch.context() as without_finhpc:
                without_finhpc.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, MINMAX)
                with pytest.raises(RuntimeError, match="mismatch"):
                    AutoModelForCausalLM.from_pretrained(out)
