"""How OpenAI's two APIs write an answer and its log probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from finhpc.generation.sampling import Score
from finhpc.serving.texts import Scored, TokenTexts, Top


class Format(ABC):
    """One API. `default_tokens`: new tokens if the request names no number; None: as many as fit."""

    kind: ClassVar[str]
    chunk: ClassVar[str]
    prefix: ClassVar[str]
    default_tokens: ClassVar[int | None]

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts

    @abstractmethod
    def whole(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return a complete choice."""

    @abstractmethod
    def part(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return the next part of a choice in a stream."""

    @abstractmethod
    def logprobs(self, scored: Sequence[Scored], start: int) -> dict[str, Any]:
        """Return the log probabilities of ids; `start`: characters of the choice's text before the answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream says of a choice before its text."""
        return None

    def echoed(self, ids: Sequence[int], scores: Sequence[Score | None], new: dict[str, Any]) -> Any:
        """Return the log probabilities of the prompt's ids and, after them, those of the answer."""
        raise NotImplementedError


class CompletionFormat(Format):
    """/v1/completions."""

    kind = chunk = "text_completion"
    prefix = "cmpl"
    default_tokens = 16

    def whole(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    part = whole

    def logprobs(self, scored: Sequence[Scored], start: int) -> dict[str, Any]:
        tops = [self._top([(each.id, each.logprob or 0.0), *each.top]) for each in scored]
        return {
            "tokens": [self.texts(each.id) for each in scored],
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": tops,
            "text_offset": [start + each.start for each in scored],
        }

    def echoed(self, ids: Sequence[int], scores: Sequence[Score | None], new: dict[str, Any]) -> Any:
        offset, offsets = 0, []
        for token in ids:
            offsets.append(offset)
            offset += len(self.texts(token))
        tops = [
            None if score is None else self._top([(token, score.logprob), *score.top])
            for token, score in zip(ids, scores, strict=True)
        ]
        before = {
            "tokens": [self.texts(token) for token in ids],
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
        return {name: before[name] + new[name] for name in new}

    def _top(self, pairs: Top) -> dict[str, float]:
        """Return the alternatives by text; of two with the same text, the likelier."""
        best: dict[str, float] = {}
        for token, logprob in pairs:
            text = self.texts(token)
            best[text] = max(logprob, best.get(text, logprob))
        return best


class ChatFormat(Format):
    """/v1/chat/completions."""

    kind, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    default_tokens = None

    def whole(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def part(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, scored: Sequence[Scored], start: int) -> dict[str, Any]:
        content = [
            self._entry(each.id, each.logprob) | {"top_logprobs": [self._entry(*pair) for pair in each.top]}
            for each in scored
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.texts(token)
        known = None if text == f"token_id:{token}" else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}
