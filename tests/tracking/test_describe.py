"""What MLflow's pages show: the same parameters for every point of a sweep, the main metric first, data by its hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import finhpc
from finhpc.commands.pretrain import Pretrain
from finhpc.commands.sweep import plan as sweep_plan
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.commands.sweep.tracking import register, settle_children
from finhpc.errors import ConfigError
from finhpc.log import redirected
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig
from finhpc.settings.training import default_tracking_uri
from finhpc.tracking import mirror
from finhpc.tracking import tracker as tracking
from finhpc.tracking.describe import Dataset, Description, parameters, short_name, trained_model
from finhpc.tracking.pages import pages_of
from finhpc.tracking.store import check_store, deleted, experiment_id, refuses
from finhpc.tracking.tags import PARENT, setting_tags
from finhpc.tracking.tracker import Tracker
from finhpc.training.journal import Journal
from tests.tiny import pretrain_tree


def pretraining(**sections: Any) -> PretrainConfig:
    return build(PretrainConfig, sections)


def sweep_tree(shards: Path, storage: Path, **more: Any) -> dict[str, Any]:
    return pretrain_tree(shards, storage, train={"steps": 20}, run={"name": "ranks"}) | more


def differing(points: list[dict[str, Any]]) -> set[str]:
    """The keys that MLflow's page takes for different: a missing one counts as another value."""
    keys = {key for point in points for key in point}
    return {key for key in keys if len({str(point.get(key)) for point in points}) > 1}


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that estimates no times, as on a cluster that is not connected yet."""
    monkeypatch.setattr(sweep_plan, "known_resources", lambda: None)


@pytest.mark.usefixtures("_unmeasured")
def test_a_sweeps_points_differ_in_what_varies_alone(run_shards: Path, tmp_path: Path) -> None:
    grid = {"method.kind": ["low_rank", "svd", "blend"], "method.rank": [4, 8], "quantization.bits": [16, 8, 4]}
    plan = plan_sweep(build(SweepConfig, sweep_tree(run_shards, tmp_path, grid=grid)), tmp_path / "ranks")
    assert len(plan.parameters) == 18
    assert differing(plan.parameters) == set(grid)
    shared = plan.shared_parameters()
    assert shared["model"] == "gpt2-tiny"
    assert not set(grid) & set(shared)


@pytest.mark.usefixtures("_unmeasured")
def test_what_only_places_a_sweeps_trials_is_shown_if_it_varies(run_shards: Path, tmp_path: Path) -> None:
    grid = {"parallel.stages": [1, 2], "train.recompute": ["none", "full"], "resources.threads": [1, 2]}
    plan = plan_sweep(build(SweepConfig, sweep_tree(run_shards, tmp_path, grid=grid)), tmp_path / "ranks")
    assert differing(plan.parameters) == set(grid)


def test_a_dense_model_has_no_rank_that_it_was_not_given() -> None:
    for varied in ({}, {"method.rank": 8, "method.kind": "dense"}):
        assert parameters(pretraining(method={"kind": "dense"}), {}, varied)["method.rank"] == "full"
    assert parameters(pretraining(method={"rank": 8}), {}, {})["method.rank"] == 8


def test_machinery_is_no_parameter_and_every_setting_is_a_hidden_tag() -> None:
    config = pretraining(run={"name": "a", "storage": "/x"}, model={"context": 64}, data={"shards": "/x/shards"})
    shown = parameters(config, {}, {})
    assert not [key for key in shown if key.startswith(("run.", "resources.", "model."))]
    assert not {"data.shards", "train.hang_timeout_s", "train.keep_checkpoints", "train.eval_every"} & set(shown)
    tags = setting_tags(config)
    assert all(key.startswith("mlflow.") for key in tags), "MLflow's pages do not list those"
    assert tags["mlflow.finhpc.setting.run.storage"] == "/x"
    assert tags["mlflow.finhpc.setting.train.keep_checkpoints"] == 2


def test_a_runs_shape_is_the_same_whether_settings_or_a_folder_give_it(run_shards: Path, tmp_path: Path) -> None:
    tree = sweep_tree(run_shards, tmp_path)
    given = Pretrain(build(PretrainConfig, tree)).parameters()
    preset = Pretrain(build(PretrainConfig, tree | {"model": {"preset": "gpt2-tiny", "layers": 2, "width": 32}}))
    assert differing([given, preset.parameters()]) == set(), "the context is a part of the shape that no page needs"
    assert (given["model.layers"], given["model.width"]) == (2, 32)


def test_epochs_stand_for_the_steps_that_follow_from_them() -> None:
    config = build(FinetuneConfig, {"train": {"epochs": 2.0}})
    shown = parameters(config, {}, {})
    assert shown["train.epochs"] == 2.0
    assert "train.steps" not in shown
    steps = build(FinetuneConfig, {"train": {"epochs": None, "steps": 7}})
    assert parameters(steps, {}, {})["train.steps"] == 7


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/runs/first/model", "first"),
        ("/data/news/shards", "news/shards"),
        ("/hub/SmolLM2-135M", "SmolLM2-135M"),
        ("/x/base.gguf", "base.gguf"),
        ("model", "model"),
    ],
)
def test_paths_have_short_names(path: str, name: str) -> None:
    assert short_name(path) == name


def test_a_dataset_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "news.csv"
    file.write_text("text,label\nup,positive\n")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    for source in (str(file), f"{file}:labelled"):
        dataset = Dataset.of_file(source, "0" * 64)
        assert (dataset.name, dataset.sha256, dataset.source) == ("news.csv", expected, str(file))
    hub = Dataset.of_file("hf:user/set", "f" * 64).entity().dataset
    assert (hub.name, hub.source_type, hub.digest) == ("user/set", "hugging_face", "f" * 16)
    entity = dataset.entity().dataset
    assert entity.digest == expected[:16]
    assert json.loads(entity.profile) == {"sha256": expected}, "no text of it"


def test_a_decomposed_model_leads_back_to_the_one_it_was_made_of(tmp_path: Path) -> None:
    for name, source in (("low", "/runs/dense/model"), ("lower", str(tmp_path / "low"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"source": source}))
    assert trained_model(str(tmp_path / "lower")) == "/runs/dense/model"
    assert trained_model("/runs/dense/model") == "/runs/dense/model"
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "result.json").write_text(json.dumps({"source": str(tmp_path / "loop")}))
    assert trained_model(str(tmp_path / "loop")) == str(tmp_path / "loop")


# -- what a real store holds ----------------------------------------------------------------


def use(storage: Path, database: Path) -> None:
    shutil.copy(database, storage / "mlflow.db")


def track(
    storage: Path, name: str, events: list[tuple[str, dict[str, Any]]], result: dict[str, Any], **more: Any
) -> Any:
    """A run of these journal events, as the store has it."""
    folder = storage / name
    folder.mkdir()
    for file in ("journal.jsonl", "driver.jsonl"):
        journal = Journal(folder / file)
        for kind, record in events:
            if (kind == "system") == (file == "driver.jsonl"):
                journal.write(kind, **record)
        journal.close()
    settings: dict[str, Any] = {"params": {}, "tags": {}, **more}
    tracker = Tracker(Description(folder, default_tracking_uri(storage), "finhpc", name, **settings)).start()
    assert tracker.finish("FINISHED", result)
    return MlflowClient(default_tracking_uri(storage)).get_run(tracker.run_id or "")


SYSTEM = ("system", {"step": 1, "cpu_utilization_percentage": 5.0})
STEPS = [("train", {"step": step, "tokens": step, "lr": 1e-3, "train_loss": 5.0}) for step in range(1, 301)]
EVAL = ("eval", {"step": 300, "tokens": 300, "val_loss": 4.0, "val_perplexity": 54.6})


@pytest.mark.parametrize("events", [[SYSTEM, *STEPS, EVAL], [SYSTEM], [EVAL, *STEPS]])
def test_the_validation_loss_is_the_first_metric(
    tmp_path: Path, empty_database: Path, events: list[tuple[str, dict[str, Any]]]
) -> None:
    """However many steps came before the first evaluation, and for a run that has but a result, as a sweep's own."""
    use(tmp_path, empty_database)
    run = track(tmp_path, "one", events, {"params_total": 7, "steps": 300, "val_loss": 4.0})
    names = list(run.data.metrics)
    assert names[0] == "val_loss"
    assert names.index("system/cpu_utilization_percentage") > 0 if SYSTEM in events else True
    if len(events) > 2:
        history = MlflowClient(default_tracking_uri(tmp_path)).get_metric_history(run.info.run_id, "train_loss")
        assert len(history) == 300


