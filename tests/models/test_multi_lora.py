"""Rows of a batch go through their own adapters, however the rows are gathered."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from finhpc.errors import ConfigError
from finhpc.models.lora.multi_lora import MANY, Adapters
from finhpc.models.lora.peft_format import Adapter


class Model(nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = type("Config", (), {})()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x))
        return found


def adapter(seed: int, bits: int = 16) -> Adapter:
    draw = torch.Generator().manual_seed(seed)

    def of(rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)

    pairs = {"first": of(1 + seed % 3, 12, 10)} | ({"second": of(2, 10, 7)} if seed % 2 else {})
    magnitudes = {"first": torch.rand(10, generator=draw)} if seed == 4 else {}
    return Adapter(pairs, dict.fromkeys(pairs, 0.5 + seed / 10), bits, "minmax" if bits < 16 else "", magnitudes)


@torch.no_grad()
def by_hand(model: Model, adapters: dict[str, Adapter], rows: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    found = []
    for row, name in zip(rows, names, strict=True):
        for layer in (model.first, model.second):
            base: Any = getattr(layer, "base", layer)
            weight = base.weight
            if name is not None:
                weight = adapters[name].merged("first" if base.in_features == 12 else "second", weight)
            row = nn.functional.linear(row, weight, base.bias)
        found.append(row)
    return torch.stack(found)


@torch.no_grad()
def test_every_choice_of_rows() -> None:
    torch.manual_seed(0)
    model, made = Model(), {str(i): adapter(i) for i in range(20)}
    adapters, draw = Adapters(model, made), random.Random(0)
    copies = []
    for _ in range(60):
        some = draw.sample([*made], draw.choice([1, 2, 6, 9, 20]))
        counts = [draw.choice([*[1] * 8, 2, MANY, MANY + 5]) for _ in range(draw.randint(1, 40))]
        names = [draw.choice([None, *some]) for _ in counts]
        adapters.select(names, counts)
        rows = torch.randn(sum(counts), 12)
        of_rows = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        wanted = by_hand(model, made, rows, of_rows)
        torch.testing.assert_close(model(rows[None])[0], wanted, rtol=1e-4, atol=1e-3)
        copies.append(adapters.choice.members)
    assert len(set(copies)) > 5
    assert 20 in map(len, copies), "all, if nearly all are needed"
    assert min(map(len, filter(None, copies))) <= 6


@torch.no_grad()
def test_weights_are_copied_only_for_other_adapters() -> None:
    model, made = Model(), {str(i): adapter(i) for i in range(20)}
    adapters = Adapters(model, made)
    layer = adapters.layers["first"]
    adapters.select(["1", "2", "3"])
    model(torch.randn(3, 12))
    stacked = layer.stacked[True]
    for names in (["3", "1"], ["1", "1", "2", None], ["2"], ["3", "2"]):
        adapters.select(names)
        model(torch.randn(len(names), 12))
        assert layer.stacked[True] is stacked
    alone = layer.stacked[False]
    adapters.select(["4", "1"])
    model(torch.randn(2, 12))
    assert layer.stacked[True] is not stacked
    assert layer.stacked[False] is alone


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_adapter_damages_only_its_own_rows(place: int) -> None:
    torch.manual_seed(0)
    model, made = Model(), {str(i): adapter(i) for i in range(3)}
    made["1"].pairs["first"][place][0, 0] = float("nan")
    adapters = Adapters(model, made)
    names: list[str | None] = ["0", "1", None, "2", "1"]
    adapters.select(names)
    rows = torch.randn(5, 12)
    found = model(rows)
    assert found.isnan().any(1).tolist() == [False, True, False, False, True]
    sound = [0, 2, 3]
    wanted = by_hand(model, made, rows[sound], [names[i] for i in sound])
    torch.testing.assert_close(found[sound], wanted, rtol=1e-4, atol=1e-3)
    adapters.free(adapters.numbers["1"])
    made["5"] = adapter(5)
    assert adapters.add("5", made["5"]) == 2
    adapters.select(["5", "0"])
    torch.testing.assert_close(model(rows[:2]), by_hand(model, made, rows[:2], ["5", "0"]), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_numbers_are_used_again() -> None:
    torch.manual_seed(0)
    model, made = Model(), {str(i): adapter(i) for i in range(3)}
    adapters = Adapters(model, made)
    size = adapters.bytes
    adapters.free(adapters.numbers["1"])
    assert adapters.names == ["0", "2"]
    made["5"] = adapter(5)
    assert adapters.add("5", made["5"]) == 2
    assert adapters.bytes == size
    made["9"] = adapter(4)
    adapters.add("9", made["9"])
    names: list[str | None] = ["5", None, "9", "0", "2"]
    adapters.select(names)
    rows = torch.randn(5, 12)
    torch.testing.assert_close(model(rows), by_hand(model, made, rows, names), rtol=1e-4, atol=1e-3)


def test_an_adapter_of_another_rounding_is_refused() -> None:
    adapters = Adapters(Model(), {"a": adapter(0, bits=8)})
    adapters.check("b", adapter(1, bits=8))
    with pytest.raises(ConfigError, match=r"adapter c was trained with a base of 16 bits, but .* 8 bits minmax"):
        adapters.check("c", adapter(1))
