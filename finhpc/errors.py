"""What can go wrong, each kind with what the user can do about it.

A message names the value, why it does not do, and the remedy. The command prints it without a
traceback and exits with `exit_code`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Python takes any folder called finhpc, such as the one around a clone, for a package without code of its own, and may
# still find our modules. Nothing would be registered with transformers then.
_package = sys.modules["finhpc"]
if getattr(_package, "__file__", None) is None:
    raise ImportError(
        f"finhpc was found as a plain folder ({', '.join(_package.__path__)}) and not as the installed package, whose "
        "start-up code did not run; work in another folder, or reinstall it with `pip install --editable CLONE`."
    )


class FinhpcError(Exception):
    """A problem the user can act on."""

    exit_code = 1


class ConfigError(FinhpcError):
    """Settings or inputs that cannot work; lists every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class DataError(FinhpcError):
    """Text or shards that cannot be read, or are not what they should be."""


class CheckpointError(FinhpcError):
    """A checkpoint or model folder that is missing, damaged or of another run."""


class NonFiniteError(FinhpcError):
    """A loss, gradient or weight that is NaN or infinite."""


class ImplausibleError(FinhpcError):
    """A score that no sound model can have; it counts as no result."""


class OutOfMemoryError(FinhpcError):
    """A worker asked for more memory than there is."""


class RunBusyError(FinhpcError):
    """Another process works on the run of that name right now."""


class TrainingFailedError(FinhpcError):
    """The workers failed more often than the run allows."""


@contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Add the problems that the `with` block raises to `problems`, so that the user sees all of them at once."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except (DataError, CheckpointError) as error:
        problems += str(error).splitlines()
