"""The loss of a choice among a few answers: -log softmax over their scores, not over the vocabulary.

An answer's score is its log-likelihood. For preferences (R. Rafailov et al., "Direct Preference Optimization", 2023,
equation 7) it is beta times its log-likelihood less the reference's; between two answers, -log softmax is then
-log sigmoid of the difference.

An answer's log-likelihood is the sum over its tokens of logit - log sum exp of the vocabulary's logits. All answers of
an example follow the same prompt, so the normalizer of their first tokens is the same and drops out: of one-token
answers only their own rows of the output layer are computed. Other normalizers are computed some rows at a time and
again in the backward pass, so that the logits of all rows never exist.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finhpc.models.loss import LOGITS_BYTES
from finhpc.models.packing.layout import Candidates


def candidate_scores(hidden: Tensor, weight: Tensor, candidates: Candidates, cap: float | None = None) -> Tensor:
    """Return the score of each candidate, up to a constant of its example, in at least float32.

    `hidden` (rows, width) of the rows that predict a token, and `weight` (vocab, width): their product are the logits;
    `cap` as in `linear_cross_entropy`.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden[candidates.rows]
    logits = _capped((rows.to(dtype) * weight[candidates.tokens].to(dtype)).sum(-1), cap)
    scores = logits.new_zeros(len(candidates.shares)).index_add(0, candidates.of, logits)
    if len(later := candidates.later):
        normalizers = _normalizers(rows[later], weight, cap)
        scores = scores.index_add(0, candidates.of[later], normalizers, alpha=-1)
    return scores * candidates.scales - candidates.offsets


def label_loss(hidden: Tensor, weight: Tensor, candidates: Candidates, cap: float | None = None) -> Tensor:
    """Return the sum over examples and their candidates of -share log softmax(scores), in float32 or float64.

    See `candidate_scores`. The shares of an example are what it wants of each candidate, 1 and zeros by default.
    """
    scores = candidate_scores(hidden, weight, candidates, cap)
    table = scores.new_full((candidates.examples, candidates.most), -torch.inf)
    table = table.index_put((candidates.example, candidates.place), scores)
    log_probs = torch.log_softmax(table, -1)[candidates.example, candidates.place]
    return -(log_probs * candidates.shares).sum()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _normalizers(rows: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Return log sum exp of the logits of each row."""

    def of_some(some: Tensor) -> Tensor:
        logits = some @ weight.T
        return _capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap).logsumexp(-1)

    at_once = max(1, LOGITS_BYTES[rows.device.type] // (4 * len(weight)))
    parts = [checkpoint(of_some, some, use_reentrant=False, preserve_rng_state=False) for some in rows.split(at_once)]
    return torch.cat(parts)
