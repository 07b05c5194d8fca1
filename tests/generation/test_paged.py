"""Attention over blocks, wherever they lie; which blocks a request gets."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from finhpc.generation.blocks import Blocks, Table, chain
from finhpc.generation.paged import PagedCache, Span, block_bytes, cache_bytes
from finhpc.models.attention import Scores

CONFIG = SimpleNamespace(
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32, num_hidden_layers=2, dtype=torch.bfloat16
)
LAYOUTS = {
    "in a row": lambda i, j: 10 * i + j,
    "in rows of other distances": lambda i, j: 7 * i + i * i + j,
    "backwards": lambda i, j: 39 - (10 * i + j),
    "mixed": lambda i, j: 4 * j + i,
}


def expected(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
    """softmax(scores) V of the last queries, row by row."""
    past = len(keys) - len(q)
    found = []
    for i, query in enumerate(q):
        begin = 0 if scores.window is None else max(0, past + i + 1 - scores.window)
        heads = []
        for head, row in enumerate(query):
            raw = keys[begin : past + i + 1, head // 2] @ row * scores.scale
            raw = raw if scores.cap is None else torch.tanh(raw / scores.cap) * scores.cap
            heads.append(torch.softmax(raw, 0) @ values[begin : past + i + 1, head // 2])
        found.append(torch.stack(heads))
    return torch.stack(found)


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, window=6), Scores(0.3, cap=0.5), Scores(0.3, 6, 0.5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_find_what_they_find_in_whole_rows(layout: str, scores: Scores) -> None:
    torch.manual_seed(0)
    cache = PagedCache(CONFIG, 40, 4, torch.float32, torch.device("cpu"))
    cache.data.fill_(float("nan"))
    tables = [[LAYOUTS[layout](i, j) for j in range(10)] for i in range(4)]
    q, k, v = (torch.randn(4, 40, heads, 8) for heads in (4, 2, 2))
    past = [0] * 4
    # parts of prompts of equal and of different lengths, then single tokens of even and of different lengths
    for news in ([7, 7, 7, 7], [1, 1, 1, 1], [5, 5, 9, 9], [1, 1, 1, 1], [2, 12, 1, 12], [1, 1, 1, 1]):
        order = sorted(range(4), key=lambda i: (news[i], -past[i]))
        taken = {block for i in range(4) for block in tables[i][: -(-past[i] // 4)]}
        needed = {block for i in range(4) for block in tables[i][: -(-(past[i] + news[i]) // 4)]}
        cache.clear(sorted(needed - taken))
        cache.begin([Span(tables[i][: -(-(past[i] + news[i]) // 4)], past[i], news[i]) for i in order])
        rows = [(i, slice(past[i], past[i] + news[i])) for i in order]
        found = cache.attend(1, *(torch.cat([x[i, part] for i, part in rows]) for x in (q, k, v)), scores)
        for (i, part), own in zip(rows, found.split([news[i] for i in order]), strict=True):
            wanted = expected(q[i, part], k[i, : part.stop], v[i, : part.stop], scores)
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
            past[i] = part.stop
    assert cache.data[0, :, :, sorted(needed)].abs().max() == 0, "the other layer is as it was"


def test_blocks_lie_in_rows_while_there_is_room() -> None:
    blocks, tables = Blocks(20, 4), [Table() for _ in range(4)]
    for table in tables[:3]:
        blocks.settle(table, 5)
    for count in range(1, 6):
        for table in tables[:3]:
            blocks.grow(table, count)
    assert [table.blocks for table in tables[:3]] == [list(range(begin, begin + 5)) for begin in (0, 5, 10)]
    blocks.settle(tables[3], 6)
    assert not tables[3].home, "no room for six in a row"
    assert blocks.grow(tables[3], 2) == [15, 16]
    blocks.release(tables[1])
    blocks.settle(tables[1], 4)
    blocks.grow(tables[3], 5)
    assert tables[3].blocks == [15, 16, 9, 17, 18]
    blocks.grow(tables[3], 6)
    assert blocks.grow(tables[1], 4) == [5, 6, 7, 8], "a home is left alone while others are free"
    blocks.release(tables[0])
    blocks.grow(tables[1], 9)
    assert blocks.free == 0
    for table in tables:
        blocks.release(table)
    assert (blocks.used, int(blocks.at_home.sum())) == (0, 0)


def test_what_is_kept_longest_is_lost_first() -> None:
    blocks, keys = Blocks(4, 2), chain("", [1, 2, 3, 4, 5, 6, 7], 2)
    first, second = Table(), Table()
    for i, block in enumerate(blocks.grow(first, 3)):
        blocks.keep(block, keys[i])
    blocks.release(first)
    assert blocks.findable(keys) == [0, 1, 2]
    assert blocks.grow(second, 2) == [3, 2], "what holds nothing, then the end of a beginning"
    assert blocks.findable(keys) == [0, 1]
    blocks.share(first, blocks.findable(keys))
    assert (blocks.free, blocks.shared) == (0, 0)
    third = Table()
    blocks.share(third, blocks.findable(keys))
    assert blocks.shared == 2
    blocks.release(first, forget=True)
    assert blocks.findable(keys) == []
    assert blocks.used == 4, "another table has them"
    blocks.release(third)
    assert (blocks.used, blocks.free) == (2, 2)


def test_keys_depend_on_everything_before() -> None:
    ids = list(range(10))
    keys = chain("a", ids, 3)
    assert len(keys) == 3
    assert chain("a", ids, 3, keys[:1]) == keys
    assert not set(keys) & {*chain("b", ids, 3), *chain("a", [9, *ids[1:]], 3)}
    assert chain("a", [*ids[:3], 77, *ids[4:]], 3)[0] == keys[0]
    assert len({tuple(chain("", [a, b], 1)) for a in range(30) for b in range(30)}) == 900


def test_bytes_of_layouts() -> None:
    found = cache_bytes(10, [5, 32, 33], [5, 40, 90], longest=100, context=1000, block_size=32)
    assert found == {
        "tokens": 700,
        "paged": 10 * (32 + 32 + 64),
        "rows: own end": 1350,
        "rows: longest": 3000,
        "rows: context": 30_000,
    }
    cache = PagedCache(CONFIG, 3, 16, torch.float32, torch.device("cpu"))
    assert cache.bytes == 3 * block_bytes(CONFIG, 16, "cpu") == 3 * 2 * 2 * 2 * 16 * 8 * 4
    assert block_bytes(CONFIG, 16, "cuda") == block_bytes(CONFIG, 16, "cpu") // 2
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(200)]
    found = cache_bytes(1, lengths, lengths, longest=1000, context=2048, block_size=32)
    assert found["paged"] < 1.04 * found["tokens"] < 0.6 * found["rows: longest"]
