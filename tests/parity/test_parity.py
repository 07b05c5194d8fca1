"""Every combination of the harness, in minutes. FINHPC_PARITY names a folder that the tables are written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.parity.harness import run_texts, run_weights
from tests.parity.table import Table
from tests.parity.tokenizer_kinds import tokenizer_pairs
from tests.parity.weights import combinations


def check(table: Table, name: str) -> None:
    if folder := os.environ.get("FINHPC_PARITY"):
        table.write(Path(folder), name)
    faults = table.faults()
    assert not faults, f"{len(faults)} faults, first:\n" + "\n".join(faults[:10])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_tokenizers_and_templates_agree(tmp_path: Path) -> None:
    check(run_texts(tokenizer_pairs(), tmp_path), "text")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_pairs_of_families_bases_adapters_and_formats_agree(tmp_path: Path) -> None:
    check(run_weights(combinations(), tmp_path), "weights")
