"""The learning rates of the factors A (rank, in) and B (out, rank) of a linear layer, over that of the optimizer.

| rule | A | B |
|---|---|---|
| plain | 1 | 1 |
| mup | 1/2 | in / (2 rank) |
| loro | rank / d | rank / d |
| loraplus | 1 | 16 |

- mup: S. Qiu et al., "Compute Better Spent", 2024 (arXiv 2406.06248), `lr_mult` in its code: in muP a matrix learns at
  a rate of 1 / (its inputs), so at (the layer's inputs / its inputs), divided among the matrices of the layer.
- loro: Z. Mo, L.-K. Huang, S. J. Pan, "Parameter and Memory Efficient Pretraining via Low-rank Riemannian
  Optimization", 2025, `lr_scaler` in its code; d is the smaller side of the layer, the hidden size in most of them.
- loraplus: S. Hayou et al., "LoRA+", 2024 (arXiv 2402.12354).

The factors of an embedding have the rate 1: a rule is about a layer's inputs, and a token is not a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from finhpc.training.optimizers.kind import Shape, blocks_of, factor_of, pair_of

Rule = Callable[[int, int, int], tuple[float, float]]  # in, out, rank -> the rates of A and B

RULES: dict[str, Rule] = {
    "plain": lambda inputs, outputs, rank: (1.0, 1.0),
    "mup": lambda inputs, outputs, rank: (0.5, inputs / (2 * rank)),
    "loro": lambda inputs, outputs, rank: (rank / min(inputs, outputs), rank / min(inputs, outputs)),
    "loraplus": lambda inputs, outputs, rank: (1.0, 16.0),
}


def rate_of(rule: str, name: str, shapes: Mapping[str, Shape]) -> float:
    """The rate of a parameter by a rule; `shapes`: of its whole layer, Hugging Face name -> shape."""
    factor = factor_of(name)
    if factor is None:
        return 1.0
    a, b = (shapes[other] for other in pair_of(name))
    blocks = blocks_of(a, b)
    return RULES[rule](a[1], b[0] // blocks, b[1])[factor == "B"] if blocks else 1.0
