"""The store that most tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.report.store import Store


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    return Store(tmp_path / "runs", empty_database)


@pytest.fixture(scope="session")
def paper_like(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Store:
    """Dense (two seeds), methods 1 and 2 at a quarter of the width, adapters, and what must be left out."""
    store = Store(tmp_path_factory.mktemp("paper-like") / "runs", empty_database)
    dense = {"params_total": 13_890_000, "peak_memory_bytes": [300_000_000, 200_000_000]}
    scored = {"evaluate/boolq/weighted_f1": 0.5, "evaluate/piqa/acc": 0.55}
    store.pretrain(
        "dense-0",
        "dense",
        result=dense | scored | {"worker_hours": 0.4, "tokens_per_s": 100.0, "generate_tokens_per_s": 50.0},
        train={step: 6.0 - 0.1 * step for step in range(1, 11)},
        evals={5: 5.5, 10: 5.0},
    )
    store.pretrain(
        "dense-1",
        "dense",
        seed=1,
        result=dense | {"worker_hours": 0.6, "tokens_per_s": 100.0, "generate_tokens_per_s": 50.0},
        train={step: 6.2 - 0.1 * step for step in range(1, 11)},
        evals={5: 5.7, 10: 5.2},
    )
    low = {"params_total": 7_640_000, "size_8bit_bytes": 7_700_000, "tokens_per_s": 150.0}
    store.pretrain(
        "one-96",
        "low_rank",
        96,
        result=low | {"worker_hours": 0.25, "generate_tokens_per_s": 100.0, "evaluate/piqa/acc": 0.53},
        train={step: 6.5 - 0.1 * step for step in range(1, 11)},
        evals={5: 5.8, 10: 5.4},
    )
    store.pretrain(
        "two-96",
        "svd",
        96,
        start="dense-0",
        result=low | {"worker_hours": 0.3},
        train={step: 5.6 - 0.1 * step for step in range(1, 11)},
        evals={2: 5.6, 4: 5.2, 10: 4.8},
    )
    tuned = {
        "params_trainable": 2_440_000,
        "evaluate/fpb/examples": 150,
        "evaluate/fpb/weighted_f1": 0.8,
        "evaluate/fpb/weighted_f1_majority": 0.3,
        "evaluate/fpb/weighted_f1_ci95_low": 0.74,
        "evaluate/fpb/weighted_f1_ci95_high": 0.85,
        "evaluate/tfns/weighted_f1": 0.7,
    }
    for bits, memory in ((16, 900_000_000), (8, 600_000_000), (4, 450_000_000)):
        result = tuned | {
            "peak_memory_bytes": [memory],
            "worker_hours": 0.05,
            f"size_{bits}bit_bytes": 17e6 * bits,
            "held_out_weighted_f1": 0.5 + bits / 100,
        }
        store.finetune(f"r8-{bits}", 8, bits, result=result, train={step: 2.0 / step for step in range(1, 11)})
    store.evaluation(["/models/smol"], {"evaluate/fpb/weighted_f1": 0.35, "evaluate/tfns/weighted_f1": 0.45})
    store.evaluation(["/x/other/model"], {"evaluate/fpb/weighted_f1": 0.99})
    return store
