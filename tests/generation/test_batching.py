"""Continuous batching: the ids of each request alone, whatever else is computed; no block is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.commands.export import export
from finhpc.errors import ConfigError
from finhpc.generation.adapters import read_adapters
from finhpc.generation.batching import Batcher
from finhpc.generation.decoder import Decoder
from finhpc.generation.fast_layers import use_fast_layers
from finhpc.generation.requests import Request, Row, Token
from finhpc.models.loading import load_model
from finhpc.models.lora.adapter_file import load_adapter
from finhpc.models.lora.multi_lora import Adapters
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.generate import Sampling
from finhpc.settings.pretrain import Qkv
from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model
from tests.generation.test_decoding import MODELS, generated

LENGTHS = (5, 40, 1, 30, 17, 8, 33, 2)
GREEDY = Sampling(max_new_tokens=12)
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def prompts_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(300) for _ in range(length)] for length in lengths]


def batcher_of(model: Any, adapters: Adapters | None = None, **more: Any) -> Batcher:
    settings = {"blocks": 64, "block_size": 8, "max_batch": 8, "prefill_tokens": 24} | more
    return Batcher(Decoder(model), adapters, **settings)


def requests_of(prompts: list[list[int]], sampling: Sampling = GREEDY, **more: Any) -> list[Request]:
    return [Request(str(i), prompt, None, sampling, row=i, **more) for i, prompt in enumerate(prompts)]


def served(batcher: Batcher, requests: Sequence[Request], every: int = 0) -> dict[str, list[Token]]:
    """The tokens of requests that come `every` so many passes, or all at once."""
    waiting, found = list(requests), {request.name: [] for request in requests}
    for step in range(10_000):
        while waiting and (not every or step % every == 0):
            batcher.add(waiting.pop(0))
            if every:
                break
        tokens = batcher.step()
        for token in tokens:
            found[token.request].append(token)
        if not waiting and not batcher.wait(0):
            return found
    raise AssertionError("it never ends")


def ids_of(tokens: dict[str, list[Token]]) -> list[list[int | None]]:
    return [[token.id for token in of if token.id is not None] for of in tokens.values()]


def assert_nothing_is_lost(batcher: Batcher) -> None:
    blocks = batcher.schedule.blocks
    assert (blocks.used, sum(blocks.users), int(blocks.at_home.sum())) == (0, 0, 0)
    assert {block: key for key, block in blocks.found.items()} == blocks.keys
    assert batcher.stats().running == batcher.stats().waiting == 0


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_ids_are_those_of_each_request_alone(family: str, kind: str, qkv: Qkv, every: int) -> None:
    model, prompts = tiny_model(family, kind, qkv=qkv), prompts_of()
    alone = [generated(model, [prompt], GREEDY)[0] for prompt in prompts]
    batcher = batcher_of(model)
    assert ids_of(served(batcher, requests_of(prompts), every)) == alone
    assert_nothing_is_lost(batcher)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize(("bits", "scheme"), [(8, "minmax"), (4, "minmax"), (8, "int8"), (4, "nf4")])
def test_quantized_models_with_several_adapters(tmp_path: Path, bits: int, scheme: str, kind: str) -> None:
    source, out = tiny_folder(tmp_path / "model", "llama", kind, tokenizer=False), tmp_path / "q"
    tree = {"model": str(source), "out": str(out), "quantization": {"bits": bits, "scheme": scheme}}
    export(build(ExportConfig, tree))
    model: Any = load_model(out)
    use_fast_layers(model)
    assert_rows_have_their_adapters(model, out, tmp_path)


def assert_rows_have_their_adapters(model: Any, source: Path, folder: Path) -> None:
    dense = tiny_model("llama")  # of the same shapes
    given = [f"a{i}={tiny_adapter(folder / f'a{i}', dense, LAYERS[: 1 + i % 2], 2 + i, seed=i)}" for i in range(3)]
    adapters = Adapters(model, read_adapters(given, model.config, source))
    names = ["a2", None, "a0", "a1", "a0", "a2", None, "a1"]
    prompts = prompts_of()
    alone = []
    for name, prompt in zip(names, prompts, strict=True):
        adapters.select([name])
        alone += generated(model, [prompt], GREEDY)
    requests = [Request(str(i), *of, GREEDY) for i, of in enumerate(zip(prompts, names, strict=True))]
    for every in (0, 2):
        batcher = batcher_of(model, adapters)
        assert ids_of(served(batcher, requests, every)) == alone
        assert_nothing_is_lost(batcher)
    batcher = batcher_of(model, adapters, max_batch=40, prefill_tokens=512, blocks=200)
    many = [Request(f"{i} {k}", *of, GREEDY) for k in range(4) for i, of in enumerate(zip(prompts, names, strict=True))]
    assert ids_of(served(batcher, many)) == alone * 4, "adapters with many and with few rows in a pass"


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_rows_have_their_adapters(tmp_path: Path, kind: str) -> None:
    source = tiny_folder(tmp_path / "model", "llama", kind, tokenizer=False)
    assert_rows_have_their_adapters(load_model(source), source, tmp_path)


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=30), Sampling(max_new_tokens=30, temperature=2.0, seed=3)]
)
def test_preemption_changes_no_id(sampling: Sampling) -> None:
    model, prompts = tiny_model("llama"), prompts_of()
    plain = batcher_of(model)
    wanted = ids_of(served(plain, requests_of(prompts, sampling)))
    tiny = batcher_of(model, blocks=12)
    assert ids_of(served(tiny, requests_of(prompts, sampling), 1)) == wanted
    assert tiny.stats().preemptions >= 2
    assert plain.stats().preemptions == 0
    assert_nothing_is_lost(tiny)


def test_equal_beginnings_are_computed_once() -> None:
    model, (beginning, *ends) = tiny_model("llama"), prompts_of((50, 3, 6, 9, 12))
    prompts = [beginning + end for end in ends] + [beginning[:48]]
    alone = [generated(model, [prompt], GREEDY)[0] for prompt in prompts]
    batcher = batcher_of(model, prefill_tokens=512)
    assert ids_of(served(batcher, requests_of(prompts))) == alone, "in one pass"
    assert batcher.stats().prefix_hits == 3 * 48 + 40, "one token of a prompt is always computed"
    assert batcher.decoder.computed_tokens == sum(map(len, prompts)) - (3 * 48 + 40) + 5 * 11
    again = [Request(f"{name} again", *rest, GREEDY) for name, *rest in (("0", prompts[0], None), ("1", ends[3], None))]
    assert ids_of(served(batcher, again))[0] == alone[0], "and after they have ended"
    assert batcher.stats().prefix_hits == 3 * 48 + 40 + 48
    assert_nothing_is_lost(batcher)


def test_an_adapter_finds_no_blocks_of_another(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    model: Any = load_model(source)
    given = [f"a{i}={tiny_adapter(tmp_path / f'a{i}', model, LAYERS, 4, seed=i)}" for i in range(2)]
    adapters = Adapters(model, read_adapters(given, model.config, source))
    [prompt] = prompts_of((40,))
    batcher = batcher_of(model, adapters)
    for name in ("a0", "a1", None):
        served(batcher, [Request("r", prompt, name, GREEDY)])
    assert batcher.stats().prefix_hits == 0
    batcher.remove_adapter("a0")
    served(batcher, [])
    batcher.add_adapter("a0", load_adapter(tmp_path / "a1", tiny_model("llama")))
    assert ids_of(served(batcher, [Request("r", prompt, "a0", GREEDY)])) == ids_of(
        served(batcher, [Request("r", prompt, "a1", GREEDY)])
    )
    assert batcher.stats().prefix_hits == 32, "only a1's own"


def test_random_traffic_loses_no_block(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    model: Any = load_model(source)
    given = [f"a{i}={tiny_adapter(tmp_path / f'a{i}', model, LAYERS, 3, seed=i)}" for i in range(2)]
    adapters = Adapters(model, read_adapters(given, model.config, source))
    batcher, draw = batcher_of(model, adapters, blocks=24, max_batch=5), random.Random(7)
    size, beginnings, live, ended = batcher.cache.bytes, prompts_of((24, 40)), set(), 0
    for step in range(400):
        if step < 300 and draw.random() < 0.4:
            ids = draw.choice([[], *beginnings]) + prompts_of((draw.randrange(1, 30),))[0]
            sampling = Sampling(max_new_tokens=draw.randrange(1, 50), temperature=draw.choice([0.0, 1.0]))
            batcher.add(Request(str(step), ids, draw.choice([None, "a0", "a1"]), sampling))
            live.add(str(step))
        if live and draw.random() < 0.1:
            batcher.cancel(draw.choice(sorted(live)))
        for token in batcher.step():
            live -= {token.request} if token.finish else set()
            ended += token.finish is not None
        blocks = batcher.schedule.blocks
        assert [
            sum(block in row.table.blocks for row in batcher.schedule.running) for block in range(24)
        ] == blocks.users
        assert blocks.used == sum(users > 0 for users in blocks.users)
        assert batcher.cache.bytes == size
    while batcher.wait(0):
        ended += sum(token.finish is not None for token in batcher.step())
    assert ended > 100
    assert batcher.stats().preemptions >= 3
    assert batcher.stats().prefix_hits > 100
    assert_nothing_is_lost(batcher)


def test_a_cancelled_request_ends_and_others_go_on() -> None:
    model, prompts = tiny_model("gpt2"), prompts_of()
    alone = [generated(model, [prompt], GREEDY)[0] for prompt in prompts]
    batcher = batcher_of(model, max_batch=4)
    for request in requests_of(prompts):
        batcher.add(request)
    tokens = batcher.step() + batcher.step()
    for name in ("0", "7", "unknown"):  # runs, waits
        batcher.cancel(name)
    tokens += batcher.step()
    assert [token.request for token in tokens if token.finish == "cancelled"] == ["0", "7"]
    while batcher.wait(0):
        tokens += batcher.step()
    found = [[token.id for token in tokens if token.request == str(i) and token.id is not None] for i in range(8)]
    assert found[1:7] == alone[1:7]
    assert found[0] == alone[0][: len(found[0])]
    assert_nothing_is_lost(batcher)


def test_a_request_cancelled_in_its_last_pass_cancels_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, last = batcher_of(tiny_model("gpt2")), GREEDY.model_copy(update={"max_new_tokens": 1})
    compute = batcher._compute

    def cancelled_meanwhile(rows: list[Row]) -> list[Token]:
        batcher.cancel("r")
        return compute(rows)

    monkeypatch.setattr(batcher, "_compute", cancelled_meanwhile)
    for _ in range(2):
        batcher.add(Request("r", [1, 2], None, last))
        assert [token.finish for token in batcher.step()] == ["length"]
    assert_nothing_is_lost(batcher)


def test_first_come_first_served() -> None:
    batcher = batcher_of(tiny_model("gpt2"), max_batch=2, blocks=12)
    found = served(batcher, requests_of(prompts_of((60, 3, 40, 2, 3))))
    assert [tokens[-1].finish for tokens in found.values()] == ["length"] * 5
    batcher = batcher_of(tiny_model("gpt2"), max_batch=2)
    for request in requests_of(prompts_of((60, 3, 40, 2, 3))):
        batcher.add(request)
    order = []
    while batcher.wait(0):
        batcher.step()
        order.append([row.request.name for row in batcher.schedule.running])
    order = [names for names in order if names]
    assert order == sorted(order), "no request is overtaken in the queue"
    assert {name for names in order for name in names} == set("01234")


def test_a_prompt_is_computed_in_parts_while_others_generate() -> None:
    batcher = batcher_of(tiny_model("gpt2"), prefill_tokens=16)
    batcher.add(requests_of([[1, 2, 3]])[0])
    batcher.step()
    batcher.add(Request("long", prompts_of((70,))[0], None, GREEDY))
    passes = [batcher.step() for _ in range(5)]
    assert [[token.request for token in tokens] for tokens in passes] == [["0"]] * 4 + [["0", "long"]]


def test_damage_ends_one_request(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    model: Any = load_model(source)
    layer = "model.layers.0.mlp.down_proj"  # before keys and values of the next one
    good, bad = (
        load_adapter(tiny_adapter(tmp_path / name, model, [layer], 4, seed=0), model) for name in ("good", "bad")
    )
    bad.pairs[layer][0][0, 0] = float("nan")
    prompts = prompts_of()
    adapters = Adapters(model, {"good": good, "bad": bad})
    names = ["good", "bad", None, "bad", "good", "bad", None, "good"]
    requests = [Request(str(i), *of, GREEDY) for i, of in enumerate(zip(prompts, names, strict=True))]
    wanted = [ids_of(served(batcher_of(model, adapters), [request]))[0] for request in requests]
    batcher = batcher_of(model, adapters, blocks=16)
    for _ in range(2):  # the second time in blocks that held NaN
        found = served(batcher, requests, 1)
        assert ids_of(found) == wanted
        errors = [name for name, tokens in zip(names, found.values(), strict=True) if tokens[-1].finish == "error"]
        assert errors == ["bad"] * 3
        assert "NaN or infinite" in str(found["1"][-1].error)
    assert not any(map(len, wanted[1::2][:3]))
    assert_nothing_is_lost(batcher)


def test_log_probabilities_are_the_models_own() -> None:
    model, [prompt] = tiny_model("llama"), prompts_of((30,))
    for other in (0, 3):
        batcher = batcher_of(model, blocks=9 if other else 64)
        others = requests_of(prompts_of()[:other])
        asked = Request("scored", prompt, None, GREEDY, logprobs=3, prompt_logprobs=True)
        tokens = served(batcher, [*others, asked, Request("not", prompt, None, GREEDY)], 1)["scored"]
        ids = [*prompt, *(int(token.id or 0) for token in tokens)]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0]
        wanted = torch.log_softmax(logits, -1)
        scores = tokens[0].prompt_logprobs
        assert scores is not None
        assert len(scores) == 30
        assert scores[0] is None
        found = [(score.logprob, score.top) for score in scores[1:] if score is not None]
        found += [(token.logprob or 0.0, token.top) for token in tokens]
        for row, own, (logprob, top) in zip(wanted, ids[1:], found, strict=True):
            assert logprob == pytest.approx(float(row[own]), abs=1e-4)
            assert [token for token, _ in top] == row.topk(3).indices.tolist()
            assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert all(token.prompt_logprobs is None for token in tokens[1:])


def test_prompts_that_are_scored_share_what_comes_before() -> None:
    model, (beginning, *ends) = tiny_model("llama"), prompts_of((50, 3, 6, 9, 12))
    none = GREEDY.model_copy(update={"max_new_tokens": 0})
    batcher = batcher_of(model, prefill_tokens=512)
    asked = [
        Request(str(i), beginning + end, None, none, logprobs=i, prompt_logprobs=True, score_from=50)
        for i, end in enumerate(ends)
    ]
    found = served(batcher, asked)
    assert batcher.stats().prefix_hits == 3 * 48, "the 50th id predicts the first that is scored"
    for i, end in enumerate(ends):
        with torch.no_grad():
            wanted = torch.log_softmax(model(torch.tensor([beginning + end])).logits[0, 49:-1], -1)
        [token] = found[str(i)]
        assert token.prompt_logprobs is not None
        own = [float(wanted[place, following]) for place, following in enumerate(end)]
        assert [score.logprob for score in token.prompt_logprobs if score] == pytest.approx(own, abs=1e-4)
        assert all(len(score.top) == i for score in token.prompt_logprobs if score)
    assert_nothing_is_lost(batcher)


def test_a_prompt_alone_can_be_scored() -> None:
    none = GREEDY.model_copy(update={"max_new_tokens": 0})
    batcher = batcher_of(tiny_model("gpt2"))
    [[token]] = served(batcher, [Request("r", prompts_of((50,))[0], None, none, prompt_logprobs=True)]).values()
    assert (token.id, token.finish, len(token.prompt_logprobs or [])) == (None, "length", 50)
    assert (token.prompt_logprobs or [None])[-1].top == []  # type: ignore[union-attr]


def test_adapters_come_and_go(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    made = {
        name: load_adapter(
            tiny_adapter(tmp_path / name, tiny_model("llama"), layers, rank, seed=rank), tiny_model("llama")
        )
        for name, layers, rank in (("a", LAYERS[:1], 2), ("b", LAYERS, 7))
    }
    prompts = prompts_of()
    wanted = {}
    for name, adapter in made.items():
        model: Any = load_model(source)
        adapters = Adapters(model, {name: adapter})
        adapters.select([name])
        wanted[name] = generated(model, [prompts[0]], GREEDY)
    plain = [generated(load_model(source), [prompt], GREEDY)[0] for prompt in prompts]
    model = load_model(source)
    batcher = batcher_of(model, Adapters(model, {}))
    for request in requests_of(prompts[:4]):
        batcher.add(request)
    tokens = batcher.step()
    batcher.add_adapter("a", made["a"])
    batcher.add(Request("a", prompts[0], "a", GREEDY))
    tokens += batcher.step()
    batcher.add_adapter("b", made["b"])
    batcher.remove_adapter("a")
    with pytest.raises(ConfigError, match="adapter a is not loaded; valid: b"):
        batcher.add(Request("late", prompts[0], "a", GREEDY))
    batcher.add(Request("b", prompts[0], "b", GREEDY))
    batcher.add_adapter("a", made["b"])
    batcher.add(Request("new a", prompts[0], "a", GREEDY))
    while batcher.wait(0):
        tokens += batcher.step()
    found: dict[str, list[Any]] = {}
    for token in tokens:
        found.setdefault(token.request, []).append(token.id)
    assert [found[str(i)] for i in range(4)] == plain[:4]
    assert [found["a"]] == wanted["a"]
    assert [found["b"]] == [found["new a"]] == wanted["b"]
    assert len(set(map(tuple, (plain[0], found["a"], found["b"])))) == 3
    batcher.remove_adapter("a")
    batcher.remove_adapter("b")
    batcher.step()
    assert not any(float(layer.B.abs().sum()) for layer in batcher.adapters.layers.values())  # type: ignore[union-attr]
    assert ids_of(served(batcher, requests_of(prompts))) == plain


def test_other_threads_add_and_wait() -> None:
    model, prompts = tiny_model("gpt2"), prompts_of()
    batcher, found = batcher_of(model), []
    assert not batcher.wait(0.01)
    threads = [threading.Thread(target=batcher.add, args=(request,)) for request in requests_of(prompts)]
    timer = threading.Timer(0.1, lambda: [thread.start() for thread in threads])
    timer.start()
    while sum(token.finish is not None for token in found) < len(prompts):
        assert batcher.wait(10), "it wakes up"
        found += batcher.step()
    for thread in (timer, *threads):
        thread.join()
    assert_nothing_is_lost(batcher)


def test_what_never_fits_is_refused() -> None:
    batcher = batcher_of(tiny_model("gpt2"), blocks=8)

    def refusal(ids: list[int], adapter: str | None = None, new: int = 12) -> str:
        with pytest.raises(ConfigError) as caught:
            batcher.add(Request("r", ids, adapter, Sampling(max_new_tokens=new)))
        return str(caught.value)

    assert "exceed the context of 128" in refusal([1] * 100, new=29)
    assert "exceed the whole cache of 64 tokens" in refusal([1] * 53)
    assert "has no tokens" in refusal([])
    assert "holds the id 300, but the model has rows for 300" in refusal([1, 300])
    assert "adapter x is not loaded" in refusal([1], "x")
    batcher.add(Request("r", [1] * 52, None, GREEDY))
    assert "request r is being computed already" in refusal([1])
    while batcher.wait(0):
        batcher.step()
    assert_nothing_is_lost(batcher)