def test_without_an_evaluation_the_training_loss_is_first(tmp_path: Path, empty_database: Path) -> None:
    use(tmp_path, empty_database)
    run = track(tmp_path, "one", [SYSTEM, *STEPS], {"steps": 300})
    assert next(iter(run.data.metrics)) == "train_loss"


def test_other_metrics_wait_for_the_first_evaluation_and_not_for_ever(tmp_path: Path) -> None:
    state = tracking.State.load(tmp_path, "uri", "finhpc", "one")

    def mirror_of(folder: Path) -> mirror.Mirror:
        return mirror.Mirror(Description(folder, "sqlite:////x/mlflow.db", "finhpc", "one", {}, {}), state)

    mirrored = mirror_of(tmp_path)
    assert not mirrored.lead(None), "nothing to send yet"
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("train", step=1, train_loss=5.0)
    assert not mirrored.lead(None)
    assert mirrored.lead(mirror.Ending("FAILED", {}, None))
    journal.write("train", step=2, train_loss=5.0, time=time.time())
    old = tmp_path / "old"
    old.mkdir()
    Journal(old / "journal.jsonl").write("train", step=1, train_loss=5.0, time=time.time() - mirror.LEAD_WAIT_S - 1)
    assert mirror_of(old).lead(None)


def test_a_run_lists_its_dataset_and_no_machinery(tmp_path: Path, empty_database: Path) -> None:
    use(tmp_path, empty_database)
    dataset = Dataset("news/shards", "a" * 64, "/data/news/shards", counts={"train_tokens": 9})
    start = ("start", {"step": 0, "attempt": "x", "workers": 2, "threads": 1, "device": "cpu"})
    more = {"datasets": [dataset], "tags": setting_tags(pretraining())}
    run = track(tmp_path, "one", [start, EVAL], {"steps": 300}, **more)
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("news/shards", "a" * 16)
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}
    assert [key for key in run.data.tags if not key.startswith("mlflow.")] == []


