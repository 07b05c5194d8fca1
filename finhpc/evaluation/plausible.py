"""Implausible figures: the one check before a score is written anywhere as a result.

A model whose weights were damaged, or read in another format than they were written in, still gives numbers. They
are recognized by limits that every sound model stays within:

- every figure is finite, and negative only if it is a correlation or a log-likelihood; shares and scores of classes
  lie between 0 and 1, a perplexity at 1 or more;
- after training, a loss is at most 1 nat above ln(vocabulary), what guessing evenly costs, or above the first
  loss of the training if that is higher (unless that exceeds 10 x ln(vocabulary), which no model reaches);
- at fewer bits, a loss is within 1 nat of the 16-bit one at 8 bits; at 4 bits it is at most 1 nat above the larger
  of the 16-bit one and ln(vocabulary);
- any model on any text: at most 10 x ln(vocabulary) per token. A confident, wrong model may well be above
  ln(vocabulary), as an untrained one may, so `evaluate` refuses no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finhpc.errors import ImplausibleError

MARGIN = 1.0  # nats
ANY_MODEL = 10.0  # x ln(vocabulary)
SHARES = {"acc", "acc_norm", "f1", "weighted_f1", "held_out_weighted_f1", "val_weighted_f1"}
SIGNED = {"mcc", "likelihood"}  # metrics of lm-eval's that may be negative
ROUNDING = 1e-5  # of means: the loss of memorized answers may be computed as -1e-6
TIMED = {"data_wait_fraction", "pipeline_utilization", "pipeline_utilization_ideal"}
CLOCKS = 0.05  # of shares of time, which clocks of several workers measured
LOSSES = {"loss", "val_loss", "final_val_loss"}
ROUNDED = {*LOSSES, "train_loss"}
PERPLEXITIES = {"perplexity", "val_perplexity"}


@dataclass(frozen=True)
class Bound:
    """The range of a loss. `why`: the meaning of its upper end."""

    low: float
    high: float
    why: str


def after_training(vocab_size: int, began: float | None) -> Bound:
    """Return the bound of a trained model's loss; `began`: the first loss of its training, if known."""
    even = math.log(vocab_size)
    if began is not None and even < began < any_model(vocab_size).high:
        return Bound(0.0, began + MARGIN, f"what its training began with, {began:.4f}, and {MARGIN:g} nat")
    return Bound(0.0, even + MARGIN, f"guessing evenly, ln(vocabulary of {vocab_size:,}), and {MARGIN:g} nat")


def at_fewer_bits(bits: int, vocab_size: int, full: float | None) -> Bound:
    """Return the bound of a trained model's loss with weights of `bits`; `full`: its loss at 16 bits, if known."""
    even = math.log(vocab_size)
    if full is None or not math.isfinite(full):
        return after_training(vocab_size, None)
    if bits >= 8:
        return Bound(max(0.0, full - MARGIN), full + MARGIN, f"its 16-bit loss, {full:.4f}, and {MARGIN:g} nat")
    high = max(full, even) + MARGIN
    return Bound(max(0.0, full - MARGIN), high, f"its 16-bit loss, {full:.4f}, or guessing evenly, and {MARGIN:g} nat")


def any_model(vocab_size: int) -> Bound:
    """Return the bound of the mean loss per token of any model on any text."""
    high = ANY_MODEL * math.log(vocab_size)
    return Bound(0.0, high, f"{ANY_MODEL:g} x ln(vocabulary of {vocab_size:,})")


def check(what: str, figures: Mapping[str, Any], loss: Bound | None = None, remedy: str = "") -> None:
    """Raise `ImplausibleError` if `figures`, however nested, contain an impossible number.

    `what`: what was scored; `loss`: bounds of `LOSSES`; `remedy`: replaces the usual advice.
    """
    problems = list(_problems(figures, loss, ""))
    if problems:
        remedy = remedy or "check how the model was made, and rerun the command"
        raise ImplausibleError(
            f"{what}: {'; '.join(problems)}. Its weights are damaged, were read in another format than they were "
            f"written in, or its training diverged; nothing of it counts as a result. What to do: {remedy}."
        )


def _problems(figures: Mapping[str, Any], loss: Bound | None, where: str) -> Iterator[str]:
    for key, value in figures.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping):
            yield from _problems(value, loss, f"{name}.")
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Mapping):
                yield from _problems(one, loss, f"{name}.")
            elif isinstance(one, int | float) and not isinstance(one, bool):
                problem = _problem(str(key), one, loss)
                if problem:
                    yield f"{name}={one:.6g} {problem}"


def _problem(key: str, value: float, loss: Bound | None) -> str | None:
    if not math.isfinite(value):
        return "is not a number" if math.isnan(value) else "is infinite"
    if value < (-ROUNDING if key in ROUNDED else 0) and key not in SIGNED:
        return "is negative"
    room = ROUNDING if key in SHARES else CLOCKS if key in TIMED else None
    if room is not None and value > 1 + room:
        return "is a share above 1"
    if key in PERPLEXITIES and value < 1 - ROUNDING:
        return "is below 1"
    if loss is not None and key in LOSSES and value > loss.high:
        return f"is above {loss.high:.4f} ({loss.why})"
    if loss is not None and key in LOSSES and value < loss.low:
        return f"is below {loss.low:.4f}, more than {MARGIN:g} nat below its 16-bit loss"
    return None
