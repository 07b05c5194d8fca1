from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.bench import shards
from finhpc.data.shards.shards import Shards


def test_random_shards_are_whole_and_have_the_frequencies_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2048)
    made = shards.random_shards(tmp_path, 8192, 64)
    assert made.num_samples("train", 64) * 64 == 8192
    Shards.open(tmp_path).verify()
    ids = made.read_shard("train", 0)
    assert (ids == 0).sum() > (ids == 9).sum() > 0
    assert (ids != made.read_shard("train", 1)).any()
