"""Tiny texts and their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = ["rates", "policy", "market", "inflation", "bank", "growth", "the", "of", "in", "2.5%", "café", "naïve", "—"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of 20 to 120 words, some over several lines."""
    rng = np.random.default_rng(seed)
    texts = []
    for index in range(count):
        words = rng.choice(WORDS, rng.integers(20, 120)).tolist()
        texts.append(f"Document {seed}-{index}.\n" + " ".join(words))
    return texts


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "source": "s"}, ensure_ascii=False) + "\n" for text in texts))
    return path
