"""The axes have everything that finhpc claims and peft may write; a handful of combinations in a few seconds."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import get_args

from peft import LoraConfig

from finhpc.models.families.registry import FAMILIES
from finhpc.quantization.schemes import SCHEMES
from finhpc.settings.finetune import Lora
from tests.parity.adapters import ADAPTERS, LLAMA, OURS, UNUSED
from tests.parity.bases import FAMILY_ROWS, REFERENCES
from tests.parity.harness import run_texts, run_weights
from tests.parity.tokenizer_kinds import Kind
from tests.parity.weights import AXES, FORMATS, allowed, combinations


def test_every_family_scheme_and_start_has_its_rows() -> None:
    assert {family for family, _ in FAMILY_ROWS.values()} == set(FAMILIES), "add a row to FAMILY_ROWS"
    assert set(REFERENCES) == set(SCHEMES), "say in REFERENCES what the scheme makes of a matrix"
    assert {one.scheme for one in FORMATS.values()} == set(SCHEMES)
    starts = {kind.lora["init"] for kind in OURS.values() if kind.lora and "init" in kind.lora}
    assert starts == set(get_args(Lora.model_fields["init"].annotation))
    schemes = {kind.quantization["scheme"] for kind in OURS.values() if kind.quantization}
    assert schemes == set(SCHEMES), "add to OURS an adapter that is trained on a base of the scheme"


def test_every_setting_of_peft_has_a_row_or_a_reason() -> None:
    kinds = [kind for kind in ADAPTERS.values() if kind is not None and kind.peft is not None]
    used = {key for kind in kinds for key in kind.peft(LLAMA)} if kinds else set()
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    missing = known - used - set(UNUSED)
    assert not missing, f"add an adapter with {sorted(missing)} to PEFT, or say in UNUSED why none is needed"
    assert not set(UNUSED) - known - used, "peft has no such setting any more"


def test_every_pair_of_values_occurs() -> None:
    rows = combinations()
    *_, second, longest = sorted(len(values) for values in AXES.values())
    assert len(rows) < 1.2 * longest * second
    for first, second in itertools.combinations(AXES, 2):
        seen = {(row[first], row[second]) for row in rows}
        for pair in itertools.product(AXES[first], AXES[second]):
            assert pair in seen or not allowed(dict(zip((first, second), pair, strict=True))), pair


TEXTS = [
    Kind("prepend", "end", "Llama 2"),
    Kind("unigram", "begin, end", "Llama 3"),
]


def test_some_tokenizers_agree(tmp_path: Path) -> None:
    assert run_texts(TEXTS, tmp_path).faults() == []


WEIGHTS = [
    ("gpt2", "names without prefix", "ours, default", "byte level", "merged, minmax 4"),
    ("qwen2", "low-rank", "peft, rank_pattern", "unigram", "merged"),
]


def test_some_models_agree(tmp_path: Path) -> None:
    rows = [dict(zip(AXES, values, strict=True)) for values in WEIGHTS]
    assert run_weights(rows, tmp_path).faults() == []
