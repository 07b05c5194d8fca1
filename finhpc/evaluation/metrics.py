"""Accuracy and weighted F1, their baselines without a model, and their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Classes = npt.NDArray[np.int64]
RESAMPLES_AT_A_TIME = 100


def weighted_f1(items: Sequence[tuple[int, int]]) -> float:
    """Return weighted F1 of (gold, predicted) pairs; lm-eval calls it as a task file's aggregation."""
    from sklearn.metrics import f1_score

    golds, predictions = zip(*items, strict=True)
    return float(f1_score(golds, predictions, average="weighted", zero_division=0))


def majority(golds: Classes) -> dict[str, float]:
    """Return the scores of always choosing the most frequent class."""
    counts = np.bincount(golds)
    always = int(counts.argmax())
    return {
        "acc": float((golds == always).mean()),
        "weighted_f1": weighted_f1([(gold, always) for gold in golds.tolist()]),
    }


def random_guess(golds: Classes, choices: Classes) -> dict[str, float]:
    """Return the expected scores of random guesses; `choices`: int64 (n,), the number of answers of each example.

    Weighted F1 uses the expected confusion counts, which many examples come close to.
    """
    p = float((1 / choices).mean())
    counts = np.bincount(golds, minlength=int(choices.max())).astype(float)
    guessed = np.zeros_like(counts)
    for n in np.unique(choices):
        guessed[:n] += (choices == n).sum() / n
    hits = np.array([(1 / choices[golds == c]).sum() for c in range(len(counts))])
    f1 = 2 * hits / np.maximum(counts + guessed, 1e-12)
    return {"acc": p, "weighted_f1": float((f1 * counts).sum() / counts.sum())}


def intervals(
    golds: Classes, predictions: Classes, means: dict[str, npt.NDArray[np.float64]], resamples: int, seed: int
) -> dict[str, list[float]]:
    """Return 95 % bootstrap intervals over examples: of weighted F1, and of the mean of each of `means` (n,)."""
    draw = np.random.default_rng(seed)
    n, classes = len(golds), int(max(golds.max(), predictions.max())) + 1
    cells = golds * classes + predictions
    resampled: dict[str, list[float]] = {name: [] for name in (*means, "weighted_f1")}
    for start in range(0, resamples, RESAMPLES_AT_A_TIME):
        rows = draw.integers(n, size=(min(RESAMPLES_AT_A_TIME, resamples - start), n))
        for name, values in means.items():
            resampled[name] += values[rows].mean(axis=1).tolist()
        offset = np.arange(len(rows))[:, None] * classes**2
        counts = np.bincount((cells[rows] + offset).reshape(-1), minlength=len(rows) * classes**2)
        resampled["weighted_f1"] += weighted_f1_of_counts(counts.reshape(len(rows), classes, classes)).tolist()
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in resampled.items()}


def weighted_f1_of_counts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return weighted F1 (m,) of confusion counts (m, gold, predicted)."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    support, predicted = counts.sum(axis=2), counts.sum(axis=1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return np.asarray((f1 * support).sum(axis=1) / support.sum(axis=1), dtype=np.float64)
