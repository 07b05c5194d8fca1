"""Blocks of text for whitening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finhpc.data.text.calibration import calibration_blocks
from finhpc.data.text.tokenizer import Encoder, save
from finhpc.errors import ConfigError
from finhpc.settings.decompose import Calibration
from tests.data.corpus import make_texts, write_jsonl


def test_blocks_come_from_all_of_the_text_and_too_little_is_refused(tmp_path: Path) -> None:
    texts = make_texts(30)
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    save("train:300", tmp_path / "tokenizer", lambda: iter(texts))
    stream = Encoder(tmp_path / "tokenizer").encode(texts)[0].astype(np.int64)
    config = Calibration(source=[str(source)], samples=5, seq_len=40)
    blocks = calibration_blocks(config, tmp_path / "tokenizer")
    assert blocks.shape == (5, 40)
    held = stream[: len(stream) // 40 * 40].reshape(-1, 40)
    places = [next(i for i, row in enumerate(held) if np.array_equal(row, block)) for block in blocks.numpy()]
    assert places[0] == 0
    assert len(set(np.diff(places)) - {min(np.diff(places)), min(np.diff(places)) + 1}) == 0, "at even distances"
    assert places[-1] >= 4
    most = Calibration(source=[str(source)], samples=len(stream) // 40, seq_len=40)
    assert np.array_equal(calibration_blocks(most, tmp_path / "tokenizer").numpy(), held)
    with pytest.raises(ConfigError, match=rf"has {len(stream):,} tokens, fewer than .* = {len(held) + 1} x 40 = "):
        calibration_blocks(most.model_copy(update={"samples": len(held) + 1}), tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"calibration\.source is not set"):
        calibration_blocks(Calibration(), tmp_path / "tokenizer")
