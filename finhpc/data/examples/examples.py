"""Tokenized examples of a finetuning run, split by input, in one file with a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finhpc.data.examples.instructions import Example, Source, is_held_out, read_examples
from finhpc.data.examples.labels import MOST
from finhpc.data.examples.mixing import check_weights, mixed
from finhpc.data.examples.tokenize import Tokenized, check_tokenizer, tokenized
from finhpc.data.shards.order import permutation
from finhpc.errors import ConfigError, DataError
from finhpc.files import json_sha256, write_atomic
from finhpc.models.files.tokens import continuation_ids
from finhpc.settings.finetune import Instructions

SPLITS = ("train", "held_out")
COUNTS = ("records", "examples", "held_out", "cut", "dropped", "tokens", "answer_tokens")
ARRAYS = ("tokens", "offsets", "answer", "source")


_newest: dict[str, Examples] = {}  # the last examples that were made, which most trials of a sweep share


class Arrays(NamedTuple):
    """Examples one after the other: tokens int32, answer bool (tokens,), offsets int64 (n + 1,), source int32 (n,)."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    answer: npt.NDArray[np.bool_]
    source: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the tokens of one example, and a mask of its answer."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.answer[part]

    def take(self, indices: list[int]) -> Arrays:
        """Return some of the examples, in this order."""
        some = [self.example(index) for index in indices]
        lengths = np.array([len(tokens) for tokens, _ in some], np.int64)
        return Arrays(
            np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in some)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            np.concatenate([np.empty(0, np.bool_), *(answer for _, answer in some)]),
            self.source[indices],
        )


@dataclass(frozen=True)
class Examples:
    """The examples that a run learns from, and those that score it."""

    train: Arrays
    held_out: Arrays
    counts: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: str = ""  # hash of records, settings and tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all ids, borders, answers and sources."""
        digest = hashlib.sha256()
        for name, array in _named(self).items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> str:
        """Write everything to one safetensors file and return its fingerprint."""
        from safetensors.numpy import save

        fingerprint = self.fingerprint
        about = {"counts": self.counts, "labels": self.labels, "notes": self.notes, "origin": self.origin}
        metadata = {"fingerprint": fingerprint, "about": json.dumps(about)}
        write_atomic(path, save(_named(self), metadata=metadata))
        return fingerprint


