"""`finhpc bench export`: what a model takes in the runtimes that its exports are for.

For each number of bits and each format the model is exported, opened in a process of its own with
`resources.threads`, and measured: bytes on disk, peak resident memory of that process, time to the first token after a
prompt, tokens per second after it, and perplexity on a text, next to that of finhpc's own export of as many bits and of
the model in 16.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finhpc.bench import in_runtime
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import ExportBench
from finhpc.commands.export import export, scored_format
from finhpc.errors import ConfigError
from finhpc.models.families.registry import context_of
from finhpc.models.files.source import config_of, find_tokenizer, locate
from finhpc.models.files.tokens import encode
from finhpc.settings.export import ExportConfig, ExportQuantization

log = logging.getLogger(__name__)

PACKAGES = {"onnx": ("onnxruntime", "onnxruntime_genai"), "gguf": ("xllamacpp",)}
REMEDY = {"onnx": 'pip install "finhpc[onnx]"', "gguf": "pip install xllamacpp"}
TIMES = ("peak_rss_bytes", "open_s", "first_token_s", "tokens_per_s")
SHOWN = ("format", "bits", "file_bytes", "peak_rss_bytes", "first_token_s", "tokens_per_s", "perplexity")


def bench_export(settings: ExportBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: perplexity of each way over that of finhpc's export of as many bits, or of 16.

    Raises `ConfigError` for no model, no text, a text that is too short, or a runtime that `python` does not have.
    """
    began = time.perf_counter()
    if settings.model is None:
        raise ConfigError("bench export needs --model FOLDER, the model to measure.")
    path = locate(settings.model)
    python = settings.python or sys.executable
    for form in settings.formats:
        _need(python, form)
        _export(path, path / "measured", form, settings.bits[0], dry_run=True)
    prompt, windows = _ids(settings, path)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        own = {bits: _own(settings, path, Path(place), bits, windows) for bits in (16, *settings.bits)}
        for bits in settings.bits:
            for form in settings.formats:
                log.info(f"{form}, {bits} bits")
                out = Path(place, f"{form}-{bits}")
                made = _export(path, out, form, bits)
                target = out / "model.gguf" if form == "gguf" else out
                request = {"format": form, "path": str(target), "prompt": prompt, "new": settings.new}
                request |= {"threads": settings.resources.threads, "windows": []}
                times = [_run(python, request) for _ in range(settings.bench.repeats)]
                answer: Row = {key: statistics.median(each[key] for each in times) for key in TIMES}
                answer |= _run(python, request | {"new": 0, "windows": windows})
                row = {"format": form, "bits": bits, "scheme": made["scheme"], "file_bytes": made["size_bytes"]}
                rows.append(row | answer)
    ratios = {}
    for row in (*own.values(), *rows):
        for name, base in (("finhpc", own[row["bits"]]), ("16_bits", own[16])):
            row[f"perplexity_over_{name}"] = row["perplexity"] / base["perplexity"]
            if row is not base:
                way = f"perplexity_{row['format'].partition(' ')[0]}_{row['bits']}"
                ratios[f"{way}_over_{name}"] = row[f"perplexity_over_{name}"]
    rows = [*own.values(), *rows]
    conditions = {
        "model": settings.model,
        "threads": settings.resources.threads,
        "prompt": f"{settings.prompt} tokens, then {settings.new} greedy ones",
        "perplexity": f"{settings.windows} windows of {settings.seq_len} tokens of {settings.text}",
        "finhpc": "its own export with minmax; native, or merged where it has none",
    }
    return publish("export", settings.bench.out, conditions, rows, ratios, began, SHOWN)


def _own(settings: ExportBench, path: Path, place: Path, bits: int, windows: list[list[int]]) -> Row:
    """Return the row of finhpc's own export."""
    form = scored_format(path)
    made = _export(path, place / f"finhpc-{bits}", form, bits)
    request = {"format": "native", "path": str(place / f"finhpc-{bits}"), "prompt": [], "new": 0}
    answer = _run(sys.executable, request | {"threads": settings.resources.threads, "windows": windows})
    row = {"format": f"finhpc {form}", "bits": bits, "scheme": made["scheme"], "file_bytes": made["size_bytes"]}
    return row | dict.fromkeys(TIMES) | answer


def _export(path: Path, out: Path, form: str, bits: int, dry_run: bool = False) -> dict[str, Any]:
    how = {"model": str(path), "out": str(out), "format": form, "quantization": ExportQuantization(bits=bits)}  # type: ignore[arg-type]
    return export(ExportConfig.model_validate(how), dry_run)


def _run(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a process that has only this request."""
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place, "request.json"), Path(place, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [python, in_runtime.__file__, str(asked), str(answered)]
        # Otherwise files next to in_runtime.py would hide modules of the standard library.
        settings = {"OMP_NUM_THREADS": str(request["threads"]), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(
                f"{request['path']} does not run in {request['format']}'s runtime: {done.stderr.strip()[-500:]}"
            )
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answer


def _need(python: str, form: str) -> None:
    """Raise `ConfigError` if an interpreter has not a format's runtime."""
    code = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))"
    if subprocess.run([python, "-c", code, *PACKAGES[form]], capture_output=True).returncode:
        raise ConfigError(
            f"formats={form} needs {' and '.join(PACKAGES[form])} in {python}; run {REMEDY[form]} there, or give "
            "another interpreter with --python."
        )


def _ids(settings: ExportBench, path: Path) -> tuple[list[int], list[list[int]]]:
    """Return the ids of the prompt, and those of the windows of the text."""
    context, tokenizer = context_of(config_of(path)), find_tokenizer(path)
    if tokenizer is None:
        raise ConfigError(f"model={path} comes without a tokenizer; add the one that it was trained with.")
    if max(settings.seq_len, settings.prompt + settings.new) > context:
        raise ConfigError(f"seq_len={settings.seq_len} and prompt + new must be at most the context of {context}.")
    if settings.text is None:
        raise ConfigError("bench export needs --text FILE, a text to measure perplexity on.")
    file = Path(settings.text).expanduser()
    if not file.is_file():
        raise ConfigError(f"text={settings.text} is not a file; give a file of plain text.")
    (ids,) = encode(tokenizer, [file.read_text(encoding="utf-8")], plain=True)
    needed = max(settings.windows * settings.seq_len, settings.prompt)
    if len(ids) < needed:
        raise ConfigError(
            f"text={settings.text} has {len(ids):,} tokens, and {needed:,} are needed; give a longer one."
        )
    return ids[: settings.prompt], [
        ids[i * settings.seq_len : (i + 1) * settings.seq_len] for i in range(settings.windows)
    ]
