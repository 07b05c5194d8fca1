"""Lines for the person at the screen: `logging`, as plain sentences on stderr.

A module writes `log = logging.getLogger(__name__)` and `log.info(...)`. `set_up` gives the package's logger its
handler; what libraries log about things that finhpc does on purpose is dropped by the beginning of the message.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("finhpc")
DROPPED = {
    # An optional package for products in 4 bits on CPUs; finhpc does without it.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    # lm-eval gets a model that is already open, in a process of its own.
    "lm_eval.models.huggingface": (
        "`pretrained` model kwarg is not of type `str`",
        "Passed an already-initialized model through `pretrained`",
    ),
    # What they choose here by themselves is right: the usual loss; the CPU if there is no GPU.
    "transformers.modeling_utils": ("`loss_type=",),
    "DeepSpeed": ("Setting accelerator to CPU.",),
}


class Lines(logging.Handler):
    """Passes each record to `write` as one line of text; warnings and errors name their level first."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        """A failing write raises: a full disk or a reader that left must end the command, as `print` would."""
        text = self.format(record)
        self.write(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")


class Beginnings(logging.Filter):
    """Drops records whose message begins with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def set_up() -> None:
    """Send the package's lines to stderr, and filter the libraries' loggers, which may not be imported yet."""
    if not PACKAGE.handlers:
        PACKAGE.addHandler(Lines(_to_stderr))
        PACKAGE.setLevel(logging.INFO)
        PACKAGE.propagate = False  # libraries configure the root logger, which would print every line twice
    for name, beginnings in DROPPED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(dropping, Beginnings) for dropping in logger.filters):
            logger.addFilter(Beginnings(beginnings))


@contextmanager
def redirected(write: Callable[[str], object] | None) -> Iterator[None]:
    """Send the package's lines to `write` instead of stderr; with None only warnings remain."""
    handlers = PACKAGE.handlers
    PACKAGE.handlers = [Lines(write)] if write else []  # without a handler, Python prints warnings to stderr
    try:
        yield
    finally:
        PACKAGE.handlers = handlers


def _to_stderr(line: str) -> None:
    # Looked up each time: a progress bar on a terminal replaces sys.stderr and prints what is written there above it.
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
