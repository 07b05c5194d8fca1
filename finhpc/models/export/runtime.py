"""What a format of another runtime defines, and what it is given to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from finhpc.models.lora.peft_format import Adapter


class Layers(Protocol):
    """The exported model: its config, its modules without memory, and its tensors a layer at a time."""

    target_config: Any
    target: nn.Module
    tied: bool
    transposed: set[str]  # names of layers stored as (in, out)

    @property
    def stored_dtype(self) -> torch.dtype: ...

    def layers(self) -> Iterator[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Source:
    """What surrounds the weights of an exported model.

    `name`: what the model is called. `tokenizer`: transformers', or None. `stops`: ids that end a text.
    `adapters`: by name, each written as a file of its own.
    """

    name: str
    bits: int
    tokenizer: Any
    stops: list[int]
    adapters: Mapping[str, Adapter]


class Runtime:
    """A format for another runtime than transformers.

    `merged`: low-rank pairs are multiplied out; if not, `layers` are the low-rank layers that it writes. `schemes`:
    bits -> how the runtime stores a matrix in so few.
    `opens`: what opens the result. `needs_tokenizer_files`: the tokenizer is not in the model's own file.
    `adapters`: it opens adapters from files of their own.
    """

    merged: ClassVar[bool]
    layers: ClassVar[tuple[type, ...]] = ()
    schemes: ClassVar[dict[int, str]]
    opens: ClassVar[str]
    needs_tokenizer_files: ClassVar[bool] = False
    adapters: ClassVar[bool] = True

    def check(self, model: Layers, source: Source) -> list[str]:
        """Return the names of matrices that stay floats; raises `ConfigError` for what the format cannot express."""
        raise NotImplementedError

    def write(self, model: Layers, source: Source, folder: Path) -> int:
        """Write all files into an empty folder; return the bytes of the model's own files."""
        raise NotImplementedError
