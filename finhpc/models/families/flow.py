"""How data flows through the parts that every family shares.

The tokens travel with the hidden states through the pipeline, so only the first stage reads data
and the last has its labels. Documents in a block are separated by the end-of-text token alone:
attention crosses document borders, as in GPT-2.
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
    """The second half of a transformer block."""
    hidden, tokens = flow
    return hidden + mlp(norm(hidden)), tokens


def head(flow: Flow, module: nn.Module) -> Tensor:
    """The output layer, then the loss."""
    hidden, tokens = flow
    return next_token_loss(module(_rows(hidden)), tokens)


def tied_head(flow: Flow, module: nn.Module) -> Tensor:
    """The same with the token embedding's matrix as output layer."""
    hidden, tokens = flow
    weight = module.weight
    assert isinstance(weight, Tensor)
    return next_token_loss(F.linear(_rows(hidden), weight), tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each next token, in float32, as transformers computes it.

    `logits`: (batch * (seq - 1), vocab), which may be overwritten; `tokens`: (batch, seq).
    """
    return cross_entropy(logits, tokens[:, 1:].reshape(-1))


def _rows(hidden: Tensor) -> Tensor:
    """The states that predict a token: (batch * (seq - 1), width). The last of a sample predicts none."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])
