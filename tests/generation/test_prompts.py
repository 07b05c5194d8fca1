"""Prompts from a file, whatever its byte order mark and line ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.errors import ConfigError
from finhpc.generation.prompts import read_prompts
from finhpc.settings.generate import GenerateConfig


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(GenerateConfig(prompts=str(path)), [])]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_not_part_of_a_prompt(tmp_path: Path, encoding: str, end: str) -> None:
    lines = {".txt": ["é one", "two"], ".jsonl": ['{"prompt": "é one"}', '{"prompt": "two"}']}
    for ending, written in lines.items():
        path = tmp_path / f"a{ending}"
        path.write_bytes(end.join(written).encode(encoding))
        assert texts(path) == ["é one", "two"]


def test_a_line_separator_does_not_end_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028still one"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\u2028still \x0cone\n", encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == ["one\u2028still one"]
    assert texts(tmp_path / "a.txt") == ["one\u2028still \x0cone"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": NaN}', r"a\.jsonl:1: the prompt is empty"),
        ("a.jsonl", b'{"prompt": null}', r"a\.jsonl:1: the prompt is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 5}', r"a\.jsonl:2: prompt holds the number 5, not text"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' is duplicated"),
        ("a.jsonl", b'{"prompt": "a", "adapter": 3}', "adapter holds the number 3, not text"),
        ("a.jsonl", b'{"text": "a"}', r'a\.jsonl:1 is not {"prompt"'),
        ("a.jsonl", b"a", "is broken JSON"),
        ("a.csv", b"prompt\na\n", r"a\.csv has an unsupported format; give \.jsonl or text"),
        ("a.json", b'["a"]', r"a\.json has an unsupported format"),
        ("a.txt", b"a\0b", "line 1: a NUL character"),
        ("a.txt", "f\xe4llt".encode("latin-1"), "line 1: byte 0xe4 is not utf-8; convert it to UTF-8"),
    ],
)
def test_what_is_not_a_prompt_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        texts(tmp_path / name)
