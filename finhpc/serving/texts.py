"""The text of an answer as it grows: decoding ids piece by piece, stop strings, the texts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finhpc.models.files.tokens import decoded

Top = list[tuple[int, float]]
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # part of a character, or bytes that are none
CONTEXT = 32  # ids before an answer that are decoded with it, for the space at its beginning


@dataclass(frozen=True)
class Scored:
    """An id of an answer. `start`: characters of the answer before it."""

    id: int
    logprob: float | None
    top: Top
    start: int


@dataclass
class Answer:
    """One answer. Pieces of text are decoded as `finhpc generate` decodes the whole.

    A stop string ends the answer and is not part of it, however its characters are spread over tokens. The first one
    that is complete counts, so that the text does not depend on where tokens end. `take` gives out what no stop string
    can remove any more.
    """

    tokenizer: Any
    prompt: Sequence[int]
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    stopped: bool = False  # by a stop string

    def __post_init__(self) -> None:
        self._window = list(self.prompt[-CONTEXT:])  # ids around the part that is not decoded yet
        self._read = len(self._window)
        self._sent = 0
        self._scored: list[Scored] = []

    def add(
        self,
        token: int | None,
        finish: str | None,
        ends: bool,
        logprob: float | None = None,
        top: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Append an id. `finish`: why the answer ends with it; `ends`: it is an end token, which has no text."""
        if self.finish is not None:
            return
        if token is not None:
            self.ids.append(token)
            self._scored.append(Scored(token, logprob, list(top), len(self.text)))
            if not ends:
                self._window.append(token)
        known = len(self.text)
        self._decode(final=finish is not None)
        if not self._cut(known):
            self.finish = finish

    def take(self) -> tuple[str, list[Scored]]:
        """Return the text that is new since the last call, and the ids that it begins."""
        safe = len(self.text) if self.finish is not None else len(self.text) - self._held()
        whole = self.finish is not None and not self.stopped
        count = len(self._scored) if whole else sum(scored.start < safe for scored in self._scored)
        scored, self._scored = self._scored[:count], self._scored[count:]
        text, self._sent = self.text[self._sent : safe], safe
        return text, scored

    def _decode(self, final: bool) -> None:
        before, new = self._window[: self._read], self._window[self._read :]
        text = decoded(self.tokenizer, before, new) if new else ""
        if text and (final or not text.endswith(INCOMPLETE)):
            self.text += text
            self._window, self._read = new, len(new)

    def _cut(self, known: int) -> bool:
        """End the text before the first stop string that is complete; `known`: characters that were searched before."""
        ends = []
        for stop in self.stops:
            at = self.text.find(stop, max(0, known - len(stop) + 1))
            if at >= 0:
                ends.append((at + len(stop), at))
        if ends:
            self.text, self.finish, self.stopped = self.text[: min(ends)[1]], "stop", True
        return bool(ends)

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self.text) - self._sent), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


class TokenTexts:
    """The texts of single tokens, as log probabilities name them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]

    def __call__(self, token: int) -> str:
        """Return a token's text; `token_id:N` for a part of a character, which has none."""
        if token not in self._known:
            added = self.tokenizer.added_tokens_decoder.get(token)
            text = added.content if added is not None else decoded(self.tokenizer, self._before, [token])
            self._known[token] = f"token_id:{token}" if INCOMPLETE in text else text
        return self._known[token]
