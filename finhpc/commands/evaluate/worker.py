"""A worker of `finhpc evaluate`: it scores pairs of a model and a task, and keeps the model open between them."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finhpc.cluster.package import Driver
from finhpc.cluster.tasks import attempt
from finhpc.data.shards.shards import Shards
from finhpc.errors import FinhpcError
from finhpc.evaluation import plausible
from finhpc.evaluation.models import Subject
from finhpc.evaluation.tasks import TaskFile
from finhpc.files import write_atomic, write_json
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.export import ExportConfig

PERPLEXITY_TOKENS = 600  # per sample, roughly


@dataclass(frozen=True)
class Pair:
    """A model and a task (None: perplexity); `out` is the path of their files without suffix."""

    subject: Subject
    task: TaskFile | None
    out: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.out.name

    @property
    def title(self) -> str:
        return f"{self.subject.name} on {self.name}"

    @property
    def weight(self) -> int:
        """Rough tokens to read, to begin with the longest pairs."""
        return (self.task.examples or 100) * self.task.tokens if self.task else 100 * PERPLEXITY_TOKENS

    def read(self) -> dict[str, Any] | None:
        """Return the stored scores, or None if there are none of this model, task and settings."""
        try:
            scores: dict[str, Any] = json.loads(self._file(".json").read_text(encoding="utf-8"))
            return scores if scores.pop("sha256") == self.sha256 else None
        except (OSError, ValueError, KeyError):
            return None

    def write(self, scores: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write the table of predictions, then the scores, so that a pair with scores is complete."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.out.parent.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
        write_atomic(self._file(".parquet"), sink.getvalue().to_pybytes())
        write_json(self._file(".json"), {"sha256": self.sha256, **scores})

    def _file(self, ending: str) -> Path:
        return self.out.with_name(self.name + ending)


class Scorer:
    """A Ray actor that scores pairs and keeps the last model open; also usable as a plain object."""

    def __init__(self, config: EvaluateConfig, cuda: bool, driver: Driver) -> None:
        import torch

        torch.set_num_threads(config.resources.threads)
        self.driver, self.config, self.device = driver, config, "cuda" if cuda else "cpu"
        self._open: Subject | None = None
        self._model: Any = None

    def score(self, pair: Pair) -> FinhpcError | None:
        """Score a pair and write its files; return the error if that fails."""
        return attempt(self._score, pair, pair.title, self.driver)

    def _score(self, pair: Pair) -> None:
        from finhpc.evaluation.perplexity import perplexity
        from finhpc.evaluation.scores import score

        begin = time.monotonic()
        model, config = self._opened(pair), self.config
        if pair.task is None:
            scores, rows = perplexity(model.model, Shards.open(config.data.shards or ""), config)
        else:
            scores, rows = score(model, pair.task, config.bootstrap, config.seed, config.limit)
        plausible.check(pair.title, scores, plausible.any_model(model.model.config.vocab_size))
        pair.write(scores | {"wall_s": time.monotonic() - begin}, rows)

    def _opened(self, pair: Pair) -> Any:
        """Return the pair's model, ready for lm-eval, after closing the previous one."""
        if self._open == pair.subject:
            return self._model
        from finhpc.evaluation.language_model import LanguageModel
        from finhpc.evaluation.models import load_for_evaluation

        self._open = self._model = None
        path, adapter = pair.subject.path, pair.subject.adapter
        quantized = pair.out.with_name(f".{pair.name}-quantized")
        shutil.rmtree(quantized, ignore_errors=True)
        if self.config.quantization.bits < 16:  # exported, so that the weights are exactly an export's
            from finhpc.commands.export import export, scored_format

            pair.out.parent.mkdir(parents=True, exist_ok=True)
            form, quantization = scored_format(Path(path)), self.config.quantization
            export(ExportConfig(model=path, format=form, out=str(quantized), quantization=quantization))
            path = str(quantized)
        try:
            opened = load_for_evaluation(path, adapter, self.config.dtype, self.device)
        finally:
            shutil.rmtree(quantized, ignore_errors=True)
        self._model = LanguageModel(*opened, self.config.batch_size)
        self._open = pair.subject
        return self._model
