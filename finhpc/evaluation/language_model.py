"""lm-eval's language model with the same numbers and less work.

Log-probabilities are computed only at the positions of the answers, not over the vocabulary at every token of the
prompt, and answers that share all tokens except the last are read from one row. The decoder of `finhpc.generation`
computes the rows, and what several begin with only once. In pairs with padded batches (SmolLM2-135M in float32, one
thread, few examples of such lengths) it took 1/1.2 of their processor time on BoolQ, which shares nothing, 1/1.4 on
WinoGrande, 1/1.8 on PhraseBank, 1/1.9 on PIQA and 1/3.5 for labels of three tokens. Padded batches remain for families
that only transformers knows, because any model of the hub can be scored.

They are float32 for any model, and an answer's are summed in float64. lm-eval computes them in the model's type by
default; in bfloat16 a log-probability of -3 is a multiple of 1/64, so that answers tie.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from finhpc.evaluation import plausible
from finhpc.generation.decoder import Decoder
from finhpc.generation.scoring import last_log_probs
from finhpc.models.families.registry import is_known
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
        self._decoder = Decoder(model) if is_known(model.config) else None
        self._few = "logits_to_keep" in inspect.signature(model.forward).parameters

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
        rows, size = list(groups), override_bs or self._rows
        last = [max(len(requests[i][2]) for i in groups[row]) for row in rows]
        compute = self._padded if self._decoder is None else partial(last_log_probs, self._decoder)
        scores: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        for place, log_probs in compute(rows, last, size):  # (last, vocabulary)
            for i in groups[rows[place]]:
                target = torch.tensor(requests[i][2], device=log_probs.device)
                of_answer = log_probs[-len(target) :]
                score = of_answer.gather(1, target[:, None]).double().sum()
                scores[i] = float(score), bool((of_answer.argmax(-1) == target).all())
            vocab_size = log_probs.shape[-1]
        if scores:
            tokens = sum(len(answer) for _, _, answer in requests)
            loss = -math.fsum(score for score, _ in scores) / tokens
            plausible.check("likelihoods of answers", {"loss": loss}, plausible.any_model(vocab_size))
        return scores

    def _padded(self, rows: list[tuple[int, ...]], last: list[int], size: int) -> Iterator[tuple[int, Tensor]]:
        """Do what `last_log_probs` does with the model's own forward pass over rows of similar lengths."""
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i]))
        for begin in range(0, len(rows), size):
            some = order[begin : begin + size]
            tokens = torch.full((len(some), max(len(rows[i]) for i in some)), PAD, dtype=torch.long)
            for r, i in enumerate(some):
                tokens[r, : len(rows[i])] = torch.tensor(rows[i])
            wanted = {len(rows[i]) - k for i in some for k in range(1, last[i] + 1)}
            kept = torch.tensor(sorted(wanted), device=self.device)
            with torch.inference_mode():
                inputs = tokens.to(self.device)
                if self._few:
                    logits = self.model(inputs, logits_to_keep=kept, use_cache=False).logits
                else:
                    logits = self.model(inputs, use_cache=False).logits[:, kept]
                log_probs = torch.log_softmax(logits.float(), dim=-1)
            for r, i in enumerate(some):
                yield i, log_probs[r, (kept >= len(rows[i]) - last[i]) & (kept < len(rows[i]))]
