"""lm-eval's language model with the same numbers and less work.

Log-probabilities are computed only at the positions of the answers, not over the vocabulary at every token of the
prompt, and answers that share all tokens except the last are read from one row.

They are float32 for any model, and an answer's are summed in float64. lm-eval computes them in the model's type by
default; in bfloat16 a log-probability of -3 is a multiple of 1/64, so that answers tie.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from finhpc.evaluation import plausible
from finhpc.models.files.tokens import continuation_ids, encode, prompt_ids

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the prompt, tokens of the answer
PAD = 0  # comes after everything that is read, so no token attends to it


class LanguageModel(HFLM):
    """Wraps a loaded model. `cut`: prompts that were longer than the context and truncated on the left.

    That is lm-eval's rule: only the last `max_length` + 1 tokens of prompt and answer remain. Ids are lm-eval's, except
    that no end token follows a text, and that a prompt keeps its own ids if its answer would change them, as in
    finetuning.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self.cut: set[str] = set()  # prompts
        self._rows = batch_size
        base: Any = model
        if hasattr(model, "get_base_model"):
            base = base.get_base_model()  # under peft's adapter
        self._few = "logits_to_keep" in inspect.signature(base.forward).parameters

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        plain = add_special_tokens is False
        ids = encode(self.tokenizer, [string])[0] if plain else prompt_ids(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt = context.rstrip()
        answer = context[len(prompt) :] + continuation
        return self.tok_encode(prompt), continuation_ids(self.tokenizer, prompt, answer)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods of answers, and whether each is the model's own choice.

        Raises `ImplausibleError` for values that no sound model gives.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (texts, context, answer) in enumerate(requests):
            if len(context) + len(answer) > self.max_length + 1:
                self.cut.add(texts[0])
            window = (context + answer)[-(self.max_length + 1) :][:-1]
            groups.setdefault(tuple(window), []).append(i)
        rows = sorted(groups, key=lambda row: (-len(row), row))
        scores: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        for start in range(0, len(rows), override_bs or self._rows):
            batch = rows[start : start + (override_bs or self._rows)]
            longest = [max(len(requests[i][2]) for i in groups[row]) for row in batch]
            kept, log_probs = self._log_probs(batch, longest)
            place = {position: at for at, position in enumerate(kept.tolist())}
            for r, row in enumerate(batch):
                for i in groups[row]:
                    target = torch.tensor(requests[i][2], device=log_probs.device)
                    at = [place[position] for position in range(len(row) - len(target), len(row))]
                    of_answer = log_probs[r, at]  # (answer, vocabulary)
                    score = of_answer.gather(1, target[:, None]).double().sum()
                    scores[i] = float(score), bool((of_answer.argmax(-1) == target).all())
            vocab_size = log_probs.shape[-1]
        if scores:
            tokens = sum(len(answer) for _, _, answer in requests)
            loss = -math.fsum(score for score, _ in scores) / tokens
            plausible.check("likelihoods of answers", {"loss": loss}, plausible.any_model(vocab_size))
        return scores

    def _log_probs(self, batch: list[tuple[int, ...]], last: list[int]) -> tuple[Tensor, Tensor]:
        """Return the `last` positions of rows and their float32 log-probabilities (rows, positions, vocabulary)."""
        width = max(map(len, batch))
        tokens = torch.full((len(batch), width), PAD, dtype=torch.long)
        for r, row in enumerate(batch):
            tokens[r, : len(row)] = torch.tensor(row)
        wanted = {len(row) - k for row, n in zip(batch, last, strict=True) for k in range(1, n + 1)}
        kept = torch.tensor(sorted(wanted), device=self.device)
        with torch.inference_mode():
            inputs = tokens.to(self.device)
            if self._few:
                logits = self.model(inputs, logits_to_keep=kept, use_cache=False).logits
            else:
                logits = self.model(inputs, use_cache=False).logits[:, kept]
            return kept, torch.log_softmax(logits.float(), dim=-1)
