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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

Losses = Callable[[list[int]], list[float]]  # of each token of a window after the first
Logits = Callable[[list[int]], Any]  # (tokens, vocabulary)


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
        answer["peak_rss_bytes"] = peak_memory()
    if request["windows"]:
        of = LOSSES[request["format"]](request)
        losses = [loss for ids in request["windows"] for loss in of(ids)]
        answer["perplexity"] = math.exp(sum(losses) / len(losses))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def peak_memory() -> int:
    """Return the most bytes that this process had in memory.

    Linux counts for getrusage also what the process that started this one had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_logits(logits: Callable[[dict[str, Any]], Logits]) -> Callable[[dict[str, Any]], Losses]:
    """Return what opens a model and gives the loss of each token of a window after the first."""

    def opened(request: dict[str, Any]) -> Losses:
        rows = logits(request)
        return lambda ids: _losses(rows(ids), ids)

    return opened


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


def onnx_logits(request: dict[str, Any]) -> Logits:
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


class LlamaCpp:
    """llama.cpp's server in this process, with room for `length` tokens; `adapters`: files of LoRA adapters it adds."""

    def __init__(self, request: dict[str, Any], length: int, adapters: Sequence[str] = ()) -> None:
        import xllamacpp

        how = xllamacpp.CommonParams()
        how.model.path, how.n_ctx, how.n_parallel = request["path"], length, 1
        how.cpuparams.n_threads = how.cpuparams_batch.n_threads = request["threads"]
        how.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
        how.cache_ram_mib, how.swa_full, how.verbosity = 0, True, 0
        self.server = xllamacpp.Server(how)

    def ask(self, path: str, **body: Any) -> Any:
        address = f"{self.server.listening_address}/{path}"
        asked = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(asked) as answer:  # it is this machine, whatever the proxy
            return json.load(answer)

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Continue a prompt; what it has in common with the previous one is not computed again."""
        how = {"temperature": 0.0, "ignore_eos": True, "return_tokens": True}
        found: list[int] = self.ask("completion", prompt=ids, n_predict=new, **how)["tokens"]
        return found

    def log_probability(self, ids: list[int], token: int) -> float:
        """Return the log probability of a token after ids: it is forced, and the server tells what it had been."""
        answer = self._forced(ids, token, 1)
        return self.log_probabilities(ids)[token] if answer is None else float(answer["logprob"])

    def log_probabilities(self, ids: list[int]) -> dict[int, float]:
        """Return the log probability of every token after ids, which takes longer."""
        (plain,) = self.ask("tokenize", content="a")["tokens"][-1:]
        answer = self._forced(ids, plain, 1 << 30)
        assert answer is not None
        return {int(each["id"]): float(each["logprob"]) for each in answer["top_logprobs"]}

    def _forced(self, ids: list[int], token: int, count: int) -> Any:
        """Return what the server tells about a next token; None if the token alone is no text in UTF-8."""
        how = {"temperature": 0.0, "n_probs": count, "logit_bias": [[token, 1e6]]}
        told = self.ask("completion", prompt=ids, n_predict=1, **how).get("completion_probabilities")
        return told[0] if told else None


def gguf_tokens(request: dict[str, Any]) -> Iterator[int]:
    """Yield -1 when the model is open, then greedy ids."""
    prompt, new = request["prompt"], request["new"]
    model = LlamaCpp(request, len(prompt) + new + 1)
    yield -1
    first = model.greedy(prompt, 1)
    yield from first
    yield from model.greedy(prompt + first, new - 1)


def gguf_losses(request: dict[str, Any]) -> Losses:
    """The server gives probabilities of the last position only, so each token is a request of its own."""
    model = LlamaCpp(request, max(map(len, request["windows"])) + 1)
    return lambda ids: [-model.log_probability(ids[:i], ids[i]) for i in range(1, len(ids))]


def native_logits(request: dict[str, Any]) -> Logits:
    import torch

    import finhpc

    torch.set_num_threads(request["threads"])
    model = finhpc.load_model(request["path"]).eval()

    def logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float().numpy()

    return logits


TOKENS = {"onnx": onnx_tokens, "gguf": gguf_tokens}
LOSSES = {"onnx": of_logits(onnx_logits), "gguf": gguf_losses, "native": of_logits(native_logits)}

if __name__ == "__main__":
    main()
