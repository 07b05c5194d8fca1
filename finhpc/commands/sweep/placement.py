"""Where the trials of a sweep run: what Ray Tune reserves for each, and how many run at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finhpc.cluster.connect import check_fits, use_cuda
from finhpc.errors import ConfigError, collect
from finhpc.settings.training import TrainingConfig


@dataclass(frozen=True)
class Placement:
    """`configs`: trial -> settings; `total`: what the cluster has, empty if unknown; `limit`: `sweep.concurrent`."""

    configs: Mapping[str, TrainingConfig]
    total: dict[str, float]
    limit: int | None = None

    @property
    def cuda(self) -> bool:
        """Whether trials train on GPUs."""
        return bool(self.total) and use_cuda(next(iter(self.configs.values())).resources, self.total)

    @property
    def one_worker_each(self) -> bool:
        """Whether every trial has a single worker, which then trains in Tune's own actor."""
        return all(config.parallel.workers == 1 for config in self.configs.values())

    def check(self) -> None:
        """Raise `ConfigError` with every trial that the cluster could never place."""
        problems: list[str] = []
        for name, config in self.configs.items():
            found: list[str] = []
            with collect(found):
                check_fits(config, self.cuda, self.total)
            problems += [f"trial {name}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems)

    def reservation(self, name: str) -> Any:
        """What Tune reserves for a trial: the share of its one worker; nothing for a driver of several workers."""
        from ray.tune import PlacementGroupFactory

        if not self.one_worker_each:
            return PlacementGroupFactory([{"memory": 1}])  # one byte: Tune takes no empty reservation
        resources = self.configs[name].resources
        gpus = {"GPU": resources.gpus_per_worker} if self.cuda else {}
        return PlacementGroupFactory([{"CPU": resources.cpus_per_worker} | gpus])

    @property
    def concurrent(self) -> int:
        """Trials at a time: only as many as there is room for all their workers, or drivers would wait forever."""
        configs = self.configs.values()
        fits = [int(self.total.get("CPU", 1) / (c.parallel.workers * c.resources.cpus_per_worker)) for c in configs]
        if self.cuda:
            gpus = [config.resources.gpus_per_worker * config.parallel.workers for config in configs]
            fits += [int(self.total["GPU"] / needed) for needed in gpus]
        return max(1, min([*fits, len(configs), self.limit or len(configs)]))
