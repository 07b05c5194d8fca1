"""The paper's memory tables as formulas, and where its tables and the arithmetic part ways.

FinGPT-HPC, Tables I to IV and sections III.B to IV.B. Sizes there are decimal GB of 16-bit numbers,
unless a difference below says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finhpc.planning.fake_passes import PartBytes
from finhpc.planning.outline import Outline

GB, GIB = 10**9, 2**30
NUMBER = 2  # bytes of a 16-bit number


@dataclass(frozen=True)
class Variable:
    """An intermediate variable of Table IV: elements for each token of one part of that kind."""

    name: str
    kind: str  # of the part that makes it: embedding, attention, mlp or norm
    per_token: float


SCORES = ("qk^T", "s")  # what recomputing attention drops


def variables(hf_config: Any, seq_len: int) -> list[Variable]:
    """Table IV's variables of a model, generalised: grouped keys, GPT-2 (no gate), low-rank pairs (A x of each).

    The table's shapes: x^e and x^d once (so are its sizes, see DIFFERENCES), all others in every layer.
    A pair's inner vector A x is as long as its rank; the paper's low-rank layers keep it too, though
    its tables leave it out.
    """
    n, heads = int(hf_config.hidden_size), int(hf_config.num_attention_heads)
    llama = hasattr(hf_config, "num_key_value_heads")
    kv = n * (hf_config.num_key_value_heads if llama else heads) // heads
    m = int(hf_config.intermediate_size if llama else hf_config.n_inner or 4 * n)
    ranks = getattr(hf_config, "low_rank", None) or {}
    found = [
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
    ]
    pairs = {"attention": 4 if llama else 2, "mlp": 3 if llama else 2}  # GPT-2 has one matrix for q, k and v
    found += [Variable("A x", kind, pairs[kind] * ranks[kind]) for kind in pairs if ranks.get(kind)]
    return found


def part_bytes(outline: Outline, micro_batch_size: int, recompute: str) -> dict[str, PartBytes]:
    """Kind of part -> bytes that one micro-batch's Table IV variables take there, in 16 bits (section IV.B).

    `attention` drops qk^T and s, and computes one layer's at a time again; `full` keeps each block's
    input and computes one block's variables at a time again.
    """
    tokens = micro_batch_size * outline.seq_len
    all_of = variables(outline.hf_config, outline.seq_len)

    def size(kinds: tuple[str, ...], dropped: tuple[str, ...] = ()) -> int:
        return round(NUMBER * tokens * sum(v.per_token for v in all_of if v.kind in kinds and v.name not in dropped))

    found = {}
    for kind in dict.fromkeys(outline.kinds):
        if kind == "block":
            kept, again = NUMBER * tokens * int(outline.hf_config.hidden_size), size(("attention", "mlp"))
        elif kind == "attention" and recompute == "attention":
            kept, again = size((kind,), SCORES), size((kind,)) - size((kind,), SCORES)
        else:
            kept, again = size((kind,)), 0
        found[kind] = PartBytes(kept=kept, forward=kept, backward=again, first_backward=again)
    return found


def table_iii_intermediates(layers: int, batch: int, width: int, heads: int, seq_len: int = 4096) -> int:
    """Bytes behind Table III's last column: s b h (34 + 5 a s / h) a layer.

    That is Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models),
    for a GPT layer in 16 bits with dropout masks and GELU; the paper does not name it, but prints it
    exactly, in GiB, for Llama2-7B at batch 4 and 16 and, with a width of 4096 instead of 8192, for
    Llama2-70B.
    """
    return layers * seq_len * batch * (34 * width + 5 * heads * seq_len)


@dataclass(frozen=True)
class Difference:
    """A place where the paper's text or table and the arithmetic disagree."""

    where: str
    printed: str
    arithmetic: str
    why: str


