"""Families that run by their description: everything that finhpc computes is what transformers and peft compute."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc import load_model
from finhpc.commands.decompose.moments import second_moments
from finhpc.commands.export import export
from finhpc.errors import ConfigError
from finhpc.generation.decoder import Decoder
from finhpc.models.families.presets import Shape
from finhpc.models.families.registry import (
    FAMILIES,
    as_low_rank,
    context_name,
    context_of,
    skeleton,
)
from finhpc.models.files.config import read_config
from finhpc.models.files.source import open_weights
from finhpc.models.initialize import weights_fill
from finhpc.models.lora.peft_format import save_adapter
from finhpc.models.pipeline import PipelineLayer, parts_of
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import Lora
from finhpc.settings.generate import Sampling
from finhpc.settings.training import Recompute
from tests.generation.folders import Passes
from tests.generation.test_decoding import generated
from tests.models.dense import saved
from tests.models.families import ROWS, tiny
from tests.models.packs import examples, packs_of, peft_model, peft_parameters, plain_loss
from tests.models.test_packed import adapted, assert_near, loss_of, parameters

CPU = torch.device("cpu")
LORA = Lora(rank=4, init="orthogonal")  # neither factor is zero
MODES: tuple[Recompute, ...] = ("attention", "full", "none")
RECOMPUTE = dict(zip(ROWS, itertools.cycle(MODES)))  # of packs


def ids(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def opened(folder: Path) -> Any:
    """transformers' own model, with the attention that caps scores if it has caps."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("families")
    return {row: saved(tiny(row), made / row) for row in ROWS}


def test_every_described_family_has_a_row() -> None:
    assert {name for name, _, _ in ROWS.values()} == {name for name, family in FAMILIES.items() if family.whole_layers}


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("row", ROWS)
def test_loss_and_gradients_of_all_weights_are_transformers_own(
    row: str, recompute: Any, folders: dict[str, Path]
) -> None:
    plain, weights = opened(folders[row]), open_weights(folders[row])
    loss = plain(ids(), labels=ids()).loss
    loss.backward()
    base, data = skeleton(weights.config, recompute), ids()
    layers = [PipelineLayer(part, base, CPU, weights_fill(weights)) for part in parts_of(weights.config, recompute)]
    for layer in layers:
        data = layer(data)
    torch.testing.assert_close(data, loss, rtol=1e-5, atol=1e-5)
    data.backward()
    ours: dict[str, Any] = {}
    for layer in layers:
        ours |= dict(layer.parameters_by_name())
    assert_near(
        {name: p.grad for name, p in ours.items()}, {name: p.grad for name, p in plain.named_parameters()}, 2e-5
    )


