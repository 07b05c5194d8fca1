"""Ids and greedy text: every tokenizer and chat template through finetuning, generation, evaluation and export.

The reference is transformers: `apply_chat_template(tokenize=True)` of the whole conversation for chats, the
tokenizer's ids of the whole text, without an end token that it appends, for prompts and answers.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finhpc.commands.export import export
from finhpc.commands.generate import generate
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays, Examples, make_examples
from finhpc.data.text.tokenizer import Encoder
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from finhpc.generation.generator import Generator
from finhpc.generation.mlflow_model import _load_pyfunc
from finhpc.models.packing.layout import IGNORED, POSITION, PREFIX, SEGMENT, TARGET, TOKEN
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import Instructions
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.training import Parallel
from tests.models.dense import settled
from tests.parity.table import Row
from tests.parity.tokenizer_kinds import END, END_OF_TURN, VOCAB, Kind, tokenizer_of

CHATS = [
    [
        ("user", "What does Alder Foods sell?"),
        ("assistant", "Fresh bread and good milk."),
        ("user", "is it good?"),
        ("assistant", "yes it is."),
    ],
    [("system", "Alder Foods"), ("user", "What does it sell?"), ("assistant", "bread")],
]
PAIRS = [
    ("What does Alder Foods sell? Answer:", " good milk"),
    ("user: is it fresh?\nAnswer:", " it does."),
    ("Alder Foods", " sell bread and milk."),
]
NEW = 6


def model_folder(folder: Path) -> Path:
    """The model that reads the texts, without a tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    settled(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def text_row(of: Kind, source: Path, folder: Path) -> Row:
    """What every command makes of texts with this tokenizer; `source` is a model, `folder` does not exist yet."""
    row = Row({"tokenizer": of.kind, "around a text": of.ends, "chat template": of.template})
    shutil.copytree(source, folder)
    tokenizer_of(of).save_pretrained(folder)
    plain, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chats, pairs = _examples(folder, plain)
    stop = [plain.eos_token_id, plain.convert_tokens_to_ids(END_OF_TURN.get(of.template, END))]
    generator = Generator(_settings(folder, prompt="unused"))
    with row.column("finetune, chats"):
        for number, chat in enumerate(CHATS):
            _check_chat(plain, of.template, _messages(chat), *chats.train.example(number))
    with row.column("finetune, pairs"):
        for number, (prompt, answer) in enumerate(PAIRS):
            tokens, carries = pairs.train.example(number)
            _same(tokens.tolist(), [*_whole(plain, prompt + answer), plain.eos_token_id])
            said = plain.decode(tokens[carries].tolist(), skip_special_tokens=True)
            assert said.strip() == _read(plain, answer), f"the answer {answer!r} is learned as {said!r}"
    with row.column("finetune, batches"):
        for examples in (chats, pairs):
            _check_batches(examples.train)
    with row.column("generate, prompts"):
        for number, (prompt, _) in enumerate(PAIRS):
            tokens, carries = pairs.train.example(number)
            _same(generator.encode(prompt, None), tokens[~carries].tolist())
    with row.column("generate, text"):
        _check_text(folder, model, plain, stop)
    with row.column("generate, chat"):
        _check_talk(folder, model, plain, stop)
    with row.column("MLflow model"):
        for prompt, _ in PAIRS:
            ids = _whole(plain, prompt)
            wanted = plain.decode([*ids, *_continued(model, ids, stop)], skip_special_tokens=True)
            (text,) = _load_pyfunc(str(folder)).predict(prompt, {"max_new_tokens": NEW})
            assert text == wanted, f"it says {text!r}, not {wanted!r}"
    with row.column("generate, stops"):
        tokens, carries = chats.train.example(0)
        last = int(tokens[carries][-1])
        assert last in generator.stop, f"a learned answer ends in {plain.decode([last])!r}, which does not stop it"
    with row.column("evaluate"):
        _check_evaluation(folder, pairs)
    with row.column("prepare"):
        texts = [prompt + answer for prompt, answer in PAIRS]
        ids, _ = Encoder(folder).encode(texts)
        rows = [[*plain(text, add_special_tokens=False).input_ids, plain.eos_token_id] for text in texts]
        _same(ids.tolist(), [token for some in rows for token in some])
    with row.column("export"):
        _check_export(folder, plain)
    return row


def _messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def _whole(plain: Any, text: str) -> list[int]:
    """transformers' ids of a text, without the end token that some tokenizers append."""
    ids: list[int] = plain(text).input_ids
    return ids[:-1] if ids and ids[-1] == plain.eos_token_id and not text.endswith(END) else ids


def _chat_ids(plain: Any, messages: list[dict[str, str]], prompt: bool = False) -> list[int]:
    ids: list[int] = plain.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return ids


def _read(plain: Any, text: str) -> str:
    """A text as the tokenizer writes it when it reads it: some lose spaces."""
    return str(plain.decode(plain(text.strip(), add_special_tokens=False).input_ids)).strip()


def _same(found: list[int], wanted: list[int]) -> None:
    assert found == wanted, f"ids {found} are not {wanted}"


def _examples(folder: Path, plain: Any) -> tuple[Examples, Examples]:
    """Chats, and prompts with answers, as a finetuning reads them, in the order of the files."""
    chats, pairs = folder / "chats.jsonl", folder / "pairs.jsonl"
    chats.write_text("".join(json.dumps({"messages": _messages(chat)}) + "\n" for chat in CHATS))
    pairs.write_text("".join(json.dumps({"context": a, "target": b}) + "\n" for a, b in PAIRS))

    def read(file: Path) -> Examples:
        settings = Instructions(source=[str(file)], eval_fraction=0.0)
        return make_examples(settings, AutoTokenizer.from_pretrained(folder), 0)

    return read(chats), read(pairs)


def _check_chat(plain: Any, template: str, messages: list[dict[str, str]], tokens: Any, carries: Any) -> None:
    """The ids are transformers', an end token after a last answer that the template does not end aside.

    The prompt of the last answer is the one that generation reads, and what is learned are the answers with the
    tokens that end them.
    """
    ids, said = tokens.tolist(), carries.tolist()
    wanted = _chat_ids(plain, messages)
    if template not in END_OF_TURN:
        assert ids[-1] == plain.eos_token_id, "nothing ends the last answer"
        _same(ids[:-1], wanted[: len(ids) - 1])
    else:
        _same(ids, wanted)
    pieces = [[i for i, _ in group] for own, group in groupby(enumerate(said), lambda pair: pair[1]) if own]
    _same(ids[: pieces[-1][0]], _chat_ids(plain, messages[:-1], prompt=True))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(pieces) == len(answers), f"{len(pieces)} answers are learned, not {len(answers)}"
    for piece, answer in zip(pieces, answers, strict=True):
        learned = [ids[i] for i in piece]
        text = plain.decode(learned, skip_special_tokens=True)
        assert text.strip() == _read(plain, answer), f"the answer {answer!r} is learned as {text!r}"
        if template in END_OF_TURN:
            assert plain.convert_ids_to_tokens(learned[-1]) == END_OF_TURN[template], f"nothing ends {answer!r}"


def _check_batches(train: Arrays) -> None:
    """Each example stands in a pack once: its ids, their positions, what each predicts."""
    count = len(train)
    for share in (True, False):
        (micro,) = Batches(Parallel(micro_batch_size=count), 0, share_prefix=share).step(train, 0, 0)
        pack = torch.as_tensor(micro["pack"][0])
        found = []
        for segment in sorted({0, *pack[SEGMENT].tolist()} - {0}):
            own = pack[:, pack[SEGMENT] == segment]
            before = pack[:, pack[SEGMENT] == own[PREFIX, 0]] if own[PREFIX, 0] else own[:, :0]
            whole = torch.cat((before, own), 1)
            assert whole[POSITION].tolist() == list(range(whole.shape[1])), "positions are not 0, 1, 2, ..."
            if (whole[TARGET] != IGNORED).any():
                found.append((whole[TOKEN].tolist(), whole[TARGET].tolist()))
        wanted = []
        for index in range(count):
            tokens, carries = (array.tolist() for array in train.example(index))
            last = len(tokens) - carries[::-1].index(True) - 1
            targets = [token if said else IGNORED for token, said in zip(tokens, carries, strict=True)]
            wanted.append((tokens[:last], targets[1 : last + 1]))
        assert sorted(found) == sorted(wanted), "packs do not hold the examples as they are"


def _settings(folder: Path, **more: Any) -> GenerateConfig:
    return build(GenerateConfig, {"model": str(folder), "sampling": {"max_new_tokens": NEW}, **more})


def _continued(model: Any, ids: list[int], stop: list[int]) -> list[int]:
    """What transformers generates greedily after ids."""
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False,
            pad_token_id=0, eos_token_id=stop,
        )  # fmt: skip
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def _check_text(folder: Path, model: Any, plain: Any, stop: list[int]) -> None:
    """Greedy text of prompts, one at a time and together; a prompt and its text join to what the ids say."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in PAIRS))
    together = generate(_settings(folder, prompts=str(prompts)))["answers"]
    for (prompt, _), answer in zip(PAIRS, together, strict=True):
        ids = _whole(plain, prompt)
        new = _continued(model, ids, stop)
        wanted = _joined(plain, ids, new)
        assert answer["text"] == wanted, f"after {prompt!r} stands {answer['text']!r}, not {wanted!r}"
    (alone,) = generate(_settings(folder, prompt=PAIRS[0][0]))["answers"]
    assert alone["text"] == together[0]["text"], f"alone it is {alone['text']!r}, together {together[0]['text']!r}"


def _joined(plain: Any, before: list[int], new: list[int]) -> str:
    """The text of new ids as it follows that of the ids before them."""
    read, whole = (plain.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *new]))
    if whole.startswith(read):
        return str(whole[len(read) :])
    return str(plain.decode(new, skip_special_tokens=True))


def _check_talk(folder: Path, model: Any, plain: Any, stop: list[int]) -> None:
    """A talk of two turns: transformers' ids of the conversation, and its text."""
    asked = [content for role, content in CHATS[0] if role == "user"]
    with patch.object(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in asked))):
        answers = generate(_settings(folder, chat=True))["answers"]
    said: list[dict[str, str]] = []
    for line, answer in zip(asked, answers, strict=True):
        said.append({"role": "user", "content": line})
        ids = _chat_ids(plain, said, prompt=True)
        wanted = _joined(plain, ids, _continued(model, ids, stop))
        assert answer["text"] == wanted, f"after {line!r} stands {answer['text']!r}, not {wanted!r}"
        said.append({"role": "assistant", "content": answer["text"].strip()})


