"""Settings of the loss by rows for small vocabularies."""

from __future__ import annotations

import pytest

from finhpc.models import loss


def rows_per_piece(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int, item_bytes: int) -> None:
    """Let the loss take so many rows of logits at a time, and half of these through the softmax."""
    monkeypatch.setattr(loss, "WIDTHS", 0)
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", rows * vocab * item_bytes)
    monkeypatch.setitem(loss.ROW_BYTES, "cpu", max(1, rows // 2) * vocab * 4)
