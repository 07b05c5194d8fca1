from __future__ import annotations

import numpy as np
import pytest

from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays, make_examples
from finhpc.data.examples.layout import SHORTEST_PREFIX, groups, pack, piece, size
from finhpc.errors import ConfigError
from finhpc.models.packing.layout import IGNORED, PACKS, POSITION, PREFIX, SEGMENT, TARGET, TARGETS, TOKEN
from finhpc.settings.finetune import Instructions
from finhpc.settings.training import Parallel
from tests.data.instructing import phrases, sentences, tokenizer


def arrays(rows: list[tuple[list[int], int]]) -> Arrays:
    """Examples of given tokens, the last few of them the answer."""
    lengths = [len(tokens) for tokens, _ in rows]
    return Arrays(
        np.array([token for tokens, _ in rows for token in tokens], np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([i >= len(tokens) - answer for tokens, answer in rows for i in range(len(tokens))]),
        np.zeros(len(rows), np.int32),
    )


def unpacked(made) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, positions, targets) that each last segment sees, read by the layout's rules alone."""
    row = made[0]
    found = []
    for segment in range(1, row[SEGMENT].max(initial=0) + 1):
        if (row[PREFIX] == segment).any():
            continue
        own = row[SEGMENT] == segment
        before = row[PREFIX][own][0]
        seen = own | ((row[SEGMENT] == before) & (before > 0))
        found.append((row[TOKEN][seen].tolist(), row[POSITION][seen].tolist(), row[TARGET][seen].tolist()))
    return found


HEAD = list(range(10, 22))


@pytest.mark.parametrize("share", [True, False])
def test_every_example_is_seen_whole_by_its_own_segment(share):
    rows = [([*HEAD, 50, 51, 7], 1), ([*HEAD, 60, 8, 9], 2), ([1, 2, 3, 4], 1), ([*HEAD, 50, 51, 8], 1)]
    data = arrays(rows)
    pieces = [piece(data, i) for i in range(4)]
    made = pack(pieces, groups(pieces, share), 9, 3, multiple=8)
    expected = []
    for tokens, answer in rows:
        target = [t if i + 1 >= len(tokens) - answer else IGNORED for i, t in enumerate(tokens[1:])]
        expected.append((tokens[:-1], list(range(len(tokens) - 1)), target))
    assert sorted(unpacked(made)) == sorted(expected)
    assert made.shape[2] % 8 == 0
    assert (made[0, TARGETS] == 9).all()
    assert (made[0, PACKS] == 3).all()
    assert (made[0, TARGET][made[0, SEGMENT] == 0] == IGNORED).all()
    shared = made[0, PREFIX].max() > 0
    assert shared == share
    if share:
        assert size(pieces, groups(pieces)) == 14 + 14 + 14 + 3 - 2 * 12


def test_groups_save_the_most_tokens_that_any_grouping_in_order_saves():
    draw = np.random.default_rng(0)
    grouped = 0
    for _ in range(50):
        stem = draw.integers(0, 9, 30).tolist()
        rows = []
        for _ in range(7):
            head = [*stem[: draw.integers(1, 30)], *draw.integers(0, 2, draw.integers(1, 12)).tolist()]
            rows.append(([*head, *draw.integers(0, 9, 3).tolist()], 3))
        pieces = [piece(arrays(rows), i) for i in range(7)]
        heads = sorted(one.tokens[: one.first].tolist() for one in pieces)

        def saved(run: list[list[int]]) -> int:
            alike = [len(set(tokens)) == 1 for tokens in zip(*run, strict=False)]
            shared = alike.index(False) if False in alike else len(alike)
            return (len(run) - 1) * shared if shared >= SHORTEST_PREFIX else 0

        best = [0]
        for end in range(1, 8):
            best.append(max(best[begin] + saved(heads[begin:end]) for begin in range(end)))
        found = groups(pieces)
        grouped += sum(len(group.members) > 1 for group in found)
        assert sum(len(one.tokens) for one in pieces) - size(pieces, found) == best[7]
    assert grouped > 50


