"""Scores of a model on the labels of examples that were held out of its finetuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from finhpc.data.examples.examples import Examples
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.metrics import majority, weighted_f1

MOST_LABELS = 20  # a source with more different answers has texts as answers, not labels
BATCH = 16
Answer = tuple[int, ...]  # its tokens


def labeled(examples: Examples, limit: int | None) -> tuple[list[int], dict[int, list[Answer]]]:
    """Return the indices of the first `limit` held-out examples whose answers are labels, and each source's labels."""
    answers = _answers(examples)
    return [i for i, source in enumerate(examples.held_out.source[:limit].tolist()) if source in answers], answers


def label_scores(model: nn.Module, tokenizer: Any, examples: Examples, limit: int | None) -> dict[str, dict[str, Any]]:
    """Return scores by template over the first `limit` held-out examples: acc, weighted_f1, majority, n, tied.

    The answer of a source with the highest log-likelihood after the prompt is chosen, the first of equal ones, as
    `finhpc evaluate` does. Sources whose answers are text are left out.
    """
    chosen, answers = labeled(examples, limit)
    sources = examples.held_out.source.tolist()
    lm = LanguageModel(model, tokenizer, BATCH)
    requests, golds = [], []
    for i in chosen:
        tokens, answer = examples.held_out.example(i)
        first = int(np.flatnonzero(answer)[0])
        labels = answers[sources[i]]
        golds.append(labels.index(tuple(tokens[answer].tolist())))
        requests += [(("", ""), tokens[:first].tolist(), list(label)) for label in labels]
    likelihoods = iter(score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True))
    names = _names(examples, answers)
    rows: dict[str, list[tuple[int, int, bool]]] = {}
    for i, gold in zip(chosen, golds, strict=True):
        scores = [next(likelihoods) for _ in answers[sources[i]]]
        is_tied = scores.count(max(scores)) > 1
        rows.setdefault(names[sources[i]], []).append((gold, int(np.argmax(scores)), is_tied))
    return {name: _scored(of_name) for name, of_name in rows.items()}


def _scored(rows: list[tuple[int, int, bool]]) -> dict[str, Any]:
    pairs = [(gold, guess) for gold, guess, _ in rows]
    return {
        "acc": float(np.mean([gold == guess for gold, guess in pairs])),
        "weighted_f1": weighted_f1(pairs),
        "majority": majority(np.array([gold for gold, _ in pairs])),
        "n": len(pairs),
        "tied": sum(is_tied for *_, is_tied in rows),
    }


def _names(examples: Examples, answers: dict[int, list[Answer]]) -> dict[int, str]:
    """Return the name of each source's scores: its template, and the file if another file has other labels."""
    named = {source: str(examples.counts["by_source"][source]["template"]) for source in answers}
    choices: dict[str, set[tuple[Answer, ...]]] = {}
    for source, labels in answers.items():
        choices.setdefault(named[source], set()).add(tuple(labels))
    files = {source: Path(str(examples.counts["by_source"][source]["source"])).name for source in answers}
    return {source: name if len(choices[name]) == 1 else f"{name} of {files[source]}" for source, name in named.items()}


def _answers(examples: Examples) -> dict[int, list[Answer]]:
    """Return the different answers of each source whose answers are labels: its template's, or few.

    Sources with the same labels share them. Labels that no example has are included, as in `finhpc evaluate`.
    """
    listed = {i: tuple(source.get("labels") or ()) for i, source in enumerate(examples.counts["by_source"])}
    found: dict[int, set[Answer]] = {}
    several: set[int] = set()  # sources with conversations of more than one answer
    for arrays in (examples.train, examples.held_out):
        for i in range(len(arrays)):
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
