"""What a run says while its workers have no place; `test_two_nodes.py` and `test_jobs.py` see it happen."""

from __future__ import annotations

import os

import pytest

from finhpc.runs.launch import START_TIMEOUT, ray_train_limits, stop_grace_s
from finhpc.runs.watch import missing


@pytest.mark.parametrize(
    ("needed", "total", "free", "said"),
    [
        ({"CPU": 4}, {"CPU": 2}, {"CPU": 2}, "they need 4 CPU, the cluster has 2 (is a node gone?)"),
        ({"CPU": 4}, {"CPU": 8}, {"CPU": 3}, "they need 4 CPU, of the cluster's 8 only 3 are free"),
        ({"CPU": 1, "GPU": 2}, {"CPU": 8}, {"CPU": 8}, "they need 2 GPU, the cluster has 0 (is a node gone?)"),
        (
            {"CPU": 4},
            {"CPU": 8},
            {"CPU": 4},
            "the free CPUs and GPUs are not on the nodes where workers need them",
        ),
    ],
)
def test_what_is_missing(needed: dict, total: dict, free: dict, said: str) -> None:
    assert missing(needed, total, free) == said


def test_ray_train_waits_for_a_place_without_an_end_but_for_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(START_TIMEOUT, raising=False)
    with ray_train_limits(0):
        assert float(os.environ[START_TIMEOUT]) > 1e6
    assert START_TIMEOUT not in os.environ
    monkeypatch.setenv(START_TIMEOUT, "5")
    with ray_train_limits(0):
        assert os.environ[START_TIMEOUT] == "5"
    assert os.environ[START_TIMEOUT] == "5"


@pytest.mark.parametrize(("wait_s", "grace_s"), [(None, 0.0), ("60", 25.0), ("20", 15.0)])
def test_a_stopped_ray_job_saves_only_what_its_time_allows(
    wait_s: str | None, grace_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    if wait_s is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", wait_s)
    assert stop_grace_s(25.0) == 25.0, "no job"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert stop_grace_s(25.0) == grace_s, "of Ray's 3 s nothing is left"
