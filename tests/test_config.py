"""Settings: resolution, and errors that list everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.bench.settings import ExportBench, GenerateBench, PrepareBench
from finhpc.cli import parse
from finhpc.errors import ConfigError
from finhpc.settings.base import build, flatten, keys, load, marked, recipes, to_yaml
from finhpc.settings.estimate import FinetuneEstimateConfig
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.prepare import PrepareConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.reproduce import Recipe
from finhpc.settings.sweep import StudyConfig, SweepConfig
from finhpc.settings.training import Run


def test_flags_win_over_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: {rank: 16, kind: low_rank}\ntrain: {steps: 7}\n")
    config = load(PretrainConfig, str(file), {"method.rank": 32})
    assert (config.method.rank, config.train.steps, config.optimizer.lr) == (32, 7, 1e-3)


def test_yaml_round_trip() -> None:
    config = load(PretrainConfig, "demo", {"method.ranks.mlp": 8, "optimizer.betas": [0.8, 0.99]})
    import yaml

    assert build(PretrainConfig, yaml.safe_load(to_yaml(config))) == config


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            PretrainConfig, None, {"method.ranc": 8, "train.steps": "x", "train.precision": "bf61", "optimizer.lr": -1}
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "method.ranc is not a setting; did you mean 'method.rank'?" in text
    assert "train.steps='x' is refused" in text
    assert "did you mean 'bf16'?" in text
    assert "optimizer.lr=-1 is refused: input should be greater than 0" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dmo", "config=dmo is not a recipe; did you mean 'demo'?"),
        ("nothing-like-it", "is not a recipe; valid: demo, "),
        ("no/such.yaml", "config=no/such.yaml is not a file"),
    ],
)
def test_unknown_configs(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, source)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_files_that_hold_no_settings(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(PretrainConfig, str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_is_valid(name: str) -> None:
    kinds = {"prepare": PrepareConfig, "studies/": StudyConfig, "finetune": FinetuneEstimateConfig}
    kinds |= {"reproduce/": Recipe}
    config = load(next((kind for first, kind in kinds.items() if name.startswith(first)), PretrainConfig), name)
    if isinstance(config, PretrainConfig) and name != "demo":
        from finhpc.models.families.registry import resolve_shape

        resolve_shape(config.model)


def test_flatten_and_keys_agree() -> None:
    assert set(flatten(PretrainConfig())) == set(keys(PretrainConfig))


def test_a_section_given_in_part_keeps_the_defaults_of_its_place() -> None:
    settings = load(PrepareBench, None, {"bench.out": "elsewhere"})
    assert (settings.bench.out, settings.bench.repeats) == ("elsewhere", 2)
    assert load(PrepareBench, None, {"bench.repeats": 7}).bench.repeats == 7


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_settings_file_may_begin_with_a_mark(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(f"optimizer:{end}  lr: 0.5{end}run:{end}  name: é{end}".encode(encoding))
    config = load(PretrainConfig, str(path))
    assert (config.optimizer.lr, config.run.name) == (0.5, "é")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"optimizer:\n  lr: 1\noptimizer:\n  lr: 2\n", "the key optimizer is duplicated"),
        ("run: {name: f\xe4llt}\n".encode("latin-1"), "line 1: byte 0xe4 is not utf-8"),
        (b"run: {name: a\0b}\n", "NUL character"),
    ],
)
def test_a_settings_file_that_would_be_misread_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(PretrainConfig, str(tmp_path / "a.yaml"))


def test_a_section_without_a_line_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optimizer:\n  # lr: 1\nrun:\n  name: mine\n")
    config = load(PretrainConfig, str(tmp_path / "a.yaml"))
    assert (config.optimizer, config.run.name) == (PretrainConfig().optimizer, "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [("data.source: [a.csv]", "written with a dot"), ("data: {source: a.csv}", "a valid list, such as \\[a.csv\\]")],
)
def test_what_settings_of_yaml_lack_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(FinetuneConfig, str(tmp_path / "a.yaml"))


def test_a_file_of_settings_may_not_trust_code(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("tasks: [mine.yaml]\ntrust_task_code: true\n")
    with pytest.raises(ConfigError, match=r"a file cannot give that permission\. .* --trust_task_code true"):
        load(EvaluateConfig, str(file))
    assert load(EvaluateConfig, str(file), {"trust_task_code": True}).trust_task_code
    assert not load(EvaluateConfig, str(file), {"trust_task_code": False}).trust_task_code
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{name: a, verb: evaluate, settings: {tasks: [mine.yaml], trust_task_code: true}}]\n")
    with pytest.raises(ConfigError, match="a file cannot give that permission"):
        load(Recipe, str(recipe))


def test_paths_are_absolute_once_settings_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    pretrain = load(PretrainConfig, None, {"data.shards": "shards", "model.path": "base"})
    data = {"source": ["a.txt", "~/b.csv:fiqa", "hf:base:main", "hf:org/name"], "templates": "own.yaml"}
    finetune = build(FinetuneConfig, {"model": {"path": "org/base"}, "data": data})
    tracked = build(Run, {"storage": "elsewhere", "tracking_uri": "sqlite:///runs.db"})
    server = build(Run, {"tracking_uri": "http://host:5000"})
    monkeypatch.chdir("/")
    assert (pretrain.data.shards, pretrain.model.path) == (f"{tmp_path}/shards", f"{tmp_path}/base")
    assert pretrain.run.storage == f"{tmp_path}/runs"
    assert pretrain.run.mlflow_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert finetune.model.path == "org/base"  # the hub's
    home = Path.home()
    assert finetune.data.source == [
        f"{tmp_path}/a.txt",
        f"{home}/b.csv:fiqa",
        f"hf:{tmp_path}/base:main",
        "hf:org/name",
    ]
    assert finetune.data.templates == f"{tmp_path}/own.yaml"
    assert (tracked.storage, tracked.mlflow_uri) == (f"{tmp_path}/elsewhere", f"sqlite:///{tmp_path}/runs.db")
    assert server.mlflow_uri == "http://host:5000"


def test_what_may_change_when_a_run_is_resumed() -> None:
    may_change = marked(SweepConfig, "may_change")
    placing = {"grid", "data.shards", "model.path", "run.storage", "sweep.seed", "parallel.stages", "train.eval_every"}
    assert placing <= set(may_change)
    assert not {"train.steps", "train.seed", "data.seq_len", "optimizer.lr", "method.rank"} & set(may_change)
    assert "data.eval_source" in marked(FinetuneConfig, "may_change")


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_on_and_off_are_no_booleans(value: str) -> None:
    """YAML reads them as such, in files and on the command line."""
    words = ["--train.compile", value]
    assert load(PretrainConfig, None, parse(words, PretrainConfig)[1]).train.compile == value


@pytest.mark.parametrize("kind", [GenerateBench, ExportBench])
def test_lists_of_bits_are_read_from_words(kind: type[GenerateBench | ExportBench]) -> None:
    """Pydantic does not turn words into the numbers of a Literal by itself."""
    assert build(kind, {"bits": ["8", "4"]}).bits == [8, 4]
