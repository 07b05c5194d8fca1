"""Registers the models and the quantizer of finhpc with transformers, while `import finhpc` stays light.

As soon as transformers imports one of its modules with a list of models or quantizers, our module for that list is
imported, too, but only after all imports under way have ended: ours needs much of transformers.
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


class ImportHook:
    """A finder in `sys.meta_path` that lets others find modules of transformers and waits until they are imported."""

    def __init__(self) -> None:
        self.waiting = dict(LISTS)
        self.finding: set[str] = set()
        self.under_way = 0  # number of modules of transformers whose import has begun and not ended

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

        def execute_and_register(module: ModuleType) -> None:
            self.under_way += 1
            try:
                execute(module)
            finally:
                self.under_way -= 1
            self.register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        """Import our module for each list that is imported by now; remove the hook once all are."""
        if self.under_way:
            return
        for name in [name for name in self.waiting if name in sys.modules]:
            if name in self.waiting:  # not imported meanwhile by another one
                import_module(self.waiting.pop(name))
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def register() -> None:
    """Register with the lists that are imported already, and with the others when they are imported."""
    hook = ImportHook()
    sys.meta_path.insert(0, hook)
    hook.register()
