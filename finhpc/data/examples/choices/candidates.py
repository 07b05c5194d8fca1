"""The candidate answers of examples whose answers are labels, and how much of each a choice among them wants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from finhpc.data.examples.examples import Arrays, Examples
from finhpc.data.examples.layout import Ints
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions

PREFERENCE = "preference"  # the format of sources of pairs
MOST_LABELS = 20  # a source with more different answers has texts as answers, not labels
Answer = tuple[int, ...]  # its tokens


class Choice(NamedTuple):
    """An example's prompt, the answers that can follow, which of them does, and what the loss wants of each.

    An answer's score is its log-likelihood times `scale`, minus its `offset`.
    """

    prompt: Ints
    answers: list[Answer]
    gold: int
    shares: list[float]
    scale: float = 1.0
    offsets: list[float] | None = None


@dataclass(frozen=True)
class Candidates:
    """What examples choose among, by source, for a softmax over the candidates alone.

    The loss of an example is the weight of its answer, times the cross-entropy with 1 - `smoothing` for its answer plus
    `smoothing` divided among all; `weights`: by candidates and answer.
    """

    answers: dict[int, list[Answer]]
    smoothing: float = 0.0
    weights: dict[tuple[Answer, ...], dict[Answer, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Instructions, examples: Examples) -> Candidates:
        """Return those of a run. Raises one `ConfigError` for sources whose answers are texts, and unknown labels."""
        answers = candidates_of(examples)
        sources = examples.counts["by_source"]
        used = {int(source) for split in (examples.train, examples.held_out) for source in np.unique(split.source)}
        problems = [
            f"data.loss=labels chooses among labels, and the answers of {sources[source]['source']} are texts; leave "
            "that source out, or use data.loss=answers."
            for source in sorted(used - answers.keys())
        ]
        problems += [
            f"data.loss=labels has nothing to choose: all examples of {sources[source]['source']} have the same "
            "answer; leave that source out, or list the labels in data.labels."
            for source, labels in answers.items()
            if len(labels) == 1
        ]
        named = {(name, tuple(ids)) for source in answers for name, ids in sources[source]["answers"]}
        names = sorted({name for name, _ in named})
        if unknown := sorted(settings.class_weights.keys() - set(names)):
            problems.append(
                f"data.class_weights has {', '.join(unknown)}, and the labels are {', '.join(names)}; correct it."
            )
        if problems:
            raise ConfigError(problems)
        factors = {ids: settings.class_weights.get(name, 1.0) for name, ids in named}
        weights = _balanced(answers, examples.train) if settings.balanced else {}
        for labels in map(tuple, answers.values()):
            balance = weights.get(labels, {})
            weights[labels] = {answer: factors.get(answer, 1.0) * balance.get(answer, 1.0) for answer in labels}
        return cls(answers, settings.label_smoothing, weights)

    def choice(self, arrays: Arrays, index: int, learned: bool = True) -> Choice:
        """Return the choice of an example; if it is not `learned`, all that it wants is its answer, at weight 1."""
        tokens, mask = arrays.example(index)
        answers, answer = self.answers[int(arrays.source[index])], tuple(tokens[mask].tolist())
        gold, number = answers.index(answer), len(answers)
        smoothing, weight = 0.0, 1.0
        if learned:
            smoothing, weight = self.smoothing, self.weights.get(tuple(answers), {}).get(answer, 1.0)
        shares = [weight * (smoothing / number + (1 - smoothing) * (i == gold)) for i in range(number)]
        return Choice(tokens[: int(np.flatnonzero(mask)[0])].astype(np.int64), answers, gold, shares)


def candidates_of(examples: Examples) -> dict[int, list[Answer]]:
    """Return the different answers of each source whose answers are labels: its template's, or few.

    Sources with the same labels share them. Labels that no example has are included, as in `finhpc evaluate`.
    """
    listed = {i: tuple(source.get("labels") or ()) for i, source in enumerate(examples.counts["by_source"])}
    pairs = {i for i, source in enumerate(examples.counts["by_source"]) if source.get("format") == PREFERENCE}
    found: dict[int, set[Answer]] = {}
    several: set[int] = set()  # sources with conversations of more than one answer
    for arrays in (examples.train, examples.held_out):
        for i in range(len(arrays)):
            if int(arrays.source[i]) in pairs:
                continue
            tokens, answer = arrays.example(i)
            if np.count_nonzero(np.diff(answer.astype(np.int8)) == 1) + int(answer[0]) > 1:
                several.add(int(arrays.source[i]))
            of_source = found.setdefault(int(arrays.source[i]), set())
            if listed[int(arrays.source[i])] or len(of_source) <= MOST_LABELS:
                of_source.add(tuple(tokens[answer].tolist()))
    for source, labels in found.items():
        labels.update(map(tuple, examples.counts["by_source"][source].get("unseen", ())))
    for source, labels in found.items():
        if listed[source]:
            labels.update(*(found[other] for other in found if listed[other] == listed[source]))
    return {
        source: sorted(labels)
        for source, labels in found.items()
        if listed[source] or (len(labels) <= MOST_LABELS and source not in several)
    }


def _balanced(answers: dict[int, list[Answer]], train: Arrays) -> dict[tuple[Answer, ...], dict[Answer, float]]:
    """Return weights that make all labels of the same choice count as much: scikit-learn's n / (classes * count)."""
    counts: dict[tuple[Answer, ...], Counter[Answer]] = {tuple(labels): Counter() for labels in answers.values()}
    for i in range(len(train)):
        tokens, mask = train.example(i)
        if (source := int(train.source[i])) in answers:
            counts[tuple(answers[source])][tuple(tokens[mask].tolist())] += 1
    return {
        labels: {answer: of.total() / (len(of) * number) for answer, number in of.items()}
        for labels, of in counts.items()
    }
