"""Every head and embedding, low-rank or dense, tied or not, from settings to counts, stages and exports."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import finhpc
from finhpc.commands.export import export
from finhpc.models.families.registry import parameter_count, skeleton
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.planning.model import hf_config_of_settings
from finhpc.planning.outline import outline_of
from finhpc.planning.plan import make_plan
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.pretrain import PretrainConfig
from tests.training.processes import run_processes

Choice = tuple[str, str, str, bool | None]  # preset, head, embedding, tie_embeddings
KINDS = ("low_rank", "dense")
CHOICES: list[Choice] = list(itertools.product(("gpt2-tiny", "llama-tiny"), KINDS, KINDS, (None, True, False)))
TOKENS = torch.randint(0, 211, (4, 32), generator=torch.Generator().manual_seed(1))


def config(choice: Choice, stages: int = 1) -> PretrainConfig:
    preset, head, embedding, tied = choice
    shape = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 211, "context": 32, "mlp_width": 48}
    tree: dict[str, Any] = {
        "model": {"preset": preset, "tie_embeddings": tied, **shape},
        "method": {"kind": "cola", "rank": 8, "qkv": "separate", "head": head, "embedding": embedding},
        "data": {"seq_len": 32},
        "parallel": {"stages": stages, "micro_batch_size": 2, "micro_batches": 2},
    }
    return build(PretrainConfig, tree)


@pytest.mark.parametrize("choice", CHOICES)
def test_only_two_dense_ends_are_tied(choice: Choice) -> None:
    preset, head, embedding, tied = choice
    hf_config = hf_config_of_settings(config(choice))
    wanted = preset == "gpt2-tiny" if tied is None else tied
    assert hf_config.tie_word_embeddings == (wanted and head == embedding == "dense")
    ends = 211 * 32 if embedding == "dense" else 8 * (211 + 32)
    ends += 0 if hf_config.tie_word_embeddings else 211 * 32 if head == "dense" else 8 * (211 + 32)
    names = dict(skeleton(hf_config).named_parameters())
    own = [p for name, p in names.items() if any(end in name for end in ("lm_head", "wte", "embed_tokens"))]
    assert sum(p.numel() for p in own) == ends
    assert outline_of(hf_config, 32).params == parameter_count(hf_config)


def test_a_tie_that_has_no_effect_is_reported(run_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for head, reported in (("dense", False), ("low_rank", True)):
        settings = config(("gpt2-tiny", head, "dense", True))
        settings.data.shards, settings.model.vocab_size = str(run_shards), None
        make_plan(settings)
        assert ("model.tie_embeddings=true has no effect" in capsys.readouterr().err) == reported, head


def losses(choices: list[Choice], stages: int) -> list[list[float]]:
    """Two steps of each choice in one process of a pipeline."""
    from finhpc.training.engine import Engine

    found = []
    for choice in choices:
        settings = config(choice, stages)
        engine = Engine(settings, hf_config_of_settings(settings), torch.device("cpu"))
        found.append([engine.train_step(iter(TOKENS.split(2)), 1e-3) for _ in range(2)])
    return found


def test_two_stages_train_as_transformers_own_model() -> None:
    choices = [choice for choice in CHOICES if choice[3] is not None]
    one, two = run_processes(losses, 1, choices, 1)[0], run_processes(losses, 2, choices, 2)
    for i, choice in enumerate(choices):
        settings = config(choice)
        model = initial_model(hf_config_of_settings(settings), settings.train.seed, None)
        model.config._attn_implementation = "sdpa"
        with torch.no_grad():
            assert one[i][0] == pytest.approx(model(TOKENS, labels=TOKENS).loss.item(), rel=1e-5), choice
        assert one[i][1] < one[i][0], choice
        for stage in two:
            assert stage[i] == pytest.approx(one[i], rel=1e-5), choice


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice[3] is not None])
def test_it_is_opened_and_exported(choice: Choice, tmp_path: Path) -> None:
    settings = config(choice)
    settings.method.kind = "low_rank"  # can be merged
    hf_config = hf_config_of_settings(settings)
    model = initial_model(hf_config, 1, None).eval()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_model(tmp_path / "model", hf_config, weights.items(), None)
    with torch.no_grad():
        wanted = finhpc.load_model(tmp_path / "model")(TOKENS).logits
        for format in ("native", "merged"):
            out = tmp_path / format
            tree = {"model": str(tmp_path / "model"), "out": str(out), "format": format}
            result = export(build(ExportConfig, tree))
            opened = AutoModelForCausalLM.from_pretrained(out)
            assert opened.config.tie_word_embeddings == hf_config.tie_word_embeddings
            assert opened.num_parameters() == result["params_total"]
            torch.testing.assert_close(opened(TOKENS).logits, wanted, rtol=0, atol=1e-5)
