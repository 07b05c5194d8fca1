"""Makes transformers know finhpc's models and quantiser after `import finhpc`, which stays light.

What transformers must know is imported right after its own module that keeps the list, whenever that
is; transformers itself is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

LISTS = {
    "transformers.models.auto.modeling_auto": "finhpc.models.families",
    "transformers.quantizers.auto": "finhpc.quantization.hf_quantizer",
}


class After:
    """A finder of modules that finds none itself; it adds an import to the end of those in `LISTS`."""

    def __init__(self) -> None:
        self.finding: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in LISTS or name in self.finding:
            return None
        self.finding.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.finding.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_ours(module: ModuleType) -> None:
            execute(module)
            import_module(LISTS[name])

        spec.loader.exec_module = then_ours  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now what is there already, and the rest when it comes."""
    sys.meta_path.insert(0, After())
    for name, ours in LISTS.items():
        if name in sys.modules:
            import_module(ours)
