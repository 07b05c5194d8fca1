"""Compiles the functions of a model's parts with torch.compile.

Blocks of a model share their graphs, because a graph takes a block's weights as arguments: there are two graphs for
all halves of blocks, or three for packed examples, whose attention is computed between two graphs. The embedding, the
last norm and the loss are not compiled; the loss is one operation already. torch keeps compiled code in a folder of the
machine (`TORCHINDUCTOR_CACHE_DIR`), where restarts, other workers and later runs find it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from finhpc.errors import ConfigError, FinhpcError
from finhpc.lowrank.sltrain import multiplied
from finhpc.settings.training import Compile

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

# `auto` compiles if the steps take this many seconds without it, estimated from their operations. On two CPU cores
# compiling took 15 to 40 s, and saved 5 to 13 % of a step.
WORTHWHILE_S = {"cpu": 600, "cuda": 120}
RATE = {"cpu": 100e9, "cuda": 100e12}  # operations per second that these are estimated with
GRAPHS = 256  # torch compiles a function for at most so many shapes and settings; its default of 8 is for one model


def run_operations(model: nn.Module, tokens: float, frozen: bool = False) -> float:
    """Return roughly the operations of a run: 6 per weight and token, 4 if these weights are frozen."""
    return (4 if frozen else 6) * multiplied(model) * tokens


def missing_compiler(device: str) -> str | None:
    """Return what torch.compile needs on a kind of device and does not find; None if it has all."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        return "a C++ compiler (Debian and Ubuntu: apt-get install g++)"
    if device == "cuda" and not torch.utils._triton.has_triton():
        return "Triton (pip install triton) and a GPU of compute capability 7.0 or newer"
    return None


def check_compiler(wanted: Compile, device: str) -> None:
    """Raise `ConfigError` if `train.compile=on` and something is missing for it."""
    if wanted == "on" and (missing := missing_compiler(device)):
        raise ConfigError(f"train.compile=on needs {missing}; install it, or use train.compile=auto or off.")


class Compiler:
    """Compiles functions as `train.compile` says.

    With `graphs` a GPU replays each as a CUDA graph, for models whose kernels take less time than their launches; the
    caller says when a step begins (`torch.compiler.cudagraph_mark_step_begin`). This needs `on`.

    `operations`: of all steps of the run on this worker, by which `auto` decides; a resumed run thus decides as its
    first start did. If they are unknown (0), `auto` does not compile. `dynamic`: the functions' tensors change in
    length from call to call. Raises `ConfigError` if something is missing for `on`.
    """

    def __init__(
        self, wanted: Compile, device: torch.device, operations: float, dynamic: bool = False, graphs: bool = False
    ) -> None:
        check_compiler(wanted, device.type)
        self.wanted, self.dynamic = wanted, dynamic
        self.mode = "reduce-overhead" if graphs and wanted == "on" and device.type == "cuda" else None
        self.on = wanted == "on"
        if wanted == "auto" and operations:
            seconds, worthwhile = operations / RATE[device.type], WORTHWHILE_S[device.type]
            missing = missing_compiler(device.type)
            self.on = seconds >= worthwhile and missing is None
            why = f"{missing} is missing" if missing else ""
            if seconds < worthwhile:
                why = f"it repays runs of {worthwhile} s and more, and this one takes about {max(1, seconds):.0f} s"
            log.info(
                "train.compile=auto: " + ("the model is compiled." if self.on else f"not compiled, because {why}.")
            )
        if self.on:
            torch._dynamo.config.recompile_limit = GRAPHS
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise torch runs eagerly without a word
            torch._functorch.config.force_non_lazy_backward_lowering = True  # so that errors come with the forward pass

    def __call__(self, function: F) -> F:
        """Return the function compiled on its first call, or as it is.

        A function may have a `prepare`, which is called with its first argument outside of the graph. If compiling
        fails, `on` raises a `FinhpcError`, and `auto` logs it and goes on without.
        """
        if not self.on:
            return function
        compiled = torch.compile(function, dynamic=self.dynamic, mode=self.mode)
        prepare = getattr(function, "prepare", None)

        def run(*args: Any) -> Any:
            if prepare is not None:
                prepare(args[0])
            if not self.on:
                return function(*args)
            try:
                return compiled(*args)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                self._give_up(error)
            return function(*args)

        return run  # type: ignore[return-value]

    def _give_up(self, error: Exception) -> None:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if self.wanted == "on":
            raise FinhpcError(
                f"train.compile=on: torch could not compile the model ({reason}); use train.compile=auto or off."
            ) from error
        self.on = False
        log.info(f"train.compile=auto: torch could not compile the model ({reason}); training goes on without.")
