"""Preferences: of two answers to a prompt, one is chosen and one rejected, for direct preference optimization (DPO)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finhpc.data.examples.choices.candidates import PREFERENCE, Choice
from finhpc.data.examples.examples import SPLITS, Arrays, Examples
from finhpc.data.examples.messages import SIDES
from finhpc.errors import ConfigError, DataError
from finhpc.files import write_atomic
from finhpc.settings.finetune import Instructions

REFERENCE = "reference.safetensors"  # in a run folder
Scores = npt.NDArray[np.float64]  # (examples, 2): of the chosen answers and of the rejected ones


@dataclass
class Preferences:
    """What a run of DPO wants of the answers of each pair.

    `reference`: by split, the log-likelihoods of the answers under the model that training begins with, each pair's up
    to a constant. Without it an answer's score is its own log-likelihood. `smoothing`: the share of pairs that are
    taken to be the wrong way round (E. Mitchell, "A note on DPO with noisy preferences", 2023: conservative DPO).
    """

    beta: float
    smoothing: float = 0.0
    reference: dict[str, Scores] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Instructions) -> Preferences:
        return cls(settings.beta, settings.label_smoothing)

    def choice(self, arrays: Arrays, index: int, learned: bool = True) -> Choice:
        """Return a pair as a choice; if it is not `learned`, it is held out, and nothing is smoothed."""
        prompt, *answers = pair_of(arrays, index)
        smoothing = self.smoothing if learned else 0.0
        choice = Choice(
            prompt.astype(np.int64), [tuple(ids.tolist()) for ids in answers], 0, [1 - smoothing, smoothing]
        )
        if not self.reference:
            return choice
        reference = self.reference[SPLITS[not learned]][index]
        return choice._replace(scale=self.beta, offsets=(self.beta * reference).tolist())

    def save(self, folder: Path) -> None:
        """Write the reference's log-likelihoods into a run folder."""
        from safetensors.numpy import save

        write_atomic(folder / REFERENCE, save(self.reference))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises `DataError` if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            self.reference = load_file(folder / REFERENCE)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder / REFERENCE} holds what the reference model thinks of the pairs, and cannot be read "
                f"({error}); begin another run."
            ) from None


def pair_of(arrays: Arrays, index: int) -> tuple[npt.NDArray[np.int32], ...]:
    """Return the ids of a pair's prompt, chosen answer and rejected answer, which lie one after the other.

    The mask of such an example is that of its chosen answer.
    """
    tokens, mask = arrays.example(index)
    first, last = np.flatnonzero(mask)[[0, -1]]
    return tokens[:first], tokens[first : last + 1], tokens[last + 1 :]


def check_loss(settings: Instructions, examples: Examples) -> None:
    """Raise `ConfigError` for sources that do not fit `data.loss`: preferences are pairs, and pairs are preferences."""
    wanted = settings.loss == "preferences"
    if others := [s["source"] for s in examples.counts["by_source"] if (s["format"] == PREFERENCE) != wanted]:
        what = "records without pairs" if wanted else f"pairs of {' and '.join(SIDES)}"
        remedy = "use data.loss=answers, or leave them out" if wanted else "use data.loss=preferences"
        raise ConfigError(f"data.loss={settings.loss} does not fit {', '.join(others)}, with {what}; {remedy}.")