def load(path: Path) -> Examples:
    """Return what `save` wrote. Raises `DataError` if it is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            train, held_out = (Arrays(*(file.get_tensor(f"{split}.{name}") for name in ARRAYS)) for split in SPLITS)
        about = json.loads(metadata["about"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a complete set of examples ({error}); remove it and run again.") from None
    labels, notes = tuple(about["labels"]), tuple(about["notes"])
    stored_examples = Examples(train, held_out, about["counts"], labels, notes, about["origin"])
    if stored_examples.fingerprint != metadata.get("fingerprint"):
        raise DataError(f"{path} is not what was written (its fingerprint differs); remove it and run again.")
    return stored_examples


def make_examples(settings: Instructions, tokenizer: Any, seed: int, before: Path | None = None) -> Examples:
    """Read, tokenize, cut and split all sources; draw `limit` of the training examples by `seed`.

    Examples of sources with weights occur several times in `train`, or some of them not at all, see `mixed`.

    Examples are split by the hash of their normalized input: the same input is never in both splits, for any seed,
    order of files, or source. `tokenizer`: a fast Hugging Face tokenizer. `before`: a file of examples to reuse if it
    was made from the same records, settings and tokenizer, because a chat template may write the date. Raises one
    `ConfigError` with everything that cannot be used, and if more than `max_dropped` of the examples have no room for
    their answer.
    """
    sources, weights = read_sources(settings), check_weights(settings)
    given = [example for source in sources for example in source.examples]
    check_tokenizer(tokenizer, given)
    origin = _origin(given, settings, tokenizer, seed)
    if before is not None:
        with suppress(DataError):  # none or damaged: the same are made again, and a run checks their fingerprint
            if (stored := load(before)).origin == origin:
                return stored
    key = json_sha256([origin, settings.model_dump()])  # notes and counts name the files
    if key in _newest and "strftime_now" not in str(tokenizer.chat_template):  # else a day later they differ
        return _newest[key]
    items, texts = tokenized(given, tokenizer, settings.max_len, settings.cut == "input")
    _check_dropped(items, settings)
    train, held_out, leaked = _split(items, settings)
    if not train:
        raise ConfigError(f"data.eval_fraction={settings.eval_fraction} leaves no example to train on; lower it.")
    drawn = train
    if settings.limit is not None and settings.limit < len(train):
        drawn = [train[i] for i in permutation(len(train), 4, seed)[: settings.limit].tolist()]
    counts = _counts(sources, items, drawn, held_out)
    for number, source in enumerate(counts["by_source"]):
        source["unseen"] = _unseen(number, sources[number], drawn + held_out, tokenizer)
        source["answers"] = _answers(number, sources[number], drawn + held_out, source["unseen"])
    counts |= {"leaked": leaked, "not_drawn": len(train) - len(drawn)}
    chosen = mixed(np.array([item.example.source for item in drawn]), weights, settings.temperature, seed)
    in_pass = [drawn[i] for i in chosen.tolist()]
    for number, source in enumerate(counts["by_source"]):
        source["in_a_pass"] = sum(item.example.source == number for item in in_pass)
    notes = [*(note for source in sources for note in source.notes), *texts, *_notes(counts, settings)]
    labels = tuple(dict.fromkeys(label for source in sources for label in source.labels))
    _newest.clear()
    _newest[key] = Examples(_arrays(in_pass), _arrays(held_out), counts, labels, tuple(notes), origin)
    return _newest[key]


def read_sources(settings: Instructions) -> list[Source]:
    """Read the examples of all sources. Raises one `ConfigError` with everything that cannot be used."""
    if not settings.source:
        raise ConfigError("data.source is not set; give --data.source with a file of examples or hf:NAME.")
    return read_examples([*settings.source, *settings.eval_source], settings)


def _unseen(number: int, source: Source, learned: list[Tokenized], tokenizer: Any) -> list[list[int]]:
    """Return ids of the labels in a source's template that no used record has: they can be chosen as well."""
    seen = {item.example.label for item in learned if item.example.source == number}
    first = source.examples[0]
    if first.label is None:
        return []
    between = first.answer.removesuffix(first.label)
    return [
        continuation_ids(tokenizer, first.prompt, between + label, plain=True)
        for label in source.labels
        if label not in seen
    ]


def _answers(number: int, source: Source, learned: list[Tokenized], unseen: list[list[int]]) -> list[list[Any]]:
    """Return each label of a source, and the ids that it has as an answer; none if its answers are texts."""
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for example, row in learned:
        if example.source == number and row is not None and (name := example.label or example.answer.strip()):
            found[name, tuple(row.tokens[row.answer].tolist())] = None
            if len(found) > MOST:
                return []
    seen = {label for label, _ in found}
    others = [label for label in source.labels if label not in seen] if unseen else []
    pairs = zip(others, unseen, strict=True)
    return [[label, list(ids)] for label, ids in found] + [[label, ids] for label, ids in pairs]


def _origin(examples: list[Example], settings: Instructions, tokenizer: Any, seed: int) -> str:
    """Return one hash of records, settings and tokenizer, before a template writes any of them."""
    settled = {"eval_fraction", "limit", "max_len", "cut", "max_dropped", "weights", "temperature"}
    ways = settings.model_dump(include=settled)
    tokenizer.backend_tokenizer.no_truncation()  # set by an earlier encoding
    tokenizer.backend_tokenizer.no_padding()
    speaks = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps([ways, len(settings.source), speaks, seed], default=str).encode())
    for example in examples:
        kind = [example.content, example.input, example.source, example.cut, example.end, example.label]
        digest.update(json.dumps(kind).encode())
    return digest.hexdigest()