def _check_evaluation(folder: Path, pairs: Examples) -> None:
    """Prompt and answer reach the model as a finetuning has them."""
    seen: list[list[int]] = []

    class Watched(LanguageModel):
        def _loglikelihood_tokens(self, requests: Any, **how: Any) -> Any:
            seen.extend([*context, *answer] for _, context, answer in requests)
            return super()._loglikelihood_tokens(requests, **how)

    from lm_eval.api.instance import Instance

    lm = Watched(*load_for_evaluation(str(folder)), 4)
    lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)], disable_tqdm=True)
    for number, ids in enumerate(seen):
        tokens = pairs.train.example(number)[0].tolist()
        _same(ids, tokens[:-1])  # an answer that is scored is not followed by an end


def _check_export(folder: Path, plain: Any) -> None:
    """An export reads every text as the model that it was made from."""
    out = folder / "export"
    export(build(ExportConfig, {"model": str(folder), "out": str(out)}))
    opened = AutoTokenizer.from_pretrained(out)
    for chat in CHATS:
        for prompt in (True, False):
            messages = _messages(chat)[: -1 if prompt else None]
            _same(_chat_ids(opened, messages, prompt), _chat_ids(plain, messages, prompt))
    for prompt, answer in PAIRS:
        _same(opened(prompt + answer).input_ids, plain(prompt + answer).input_ids)
    assert opened.all_special_ids == plain.all_special_ids
