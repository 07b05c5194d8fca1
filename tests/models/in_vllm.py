"""Models in vLLM, one after the other in one process: `python in_vllm.py REQUEST.json ANSWER.json`.

vLLM's own interpreter runs this file. Request: a list of cases, each with `model`, `adapter` (folder or null),
`prompts` (lists of ids), `new` (tokens), and perhaps `dtype`, `context`, `eager` and `repeats`. Answer: per case `ids`,
the new ones of each prompt, and `tokens_per_s` of the fastest repeat; or `error`, what vLLM raised.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# In this process, so that a case's error is that of the model; 1 GiB of cache.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def answer(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = case["adapter"]
    how: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    try:
        llm = LLM(
            case["model"],
            dtype=case.get("dtype", "float32"),
            max_model_len=case.get("context", 64),
            max_num_seqs=max(2, len(case["prompts"])),
            enforce_eager=case.get("eager", True),  # compiling one model takes longer than all of them together
            seed=0,
            **how,
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    sampling = SamplingParams(temperature=0, max_tokens=case["new"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    times = []
    for _ in range(case.get("repeats", 1)):
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
        times.append(time.perf_counter() - begin)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    gc.collect()
    return {"ids": ids, "tokens_per_s": sum(map(len, ids)) / min(times)}


def main() -> None:
    os.environ.update(SETTINGS)
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([answer(case) for case in cases]), encoding="utf-8")


if __name__ == "__main__":
    main()
