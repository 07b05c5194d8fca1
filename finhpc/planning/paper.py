"""The paper's memory tables as formulas, and what it prints (`paper.yaml`).

FinGPT-HPC, Tables I to IV and IX, sections III.B to IV.B. Its sizes are decimal GB of 16-bit numbers, except in the
places that `differences` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from finhpc.planning.fake_passes import PartBytes
from finhpc.planning.outline import Outline

NUMBER = 2  # bytes of a 16-bit number
SCORES = ("qk^T", "s")  # what recomputing attention drops


@cache
def _printed() -> Any:
    return yaml.safe_load((files("finhpc.planning") / "paper.yaml").read_text(encoding="utf-8"))


def differences(of: Literal["pretraining", "finetuning"]) -> list[dict[str, str]]:
    """The places where the paper disagrees with the arithmetic: where, printed, arithmetic, why."""
    return list(_printed()[of])


def table_ix(preset: str | None) -> list[dict[str, Any]]:
    """Table IX's rows of a model: preset, rank, bits, trained_m, memory_gb, hours, model_gb."""
    return [row for row in _printed()["table_ix"] if row["preset"] == preset]


def table_ix_targets(preset: str) -> list[str]:
    """The layers whose adapters have as many parameters as Table IX prints."""
    return list(_printed()["targets"][preset])


@dataclass(frozen=True)
class Variable:
    """An intermediate variable of Table IV: the elements that each token has in one part of that kind."""

    name: str
    kind: str  # embedding, attention, mlp or norm
    per_token: float


def variables(hf_config: Any, seq_len: int) -> list[Variable]:
    """Table IV's variables of a model, generalized to grouped keys, GPT-2 (no gate) and low-rank pairs (A x of each).

    The table's shapes: x^e and x^d once (as their sizes are, see `differences`), all others in every layer. A pair's
    inner vector A x is as long as its rank; the paper's low-rank layers store it too, though its tables omit it.
    """
    n, heads = int(hf_config.hidden_size), int(hf_config.num_attention_heads)
    llama = hasattr(hf_config, "num_key_value_heads")
    kv = n * (hf_config.num_key_value_heads if llama else heads) // heads
    m = int(hf_config.intermediate_size if llama else hf_config.n_inner or 4 * n)
    ranks = getattr(hf_config, "low_rank", None) or {}
    apart = llama or (ranks and hf_config.low_rank_qkv == "separate")  # GPT-2 has one matrix for q, k and v
    pairs = {"attention": {"qkv": 3 if apart else 1, "out": 1}, "mlp": {"up": 2 if llama else 1, "down": 1}}
    narrow = {
        kind: sum(pairs[kind][key] * (ranks.get(key, ranks.get(kind)) or 0) for key in pairs[kind]) for kind in pairs
    }
    return [
        Variable("x^e", "embedding", n),
        Variable("~x^e", "attention", n),
        Variable("k", "attention", kv),
        Variable("q", "attention", n),
        Variable("v", "attention", kv),
        Variable("qk^T", "attention", heads * seq_len),
        Variable("s", "attention", heads * seq_len),
        Variable("x^o", "attention", n),
        Variable("~x^o", "mlp", n),
        Variable("x^u", "mlp", m),
        *([Variable("x^g", "mlp", m)] if llama else []),
        Variable("x^d", "norm", n),
        *(Variable("A x", kind, length) for kind, length in narrow.items() if length),
    ]


def part_bytes(outline: Outline, micro_batch_size: int, recompute: str) -> dict[str, PartBytes]:
    """Kind of part -> bytes of one micro-batch's Table IV variables, in 16 bits (section IV.B).

    `attention` drops qk^T and s and recomputes them for one layer at a time; `full` stores each block's input and
    recomputes the variables of one block at a time.
    """
    tokens = micro_batch_size * outline.seq_len
    every = variables(outline.hf_config, outline.seq_len)

    def size(kinds: tuple[str, ...], dropped: tuple[str, ...] = ()) -> int:
        return round(NUMBER * tokens * sum(v.per_token for v in every if v.kind in kinds and v.name not in dropped))

    parts = {}
    for kind in dict.fromkeys(outline.kinds):
        if kind == "block":
            stored, again = NUMBER * tokens * int(outline.hf_config.hidden_size), size(("attention", "mlp"))
        elif kind == "attention" and recompute == "attention":
            stored, again = size((kind,), SCORES), size((kind,)) - size((kind,), SCORES)
        else:
            stored, again = size((kind,)), 0
        parts[kind] = PartBytes(kept=stored, forward=stored, backward=again, first_backward=again)
    return parts
