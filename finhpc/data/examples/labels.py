"""The labels of a source, and which of them each value of its records means.

Codes (0, 1, 2) mean nothing by themselves, and data sets order them differently: they need a named format, names in
the file, or `data.labels`. Words mean themselves.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finhpc.data.examples.values import without_zeros
from finhpc.errors import ConfigError

# a number, which means nothing by itself
CODE = re.compile(r"((label|class)[ _-]?)?[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
NUMBERED = re.compile(r"[ _-]\w{1,2}$")
MOST = 100  # different labels of one source; more are text
TYPO = 0.8  # similarity above which a label that occurs once is taken for a slip


@dataclass(frozen=True)
class Meaning:
    """The labels in the order of the prompt, and the label of each value, in lower case, that means one."""

    labels: tuple[str, ...]
    of: Mapping[str, str]

    def note(self, words: Counter[str]) -> str:
        """Return the labels with their counts, and the codes that were read as labels."""
        counts: Counter[str] = Counter()
        for word, number in words.items():
            if (label := self.of.get(word.lower())) is not None:
                counts[label] += number
        codes = sorted({word for word in words if word.lower() in self.of and self.of[word.lower()] != word.lower()})
        read = ", ".join(
            f"{code} = {self.of[code.lower()]}" for code in codes if self.of[code.lower()].lower() != code.lower()
        )
        labels = ", ".join(f"{label} {counts[label]:,}" for label in self.labels)
        return f"labels: {labels}" + (f"; {read}" if read else "")


def given(labels: Mapping[str, str]) -> Meaning:
    """Return the meaning that `data.labels` states; a label means itself as well."""
    names = tuple(dict.fromkeys(labels.values()))
    return Meaning(
        names,
        {name.lower(): name for name in names} | {without_zeros(code).lower(): name for code, name in labels.items()},
    )


def of_words(labels: Iterable[str], others: Mapping[str, str]) -> Meaning:
    """Return the meaning of known labels, and of other values that mean them."""
    names = tuple(labels)
    return Meaning(names, {name.lower(): name for name in names} | dict(others))


def refuse_codes(source: str, words: Iterable[str], known: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `ConfigError` if values are codes without a meaning; `known`: format -> what codes mean in it."""
    codes = sorted({word for word in words if CODE.fullmatch(word)}, key=lambda word: (len(word.lstrip("+-")), word))
    if not codes:
        return
    if len(codes) > MOST:
        raise ConfigError(f"{source}: its labels are {len(codes):,} numbers, not labels; write a word for each range.")
    formats = "; ".join(
        f"{source}:{name} if they are " + ", ".join(f"{code} {label}" for code, label in meaning.items())
        for name, meaning in known.items()
        if set(codes) <= set(meaning)
    )
    example = " ".join(f"{code}=..." for code in codes[:4]) + (" and so on" if len(codes) > 4 else "")
    raise ConfigError(
        f"{source}: its labels are codes ({', '.join(codes[:10])}{', ...' if len(codes) > 10 else ''}), and their "
        f"meaning is unknown; give --data.labels {example}"
        + (f", or name the format: {formats}." if formats else " with a word for each.")
    )


def of_data(source: str, words: Counter[str]) -> Meaning:
    """Return the labels in a source, in alphabetical order, each in its most frequent spelling.

    Raises `ConfigError` if there is one label, if there are so many that they are text, and for a label in a single
    record that looks like a slip of another.
    """
    spellings: dict[str, Counter[str]] = {}
    for word, number in words.items():
        spellings.setdefault(word.lower(), Counter())[word] += number
    counts = {key: sum(entries.values()) for key, entries in spellings.items()}
    if len(counts) > MOST:
        raise ConfigError(
            f"{source}: {len(counts):,} different labels are more than {MOST}, so they are probably text; name the "
            "columns of prompt and answer with --data.columns context=COLUMN target=COLUMN."
        )
    if len(counts) < 2:
        raise ConfigError(
            f"{source}: all records have the label {next(iter(words), '')!r}, so there is nothing to choose; list all "
            "labels with --data.labels."
        )
    for key, number in counts.items():
        others = [other for other, count in counts.items() if count > number and not _told_apart(key, other)]
        if number == 1 and (near := difflib.get_close_matches(key, others, n=1, cutoff=TYPO)):
            raise ConfigError(
                f"{source}: the label {next(iter(spellings[key]))!r} occurs only once; did you mean "
                f"{near[0]!r}? Correct it, or list all labels with --data.labels."
            )
    named = {key: min(entries, key=lambda word: (-entries[word], word)) for key, entries in sorted(spellings.items())}
    return Meaning(tuple(named.values()), named)


def _told_apart(one: str, other: str) -> bool:
    """Return whether similar labels differ as names do: AAA and AA, certain and uncertain, class_a and class_b."""
    if one.endswith(other) or other.endswith(one):
        return True
    stems = {NUMBERED.sub("", label) for label in (one, other)}
    return len(stems) == 1 and not stems & {one, other}


def united(meanings: list[Meaning]) -> list[Meaning]:
    """Return the meanings, with one for all that share a label: files of one data set have the same labels."""
    groups: list[dict[str, str]] = []
    for meaning in meanings:
        mine = dict(meaning.of)
        for group in [group for group in groups if group.keys() & mine.keys()]:
            groups.remove(group)
            mine = mine | group
        groups.append(mine)
    entries = []
    for meaning in meanings:
        group = next(group for group in groups if group.keys() & meaning.of.keys())
        entries.append(Meaning(tuple(group[key] for key in sorted(group)), group))
    return entries
