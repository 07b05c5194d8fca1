"""The loss and the gradient norm of a step, read without making a GPU wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finhpc.errors import NonFiniteError


class Metrics:
    """The loss and the gradient norm of a step; a GPU may still be computing them."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.step = step
        values = torch.stack((loss.double(), norm))
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._values = values

    def read(self) -> tuple[float, float]:
        """Wait for the step; return its mean loss in nats and gradient norm.

        Raises `NonFiniteError` if one of them is not finite; all processes have the same values.
        """
        if self._ready is not None:
            self._ready.synchronize()
        loss, norm = self._values.tolist()
        return check_finite("train_loss", loss, self.step), check_finite("gradient norm", norm, self.step)


def check_finite(name: str, value: float, step: int) -> float:
    """Return `value`; raises `NonFiniteError` if it is NaN or infinite."""
    if not math.isfinite(value):
        raise NonFiniteError(f"{name}={value} at step {step}")
    return value
