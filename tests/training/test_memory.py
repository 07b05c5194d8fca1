"""The counted peak is what the tensors really took."""

from __future__ import annotations

import torch

from finhpc.training.memory import counted_peak, live_tensor_bytes, peak_resident_bytes

MB = 1 << 20


def test_peak_counts_what_lived_at_once() -> None:
    kept = torch.zeros(8 * MB, dtype=torch.uint8)
    before = live_tensor_bytes()

    def work() -> torch.Tensor:
        a = torch.ones(16 * MB, dtype=torch.uint8)
        b = a + 1  # a and b live: 32 MB
        del a
        c = b + 1  # b and c live: 32 MB
        return c

    result, peak = counted_peak(work)
    assert result.numel() == 16 * MB
    assert kept.numel() == 8 * MB
    assert abs(peak - (before + 32 * MB)) < MB / 4


def test_live_bytes_count_a_storage_once() -> None:
    before = live_tensor_bytes()
    base = torch.zeros(4 * MB, dtype=torch.uint8)
    views = [base[i:] for i in range(5)]
    assert live_tensor_bytes() - before == 4 * MB
    assert len(views) == 5


def test_gradients_are_counted() -> None:
    before = live_tensor_bytes()
    weight = torch.zeros(MB, requires_grad=True)
    (weight * 2).sum().backward()
    assert abs(live_tensor_bytes() - before - 8 * MB) < 1024
    assert peak_resident_bytes() > 8 * MB


def test_tensors_of_tracing_have_no_memory() -> None:
    from torch._subclasses import FakeTensorMode

    before = live_tensor_bytes()
    with FakeTensorMode():
        fake = torch.ones(MB)
        functional = torch._to_functional_tensor(fake)
    kept = torch.zeros(MB, dtype=torch.uint8)
    assert live_tensor_bytes() - before == MB
    del functional, fake, kept
