"""Log a trained model to MLflow, and open it from there in any process that has finhpc.

Every model opens with `mlflow.pyfunc.load_model(uri).predict(prompts)`; a model of transformers' own layers also opens
with `mlflow.transformers.load_model(uri)`. Weights are safetensors; nothing is pickled. The folder's files go to
MLflow as they are; the model is never loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    pyfunc.add_to_model(model, loader_module="finhpc.tracking.pyfunc", data=_DATA)
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


class TextGenerator:
    """Continues prompts with greedy decoding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Each prompt with its continuation of `max_new_tokens` tokens."""
        new_tokens = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        return [self._continue(prompt, new_tokens) for prompt in _prompts(model_input)]

    def _continue(self, prompt: str, new_tokens: int) -> str:
        import torch

        from finhpc.models.files.tokens import prompt_ids, stop_ids

        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)])
        stop = stop_ids(self.tokenizer, self.model.generation_config)
        with torch.inference_mode():
            out = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stop or None,
                pad_token_id=stop[0] if stop else 0,
            )
        return str(self.tokenizer.decode(out[0], skip_special_tokens=True))


def _load_pyfunc(path: str) -> TextGenerator:
    """Open the model's folder; MLflow calls this."""
    from finhpc.models.files.tokenizer import open_tokenizer
    from finhpc.models.loading import load_model

    return TextGenerator(load_model(path), open_tokenizer(Path(path)))


def _prompts(model_input: Any) -> Iterable[str]:
    """The texts in a string, a list, an array, a series or the first column of a table."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "iloc"):
        column = model_input if model_input.ndim == 1 else model_input.iloc[:, 0]
        return [str(prompt) for prompt in column]
    return [str(prompt) for prompt in model_input]
