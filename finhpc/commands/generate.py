"""`finhpc generate`: one prompt, a file of them, or a chat at the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from finhpc.data.examples.chat import prompt_text, rendered_ids
from finhpc.errors import ConfigError
from finhpc.generation.adapters import parse_adapter, resolve_adapter_model
from finhpc.generation.generator import Generator, open_inputs
from finhpc.generation.prompts import Prompt, read_prompts
from finhpc.models.families.registry import context_of
from finhpc.models.files import tokens
from finhpc.settings.generate import GenerateConfig


def generate(config: GenerateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Generate text; returns counts, sizes, speed and `answers`.

    Text is streamed to stderr and written to `config.out`. With `dry_run` prompts, model and adapters are checked and
    counted, and no weight is read. Raises `ConfigError` for unusable settings, prompts and adapters, `CheckpointError`
    for damaged weights.
    """
    begin = time.monotonic()
    model, config = config.model, resolve_adapter_model(config)
    _check(config)
    prompts = [] if config.chat else read_prompts(config, [parse_adapter(entry)[0] for entry in config.adapters])
    if padded := sum(prompt.text != prompt.text.rstrip() for prompt in prompts):
        advice = "prompts end in white space, which finetuning gives to the answer; a model may do better without it"
        print(f"{padded} {advice}", file=sys.stderr)
    if dry_run:
        return _dry(config, prompts)
    generator = Generator(config)
    if config.chat:
        answers = _chat(generator)
    elif config.prompt is not None:
        answers = [_one(generator, prompts[0])]
    else:
        answers = _many(generator, prompts)
    counts, speed = generator.counts, None
    if counts.decode_s:
        speed = counts.new_tokens / counts.decode_s
        print(f"{counts.new_tokens} tokens, {speed:.1f} tokens/s", file=sys.stderr)
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
        "tokens_per_s": speed,
        "model_bytes": generator.model_bytes,
        "adapter_bytes": generator.adapters.bytes,
        "cache_bytes": counts.cache_bytes if config.cache else None,
        "forms": generator.fast_layers,
        "wall_s": time.monotonic() - begin,
    }


def _dry(config: GenerateConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """Count the prompts' tokens and the bytes of the model's files."""
    inputs = open_inputs(config)
    lengths = [len(tokens.prompt_ids(inputs.tokenizers[prompt.adapter], prompt.text)) for prompt in prompts]
    room = context_of(inputs.config) - config.sampling.max_new_tokens
    result: dict[str, Any] = {
        "status": "dry_run",
        "model": config.model,
        "adapters": list(inputs.adapters),
        "prompts": len(prompts),
        "prompts_cut": sum(length > room for length in lengths),
        "prompt_tokens": sum(lengths),
        "new_tokens_at_most": len(prompts) * config.sampling.max_new_tokens,
        "size_bytes": sum(
            file.stat().st_size
            for file in ([inputs.path] if inputs.path.is_file() else inputs.path.glob("*.safetensors"))
        ),
    }
    print(
        f"dry run: {result['prompts']} prompts of {result['prompt_tokens']:,} tokens, at most "
        f"{result['new_tokens_at_most']:,} new ones, by a model of {result['size_bytes'] / 1e6:,.1f} MB with adapters: "
        f"{', '.join(inputs.adapters) or 'none'}; nothing was generated",
        file=sys.stderr,
    )
    return result


def _check(config: GenerateConfig) -> None:
    problems = []
    if not config.model:
        problems.append("model is not set; give --model with a model folder.")
    ways = [name for name in ("prompt", "prompts") if getattr(config, name) is not None] + ["chat"] * config.chat
    if len(ways) != 1:
        reason = f"{' and '.join(ways)} are set together" if ways else "there is nothing to generate from"
        problems.append(f"{reason}; give one of --prompt TEXT, --prompts FILE, --chat.")
    if config.out is not None and os.path.lexists(os.path.expanduser(config.out)):
        problems.append(f"out={config.out} exists already, and nothing is overwritten; choose another --out.")
    names = [parse_adapter(entry)[0] for entry in config.adapters]
    if config.adapter is not None and config.adapter not in names:
        problems.append(
            f"adapter={config.adapter} is not among adapters ({', '.join(names) or 'none are set'}); correct it."
        )
    if problems:
        raise ConfigError(problems)


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _one(generator: Generator, prompt: Prompt) -> dict[str, Any]:
    _write(prompt.text)
    text = generator.stream_text(generator.encode(prompt.text, prompt.adapter), prompt.adapter, _write)
    _write("\n")
    return _write_answers(generator, [{"prompt": prompt.text, "adapter": prompt.adapter, "text": text}])[0]


def _many(generator: Generator, prompts: list[Prompt]) -> list[dict[str, Any]]:
    answers = []
    for prompt, ids, text in generator.answers(prompts):
        answers.append({"prompt": prompt.text, "adapter": prompt.adapter, "text": text, "new_tokens": len(ids)})
        if generator.config.out is None:
            _write(f"> {prompt.text}\n{text}\n\n")
    return _write_answers(generator, answers)


def _write_answers(generator: Generator, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if generator.config.out is not None:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        path = Path(generator.config.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding="utf-8")
    return answers


def _chat(generator: Generator) -> list[dict[str, Any]]:
    """Chat until the input ends, with the tokenizer's chat template if it has one, otherwise as plain text."""
    adapter = generator.config.adapter
    tokenizer = generator.tokenizers[adapter]
    turns: list[dict[str, str]] = []
    answers: list[dict[str, Any]] = []
    print("end with ctrl-d", file=sys.stderr)
    while True:
        _write("> ")
        line = sys.stdin.readline()
        if not line:
            _write("\n")
            return _write_answers(generator, answers)
        turns.append({"role": "user", "content": line.strip()})
        if tokenizer.chat_template:
            ids = generator.fit(rendered_ids(prompt_text(turns, tokenizer), tokenizer))
        else:
            ids = generator.encode("\n".join(turn["content"] for turn in turns) + "\n", adapter)
        text = generator.stream_text(ids, adapter, _write)
        _write("\n")
        # A template puts its own space before an answer.
        turns.append({"role": "assistant", "content": text.strip() if tokenizer.chat_template else text})
        answers.append({"prompt": line.strip(), "adapter": adapter, "text": text})
