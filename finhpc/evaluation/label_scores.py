"""Scores of a model on the labels of examples that were held out of its finetuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from finhpc.data.examples.choices.candidates import Answer, candidates_of
from finhpc.data.examples.examples import Examples
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.metrics import majority, weighted_f1

BATCH = 16
Row = tuple[int, int, bool]  # places among the labels of an example's own and of the chosen one; several were best


def labeled(examples: Examples, limit: int | None) -> tuple[list[int], dict[int, list[Answer]]]:
    """Return the indices of the first `limit` held-out examples whose answers are labels, and each source's labels."""
    answers = candidates_of(examples)
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
    rows: dict[int, Row] = {}
    for i, gold in zip(chosen, golds, strict=True):
        scores = [next(likelihoods) for _ in answers[sources[i]]]
        rows[i] = gold, int(np.argmax(scores)), scores.count(max(scores)) > 1
    return _by_name(examples, answers, rows)


def mean_weighted_f1(scores: dict[str, dict[str, Any]]) -> float:
    """Return the mean of the sources' weighted F1, weighted by the number of examples."""
    n = sum(score["n"] for score in scores.values())
    return float(sum(score["weighted_f1"] * score["n"] for score in scores.values()) / n)


class HeldOutScore:
    """Rates choices among the labels of held-out examples as `label_scores` does, by `mean_weighted_f1`."""

    def __init__(self, examples: Examples, answers: dict[int, list[Answer]]) -> None:
        self.examples, self.answers = examples, answers

    def __call__(self, choices: Mapping[int, tuple[int, int]]) -> float:
        rows = {i: (gold, guess, False) for i, (gold, guess) in sorted(choices.items())}
        return mean_weighted_f1(_by_name(self.examples, self.answers, rows))


def _by_name(
    examples: Examples, answers: dict[int, list[Answer]], rows: Mapping[int, Row]
) -> dict[str, dict[str, Any]]:
    """Return the scores of each name's examples."""
    names, sources = _names(examples, answers), examples.held_out.source.tolist()
    of_names: dict[str, list[Row]] = {}
    for i, row in rows.items():
        of_names.setdefault(names[sources[i]], []).append(row)
    return {name: _scored(of_name) for name, of_name in of_names.items()}


def _scored(rows: list[Row]) -> dict[str, Any]:
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