def _split(items: list[Tokenized], settings: Instructions) -> tuple[list[Tokenized], list[Tokenized], int]:
    """Return the examples to train on, those held out in the order of their hashes, and how many leaked."""
    kept = [item for item in items if item.row is not None]
    leaked = 0
    if settings.eval_source:
        given = len(settings.source)
        held_out = [item for item in kept if item.example.source >= given]
        seen = {item.example.key for item in held_out}
        learned = [item for item in kept if item.example.source < given]
        train = [item for item in learned if item.example.key not in seen]
        leaked = len(learned) - len(train)
    else:
        train = [item for item in kept if not is_held_out(item.example.key, settings.eval_fraction)]
        held_out = [item for item in kept if is_held_out(item.example.key, settings.eval_fraction)]
    # By the far end of the hash: its beginning decided the split, and eval_limit takes the first of these.
    held_out.sort(key=lambda item: item.example.key[::-1])
    return train, held_out, leaked


def _check_dropped(items: list[Tokenized], settings: Instructions) -> None:
    lost = [item.example.where for item in items if item.row is None]
    if len(lost) > settings.max_dropped * len(items):
        raise ConfigError(
            f"data.max_len={settings.max_len} leaves no room for the answer of {len(lost):,} of {len(items):,} "
            f"examples ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}), more than "
            f"data.max_dropped={settings.max_dropped}; raise max_len, or max_dropped to train without them."
        )


def _arrays(items: list[Tokenized]) -> Arrays:
    rows = [item.row for item in items if item.row is not None]
    lengths = np.array([len(row.tokens) for row in rows], np.int64)
    return Arrays(
        np.concatenate([np.empty(0, np.int32), *(row.tokens for row in rows)]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        np.concatenate([np.empty(0, np.bool_), *(row.answer for row in rows)]),
        np.array([item.example.source for item in items], np.int32),
    )


def _counts(
    sources: list[Source], items: list[Tokenized], train: list[Tokenized], held_out: list[Tokenized]
) -> dict[str, Any]:
    """Return counts in total and by source; its `examples` are those trained on."""
    same = Counter((item.example.key, item.example.content) for item in items)
    answers: dict[str, set[str]] = {}
    for example, _ in items:
        if example.label is not None:
            answers.setdefault(example.prompt, set()).add(example.label)

    of_sources = [dict.fromkeys(COUNTS, 0) for _ in sources]
    for example, row in items:
        counted = of_sources[example.source]
        counted["records"] += 1
        counted["cut"] += row is not None and row.cut
        counted["dropped"] += row is None
    for example, _ in held_out:
        of_sources[example.source]["held_out"] += 1
    for example, row in train:
        counted = of_sources[example.source]
        counted["examples"] += 1
        if row is not None:
            counted["tokens"] += len(row.tokens)
            counted["answer_tokens"] += int(row.answer.sum())
    total = {name: sum(counted[name] for counted in of_sources) for name in COUNTS}
    by_source = [
        of_sources[i]
        | {
            "source": source.name,
            "format": source.format,
            "template": source.template,
            "labels": list(source.labels),
            "skipped": dict(source.skipped),
        }
        for i, source in enumerate(sources)
    ]
    conflicting = sum(len(labels) > 1 for labels in answers.values())
    duplicates = sum(count - 1 for count in same.values())
    return total | {"duplicates": duplicates, "conflicting": conflicting, "by_source": by_source}


def _notes(counts: dict[str, Any], settings: Instructions) -> list[str]:
    texts = {
        "cut": f"inputs longer than data.max_len={settings.max_len} were cut at their end",
        "dropped": f"examples were left out: data.max_len={settings.max_len} has no room for their answer",
        "leaked": "examples were left out of training: their input is held out",
        "conflicting": "prompts occur with different labels",
    }
    notes = [f"{counts[name]:,} {text}" for name, text in texts.items() if counts[name]]
    for source in counts["by_source"]:
        notes += [f"{source['source']}: {number:,} {what} were left out" for what, number in source["skipped"].items()]
    return notes


def _named(examples: Examples) -> dict[str, npt.NDArray[Any]]:
    splits = {"train": examples.train, "held_out": examples.held_out}
    return {f"{split}.{name}": getattr(arrays, name) for split, arrays in splits.items() for name in ARRAYS}
