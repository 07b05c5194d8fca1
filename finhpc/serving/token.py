"""The token that clients must give."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from finhpc.errors import ConfigError
from finhpc.settings.serve import ServeConfig

VARIABLE = "FINHPC_SERVE_TOKEN"
SHORTEST = 16


def read_token(config: ServeConfig) -> str:
    """Return the token of `token_file` or of the environment. Raises `ConfigError` if there is none, or a short one."""
    token = given_token(config)
    if token is None:
        raise ConfigError(
            f"there is no token: {VARIABLE} is not set in the replica's environment, and token_file is not either; set "
            "one of them, as cluster/rayservice.yaml does from a Secret."
        )
    return token


def given_token(config: ServeConfig) -> str | None:
    """Return the token that the user has given, or None. Raises `ConfigError` for one that is not safe."""
    if config.token_file is not None:
        path = Path(config.token_file)
        if not path.is_file():
            raise ConfigError(f"token_file={path} does not exist; write a token into it, or leave it out.")
        token, where = path.read_text(encoding="utf-8").strip(), f"token_file={path}"
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH) and path.stat().st_uid == os.getuid():
            raise ConfigError(f"token_file={path} can be read by other users; run `chmod 600 {path}`.")
    elif VARIABLE in os.environ:
        token, where = os.environ[VARIABLE].strip(), VARIABLE
    else:
        return None
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{where} holds a token that is shorter than {SHORTEST} characters, or has spaces or characters beyond "
            "ASCII; make one with `openssl rand -hex 24`."
        )
    return token
