"""How data flows through the parts that every family shares.

The tokens travel with the hidden states through the pipeline, so only the first stage reads data
and the last has its labels. Documents in a block are separated by the end-of-text token alone:
attention crosses document borders, as in GPT-2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.models.family import Flow


def embed(module: nn.Module, tokens: Tensor) -> Flow:
    return module(tokens), tokens


def norm(module: nn.Module, flow: Flow) -> Flow:
    hidden, tokens = flow
    return module(hidden), tokens


def head(module: nn.Module, flow: Flow) -> Tensor:
    """Logits of the output layer, then the loss."""
    hidden, tokens = flow
    return next_token_loss(module(hidden), tokens)


def tied_head(module: nn.Module, flow: Flow) -> Tensor:
    """The same with the token embedding's matrix as output layer."""
    hidden, tokens = flow
    weight = module.weight
    assert isinstance(weight, Tensor)
    return next_token_loss(F.linear(hidden, weight), tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each next token, in float32, as transformers computes it.

    `logits`: (batch, seq, vocab); `tokens`: (batch, seq); seq - 1 predictions a sample.
    """
    logits = logits[:, :-1].float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
