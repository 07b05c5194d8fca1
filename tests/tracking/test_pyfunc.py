"""Models in MLflow: opened again in a fresh process, by pyfunc and by the transformers flavour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from finhpc.generation.mlflow_model import TextGenerator
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config, resolve_shape
from finhpc.models.initialize import initial_model
from finhpc.models.loading import load_model
from finhpc.settings.pretrain import Method, Model
from finhpc.settings.training import default_tracking_uri
from finhpc.tracking.describe import Description
from finhpc.tracking.pyfunc import log_model
from finhpc.tracking.tracker import Tracker

PROMPTS = ["hello world", "this is"]

OPEN = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
out = {}
model = mlflow.pyfunc.load_model(sys.argv[2])
out["default"] = model.predict(["hello world", "this is"])
out["short"] = model.predict(["hello world", "this is"], params={"max_new_tokens": 3})
import pandas
out["table"] = model.predict(pandas.DataFrame({"prompt": ["hello world", "this is"]}), params={"max_new_tokens": 3})
if sys.argv[3] == "transformers":
    import mlflow.transformers
    pipe = mlflow.transformers.load_model(sys.argv[2])
    told = pipe(["hello world", "this is"], max_new_tokens=3, do_sample=False)
    out["pipeline"] = [answer[0]["generated_text"] for answer in told]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense GPT-2 with a tokeniser, as training leaves it."""
    out = tmp_path_factory.mktemp("run") / "model"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["hello world, this is a test"] * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(out)
    shape = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=bpe.get_vocab_size(), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(shape).save_pretrained(out)
    return out


def _open(uri: str, model_uri: str, flavor: str) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, uri, model_uri, flavor], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_dense_model_opens_both_ways_in_a_fresh_process(tmp_path: Path, folder: Path) -> None:
    run_folder = tmp_path / "one"
    run_folder.mkdir()
    uri = default_tracking_uri(tmp_path)
    tracker = Tracker(Description(run_folder, uri, "tests", "one", {}, {})).start()
    assert tracker.finish("FINISHED", {"steps": 3}, model=folder)

    direct = TextGenerator(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    short = direct.predict(PROMPTS, {"max_new_tokens": 3})
    assert all(text.startswith(prompt) for text, prompt in zip(short, PROMPTS, strict=True))
    found = _open(uri, f"runs:/{tracker.run_id}/model", "transformers")
    assert found["default"] == direct.predict(PROMPTS, {"max_new_tokens": 32})
    assert found["short"] == found["table"] == found["pipeline"] == short
    assert found["default"] != short

    stored = [path for path in (tmp_path / "mlartifacts" / "models").rglob("*") if path.is_file()]
    assert {path.suffix for path in stored if "model" in path.parent.name} == {".json", ".safetensors"}
    assert not [path for path in stored if str(folder.parent).encode() in path.read_bytes()]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]  # no draft stays behind


def test_a_low_rank_model_opens_by_pyfunc(tmp_path: Path, folder: Path) -> None:
    shape = resolve_shape(Model(layers=1, width=16, heads=2, context=64), len(AutoTokenizer.from_pretrained(folder)))
    hf_config = make_config(shape, ranks_of(Method(rank=4)))
    model = initial_model(hf_config, seed=0, scheme="spectral")
    model.save_pretrained(tmp_path / "low")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "low")

    uri = default_tracking_uri(tmp_path)
    client = MlflowClient(uri)
    experiment = client.create_experiment("tests", artifact_location=str(tmp_path / "mlartifacts"))
    run = client.create_run(experiment)
    model_uri = log_model(client, run.info.run_id, tmp_path / "low", step=7)
    direct = TextGenerator(load_model(tmp_path / "low"), AutoTokenizer.from_pretrained(folder))
    found = _open(uri, model_uri, "pyfunc")
    assert found["default"] == direct.predict(PROMPTS, {"max_new_tokens": 32})
    assert found["short"] == found["table"] == direct.predict(PROMPTS, {"max_new_tokens": 3})
    (output,) = client.get_run(run.info.run_id).outputs.model_outputs
    assert (f"models:/{output.model_id}", output.step) == (model_uri, 7)


def test_a_failed_upload_is_not_ready(tmp_path: Path, folder: Path) -> None:
    uri = default_tracking_uri(tmp_path)
    client = MlflowClient(uri)
    (tmp_path / "file").write_text("")
    experiment = client.create_experiment("tests", artifact_location=str(tmp_path / "file" / "under"))
    run = client.create_run(experiment)
    with pytest.raises(OSError, match="Not a directory"):
        log_model(client, run.info.run_id, folder)
    (model,) = client.search_logged_models([experiment])
    assert model.status == "FAILED"
