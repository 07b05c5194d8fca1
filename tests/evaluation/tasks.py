"""Small files of every task, and a small model with its tokeniser."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.tiny import tiny_shards


def write_data(folder: Path, n: int = 6) -> Path:
    """Files of all seven tasks, `n` examples each, under usual names."""
    folder.mkdir(parents=True)
    moods = ["positive", "negative", "neutral"]
    phrases = [f"The bank rate rises {i} times in M\xfcnchen@{moods[i % 3]}" for i in range(n)]
    (folder / "fpb.txt").write_bytes("\n".join(phrases).encode("latin-1"))
    (folder / "tfns.csv").write_text("text,label\n" + "".join(f"prices move {i},{i % 3}\n" for i in range(n)))
    fiqa = {str(i): {"sentence": f"news {i}", "info": [{"sentiment_score": str(i % 6 / 4 - 0.5)}]} for i in range(n)}
    (folder / "fiqa.json").write_text(json.dumps(fiqa))
    tags = ["PER", "LOC", "ORG"]
    conll = [f"the DT - O\nBank NNP - I-{tags[i % 3]}\nof{i} IN - O\n" for i in range(n)]
    (folder / "FIN5.txt").write_text("-DOCSTART- -X- O O\n\n" + "\n".join(conll))
    lines = {
        "boolq": [{"question": f"is {i} even", "passage": f"{i} is a number", "answer": i % 2 == 0} for i in range(n)],
        "piqa": [{"goal": f"count to {i}", "sol1": "begin at one", "sol2": "end", "label": i % 2} for i in range(n)],
        "winogrande": [
            {"sentence": f"The bank saw {i} and _ fell.", "option1": "it", "option2": "rates", "answer": str(i % 2 + 1)}
            for i in range(n)
        ],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_model(folder: Path, seed: int = 0, positions: int = 256) -> Path:
    shards = tiny_shards(folder.parent / f"{folder.name}-shards")
    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=2)
    config.initializer_range = 0.5  # so that answers differ by more than rounding
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
