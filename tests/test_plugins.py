"""Own layers, optimizers, families, shapes and templates: from a module or an installed package, or refused early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import finhpc
from finhpc import plugins
from finhpc.cli import main
from finhpc.data.examples.templates import TEMPLATES
from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.registry import LAYERS
from finhpc.models.families.presets import PRESETS
from finhpc.models.families.registry import FAMILIES
from finhpc.settings.base import build, load
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import OptimizerKind
from finhpc.training.optimizers.registry import OPTIMIZERS
from finhpc.training.optimizers.stage import init_state, make_optimizer, moments
from tests.tiny import tiny_shards

# What a user writes: an example of the documentation and more. Tests with it run in new processes.
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
EXAMPLE = next(block for block in PAGE.split("```python")[1:] if "@LAYERS.register" in block)
EXAMPLE = EXAMPLE.partition("\n")[2].partition("```")[0]
MODULE = (
    EXAMPLE
    + """
import torch

from finhpc.data.examples.templates import TEMPLATES, Template
from finhpc.models.families.presets import PRESETS, Shape
from finhpc.training.optimizers.kind import OptimizerKind
from finhpc.training.optimizers.registry import OPTIMIZERS


def momentum(groups, settings):
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0])


OPTIMIZERS.register("momentum", OptimizerKind(momentum, ("momentum_buffer",)))
PRESETS.register("gpt2-nano", Shape("gpt2", 2, 32, 2, 64, 300, True))
TEMPLATES.register(
    "headline",
    Template(
        name="headline", prompt="Headline: {input}\\nMood:", answer="{label}", separator=" ", end=False, key="{input}",
        cut="input", labels=("down", "up"),
    ),
)
"""
)
TRAIN = "--data.seq_len 32 --data.eval_samples 8 --method.kind gelu --method.rank 4 --optimizer.name momentum"
NANO = [*TRAIN.split(), *["--model.preset", "gpt2-nano", "--plugins", "my_parts"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module `my_parts`, and shards."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_parts.py").write_text(MODULE)
    tiny_shards(folder / "shards")
    return folder


def finhpc_in(folder: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command, or Python code, in a new process that works in a folder."""
    start = ["-c", code] if code else ["-m", "finhpc.cli"]
    # As an installed script has it, the current folder is not on the path.
    return subprocess.run([sys.executable, "-P", *start, *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_a_module_of_ones_own_in_a_dry_run(place: Path) -> None:
    done = finhpc_in(place, "pretrain", "--data.shards", "shards", *NANO, "--dry_run", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["params_total"] > 0
    assert not (place / "runs").exists()


def test_without_its_module_it_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = TRAIN.replace("gelu", "glue").replace("momentum", "momentums").split()
    assert main(["pretrain", "--data.shards", str(place / "shards"), *words, "--dry_run"]) == 2
    found = capsys.readouterr().err
    for said in (
        "optimizer.name=momentums is not an optimizer; valid: adamw, adamw8bit, muon, spectron, loro, apollo_mini, "
        "relora.",
        "method.kind=glue is unknown; valid: dense, low_rank, cola, half, sltrain, svd, blend. One of your own",
    ):
        assert said in found


INSTALLED = """
import finhpc
from finhpc.lowrank.registry import LAYERS
from finhpc.data.examples.templates import template
from finhpc.models.families.presets import PRESETS
assert LAYERS["gelu"].__name__ == "GeluLinear" and "gpt2-nano" in PRESETS and template("headline")
from finhpc.cluster.package import Driver
assert Driver.here().plugins == ("my_package",)
"""


@pytest.mark.slow
def test_an_installed_package_is_found_by_every_process(place: Path, tmp_path: Path) -> None:
    (tmp_path / "my_package.py").write_text(MODULE)
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[finhpc.plugins]\nparts = my_package\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){INSTALLED}"
    done = finhpc_in(place, code=code)
    assert done.returncode == 0, done.stderr[-2000:]


NOTEBOOK = """
import sys, finhpc
from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.registry import LAYERS
{imported}
LAYERS.register("mine", type("Mine", (LowRankLinear,), {{"mergeable": False}})) if {main} else None
data, method = {{"shards": "shards", "seq_len": 32, "eval_samples": 8}}, {{"kind": sys.argv[1], "rank": 4}}
try:
    finhpc.pretrain(finhpc.PretrainConfig(data=data, method=method), dry_run=True)
except finhpc.ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_a_notebook_alone_registers_is_refused_before_workers_start(place: Path) -> None:
    done = finhpc_in(place, "mine", code=NOTEBOOK.format(imported="", main=True))
    assert "method.kind=mine was registered by __main__ in this process, which workers do not import" in done.stdout
    assert "put it into a module, such as my_parts.py in the current folder, and give --plugins my_parts" in done.stdout
    # Imported by the notebook alone: the module exists, and the workers are not told.
    done = finhpc_in(place, "gelu", code=NOTEBOOK.format(imported="sys.path.append('.'); import my_parts", main=False))
    assert "method.kind=gelu was registered by my_parts in this process" in done.stdout, done.stderr
    assert "add it to plugins: --plugins my_parts" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plugins=own_{n} is not a module that can be imported"),
        ("import nowhere_at_all", "plugins=own_{n} cannot be imported: No module named 'nowhere_at_all'; install"),
        ("\n1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def broken(:", "cannot be imported: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{abs(hash(text))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, None, {"plugins": [name], "train.steps": 0})
    assert message.format(n=abs(hash(text))) in str(caught.value)


def test_a_module_that_workers_would_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden_parts.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ConfigError, match=r"hidden_parts was imported from .*, where workers do not look; install it"):
        plugins.load(["hidden_parts"])
    assert "hidden_parts" not in plugins.loaded(), "workers would look for it"


class Tanh(LowRankLinear):
    @staticmethod
    def between(narrow: torch.Tensor) -> torch.Tensor:
        return torch.tanh(narrow)


class Wide(LowRankLinear):
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.C = torch.nn.Parameter(torch.empty(3))


class Own(LowRankLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Odd(LowRankLinear):
    init = "xavier"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Tanh, "so B A is not the whole layer; set mergeable = False"),
        (
            Wide,
            "it has the parameters A.weight, B.bias, B.weight, C; a low-rank layer has A.weight,",
        ),
        (Own, "it has its own forward, which quantized exports would lose"),
        (Odd, "init='xavier' is an unknown initialization; valid: spectral, normal, cola"),
        (torch.nn.Linear, "must be a class derived from finhpc.lowrank.layers.LowRankLinear"),
    ],
)
def test_a_layer_that_an_export_would_change_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LAYERS.register("some", layer)
    assert message in str(caught.value)
    assert "some" not in LAYERS


def sgd(groups: Any, settings: Any) -> Any:
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OptimizerKind(sgd, ()), "stores momentum_buffer for a parameter and names nothing as moments"),
        (OptimizerKind(lambda groups, s: torch.optim.Adafactor(groups), ("row_var",)), "names row_var as moments"),
        (OptimizerKind(lambda groups, s: torch.optim.SGD(groups, lr=-1), ()), "fails in its first step (ValueError"),
        (sgd, "must be a finhpc.training.optimizers.kind.OptimizerKind"),
    ],
)
def test_an_optimizer_whose_state_checkpoints_would_lose_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OPTIMIZERS.register("some", kind)
    assert message in str(caught.value)


def test_names_are_not_taken_twice_and_not_assigned() -> None:
    for registry, name in ((LAYERS, "cola"), (OPTIMIZERS, "adamw"), (FAMILIES, "llama"), (PRESETS, "gpt2-tiny")):
        with pytest.raises(ConfigError, match=f"{name} is already registered by finhpc"):
            registry.register(name, registry[name])
        with pytest.raises(ConfigError, match=r"must be added by \.register"):
            registry["other"] = registry[name]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"data\.template=x must be a finhpc"):
        TEMPLATES.register("x", "{input}")


def test_an_own_optimizer_goes_on_where_it_was() -> None:
    if "momentum" not in OPTIMIZERS:
        OPTIMIZERS.register("momentum", OptimizerKind(sgd, ("momentum_buffer",)))
    settings = build(Optimizer, {"name": "momentum", "lr": 0.1})

    def stepped(matrix: torch.nn.Parameter, optimizer: Any, steps: range) -> None:
        for step in steps:
            matrix.grad = torch.full_like(matrix, 1.0 + step)
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(2, 2))
    stepped(straight, make_optimizer({"w": straight}, settings), range(6))
    first = torch.nn.Parameter(torch.ones(2, 2))
    before = make_optimizer({"w": first}, settings)
    stepped(first, before, range(3))
    second = torch.nn.Parameter(first.detach().clone())
    after = make_optimizer({"w": second}, settings)
    init_state(after, 3)
    for name, value in moments(after, second).items():
        value.copy_(moments(before, first)[name])
    stepped(second, after, range(3, 6))
    assert torch.equal(second, straight)


MODEL = """
import sys
sys.path.insert(0, "")
import finhpc, torch
from finhpc import plugins
from finhpc.settings.pretrain import Method
plugins.load(["my_parts"])
from pathlib import Path
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.families.presets import PRESETS
hf = make_config(PRESETS["gpt2-nano"], ranks_of(Method(kind="gelu", rank=4)), "gelu")
model = initial_model(hf, 0, None)
weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
save_model(Path("gelu-model"), hf, weights.items(), Path("shards/tokenizer"))
again = finhpc.load_model("gelu-model")
tokens = torch.arange(8)[None]
assert torch.allclose(again(tokens).logits, model.eval()(tokens).logits, atol=1e-5)
finhpc.export(finhpc.ExportConfig(model="gelu-model", out="gelu-packed", quantization={"bits": 8}))
packed = finhpc.load_model("gelu-packed")
assert torch.nn.functional.cosine_similarity(packed(tokens).logits, again(tokens).logits, dim=-1).min() > 0.98
try:
    finhpc.export(finhpc.ExportConfig(model="gelu-model", out="merged", format="merged"))
except finhpc.ConfigError as error:
    assert "use --format native" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_a_model_says_which_plugin_it_needs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = finhpc_in(place, code=MODEL)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.chdir(place)
    for model in ("gelu-model", "gelu-packed"):
        assert json.loads((place / model / "config.json").read_text())["finhpc_plugins"] == ["my_parts"]
        said = f"model={place / model} needs the plugin my_parts, which is not imported here; install its package"
        with pytest.raises(ConfigError, match=said):
            finhpc.load_model(model)
        for words in (
            ["generate", "--model", model, "--prompt", "x"],
            ["evaluate", "--model", model, "--tasks", "perplexity", "--data.shards", "shards"],
            ["export", "--model", "gelu-model", "--out", "out"],
        ):
            assert main(words) == 2, words
            assert "needs the plugin my_parts" in capsys.readouterr().err


@pytest.mark.slow
def test_ones_own_parts_train_resume_sweep_export_and_score(place: Path, tmp_path: Path) -> None:
    """In Ray Train's workers (two stages), in a sweep's trials, in an evaluation's worker."""
    data = ["--data.shards", str(place / "shards"), *NANO, "--run.storage", str(tmp_path / "runs")]
    data += ["--train.eval_every", "0", "--json"]
    first = ["--train.checkpoint_every", "2", "--parallel.stages", "2", "--resources.cpus_per_worker", "0.5"]

    def run(*words: str) -> dict[str, Any]:
        done = finhpc_in(place, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    assert run("pretrain", *data, *first, "--train.steps", "2", "--run.name", "one")["steps"] == 2
    longer = run("pretrain", *data, *first, "--train.steps", "4", "--run.name", "one")
    assert (longer["resumed_from_step"], longer["status"]) == (2, "finished")
    swept = run("sweep", *data, "--train.steps", "2", "--grid", "train.seed=[0,1]", "--run.name", "swept")
    assert [trial["status"] for trial in swept["trials"]] == ["finished", "finished"], swept
    own = ["--plugins", "my_parts", "--json"]
    packed = str(tmp_path / "packed")
    run("export", "--model", longer["model"], "--out", packed, "--quantization.bits", "8", *own)
    scored = run("evaluate", "--model", longer["model"], packed, "--tasks", "perplexity", *own,
                 "--data.shards", str(place / "shards"), "--run.storage", str(tmp_path / "runs"))  # fmt: skip
    losses = [model["scores"]["perplexity"]["loss"] for model in scored["models"]]
    assert abs(losses[0] - losses[1]) < 0.05
