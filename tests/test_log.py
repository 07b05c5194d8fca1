"""Lines for the person at the screen: where they go, and what libraries log in between."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import finhpc
from finhpc.log import DROPPED, redirected

log = logging.getLogger("finhpc.somewhere")


def test_lines_are_plain_on_stderr_and_warnings_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    log.debug("hidden")
    log.info("at 100%% of %s", "it")
    log.warning("careful")
    assert capsys.readouterr() == ("", "at 100% of it\nwarning: careful\n")


def test_redirected_lines_leave_the_screen_and_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with redirected(lines.append):
        log.info("one")
        log.warning("two")
    with redirected(None):
        log.info("three")
    log.info("four")
    assert lines == ["one", "warning: two"]
    assert capsys.readouterr().err == "four\n"


def test_a_reader_that_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with pytest.raises(BrokenPipeError):
        log.info("nobody reads this")


@pytest.mark.parametrize("name", list(DROPPED))
def test_named_lines_alone_are_dropped(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert finhpc.__version__
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, logger=name):
        for beginning in DROPPED[name]:
            logger.warning(beginning + ": and the rest")
        logger.warning("a kernel is missing")
        logger.warning("%s is not what it seems", "this")
    assert [record.getMessage() for record in caplog.records] == ["a kernel is missing", "this is not what it seems"]


def test_the_lines_are_those_of_the_installed_libraries() -> None:
    """A new release may word them anew: then they are noise again, and this fails."""
    where = {"DeepSpeed": "deepspeed.accelerator.real_accelerator"}  # the others are named after their module
    for name, beginnings in DROPPED.items():
        package, _, rest = where.get(name, name).partition(".")
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        source = (Path(spec.origin).parent / f"{rest.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert name in where or re.search(r"get_?[lL]ogger\(__name__\)", source)
        for beginning in beginnings:
            assert beginning in source


def test_bitsandbytes_is_quiet_after_import() -> None:
    words = "import finhpc, bitsandbytes"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit_forward" not in done.stderr


def test_the_model_families_are_quiet() -> None:
    """Default configs of transformers may hold special tokens that it reports as impossible."""
    words = "from finhpc.models.families.registry import DESCRIBED; [family.own_settings() for family in DESCRIBED]"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