# -- the pages ------------------------------------------------------------------------------


def test_the_pages_of_a_sweep_are_found_by_its_name_or_as_the_newest(tmp_path: Path, empty_database: Path) -> None:
    use(tmp_path, empty_database)
    uri = default_tracking_uri(tmp_path)
    assert pages_of(uri, None) == []
    client, ids = MlflowClient(uri), {}
    experiment = experiment_id(client, uri, "finhpc")

    def run(name: str, metric: str, value: float, parent: str | None = None) -> None:
        tags = {PARENT: parent} if parent else {}
        ids[name] = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.log_metric(ids[name], metric, value)
        client.set_terminated(ids[name])

    run("plain", "val_loss", 4.0)
    for sweep, losses in (("older", (4.0, 3.0)), ("newer", (2.0, 1.0, 5.0))):
        run(sweep, "val_loss", 1.0)
        for i, loss in enumerate(losses):
            run(f"{sweep}-{i}", "val_loss", loss, ids[sweep])
        run(f"{sweep}-without", "train_loss", 9.0, ids[sweep])
    (title, page), (listed, runs) = pages_of(uri, None)
    assert title == "compare the 3 runs of newer"
    assert page.startswith("#/compare-runs?runs=%5B%22")
    order = [page.index(ids[name]) for name in ("newer-1", "newer-0", "newer-2")]
    assert order == sorted(order), "the best first"
    assert "viewStateShareKey=finhpc" in runs
    assert listed == "all runs of finhpc"
    ((title, page), _) = pages_of(uri, "older")
    assert title == "compare the 2 runs of older"
    ((title, page), _) = pages_of(uri, "plain")
    assert page.endswith(f"runs/{ids['plain']}")
    with pytest.raises(ConfigError, match=r"run\.name=oldr is not the name of a run in MLflow; did you mean 'older'\?"):
        pages_of(uri, "oldr")
    assert client.get_experiment(experiment).tags["mlflow.experiment.primaryMetric.name"] == "val_loss"


# -- stores that will not take a run --------------------------------------------------------


def test_a_deleted_experiment_is_refused_at_once(tmp_path: Path, empty_database: Path, run_shards: Path) -> None:
    use(tmp_path, empty_database)
    uri = default_tracking_uri(tmp_path)
    client = MlflowClient(uri)
    gone = client.create_experiment("gone")
    check_store(uri, "gone")
    client.delete_experiment(gone)
    tree = sweep_tree(run_shards, tmp_path)
    tree["run"]["experiment"] = "gone"
    says = rf"run\.experiment=gone was deleted in MLflow; restore it .*--experiment-id {gone}\), or choose another"
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=says):
            finhpc.pretrain(build(PretrainConfig, tree), dry_run)
    for kind in (SweepConfig, FinetuneSweepConfig):
        base = {"run": tree["run"], "grid": {"optimizer.lr": [1e-3]}}
        with pytest.raises(ConfigError, match=says):
            plan_sweep(build(kind, (tree if kind is SweepConfig else {}) | base), tmp_path / "ranks")
    assert not (tmp_path / "ranks").exists(), "nothing was started"
    client.restore_experiment(gone)
    check_store(uri, "gone")


