"""Prometheus metrics: those of this replica, and those of all replicas, which any of them can show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from finhpc.generation.requests import Stats
from finhpc.serving.shared import Shared

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
IN_FLIGHT, NEW_TOKENS, REQUESTS = "finhpc_requests_in_flight", "finhpc_new_tokens_total", "finhpc_requests_total"
RUNNING, WAITING = "finhpc_requests_running", "finhpc_requests_waiting"
BLOCKS, BLOCKS_USED = "finhpc_cache_blocks", "finhpc_cache_blocks_used"


class Metrics:
    """The metrics of one replica. `counts` returns the engine's."""

    def __init__(self, replica: str, shared: Shared, counts: Callable[[], Stats]) -> None:
        self.replica, self.shared, self.counts = replica, shared, counts
        self.registry = CollectorRegistry()
        how: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(REQUESTS, "Requests by path and status code", ["path", "code"], **how)
        self.in_flight = Gauge(IN_FLIGHT, "HTTP requests that are not answered yet", **how)
        self.first = Histogram(
            "finhpc_first_token_seconds", "Time from a request to its first token", buckets=SECONDS, **how
        )
        self.between = Histogram("finhpc_token_seconds", "Time between two tokens", buckets=SECONDS, **how)
        self.registry.register(_Engine(counts))  # type: ignore[arg-type]

    def publish(self) -> None:
        """Write this replica's metrics where all replicas can read them."""
        self.shared.write_metrics(self.replica, generate_latest(self.registry))

    def everything(self) -> bytes:
        """Return the metrics of all replicas, each with the label `replica`, in Prometheus' text format."""
        self.publish()
        registry = CollectorRegistry()
        registry.register(_Everyone(self.shared))  # type: ignore[arg-type]
        return generate_latest(registry)


class _Engine:
    def __init__(self, counts: Callable[[], Stats]) -> None:
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        now = self.counts()
        gauges = {
            RUNNING: ("Requests in the batch", now.running),
            WAITING: ("Requests that wait for the batch", now.waiting),
            BLOCKS: ("Blocks of the cache", now.blocks_total),
            BLOCKS_USED: ("Blocks in use", now.blocks_used),
            "finhpc_cache_blocks_shared": ("Blocks that several requests use", now.blocks_shared),
        }
        counters = {
            "finhpc_prompt_tokens_total": ("Tokens of prompts", now.tokens_in),
            NEW_TOKENS: ("New tokens", now.tokens_out),
            "finhpc_preemptions_total": ("Requests that gave their blocks to others", now.preemptions),
            "finhpc_prompt_tokens_found_total": ("Tokens of prompts that were in the cache already", now.prefix_hits),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name.removesuffix("_total"), text, value=value)


class _Everyone:
    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self.shared.metrics().items():
            for family in text_string_to_metric_families(text):
                one = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        one.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        return families.values()


def totals(shared: Shared) -> dict[str, float]:
    """Return the sum over all replicas and labels of each metric, by the name of its samples."""
    sums: dict[str, float] = {}
    for text in shared.metrics().values():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
