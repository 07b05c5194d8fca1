"""`finhpc generate`: one prompt, a file of them, or a chat at the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from finhpc.data.examples.chat import prompt_ids, prompt_text
from finhpc.errors import ConfigError
from finhpc.generation.adapters import named, over_its_base
from finhpc.generation.generator import Generator, open_parts
from finhpc.generation.prompts import Prompt, read_prompts
from finhpc.models.families.registry import context_of
from finhpc.models.files import tokens
from finhpc.settings.generate import GenerateConfig


def generate(config: GenerateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Generate what `config` asks for; returns counts, sizes, speed and `answers`.

    Text goes to stderr as it is made, and to `config.out`. With `dry_run` prompts, model and adapters are checked and
    counted, and no weight is read. Raises `ConfigError` for settings, prompts and adapters
    that cannot be used, `CheckpointError` for damaged weights.
    """
    begin = time.monotonic()
    model, config = config.model, over_its_base(config)
    _check(config)
    prompts = [] if config.chat else read_prompts(config, [named(entry)[0] for entry in config.adapters])
    if padded := sum(prompt.text != prompt.text.rstrip() for prompt in prompts):
        said = "prompts end in white space, which finetuning gives to the answer; a model may do better without it"
        print(f"{padded} {said}", file=sys.stderr)
    if dry_run:
        return _dry(config, prompts)
    generator = Generator(config)
    if config.chat:
        answers = _chat(generator)
    elif config.prompt is not None:
        answers = [_one(generator, prompts[0])]
    else:
        answers = _many(generator, prompts)
    counts, pace = generator.counts, None
    if counts.decode_s:
        pace = counts.new_tokens / counts.decode_s
        print(f"{counts.new_tokens} tokens, {pace:.1f} tokens/s", file=sys.stderr)
    return {
        "status": "finished",
        "model": model,
        "adapters": generator.adapters.names,
        "answers": answers,
        "prompts": counts.prompts,
        "prompts_cut": counts.prompts_cut,
        "tokens_cut": counts.tokens_cut,
        "new_tokens": counts.new_tokens,
        "computed_tokens": generator.decoder.computed_tokens,
        "first_token_s": counts.first_token_s,
        "tokens_per_s": pace,
        "model_bytes": generator.model_bytes,
        "adapter_bytes": generator.adapters.bytes,
        "cache_bytes": counts.cache_bytes if config.cache else None,
        "forms": generator.forms,
        "wall_s": time.monotonic() - begin,
    }


def _dry(config: GenerateConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """What a generation would begin with: the prompts' tokens, and the bytes of the model's files."""
    opened = open_parts(config)
    lengths = [len(tokens.prompt_ids(opened.tokenizers[prompt.adapter], prompt.text)) for prompt in prompts]
    room = context_of(opened.config) - config.sampling.max_new_tokens
    result: dict[str, Any] = {
        "status": "dry_run",
        "model": config.model,
        "adapters": list(opened.adapters),
        "prompts": len(prompts),
        "prompts_cut": sum(length > room for length in lengths),
        "prompt_tokens": sum(lengths),
        "new_tokens_at_most": len(prompts) * config.sampling.max_new_tokens,
        "size_bytes": sum(
            file.stat().st_size
            for file in ([opened.path] if opened.path.is_file() else opened.path.glob("*.safetensors"))
        ),
    }
    print(
        f"dry run: {result['prompts']} prompts of {result['prompt_tokens']:,} tokens, at most "
        f"{result['new_tokens_at_most']:,} new ones, by a model of {result['size_bytes'] / 1e6:,.1f} MB with adapters: "
        f"{', '.join(opened.adapters) or 'none'}; nothing was generated",
        file=sys.stderr,
    )
    return result


def _check(config: GenerateConfig) -> None:
    problems = []
    if not config.model:
        problems.append("model is not set; give --model with a model folder.")
    ways = [name for name in ("prompt", "prompts") if getattr(config, name) is not None] + ["chat"] * config.chat
    if len(ways) != 1:
        given = f"{' and '.join(ways)} are given" if ways else "there is nothing to generate from"
        problems.append(f"{given}; give one of --prompt TEXT, --prompts FILE, --chat.")
    if config.out is not None and os.path.lexists(os.path.expanduser(config.out)):
        problems.append(f"out={config.out} exists already, and nothing is overwritten; choose another --out.")
    names = [named(entry)[0] for entry in config.adapters]
    if config.adapter is not None and config.adapter not in names:
        problems.append(f"adapter={config.adapter} is none of adapters ({', '.join(names) or 'none is given'}).")
    if problems:
        raise ConfigError(problems)


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _one(generator: Generator, prompt: Prompt) -> dict[str, Any]:
    _write(prompt.text)
    text = generator.spoken(generator.encode(prompt.text, prompt.adapter), prompt.adapter, _write)
    _write("\n")
    return _kept(generator, [{"prompt": prompt.text, "adapter": prompt.adapter, "text": text}])[0]


def _many(generator: Generator, prompts: list[Prompt]) -> list[dict[str, Any]]:
    answers = []
    for prompt, ids, text in generator.answers(prompts):
        answers.append({"prompt": prompt.text, "adapter": prompt.adapter, "text": text, "new_tokens": len(ids)})
        if generator.config.out is None:
            _write(f"> {prompt.text}\n{text}\n\n")
    return _kept(generator, answers)


def _kept(generator: Generator, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if generator.config.out is not None:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        path = Path(generator.config.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding="utf-8")
    return answers


def _chat(generator: Generator) -> list[dict[str, Any]]:
    """A talk until the input ends; with the tokenizer's chat template if it has one, else plain text."""
    adapter = generator.config.adapter
    tokenizer = generator.tokenizers[adapter]
    said: list[dict[str, str]] = []
    answers: list[dict[str, Any]] = []
    print("end with ctrl-d", file=sys.stderr)
    while True:
        _write("> ")
        line = sys.stdin.readline()
        if not line:
            _write("\n")
            return _kept(generator, answers)
        said.append({"role": "user", "content": line.strip()})
        if tokenizer.chat_template:
            ids = generator.fit(prompt_ids(prompt_text(said, tokenizer), tokenizer))
        else:
            ids = generator.encode("\n".join(turn["content"] for turn in said) + "\n", adapter)
        text = generator.spoken(ids, adapter, _write)
        _write("\n")
        # A template puts its own space before an answer.
        said.append({"role": "assistant", "content": text.strip() if tokenizer.chat_template else text})
        answers.append({"prompt": line.strip(), "adapter": adapter, "text": text})
