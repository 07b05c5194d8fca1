"""`finhpc generate`: prompts, files and talks; adapters over one base; what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finhpc.cli import main
from finhpc.commands.export import export
from finhpc.commands.generate import generate
from finhpc.errors import CheckpointError, ConfigError
from finhpc.generation.decode import decode
from finhpc.generation.decoder import Decoder
from finhpc.generation.generator import Generator
from finhpc.models.loading import load_model
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.generate import GenerateConfig, Sampling
from tests.data.kinds import tokenizer
from tests.generation.folders import folder_of_kind, tiny_adapter, tiny_folder, tiny_model

TEXTS = ["the bank", "prices move while markets wait", "news", "of growth and", "rate", "falls as", "the", "and"]
LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama") / "model", "llama")


def settings(model: Path, **more: Any) -> GenerateConfig:
    tree = {"model": str(model), "sampling": {"max_new_tokens": 12, "stop_at_eos": False}, **more}
    return build(GenerateConfig, tree)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight of different ranks and layers."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    made = [tiny_adapter(folder / f"a{i}", model, LLAMA[: 1 + i % 2], 2 + i, seed=i) for i in range(8)]
    return [f"{path.name}={path}" for path in made]


def test_a_mixed_batch_gives_each_prompt_what_its_adapter_alone_gives(
    llama: Path, adapters: list[str], tmp_path: Path
) -> None:
    names = [entry.partition("=")[0] for entry in adapters]
    rows: list[dict[str, Any]] = [{"prompt": text, "adapter": name} for text, name in zip(TEXTS, names, strict=True)]
    rows += [{"prompt": TEXTS[1]}, {"prompt": TEXTS[1], "adapter": "a7"}]
    mixed = generate(settings(llama, adapters=adapters, prompts=write(tmp_path / "mixed.jsonl", rows)))
    found = [answer["text"] for answer in mixed["answers"]]
    base = load_model(llama)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    for row, text in zip(rows, found, strict=True):
        folder = dict(entry.split("=") for entry in adapters).get(row.get("adapter", ""))
        # peft's own reading of the adapter, one model for each
        model: Any = PeftModel.from_pretrained(load_model(llama), folder) if folder else base
        ids = torch.tensor([tokenizer(row["prompt"]).input_ids])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, pad_token_id=0
            )
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), row
    assert len({found[1], found[8], found[9]}) == 3, "the adapters change what is generated"
    assert mixed["adapter_bytes"] < 0.5 * mixed["model_bytes"], "one base, eight adapters"


@pytest.mark.parametrize(("bits", "scheme"), [(8, "minmax"), (4, "minmax"), (8, "int8"), (4, "nf4")])
def test_quantised_low_rank_models_generate_and_take_adapters(bits: int, scheme: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", "low_rank")
    tree = {"model": str(source), "out": str(tmp_path / "q"), "quantization": {"bits": bits, "scheme": scheme}}
    exported = export(build(ExportConfig, tree))
    adapter = tiny_adapter(tmp_path / "a", tiny_model("llama", "low_rank"), LLAMA, 4, seed=0)
    results = {}
    for cache in (True, False):
        for name in (None, "a"):
            config = settings(tmp_path / "q", adapters=[str(adapter)], adapter=name, prompt=TEXTS[1], cache=cache)
            results[cache, name] = generate(config)
    for name in (None, "a"):
        assert results[True, name]["answers"][0]["text"] == results[False, name]["answers"][0]["text"]
        assert results[True, name]["computed_tokens"] < results[False, name]["computed_tokens"]
    assert results[True, None]["answers"][0]["text"] != results[True, "a"]["answers"][0]["text"]
    assert results[True, None]["model_bytes"] <= 1.05 * exported["size_bytes"], "what is packed stays packed"


def test_the_folder_of_an_adapter_generates_over_its_base(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "run=1" / "model", tiny_model("llama"), LLAMA, 4, seed=0, base=llama)
    given = generate(settings(llama, adapters=[f"a={adapter}"], adapter="a", prompt=TEXTS[1]))
    rows: list[dict[str, Any]] = [{"prompt": TEXTS[1]}, {"prompt": TEXTS[1], "adapter": None}]
    found = generate(settings(adapter, prompts=write(tmp_path / "prompts.jsonl", rows)))
    own, base = found["answers"]
    assert own["text"] == given["answers"][0]["text"]
    assert base["text"] == generate(settings(llama, prompt=TEXTS[1]))["answers"][0]["text"] != own["text"]
    assert found["model"] == str(adapter)
    assert generate(settings(adapter, prompt=TEXTS[1]))["answers"][0]["text"] == own["text"]


def test_prompts_beyond_the_context_lose_their_beginning(llama: Path, tmp_path: Path) -> None:
    long = " ".join(TEXTS * 40)
    file = write(tmp_path / "p.jsonl", [{"prompt": long}, {"prompt": TEXTS[0]}])
    result = generate(settings(llama, prompts=file))
    assert (result["prompts"], result["prompts_cut"]) == (2, 1)
    assert result["tokens_cut"] > 0
    assert result["new_tokens"] == 24


def test_a_chat_streams_and_remembers(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the bank rate\nand now\n"))
    out = tmp_path / "talk.jsonl"
    result = generate(settings(llama, chat=True, out=str(out)))
    first, second = result["answers"]
    once = generate(settings(llama, prompt=f"the bank rate\n{first['text']}\nand now\n"))
    assert second["text"] == once["answers"][0]["text"], "the talk so far is before the second answer"
    assert first["text"] in capfd.readouterr().err
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [first["text"], second["text"]]


def test_the_command_and_its_files(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("the bank\n\nprices move\n")
    words = ["generate", "--model", str(llama), "--prompts", str(tmp_path / "prompts.txt"), "--batch", "1"]
    words += ["--out", str(tmp_path / "out.jsonl"), "--sampling.max_new_tokens", "5", "--json"]
    assert main(words) == 0
    result = json.loads(capfd.readouterr().out)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == result["answers"]
    assert [answer["prompt"] for answer in answers] == ["the bank", "prices move"]
    assert main(words) == 2, "nothing is overwritten"


@pytest.mark.parametrize("kind", ["byte level, prefix", "metaspace first", "prepend", "word piece"])
def test_prompt_and_text_join_and_no_end_is_read(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = folder_of_kind(tmp_path / "model", tokenizer(kind, begin=True, end=True))
    prompts = ["Alder Foods", "What does", "bread and"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    many = generate(settings(model, prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "out.jsonl")))
    one = generate(settings(model, prompt=prompts[0]))
    assert prompts[0] + one["answers"][0]["text"] in capfd.readouterr().err, "the screen shows it as it joins"
    assert one["answers"][0]["text"] == many["answers"][0]["text"]
    network, tok = load_model(model), tokenizer(kind)
    for prompt, line in zip(prompts, (tmp_path / "out.jsonl").read_text().splitlines(), strict=True):
        ids = torch.tensor([[tok.bos_token_id, *tok(prompt, add_special_tokens=False).input_ids]])
        with torch.inference_mode():
            whole: Any = network.generate(ids, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)  # type: ignore[operator]
        said = tok.decode(whole[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert prompt + json.loads(line)["text"] == said.removeprefix(" ")


def test_a_chat_ends_with_the_templates_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base ends a text with </s>, its template a turn with <|im_end|>; generation_config.json has neither."""
    tok = tokenizer("metaspace first", "chatml")
    free = folder_of_kind(tmp_path / "free", tok)
    sampling = {"max_new_tokens": 12, "stop_at_eos": True}

    def talk(model: Path, **more: Any) -> dict[str, Any]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is it\n"))
        return generate(settings(model, chat=True, sampling=sampling, **more))

    endless = talk(free)
    assert endless["new_tokens"] == 12
    prompt = tok.apply_chat_template([{"role": "user", "content": "What is it"}], add_generation_prompt=True)[
        "input_ids"
    ]

    ids = [row[0] for row in decode(Decoder(load_model(free)), [prompt], Sampling(max_new_tokens=12))]
    at = next(i for i, token in enumerate(ids) if token not in ids[:i] and i)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    model = folder_of_kind(tmp_path / "model", tok, likely=(int(ids[at] or 0), end))
    ended = talk(model)
    assert ended["new_tokens"] == at + 1
    assert "im_end" not in ended["answers"][0]["text"]
    adapter = tiny_adapter(tmp_path / "a", load_model(model), ["model.layers.0.self_attn.q_proj"], 2, seed=0)
    bare = tokenizer("metaspace first")
    bare.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    assert end not in Generator(settings(model, prompt="a", sampling=sampling)).stop
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    generator = Generator(settings(model, prompt="a", sampling=sampling, adapters=[f"a={adapter}"]))
    assert generator.stop == {2, end}, "an adapter brings the ends that it has learned"
    tok.save_pretrained(adapter)
    (adapter / "generation_config.json").unlink()
    generator = Generator(settings(model, prompt="a", sampling=sampling, adapters=[f"a={adapter}"]))
    assert generator.stop == {2, end}
    assert generator.tokenizers["a"].chat_template
    assert not generator.tokenizers[None].chat_template


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    tok = tokenizer("byte level")
    size = len(tok)
    short = folder_of_kind(tmp_path / "short", tok, rows=size - 4)
    message = refusal(settings(short, prompt="a"))
    assert f"an embedding of {size - 4} rows" in message
    assert f"{size} ids" in message
    folder_of_kind(tmp_path / "padded", tok, rows=size + 28)
    assert generate(settings(tmp_path / "padded", prompt="a"))["new_tokens"] == 12
    tok.add_special_tokens({"pad_token": "[PAD]"})
    pads = folder_of_kind(tmp_path / "pads", tok, rows=size)
    assert generate(settings(pads, prompt="a"))["new_tokens"] == 12
    assert f"holds the id {size}" in refusal(settings(pads, prompt="a [PAD]"))


