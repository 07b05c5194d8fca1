"""Packs whose examples choose among candidate answers, see the second half of `finhpc.models.packing.layout`'s fields.

If all candidates of an example are single tokens, its prompt is computed once and its last token predicts all of them.
Otherwise each candidate is an example of its own after the same prompt, and `groups` shares the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finhpc.data.examples.choices.candidates import Choice
from finhpc.data.examples.layout import Group, Ints, Piece, groups, pack, size
from finhpc.models.packing.layout import (
    CANDIDATE,
    CHOICE_FIELDS,
    EXAMPLE,
    FIELDS,
    IGNORED,
    LATER,
    OFFSET,
    PLACE,
    ROW,
    SCALE,
    SHARE,
    TOKEN_ID,
)


def choice_pieces(choice: Choice) -> list[Piece]:
    """Return the pieces of an example: one for all its candidates, or one for each."""
    prompt, first = choice.prompt, len(choice.prompt) - 1
    read = [answer[:-1] for answer in choice.answers]
    answers = choice.answers
    if not any(read):
        read, answers = [()], [choice.answers[choice.gold]]
    return [
        Piece(
            np.concatenate([prompt, np.array(tokens, np.int64)]),
            np.array([IGNORED] * first + list(answer), np.int64),
            first,
        )
        for tokens, answer in zip(read, answers, strict=True)
    ]


def label_pack(
    choices: Sequence[Choice],
    share_prefix: bool,
    examples: int,
    packs: int,
    multiple: int = 1,
    length: int | None = None,
) -> Ints:
    """Return int64 (1, FIELDS + CHOICE_FIELDS, T), otherwise as `finhpc.data.examples.layout.pack`.

    `examples`, `packs`: of the whole step or evaluation.
    """
    owned = [choice_pieces(choice) for choice in choices]
    pieces = [piece for mine in owned for piece in mine]
    grouping = groups(pieces, share_prefix)
    columns = _columns(choices, owned, _begins(pieces, grouping))
    least = max(size(pieces, grouping), columns.shape[1], 1)  # prompts may be shorter than their lists of candidates
    total = -(-least // multiple) * multiple if length is None else length
    array = np.zeros((1, FIELDS + CHOICE_FIELDS, total), np.int64)
    array[:, :FIELDS] = pack(pieces, grouping, examples, packs, length=total)
    array[0, FIELDS:, : columns.shape[1]] = columns
    return array


def _begins(pieces: Sequence[Piece], grouping: Sequence[Group]) -> list[int]:
    """Return the row of a pack at which each piece would begin if nothing of it were shared."""
    begins, at = [0] * len(pieces), 0
    for group in grouping:
        at += group.prefix
        for member in group.members:
            begins[member] = at - group.prefix
            at += len(pieces[member].tokens) - group.prefix
    return begins


def _columns(choices: Sequence[Choice], owned: Sequence[Sequence[Piece]], begins: list[int]) -> Ints:
    """Return int64 (CHOICE_FIELDS, columns): the candidates of a pack and their tokens."""
    tokens: list[list[int]] = []
    candidates: list[tuple[int, int, float, float, float]] = []
    piece = 0
    for example, (choice, mine) in enumerate(zip(choices, owned, strict=True), 1):
        of_each = zip(choice.answers, choice.shares, choice.offsets or [0.0] * len(choice.answers), strict=True)
        for place, (answer, share, offset) in enumerate(of_each):
            begin = begins[piece + (place if len(mine) > 1 else 0)] + len(choice.prompt)  # its first row, from 1
            tokens += [[begin + i, token, len(candidates), int(i > 0)] for i, token in enumerate(answer)]
            candidates.append((example, place, share, choice.scale, offset))
        piece += len(mine)
    columns = np.zeros((CHOICE_FIELDS, max(len(tokens), len(candidates))), np.int64)
    if candidates:
        numbers, places, *floats = zip(*candidates, strict=True)
        bits = np.array(floats, np.float64).view(np.int64)
        for fields, values in (
            ([ROW, TOKEN_ID, CANDIDATE, LATER], np.array(tokens).T),
            ([EXAMPLE, PLACE, SHARE, SCALE, OFFSET], np.array([numbers, places, *bits])),
        ):
            columns[np.array(fields) - FIELDS, : values.shape[1]] = values
    return columns
