"""The paper's Table IX, finetuning Llama 2 with adapters, and where it and the arithmetic part ways."""

from __future__ import annotations

from dataclasses import dataclass

from finhpc.planning.paper_memory import Difference


@dataclass(frozen=True)
class Finetuned:
    """A row of Table IX: what is printed of a finetuning. Memory and model size in GB, hours of finetuning."""

    preset: str
    rank: int
    bits: int
    trained_m: float
    memory_gb: float
    hours: float
    model_gb: float


ROWS = [
    Finetuned("llama2-7b", 8, 4, 4.2, 11.8, 7.8, 5.1),
    Finetuned("llama2-7b", 8, 8, 4.2, 14.2, 4.7, 7.9),
    Finetuned("llama2-7b", 8, 16, 4.2, 20.3, 3.3, 13.4),
    Finetuned("llama2-7b", 4, 16, 2.1, 20.3, 4.0, 13.4),
    Finetuned("llama2-7b", 16, 16, 8.4, 24.3, 2.5, 13.4),
    Finetuned("llama2-13b", 8, 4, 9.8, 17.7, 8.5, 9.8),
    Finetuned("llama2-13b", 8, 8, 9.8, 30.4, 6.8, 15.5),
    Finetuned("llama2-13b", 8, 16, 9.8, 32.7, 5.4, 26.2),
    Finetuned("llama2-13b", 4, 16, 4.9, 32.7, 5.4, 26.2),
    Finetuned("llama2-13b", 16, 16, 19.6, 33.0, 6.1, 26.2),
]
# The layers whose adapters have the printed number of parameters; the paper does not name them.
TARGETS = {"llama2-7b": ["q_proj", "v_proj"], "llama2-13b": ["q_proj", "k_proj", "v_proj"]}

DIFFERENCES = [
    Difference("Table IX, #Params of Llama2-13B", "6.7 B", "13.02 B", "Llama2-7B's row again"),
    Difference(
        "Table IX, #Params of the adapters",
        "4.2 M at r = 8 for 7B, 9.8 M for 13B",
        "4.19 M with q and v, 9.83 M with q, k and v",
        "two matrices a layer for 7B (13B would have 6.6 M), three for 13B; which is not said",
    ),
    Difference(
        "Table IX, memory of full finetuning",
        "112 and 208 GB",
        "107.8 and 208.3 GB",
        "16 bytes of 7 and of 13.02 billion parameters instead of 6.74 and 13.02; without intermediates",
    ),
    Difference(
        "Table IX, finetuning hours of Llama2-7B and 13B",
        "184,320 and 368,640",
        "",
        "Table I's GPU hours of pretraining",
    ),
    Difference(
        "Table IX, 7B at 16 bits, memory by rank",
        "20.3 GB at r = 4 and 8, 24.3 GB at r = 16",
        "0.07 GB more from r = 8 to 16",
        "4.2 M more parameters of 16 bytes",
    ),
    Difference(
        "Table IX, model size at 8 and 4 bits",
        "7.9, 5.1 GB (7B); 15.5, 9.8 GB (13B)",
        "7.0, 3.9 GB; 13.4, 7.2 GB",
        "int8, and NF4 with its scales, of the blocks' matrices; embedding, head and norms at 16 bits",
    ),
    Difference(
        "Table IX, 13B at 8 bits, memory beyond the model",
        "30.4 - 15.5 = 14.9 GB",
        "as at 16 and 4 bits",
        "32.7 - 26.2 = 6.5 GB and 17.7 - 9.8 = 7.9 GB; 7B: 6.9, 6.3 and 6.7 GB",
    ),
    Difference(
        "Table IX, hours by rank",
        "2.5 at r = 16, 3.3 at r = 8, 4.0 at r = 4 (7B)",
        "about the same",
        "the adapters are 0.1 % of the operations; 13B: 6.1, 5.4, 5.4",
    ),
    Difference(
        "Section VI.C, 13B at 8 bits",
        "Llama2-7B-r8 (8-bit), 6.8 x",
        "Llama2-13B-r8 (8-bit)",
        "208 / 30.4 = 6.84; 7B's own 8 bits: 112 / 14.2 = 7.9",
    ),
]
