"""Lines that libraries log about what finhpc does on purpose, dropped by their beginnings; all others stay."""

from __future__ import annotations

import logging

DROPPED = {
    # An optional package for products in 4 bits on CPUs, which finhpc does without.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    # lm-eval is given a model that is open already, in a process of its own.
    "lm_eval.models.huggingface": (
        "`pretrained` model kwarg is not of type `str`",
        "Passed an already-initialized model through `pretrained`",
    ),
}


class Beginnings(logging.Filter):
    """Drops records whose message begins with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def drop() -> None:
    """Put the filters on the libraries' loggers, which need not be imported yet."""
    for name, beginnings in DROPPED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, Beginnings) for found in logger.filters):
            logger.addFilter(Beginnings(beginnings))
