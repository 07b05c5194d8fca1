"""Whether processes have the same finhpc, and all of it: what a driver hands its workers, and what they check first.

A worker of Ray looks for modules in the driver's current folder before anywhere else, and a machine of a cluster may
have another version installed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import finhpc
from finhpc import plugins
from finhpc.errors import ConfigError

FOLDER = Path(finhpc.__file__).resolve().parent
CODE = (".py", ".yaml", ".css")


@dataclass(frozen=True)
class Driver:
    """The package of the process that starts workers, to be compared with theirs."""

    folder: str
    version: str
    sha256: str
    plugins: tuple[str, ...]

    @classmethod
    def here(cls) -> Driver:
        """This process, as the driver of workers."""
        return cls(str(FOLDER), finhpc.__version__, sha256_of(FOLDER), plugins.loaded())

    def enter(self) -> None:
        """What a worker does first; raises `ConfigError` if its finhpc is not its driver's, or a plugin is missing."""
        if sha256_of(FOLDER) != self.sha256:
            raise ConfigError(
                f"a worker has another finhpc ({finhpc.__version__} in {FOLDER}) than the command that started it "
                f"({self.version} in {self.folder}), and its results would not be comparable; install the same one on "
                "every machine, and do not work in a folder that holds another copy. If its code was just changed, run "
                "the command again."
            )
        plugins.enter(self.plugins)


def check_workers_package() -> None:
    """Raise `ConfigError` if workers started from the current folder would import another finhpc than this process."""
    found = PathFinder.find_spec("finhpc", [os.getcwd(), *sys.path])
    folder = Path(found.origin).resolve().parent if found is not None and found.origin else None
    if folder is None or (folder != FOLDER and sha256_of(folder) != sha256_of(FOLDER)):
        raise ConfigError(
            f"the folder {os.getcwd()} holds a finhpc of its own ({folder or 'without the package in it'}), which "
            f"workers would import in place of {FOLDER}; run the command from another folder, or with that copy."
        )


@cache
def sha256_of(folder: Path) -> str:
    """One hash of the package's code, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in CODE):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
