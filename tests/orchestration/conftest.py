"""What the tests of whole runs share: one folder of shards, and one run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.runs import command, outcome
from tests.tiny import tiny_shards


@pytest.fixture(scope="session")
def run_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def unbroken(run_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    storage = tmp_path_factory.mktemp("unbroken")
    with command(storage, run_shards) as process:
        assert process.wait(240) == 0, (storage / "stderr").read_text()[-3000:]
    return outcome(storage) | {"token_mode": (storage / ".ray" / "auth_token").stat().st_mode}
