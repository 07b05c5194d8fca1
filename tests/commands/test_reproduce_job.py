"""`jobs/reproduce.py` under `ray job submit`, on a cluster with token authentication."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.commands.test_reproduce import PRETRAIN
from tests.runs.test_jobs import Cluster, cluster

__all__ = ["cluster"]  # the fixture


@pytest.mark.slow
def test_a_study_runs_as_a_job_and_its_exit_code_is_the_jobs(cluster: Cluster, tmp_path: Path) -> None:
    data = PRETRAIN["data"] | {"shards": str(cluster.storage / "shards")}
    steps = [
        {"name": "dense", "verb": "pretrain", "settings": PRETRAIN | {"data": data, "method": {"kind": "dense"}}},
        {"name": "speed", "verb": "measure", "settings": {"model": ["${dense.model}"], "prompt": 9, "new": 5}},
    ]
    recipe, runs = cluster.storage / "steps.yaml", cluster.storage / "runs"
    recipe.write_text(yaml.safe_dump({"steps": steps}))
    words = ["jobs/reproduce.py", "--scale", str(recipe), "--run.storage", str(runs)]
    done = cluster.submit(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "[2/2] speed (measure): finished" in done.stdout
    result = json.loads((runs / "reproduce" / "result.json").read_text())
    assert [row["status"] for row in result["steps"]] == ["finished", "finished"]
    steps[1]["settings"]["model"] = ["${dense.model}/none"]
    recipe.write_text(yaml.safe_dump({"steps": steps}))
    failed = cluster.submit(*words)
    assert failed.returncode != 0
    assert "1 of 2 steps failed: speed (" in failed.stdout
    refused = cluster.submit(*words, HOME=str(tmp_path), RAY_AUTH_TOKEN="")
    assert refused.returncode != 0
    assert "2/2" not in refused.stdout
