"""Check that all processes run the same, complete finhpc: the driver describes its own, and workers compare theirs.

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
        """Check this worker. Raises `ConfigError` if its finhpc is not the driver's, or a plugin is missing."""
        if sha256_of(FOLDER) != self.sha256:
            raise ConfigError(
                f"a worker has another finhpc ({finhpc.__version__} in {FOLDER}) than the command that started it "
                f"({self.version} in {self.folder}), and its results would not be comparable; install the same one on "
                "every machine, and do not work in a folder with another copy. If its code was just changed, rerun the "
                "command."
            )
        plugins.enter(self.plugins)


def check_workers_package() -> None:
    """Raise `ConfigError` if workers started from the current folder would import another finhpc than this process."""
    spec = PathFinder.find_spec("finhpc", [os.getcwd(), *sys.path])
    folder = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if folder is None or (folder != FOLDER and sha256_of(folder) != sha256_of(FOLDER)):
        raise ConfigError(
            f"the folder {os.getcwd()} has a finhpc of its own ({folder or 'without the package in it'}), which "
            f"workers would import in place of {FOLDER}; run the command from another folder, or with that copy."
        )


@cache
def sha256_of(folder: Path) -> str:
    """Return one hash of the package's code, wherever it is installed."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in CODE):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
