from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finhpc.bench import shards
from finhpc.bench.measures import data
from finhpc.bench.settings import DataBench
from finhpc.data.shards import stream
from finhpc.data.shards.reader import ReplicaStream, local_stream
from finhpc.errors import ConfigError, DataError
from finhpc.settings.base import build


def settings(out: Path, **changes: Any) -> DataBench:
    tree: dict[str, Any] = {
        "bench": {"repeats": 1, "out": str(out)},
        "data": {"seq_len": 64},
        "micro_batch_size": 2,
        "tokens": 8192,
        "consumer_tokens_per_s": 1e6,
        "consumer_tokens": 1024,
    }
    return build(DataBench, tree | changes)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2048)


@pytest.mark.usefixtures("ray_cluster")
def test_every_way_reads_the_same_tokens(tmp_path: Path) -> None:
    result = data.bench_data(settings(tmp_path))
    assert json.loads((Path(result["folder"]) / "result.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == [Path(result["folder"]).name], "the random shards are gone"
    assert set(result["ratios"]) == {
        "stream_over_ray_data",
        "stream_over_ray_data_blocks",
        "stream_wait_fraction",
    }
    assert all(value >= 0 for value in result["ratios"].values())
    rows = {row["way"].removesuffix(" *"): row for row in result["rows"]}
    assert len({tuple(row) for row in result["rows"]}) == 1, "the same keys in each"
    for name, row in rows.items():
        assert row["tokens"] == (1024 if "consumer" in name else 8192), name
        assert (row["wait_fraction"] is None) == ("consumer" not in name)
        assert row["own_cpu_s"] >= 0
        assert row["task_cpu_s"] is not None, "this Ray is ours"
    assert [row["way"] for row in result["rows"] if row["way"].endswith("*")] == [
        f"{result['conditions']['compared_with']} *"
    ]
    assert result["conditions"]["compared_with"].startswith("plain")
    assert result["conditions"]["shards"] == "random"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_given_shards_are_read_and_stay(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    shards.random_shards(folder, 8192, 128)
    before = sorted(path.name for path in folder.iterdir())
    result = data.bench_data(settings(tmp_path / "out", data={"shards": str(folder), "seq_len": 64}, tokens=3000))
    assert result["conditions"]["shards"] == str(folder)
    assert {row["tokens"] for row in result["rows"] if "consumer" not in row["way"]} == {4096}, "two whole shards"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_work_that_does_not_fit_the_shards_is_refused(tmp_path: Path) -> None:
    folder = shards.random_shards(tmp_path, 8192, 128)
    with pytest.raises(ConfigError, match=r"micro_batch_size x data.seq_len = 192 .* block_len=128 do not divide"):
        data._work(settings(tmp_path, micro_batch_size=3), folder)
    with pytest.raises(ConfigError, match="holds 8192 train tokens, less than two micro-batches of 8192"):
        data._work(settings(tmp_path, micro_batch_size=128), folder)


def made(folder: Path) -> ReplicaStream:
    folder.mkdir()
    return data._work(settings(folder), shards.random_shards(folder, 8192, 64))[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_stream_out_of_order_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = made(tmp_path / "shards")
    data.check(right)

    def swapped(given: ReplicaStream) -> Iterator[Any]:
        first, second, *rest = local_stream(given)
        yield from (second, first, *rest)

    def forgetful(given: ReplicaStream) -> Iterator[Any]:
        yield from list(local_stream(given))[1 if given.start_step else 0 :]

    monkeypatch.setattr(stream, "ray_stream", swapped)
    with pytest.raises(DataError, match="not the seeded order"):
        data.check(right)
    monkeypatch.setattr(stream, "ray_stream", forgetful)
    with pytest.raises(DataError, match="resumed at step 32 is not the rest"):
        data.check(right)


def test_waiting_is_what_the_consumer_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(data, "_compute", pass_time)

    def batches() -> Iterator[int]:
        for seconds in (5.0, 1.0, 0.0, 2.0, 100.0):
            pass_time(seconds)
            yield 10

    reading = data.read(batches(), rate=10, most=4)
    assert (reading.tokens, reading.first_batch_s, reading.wall_s) == (40, 5.0, 12.0)
    assert reading.wait_fraction == 3 / 7
    fast = data.read(batches())
    assert (fast.tokens, fast.wall_s, fast.wait_fraction) == (50, 108.0, None)
