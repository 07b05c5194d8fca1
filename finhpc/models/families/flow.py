"""How data flows through the parts that every family shares.

The tokens travel with the hidden states through the pipeline, so only the first stage reads data and the last has its
labels. Documents in a block are separated only by the end-of-text token: attention crosses document borders, as in
GPT-2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.models.families.family import Flow
from finhpc.models.loss import cross_entropy


def embed(tokens: Tensor, module: nn.Module) -> Flow:
    return module(tokens), tokens


def apply(flow: Flow, module: nn.Module) -> Flow:
    hidden, tokens = flow
    return module(hidden), tokens


def mlp(flow: Flow, norm: nn.Module, mlp: nn.Module) -> Flow:
    hidden, tokens = flow
    return hidden + mlp(norm(hidden)), tokens


def head(flow: Flow, module: nn.Module) -> Tensor:
    """Return the mean cross-entropy in nats of each next token, in float32, as transformers computes it.

    A sample's last state predicts nothing.
    """
    hidden, tokens = flow
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return cross_entropy(logits(rows, module), tokens[:, 1:].reshape(-1))


def logits(hidden: Tensor, module: nn.Module) -> Tensor:
    """Apply the output layer, or the matrix of the embedding that is tied to it."""
    return F.linear(hidden, module.weight) if isinstance(module, nn.Embedding) else module(hidden)


def split_heads(x: Tensor, size: int) -> Tensor:
    """(batch, seq, heads * size) -> (batch, heads, seq, size)."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)