def test_twice_the_same_example_keeps_both_targets():
    data = arrays([([*HEAD, 7], 1)] * 2)
    pieces = [piece(data, i) for i in range(2)]
    made = pack(pieces, groups(pieces), 2, 1)
    assert (made[0, TARGET] == 7).sum() == 2


def test_a_length_that_is_too_short_is_refused():
    data = arrays([(HEAD, 1)])
    with pytest.raises(ConfigError, match="11 tokens does not fit packs of 10"):
        pack([piece(data, 0)], groups([piece(data, 0)]), 1, 1, length=10)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("packs") / "fpb.txt"
    return make_examples(Instructions(source=[phrases(path, sentences(150))], eval_fraction=0.2), tokenizer(), 0)


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)])
def test_steps_hold_the_same_examples_and_targets_for_any_replicas(examples, shape):
    reference = Batches(Parallel(micro_batch_size=8), seed=3)
    other = Batches(Parallel(micro_batch_size=shape[0], micro_batches=shape[1], replicas=shape[2]), seed=3)
    for step in (0, 1, 40):
        (whole,) = reference.step(examples.train, step, 0)
        parts = [batch for replica in range(shape[2]) for batch in other.step(examples.train, step, replica)]
        assert len(parts) == shape[1] * shape[2] == parts[0]["pack"][0, PACKS, 0]
        pairs = sorted((int(p), int(s)) for b in parts for p, s in zip(b["position"], b["sample"], strict=True))
        assert pairs == sorted(zip(whole["position"].tolist(), whole["sample"].tolist(), strict=True))
        assert sorted(x for b in parts for x in unpacked(b["pack"])) == sorted(unpacked(whole["pack"]))
        assert {int(b["pack"][0, TARGETS, 0]) for b in parts} == {int(whole["pack"][0, TARGETS, 0])}


def test_an_epoch_takes_every_example_once_and_a_stream_starts_anywhere(examples):
    batches = Batches(Parallel(micro_batch_size=7), seed=1)
    n = len(examples.train)
    taken = np.concatenate([batches.samples(n, step) for step in range(2 * n)])
    for epoch in range(3):
        assert sorted(taken[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    assert taken[:n].tolist() != taken[n : 2 * n].tolist()
    stream, late = batches.stream(examples.train, 0), batches.stream(examples.train, 0, 5)
    for _ in range(5):
        next(stream)
    assert np.array_equal(next(stream)["pack"], next(late)["pack"])


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 10])
def test_every_held_out_example_is_scored_once(examples, replicas, limit):
    batches = Batches(Parallel(micro_batch_size=4, replicas=replicas), seed=0)
    each = [batches.held_out(examples.held_out, replica, limit) for replica in range(replicas)]
    assert len({len(found) for found in each}) == 1
    found = [batch for mine in each for batch in mine]
    expected = range(min(limit or len(examples.held_out), len(examples.held_out)))
    assert sorted(int(i) for batch in found for i in batch["sample"]) == list(expected)
    assert {int(batch["pack"][0, PACKS, 0]) for batch in found} == {len(found)}
    total = sum(int((batch["pack"][0, TARGET] != IGNORED).sum()) for batch in found)
    assert {int(batch["pack"][0, TARGETS, 0]) for batch in found} == {total}
    assert all(len(batch["sample"]) <= 4 for batch in found)


def test_replicas_have_equally_much_to_compute():
    data = arrays([([i, *range(10 + i, 10 + i + (90 if i % 8 == 0 else 9))], 1) for i in range(64)])
    batches = Batches(Parallel(micro_batch_size=8, micro_batches=2, replicas=2), seed=0)
    for step in range(4):
        each = [[b["pack"].shape[2] for b in batches.step(data, step, replica)] for replica in range(2)]
        assert abs(sum(each[0]) - sum(each[1])) <= 90
        assert max(map(max, each)) - min(map(min, each)) <= 90