def test_an_experiment_deleted_under_a_run_ends_it_without_waiting(tmp_path: Path, empty_database: Path) -> None:
    use(tmp_path, empty_database)
    uri = default_tracking_uri(tmp_path)
    said: list[str] = []
    (tmp_path / "one").mkdir()
    tracker = Tracker(Description(tmp_path / "one", uri, "gone", "one", {}, {})).start()
    deadline = time.monotonic() + 180
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
    client = MlflowClient(uri)
    experiment = client.get_run(tracker.run_id or "").info.experiment_id
    client.delete_experiment(experiment)
    begin = time.monotonic()
    with redirected(said.append):
        assert not tracker.finish("FINISHED", {"steps": 1, "val_loss": 2.0}, timeout_s=500)
    assert time.monotonic() - begin < 250
    assert "run.experiment=gone was deleted in MLflow; restore it" in said[-1]
    assert said[-1].endswith("then run the same command again to send it.")
    client.restore_experiment(experiment)
    again = Tracker(Description(tmp_path / "one", uri, "gone", "one", {}, {})).start()
    assert again.finish("FINISHED", {"steps": 1, "val_loss": 2.0})
    assert client.get_run(again.run_id or "").data.metrics["val_loss"] == 2.0


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be taken for one" * 20, b"SQLite format 3\0" + b"x" * 200]
)
def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mlflow\.db"):
        check_store(default_tracking_uri(tmp_path), "finhpc")


def test_a_folder_that_cannot_be_written_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"/proc/mlflow\.db cannot be written .*; correct its permissions, or give"):
        check_store("sqlite:////proc/mlflow.db", "finhpc")


def test_a_server_that_is_away_is_no_reason_to_refuse() -> None:
    check_store("http://127.0.0.1:9", "finhpc")
    assert not refuses(OSError("http://127.0.0.1:40301/runs/get?run_id=a403b401: Connection refused"))
    assert refuses(OSError("API request to endpoint /api/2.0 failed with error code 403 != 200"))


def test_a_password_is_not_in_the_remedy() -> None:
    assert "hunter2" not in str(deleted("http://me:hunter2@host", "gone", "1"))


# -- what somebody deleted in MLflow --------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that the registry takes: an adapter's, which is opened next to its base."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_the_best_model_is_registered_again_after_its_deletion(
    tmp_path: Path, empty_database: Path, model: Path
) -> None:
    use(tmp_path, empty_database)
    run = track(tmp_path, "best", [EVAL], {"steps": 300})
    uri = default_tracking_uri(tmp_path)
    client = MlflowClient(uri)
    for gone in ("nothing", "version", "model", "logged model"):
        if gone == "version":
            client.delete_model_version("ranks", "1")
        elif gone == "model":
            client.delete_registered_model("ranks")
        elif gone == "logged model":
            client.delete_registered_model("ranks")
            for output in client.get_run(run.info.run_id).outputs.model_outputs:
                client.delete_logged_model(output.model_id)
        assert register(uri, "ranks", run.info.run_id, model, 300) == "models:/ranks@best", gone
        assert client.get_model_version_by_alias("ranks", "best").run_id == run.info.run_id, gone


def test_a_deleted_run_is_left_alone_and_never_registered(tmp_path: Path, empty_database: Path, model: Path) -> None:
    use(tmp_path, empty_database)
    uri = default_tracking_uri(tmp_path)
    gone, kept, parent = (track(tmp_path, name, [EVAL], {"steps": 300}).info.run_id for name in ("a", "b", "c"))
    client = MlflowClient(uri)
    client.delete_run(gone)
    settle_children(uri, parent, [(gone, "KILLED"), ("0" * 32, "KILLED"), (kept, "KILLED")])
    assert client.get_run(kept).data.tags[PARENT] == parent
    with pytest.raises(
        ConfigError, match=rf"was deleted in MLflow, .*restore it \(mlflow runs restore --run-id {gone}"
    ):
        register(uri, "ranks", gone, model, 300)


def test_a_database_that_cannot_be_read_shows_no_pages(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database")
    with pytest.raises(ConfigError, match="not a database that MLflow can read"):
        pages_of(default_tracking_uri(str(tmp_path)), None)