def refusal(config: GenerateConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        generate(config)
    return str(caught.value)


def test_what_cannot_be_used_is_named(llama: Path, adapters: list[str], tmp_path: Path) -> None:
    assert "model is not set" in refusal(build(GenerateConfig, {"prompt": "a"}))
    assert "nothing to generate from" in refusal(settings(llama))
    assert "prompt and chat are set together" in refusal(settings(llama, prompt="a", chat=True))
    assert "adapter=x is not among adapters" in refusal(settings(llama, prompt="a", adapter="x"))
    assert "does not exist" in refusal(settings(llama, prompts=str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert "has no prompts" in refusal(settings(llama, prompts=str(tmp_path / "empty.txt")))
    file = write(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert "bad.jsonl:2 is no" in refusal(settings(llama, prompts=file))
    file = write(tmp_path / "name.jsonl", [{"prompt": "a", "adapter": "a11"}])
    assert "name.jsonl:1: adapter a11 is not loaded; did you mean 'a1'?" in refusal(
        settings(llama, prompts=file, adapters=adapters)
    )
    assert "leaves no room" in refusal(settings(llama, prompt="a", sampling={"max_new_tokens": 128}))


def test_an_adapter_of_another_base_and_a_model_without_tokeniser_are_refused(
    llama: Path, adapters: list[str], tmp_path: Path
) -> None:
    other = tiny_folder(tmp_path / "gpt2", "gpt2")
    message = refusal(settings(other, prompt="a", adapters=adapters[:1]))
    assert f"adapts {LLAMA[0]}, which the base does not have" in message
    bare = tiny_folder(tmp_path / "bare", "gpt2", tokenizer=False)
    assert "has no tokenizer" in refusal(settings(bare, prompt="a"))


@pytest.mark.parametrize("content", ["{", '\ufeff{"eos_token_id": 0}', '{"eos_token_id": "</s>"}'])
def test_a_broken_generation_config_is_refused(llama: Path, tmp_path: Path, content: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generate(settings(model, prompt="the bank", sampling={"max_new_tokens": 1}))
