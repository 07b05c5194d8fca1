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


def norm(flow: Flow, module: nn.Module) -> Flow:
    hidden, tokens = flow
    return module(hidden), tokens


def mlp(flow: Flow, norm: nn.Module, mlp: nn.Module) -> Flow:
    hidden, tokens = flow
    return hidden + mlp(norm(hidden)), tokens


def head(flow: Flow, module: nn.Module) -> Tensor:
    """Apply the output layer, then the loss."""
    hidden, tokens = flow
    return next_token_loss(module(_predicting(hidden)), tokens)


def tied_head(flow: Flow, module: nn.Module) -> Tensor:
    """Apply the token embedding's matrix as output layer, then the loss."""
    hidden, tokens = flow
    weight = module.weight
    assert isinstance(weight, Tensor)
    return next_token_loss(F.linear(_predicting(hidden), weight), tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of each next token, in float32, as transformers computes it.

    `logits`: (batch * (seq - 1), vocab), which may be overwritten; `tokens`: (batch, seq).
    """
    return cross_entropy(logits, tokens[:, 1:].reshape(-1))


def _predicting(hidden: Tensor) -> Tensor:
    """Return the states that predict a token, all but each sample's last: (batch * (seq - 1), width)."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def split_heads(x: Tensor, size: int) -> Tensor:
    """(batch, seq, heads * size) -> (batch, heads, seq, size)."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)
