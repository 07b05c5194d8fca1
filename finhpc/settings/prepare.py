"""Settings of `finhpc prepare`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Section


class PrepareConfig(Section):
    """Settings of `finhpc prepare`."""

    source: list[str] = Field(
        default_factory=list, description="files or folders of text, hf:NAME, or docs (repeatable)"
    )
    tokenizer: str = Field(
        "train:8192",
        description="gpt2, a model's or tokenizer's folder, .gguf file or hub id, or train:N to train one of N tokens",
    )
    out: str = Field("", description="folder for the shards; required")
    block_len: int = Field(1024, ge=2, description="tokens per block (a row of a shard)")
    shard_blocks: int = Field(4096, ge=1, description="blocks per shard")
    val_fraction: float = Field(0.01, gt=0, lt=1, description="share of documents to hold out, chosen by hash")
    text_field: str = Field("text", description="field or column with the text")
    hf_split: str = Field("train", description="split of a source hf:NAME")
    on_error: Literal["strict", "skip"] = Field(
        "strict", description="strict: a broken record is an error; skip: skip and count it"
    )
    workers: int = Field(0, ge=0, description="parallel tasks; 0: one per core")
