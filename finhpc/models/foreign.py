"""No model or tokenizer folder brings code of its own: transformers would ask at the terminal whether it may run it."""

from __future__ import annotations

from typing import NoReturn

from transformers import dynamic_module_utils


def _refuse(signum: object, frame: object) -> NoReturn:
    raise ValueError(
        "it would run Python code of its own (auto_map), which finhpc never does; use a model that transformers knows"
    )


# transformers calls the second in place of its question if there is no time to answer it. Who passes
# trust_remote_code to transformers is not asked, and not refused.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
dynamic_module_utils._raise_timeout_error = _refuse
