"""Runs combinations one after the other and returns their table."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers.utils import logging

from tests.parity.pairwise import Combination
from tests.parity.table import Row, Table
from tests.parity.text import model_folder, text_row
from tests.parity.tokenizer_kinds import Kind
from tests.parity.weights import BITSANDBYTES, EXACT, weights_row

TEXT_NOTES = [
    "Ids and texts are equal, or the command is at fault. The reference is transformers: `apply_chat_template` of the",
    "whole conversation, the tokenizer's ids of the whole text, and `generate` on them.",
]
WEIGHTS_NOTES = [
    "Numbers are the largest difference from the reference, transformers' own float32 model under peft's reading of",
    "the adapter: of logits as a share of the largest one, of losses as a share of the loss. They may be",
    f"{EXACT:.0e}, and {BITSANDBYTES:.0e} where bitsandbytes computes: its int8 rounds a layer's inputs, its NF4",
    "computes in bfloat16 on some CPUs. Greedy text is equal. An adapter that is refused is refused by all commands",
    "alike, by name.",
]


Say = Callable[[Row], None]  # called with each row when it is there


def run_texts(kinds: Iterable[Kind], folder: Path, say: Say = lambda row: None) -> Table:
    """The table of tokenizers and chat templates; `folder` is for files that are removed again."""
    table = Table("Ids and text of every tokenizer and chat template", notes=TEXT_NOTES)
    model = model_folder(folder / "model")
    for number, kind in enumerate(kinds):
        with _quiet(folder / str(number)) as at:
            table.rows.append(text_row(kind, model, at))
        say(table.rows[-1])
    shutil.rmtree(model)
    return table


def run_weights(combinations: Iterable[Combination], folder: Path, say: Say = lambda row: None) -> Table:
    """The table of families, bases, adapters, tokenizers and export formats."""
    table = Table("Losses, logits and text of every family, base, adapter and export format", notes=WEIGHTS_NOTES)
    for number, combination in enumerate(combinations):
        with _quiet(folder / str(number)) as at:
            table.rows.append(weights_row(combination, at))
        say(table.rows[-1])
    return table


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[Path]:
    """A folder for one row; what commands write on the screen is dropped."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
