"""Log a trained model to MLflow.

Every model opens with `mlflow.pyfunc.load_model(uri).predict(prompts)`; a model of transformers' own layers also opens
with `mlflow.transformers.load_model(uri)`. Weights are safetensors; nothing is pickled. The folder's files go to
MLflow as they are; the model is never loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model

REQUIREMENTS = ("torch", "transformers", "safetensors")  # and finhpc itself, which is not on an index
MAX_NEW_TOKENS = 32
_DATA = "model"
_TOKENIZER = "components/tokenizer"


def log_model(client: MlflowClient, run_id: str, folder: str | Path, name: str = "model", step: int = 0) -> str:
    """Log a Hugging Face folder as a model of the run; return its address (`models:/m-...`)."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    # The client's own calls, not `mlflow.pyfunc.log_model`, because that one works through the
    # process-wide active run and tracking URI.
    folder = Path(folder)
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id)
    try:
        # Next to the model, so that its files can be linked: large weights are not copied.
        with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=folder.parent) as draft:
            model = Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_id=logged.model_id,
                model_uuid=logged.model_id,
            )
            _write(folder, Path(draft), model)
            client.log_model_artifacts(logged.model_id, draft)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
    return f"models:/{logged.model_id}"


def _write(folder: Path, out: Path, model: Model) -> None:
    """Write the files of an MLflow model into `out`."""
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    shutil.copytree(folder, out / _DATA, copy_function=_link)
    text = Schema([ColSpec(DataType.string)])
    model.signature = ModelSignature(
        inputs=text,
        outputs=text,
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)]),
    )
    pyfunc.add_to_model(model, loader_module="finhpc.generation.mlflow_model", data=_DATA)
    is_model = (folder / "config.json").is_file()  # otherwise it is an adapter, which opens over its base
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if is_model else {}
    if is_model and "lowrank" not in config["model_type"]:
        _add_transformers_flavor(folder, out, model, config)
    model.model_size_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS]
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    model.save(str(out / "MLmodel"))


def _add_transformers_flavor(folder: Path, out: Path, model: Model, config: dict[str, Any]) -> None:
    """Write the same as `mlflow.transformers.save_model(folder, task=...)`.

    That function fails in MLflow 3.17: it expects the pipelines of transformers to be classes, which are names since
    transformers 5.2. With a loaded model it would work, at the cost of loading it.
    """
    import transformers

    from finhpc.models.files.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(folder)
    tokenizer.save_pretrained(str(out / _TOKENIZER))
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        source_model_name=folder.name,
        model_binary=_DATA,
        tokenizer_type=type(tokenizer).__name__,
        components=["tokenizer"],
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
