"""One exported model in its runtime, measured in a process of its own: `python in_runtime.py REQUEST.json ANSWER.json`.

The process needs only the runtime: another interpreter may run this file, without finhpc. Request: `format` (onnx, gguf
or native), `path`, `prompt` (ids), `new` (tokens), `threads`, `windows` (lists of ids for the perplexity). The peak of
resident memory is that of opening and generating, because perplexity needs the logits of whole windows.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {}
    if request["new"]:
        begin = time.perf_counter()
        tokens = TOKENS[request["format"]](request)
        next(tokens)  # opened
        answer["open_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        ids = [next(tokens)]
        answer["first_token_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        ids += tokens
        answer["tokens_per_s"] = (len(ids) - 1) / (time.perf_counter() - begin)
        answer["ids"] = ids
        answer["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if request["windows"]:
        of = LOGITS[request["format"]](request)
        losses = [loss for ids in request["windows"] for loss in _losses(of(ids), ids)]
        answer["perplexity"] = math.exp(sum(losses) / len(losses))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def _losses(rows: Any, ids: list[int]) -> list[float]:
    """Return the loss of each token after the first, from logits (tokens, vocabulary)."""
    import numpy as np

    rows = np.asarray(rows[: len(ids) - 1], dtype=np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(rows).sum(axis=1))
    return [float(log_sums[i] - rows[i, token]) for i, token in enumerate(ids[1:])]


def onnx_tokens(request: dict[str, Any]) -> Iterator[int]:
    """Yield -1 when the model is open, then greedy ids."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(request["path"])
    options = {"intra_op_num_threads": request["threads"], "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    length = len(request["prompt"]) + request["new"]
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    yield -1
    generator.append_tokens(np.array([request["prompt"]], dtype=np.int32))
    for _ in range(request["new"]):
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def onnx_logits(request: dict[str, Any]) -> Callable[[list[int]], Any]:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = request["threads"], 1
    session = ort.InferenceSession(f"{request['path']}/model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {each.name: each.shape for each in session.get_inputs()}

    def logits(ids: list[int]) -> Any:
        tokens = np.array([ids], dtype=np.int64)
        feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(len(ids))[None]
        for name, shape in inputs.items():
            if name.startswith("past_key_values."):
                feed[name] = np.zeros((1, shape[1], 0, shape[3]), np.float32)
        return session.run(["logits"], feed)[0][0]

    return logits


def _llama_cpp(request: dict[str, Any], length: int, every: bool) -> Any:
    from llama_cpp import Llama

    threads = {"n_threads": request["threads"], "n_threads_batch": request["threads"]}
    return Llama(request["path"], n_ctx=length, n_batch=512, logits_all=every, verbose=False, **threads)


def gguf_tokens(request: dict[str, Any]) -> Iterator[int]:
    """Yield -1 when the model is open, then greedy ids."""
    llama = _llama_cpp(request, len(request["prompt"]) + request["new"] + 1, every=False)
    yield -1
    for i, token in enumerate(llama.generate(request["prompt"], temp=0.0, repeat_penalty=1.0)):
        yield int(token)
        if i + 1 == request["new"]:
            return


def gguf_logits(request: dict[str, Any]) -> Callable[[list[int]], Any]:
    llama = _llama_cpp(request, max(map(len, request["windows"])), every=True)

    def logits(ids: list[int]) -> Any:
        llama.reset()
        llama.eval(ids)
        return llama.scores[: len(ids)].copy()

    return logits


def native_logits(request: dict[str, Any]) -> Callable[[list[int]], Any]:
    import torch

    import finhpc

    torch.set_num_threads(request["threads"])
    model = finhpc.load_model(request["path"]).eval()

    def logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float().numpy()

    return logits


TOKENS = {"onnx": onnx_tokens, "gguf": gguf_tokens}
LOGITS = {"onnx": onnx_logits, "gguf": gguf_logits, "native": native_logits}

if __name__ == "__main__":
    main()