DIFFERENCES = [
    Difference("Section VI.A, GPT2-127M", "n = 786", "n = 768", "12 heads of 64, as in its parameter count"),
    Difference("Table I against section III.C.1", "Llama2's data: 4.6 TB", "4.7 TB in the text", "unclear which"),
    Difference(
        "Table II, W^H of Llama2-7B", "1442.84 M", "131.07 M", "W^D's row again; its 0.26 GB and 1.94 % are W^H's"
    ),
    Difference("Table II, W^U, W^G, W^D of Llama2-13B", "2834.84 M", "2831.16 M", "5120 x 13824 x 40; storage 5.66 GB"),
    Difference("Table II, W^Q, W^K, W^V, W^O of Llama2-13B", "1048.56 M", "1048.58 M", "5120 x 5120 x 40, cut off"),
    Difference(
        "Table II, percentages",
        "7.98, 21.40; 1.25, 8.07, 21.74",
        "7.97, 21.41; 1.26, 8.06, 21.75",
        "the last digit, for Llama2-7B (W^Q, W^U) and Llama2-13B (W^E, W^Q, W^U)",
    ),
    Difference("Table II, RMSNorm of Llama2-13B", "0.21 M", "0.20 M", "5120 x 40 = 0.2048 M, each of the two a layer"),
    Difference("Table II", "one RMSNorm a module", "and a final one (4096, 5120)", "left out; 0.004 M"),
    Difference(
        "Section III.B, W^E and W^H at r = 512",
        "262.14 M to 18.48 M",
        "36.96 M",
        "18.48 M is one of the two; section IV.C's 1.32 B counts both",
    ),
    Difference(
        "Section III.C.2, Llama2-7B at r = 512",
        "about 2 B parameters, 4 GB",
        "1.32 B, 2.63 GB",
        "1.32 B in section IV.C",
    ),
    Difference(
        "Table III, parameters, gradients, optimiser",
        "14, 14, 84; 140, 140, 840 GB",
        "13.5, 13.5, 80.9; 138, 138, 828 GB",
        "2, 2, 12 bytes of 7 and 70 billion instead of 6.74 and 68.98",
    ),
    Difference(
        "Table III, intermediates of Llama2-7B",
        "81, 388, 1552 at batch 1, 4, 16",
        "81, 324, 1296 GB by Table IV; 97, 388, 1552 GiB by s b h (34 + 5 a s / h) a layer",
        "batch 1 is Table IV's sum, batches 4 and 16 another formula, in GiB, for layers that Llama does not have",
    ),
    Difference(
        "Table III, intermediates of Llama2-70B",
        "442.5, 1770, 7080",
        "485, 1940, 7760 GiB by the same formula; 404, 1617, 6466 GB by Table IV's variables with 8 key/value heads",
        "computed with a width of 4096 instead of 8192",
    ),
    Difference(
        "Table IV, x^d",
        "536.9 M and << 0.1 GB",
        "16.8 M and 0.03 GB, or 536.9 M and 1.07 GB",
        "the size counts it once, the number in every layer; the sum of 81 GB takes the size",
    ),
    Difference("Table IV, x^u", "2.8 GB", "2.9 GB", "4096 x 11008 x 32 x 2 bytes = 2.886 GB, cut off (x^g too)"),
    Difference(
        "Table IV",
        "one size for q, k, v; none for RoPE's, heads', SiLU's results, norms' and the loss's logits",
        "kept too by an unfused implementation",
        "finhpc's own memory is counted from its code instead (estimate.scheme finhpc)",
    ),
    Difference(
        "Section IV.B, recomputing everything",
        "81 GB to 2.5 GB, 97 %",
        "3.6 GB, 95.6 %",
        "2.5 GB is one layer's variables; the 32 kept inputs take 1.07 GB more",
    ),
    Difference(
        "Section IV.B, recomputing qk^T and s",
        "81 GB to 12.2 GB",
        "14.4 GB",
        "the one layer's that are there again while its gradients are computed take 2.1 GB",
    ),
    Difference(
        "Section IV.B, recomputing qk^T and s",
        "about 6 % more computation",
        "2.4 % (q k^T alone), 4.7 % with s v",
        "of forward and backward of a Llama2-7B layer at 4096 tokens, no causal saving; 5.5 % if the products of "
        "attention are left out of the whole",
    ),
]
