from importlib.metadata import version

import pytest

from finhpc.data.text import docs
from finhpc.data.text.formats import Faults
from finhpc.errors import ConfigError
from finhpc.settings.prepare import PrepareConfig

CONFIG = PrepareConfig(source=["docs"])


def texts(units) -> list[str]:
    return [text for unit in units for text in docs.read_docs(unit, CONFIG, Faults("strict"))]


def test_installed_packages_give_prose_always_the_same(monkeypatch):
    monkeypatch.setattr(docs, "DISTRIBUTIONS", ("numpy", "no-such-package"))
    units, described = docs.docs_units()
    assert described["distributions"] == {"numpy": version("numpy")}
    assert described["absent"] == ["no-such-package"]
    found = texts(units)
    assert sum(map(len, found)) > 1_000_000
    assert any("Return evenly spaced numbers over a specified interval" in text for text in found)
    assert not any("/tests/" in path for unit in units for path in unit.paths)
    assert found == texts(docs.docs_units()[0])


def test_nothing_installed_is_refused(monkeypatch):
    monkeypatch.setattr(docs, "DISTRIBUTIONS", ("no-such-package",))
    with pytest.raises(ConfigError, match="source=docs finds none of no-such-package installed"):
        docs.docs_units()


LONG = "Words enough to say something about what this does and why it is there, "
MODULE = f'''"""{LONG} module."""
class A:
    """{LONG} class.

    Notes
        indented
    """
    def f(self):
        """Short."""
    async def g(self):
        """{LONG} method."""
        def inner():
            """{LONG} inner."""
def again():
    """{LONG} method."""
'''


def test_docstrings_of_a_module_in_order_short_repeated_and_inner_ones_left_out():
    assert list(docs._docstrings(MODULE)) == [
        f"{LONG} module.",
        f"{LONG} class.\n\nNotes\n    indented",
        f"{LONG} method.",
    ]


def test_tables_and_other_scripts_are_no_english():
    assert docs._is_english("A sentence about banks, rates and the economy. " * 5)
    assert not docs._is_english("| 1.0 | 2.0 | 3.5 |\n" * 20)
    assert not docs._is_english("Документация на другом языке. " * 10)


def test_source_that_does_not_parse_gives_nothing():
    assert list(docs._docstrings("def {{ name }}: pass")) == []