@pytest.mark.parametrize("row", ROWS)
def test_packs_give_pefts_loss_and_gradients_and_export_merges_them(
    row: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora_model, layers = adapted(folders[row], LORA, recompute=RECOMPUTE[row])
    ours, some = parameters(layers), examples(8, longest=30)
    plain = peft_model(folders[row], {n: p.detach() for n, p in ours.items()}, attn_implementation="eager")
    wanted = plain_loss(plain, some)
    wanted.backward()
    loss = loss_of(layers, packs_of(some, 4, 6, padding=3))
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item()
    gradients = {name: p.grad for name, p in ours.items()}
    assert_near(gradients, {name: p.grad for name, p in peft_parameters(plain).items()}, 2e-5)
    save_adapter(tmp_path / "adapter", LORA, {name: p.detach() for name, p in ours.items()}, lora_model.weights)
    theirs: Any = PeftModel.from_pretrained(opened(folders[row]), str(tmp_path / "adapter")).eval()
    export(ExportConfig(model=str(tmp_path / "adapter"), format="merged", out=str(tmp_path / "out")))
    merged = opened(tmp_path / "out")
    assert type(merged) is type(tiny(row))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_decoding_is_transformers_own(row: str, folders: dict[str, Path]) -> None:
    model, plain, tokens = load_model(folders[row]), opened(folders[row]), ids()
    rows = [tokens[0].tolist(), tokens[1, 5:].tolist()]
    passed = Passes(Decoder(model), 2, 40)
    with torch.no_grad():
        first = passed([row[: len(row) - 7] for row in rows])
        last = [passed([[row[i]] for row in rows]) for i in range(-7, 0)][-1]
        torch.testing.assert_close(first[0], plain(tokens[:1, :33]).logits[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[0], plain(tokens[:1]).logits[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[1], plain(tokens[1:, 5:]).logits[0, -1], rtol=1e-4, atol=1e-4)
        theirs = plain.generate(
            tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    assert generated(model, tokens[:1].tolist(), Sampling(max_new_tokens=20)) == [theirs[0, 40:].tolist()]


@pytest.mark.parametrize("row", ROWS)
def test_bfloat16_is_near(row: str, folders: dict[str, Path]) -> None:
    weights = open_weights(folders[row])
    with torch.no_grad():
        wanted = float(opened(folders[row])(ids(), labels=ids()).loss)
    for precision in ("bf16", "bf16-weights"):
        base, data = skeleton(weights.config), ids()
        for part in parts_of(weights.config):
            data = PipelineLayer(part, base, CPU, weights_fill(weights), precision)(data)  # type: ignore[arg-type]
        data.backward()
        assert float(data.detach()) == pytest.approx(wanted, rel=0.02), precision
    some = examples(8, longest=30)
    exact, half = (loss_of(adapted(folders[row], LORA, bf16=bf16)[1], packs_of(some, 4, 6)) for bf16 in (False, True))
    half.backward()
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    models = [load_model(folders[row], dtype) for dtype in (torch.float32, torch.bfloat16)]
    plain, rounded = (Passes(Decoder(model), 2, 40)(ids()[:, :20].tolist()) for model in models)
    assert rounded.dtype == torch.bfloat16
    assert torch.cosine_similarity(plain, rounded.float(), dim=-1).min() > 0.99


def config_of(folder: Path, **settings: Any) -> Path:
    """Write a folder that has only a config with other settings."""
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


OTHERS = [
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "gemma3",
    "gemma3n_text",
    "t5",
    "mamba2",
    "falcon_h1",
    "lfm2",
    "bert",
    "phi",
]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_family_that_is_not_followed_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model_type={kind} is not supported; supported: .*qwen3.*") as caught:
        open_weights(config_of(tmp_path, model_type=kind, hidden_size=32))
    assert kind not in str(caught.value).partition("supported: ")[2].split(" (")[0].split(", ")


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "both ways": ("Gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "a mixture": ("Granite", {"num_local_experts": 4}, "num_local_experts=4"),
    "another factor": ("Qwen3", {"embedding_multiplier": 3.0}, "embedding_multiplier=3.0"),
    "chunks": ("SmolLM3", {"layer_types": ["chunked_attention"] * 3}, "layer_types with chunked_attention"),
    "other positions": ("OLMo 2", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters of type longrope"),
    "some positions": ("Qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "positions by layer": (
        "Granite",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters of several kinds of layers",
    ),
    "one of several": (
        "Gemma 3",
        {"rope_parameters": {"full_attention": {"rope_type": "odd"}, "sliding_attention": {"rope_type": "default"}}},
        "rope_parameters of type odd",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_layers_do_not_compute_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    row, settings, said = SETTINGS[name]
    tree = json.loads((folders[row] / "config.json").read_text())
    with pytest.raises(ConfigError, match="which finhpc does not compute") as caught:
        open_weights(config_of(tmp_path, **tree | settings))
    assert said in str(caught.value)


@pytest.mark.parametrize(("row", "key"), [("GPT-NeoX", "rotary_pct"), ("StableLM", "partial_rotary_factor")])
def test_the_rotated_share_of_heads_is_read_as_older_configs_have_it(
    row: str, key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tree = json.loads((folders[row] / "config.json").read_text())
    del tree["rope_parameters"]
    config = read_config(config_of(tmp_path, **tree | {key: 0.5}))
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_longrope_ends_where_its_frequencies_change(folders: dict[str, Path]) -> None:
    config = open_weights(folders["Phi-4, longrope"]).config
    assert context_of(config) == 80
    assert context_name(config) == "longrope length of 80"
    assert context_of(open_weights(folders["Gemma 3"]).config) == 96, "windows are computed"


def test_what_does_not_fit_a_family_is_refused(folders: dict[str, Path]) -> None:
    gemma, phi = (open_weights(folders[row]).config for row in ("Gemma", "Phi-3"))
    with pytest.raises(ConfigError, match=r"=low_rank does not fit model.embed_tokens, which also scales its rows"):
        skeleton(as_low_rank(gemma, {"embedding": 4}))
    with pytest.raises(ConfigError, match="qkv=separate does not fit Phi-3, whose qkv_proj"):
        skeleton(as_low_rank(phi, {"attention": 4}, qkv="separate"))
    (problem,) = FAMILIES["qwen3"].shape_problems(Shape("qwen3", 2, 32, 4, 64, 300, True))
    assert problem == "Qwen3 models start from weights, not from a shape; give model.path with a model folder."


@pytest.mark.parametrize("row", ["Gemma 2", "Gemma 3", "Phi-3", "Granite", "GPT-NeoX"])
def test_moments_are_of_the_inputs_in_transformers_own_model(row: str, folders: dict[str, Path]) -> None:
    plain, weights, found, wanted = opened(folders[row]), open_weights(folders[row]), {}, {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def keep(module: Any, inputs: Any, name: str = name) -> None:
                rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                wanted[name] = rows.T @ rows / len(rows)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        plain(ids())
    for moments in second_moments(weights, ids(), wanted.keys() | {"lm_head"}, CPU):
        found |= moments
    assert found.keys() == wanted.keys() | {"lm_head"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
