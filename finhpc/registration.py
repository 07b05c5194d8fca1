"""Makes transformers know finhpc's models and quantizer after `import finhpc`, which stays light.

What transformers must know is imported once its own module that keeps the list is there, and nothing of
transformers is half imported: ours needs much of it. transformers itself is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

LISTS = {
    "transformers.models.auto.modeling_auto": "finhpc.models.families.registry",
    "transformers.quantizers.auto": "finhpc.quantization.hf_quantizer",
}


class After:
    """A finder of modules that finds none itself; it sees when transformers' modules are imported, one in another."""

    def __init__(self) -> None:
        self.waiting = dict(LISTS)
        self.finding: set[str] = set()
        self.under_way = 0  # modules that are being imported

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "transformers" or name in self.finding:
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
            self.under_way += 1
            try:
                execute(module)
            finally:
                self.under_way -= 1
            self.register()

        spec.loader.exec_module = then_ours  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        """Import what transformers must know and can know by now; look no further once it knows all."""
        if self.under_way:
            return
        for name in [name for name in self.waiting if name in sys.modules]:
            if name in self.waiting:  # the import of another one may have brought it already
                import_module(self.waiting.pop(name))
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def register() -> None:
    """Register now what is there already, and the rest when it comes."""
    after = After()
    sys.meta_path.insert(0, after)
    after.register()
