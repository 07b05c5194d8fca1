"""What each `finhpc bench NAME` can be told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finhpc.config import Section


class Bench(Section):
    """How a measurement is repeated and where it is kept."""

    repeats: int = Field(5, ge=1, description="pairs measured, in turn; ratios are medians over pairs")
    out: str = Field("runs/bench", description="folder of the measurements: one folder each, with result.json")


class BenchShards(Section):
    shards: str | None = Field(None, description="folder written by `finhpc prepare`; default: random ones are made")
    seq_len: int = Field(1024, ge=2, description="tokens a sample; also the block length of random shards")


class DataBench(Section):
    """Settings of `finhpc bench data`."""

    bench: Bench = Field(default_factory=Bench)
    data: BenchShards = Field(default_factory=BenchShards)
    micro_batch_size: int = Field(8, ge=1, description="samples a micro-batch")
    tokens: int = Field(12 << 22, ge=1, description="tokens read in each pass, in whole shards")
    consumer_tokens_per_s: float = Field(
        500_000, gt=0, description="pace of the consumer that waiting is measured with"
    )
    consumer_tokens: int = Field(2_000_000, ge=1, description="tokens it takes in each pass")


BENCHES: dict[str, tuple[type[Section], str]] = {
    "data": (DataBench, "finhpc.bench.data:bench_data"),
}
"""Name -> its settings and the function that measures, as `module:function`."""


def function_of(name: str) -> Any:
    """The measuring function of a bench, imported only now. It takes the settings and returns the result."""
    from importlib import import_module

    module, _, function = BENCHES[name][1].partition(":")
    return getattr(import_module(module), function)
