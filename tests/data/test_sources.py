import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from finhpc.data.text import formats, sources
from finhpc.data.text.formats import Faults
from finhpc.errors import ConfigError, DataError
from finhpc.settings.prepare import PrepareConfig
from tests.data.corpus import make_texts, write_jsonl

TEXTS = make_texts(40)


def read_all(*source: Path | str, **settings) -> list[str]:
    config = PrepareConfig(source=[str(s) for s in source], **settings)
    faults = Faults(config.on_error)
    return [text for unit in sources.units(config)[0] for text in sources.read(unit, config, faults)]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def openwebtext(texts: list[str], inner: int = 4) -> bytes:
    """The distribution's layout: a tar of xz tars of .txt files."""
    members = {}
    for part in range(inner):
        files = {f"{i:07d}-x.txt": text.encode() for i, text in enumerate(texts) if i * inner // len(texts) == part}
        members[f"openwebtext/urlsf_subset{part:02d}-1_data.xz"] = lzma.compress(tar_of(files))
    return tar_of(members)


def write(form: str, folder: Path) -> Path:
    plain = write_jsonl(folder / "plain.jsonl", TEXTS)
    lines = plain.read_bytes()
    plain.unlink()
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    match form:
        case "jsonl":
            return write_jsonl(folder / "a.jsonl", TEXTS)
        case "jsonl.gz" | "json.gz":
            (folder / f"a.{form}").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
        case "jsonl.zst":
            (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
        case "parquet":
            pq.write_table(table, folder / "a.parquet", row_group_size=7)
        case "parquet dictionary":
            pq.write_table(table.set_column(1, "text", table["text"].dictionary_encode()), folder / "a.parquet")
        case "txt":
            for index, text in enumerate(TEXTS):
                (folder / f"{index:03d}.txt").write_bytes(text.encode())
        case "openwebtext.tar":
            (folder / form).write_bytes(openwebtext(TEXTS))
        case "openwebtext.tar.xz":
            (folder / form).write_bytes(lzma.compress(openwebtext(TEXTS)))
        case "unpacked openwebtext":
            with tarfile.open(fileobj=io.BytesIO(openwebtext(TEXTS))) as tar:
                tar.extractall(folder, filter="data")
        case "tar of txt":
            (folder / "a.tar").write_bytes(tar_of({f"{i:03d}.txt": text.encode() for i, text in enumerate(TEXTS)}))
        case "hf":
            pq.write_table(table.slice(0, 25), folder / "train-00000.parquet")
            pq.write_table(table.slice(25), folder / "train-00001.parquet")
    return folder


FORMS = ["jsonl", "jsonl.gz", "json.gz", "jsonl.zst", "parquet", "parquet dictionary", "txt", "tar of txt"]
FORMS += ["openwebtext.tar", "openwebtext.tar.xz", "unpacked openwebtext", "hf"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(form, tmp_path):
    written = write(form, tmp_path)
    assert read_all(f"hf:{written}" if form == "hf" else written) == TEXTS


@pytest.mark.parametrize("unit_bytes", [1, 50, 333, 5000])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt"])
def test_units_of_any_size_share_the_documents_out(form, unit_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "UNIT_BYTES", unit_bytes)
    written = write(form, tmp_path)
    assert len(sources.units(PrepareConfig(source=[str(written)]))[0]) > 1
    assert read_all(written) == TEXTS


def test_openwebtext_is_one_unit_for_each_inner_archive(tmp_path):
    config = PrepareConfig(source=[str(write("openwebtext.tar", tmp_path))])
    assert len(sources.units(config)[0]) == 4


def test_sources_keep_their_order_and_are_described(tmp_path):
    first = write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    second = write_jsonl(tmp_path / "a.jsonl", TEXTS[3:])
    assert read_all(first, second) == TEXTS
    assert read_all(tmp_path) == TEXTS[3:] + TEXTS[:3]
    (tmp_path / "README.md").write_text("not read")
    _, described = sources.units(PrepareConfig(source=[str(tmp_path)]))
    size = first.stat().st_size + second.stat().st_size
    assert described == [{"source": str(tmp_path), "files": 2, "bytes": size, "ignored_files": 1}]


def test_endings_are_known_in_any_case(tmp_path):
    write_jsonl(tmp_path / "a.JSONL", TEXTS[:3])
    (tmp_path / "b.Jsonl.GZ").write_bytes(gzip.compress(write_jsonl(tmp_path / "b.ndjson", TEXTS[3:6]).read_bytes()))
    (tmp_path / "c.TXT").write_text(TEXTS[6])
    assert read_all(tmp_path) == TEXTS[:3] + TEXTS[3:6] + TEXTS[3:6] + TEXTS[6:7]


def test_bad_sources_are_all_listed_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a.csv").write_text("x")
    config = PrepareConfig(source=[str(tmp_path / s) for s in ("empty", "others", "others/a.csv", "nowhere")])
    with pytest.raises(ConfigError) as error:
        sources.units(config)
    assert [problem.split(str(tmp_path))[1].split(";")[0] for problem in error.value.problems] == [
        "/empty contains no files",
        "/others contains only files of other formats, such as a.csv",
        "/others/a.csv has an unknown format",
        "/nowhere does not exist",
    ]
    with pytest.raises(ConfigError, match="source is not set; give --source"):
        sources.units(PrepareConfig())


def bad_jsonl(folder: Path, bad: bytes) -> Path:
    """A file of several units whose line 30 is `bad`."""
    path = write_jsonl(folder / "file.jsonl", TEXTS)
    lines = path.read_bytes().splitlines()
    lines[29] = bad
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


BAD_LINES = [
    (b'{"txt": "a", "source": "b"}', r'line 30: no field "text"; use --text_field with one of: txt, source'),
    (b'{"text": "a', r"line 30: broken JSON \(.*\); correct the line"),
    (b'{"text": null}', r'line 30: field "text" holds null, not text'),
    (b'["text"]', r"line 30: a JSON list, not an object"),
    (b'{"text": "caf\xe9"}', r"line 30: not UTF-8 \(byte 14 of the line\); convert the file to UTF-8"),
    (b'{"text": "\\ud800"}', r"line 30: .* half a surrogate pair"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_counted(bad, message, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "UNIT_BYTES", 700)
    path = bad_jsonl(tmp_path, bad)
    with pytest.raises(DataError, match=message) as error:
        read_all(path)
    assert str(path) in str(error.value)
    assert "--on_error skip" in str(error.value)
    assert read_all(path, on_error="skip") == TEXTS[:29] + TEXTS[30:]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("first\nprofit rose 5 £\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt line 2: byte 0xa3 is not utf-8; convert it to UTF-8 \(iconv"):
        read_all(tmp_path)


def test_a_parquet_without_the_column_names_those_with_text(tmp_path):
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a.parquet: no column "text"; use --text_field with one of: body\.'):
        read_all(tmp_path)
    with pytest.raises(DataError, match=r'column "n" holds int64, not text'):
        read_all(tmp_path, text_field="n")


def test_bad_parquet_rows_are_named_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "UNIT_BYTES", 1)  # a unit a row group: rows are counted from the file's first
    raw = pa.array([b"good", b"fine", None, b"caf\xe9"], pa.binary())
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r'a.parquet row 3: field "text" holds null'):
        read_all(tmp_path)
    assert read_all(tmp_path, on_error="skip") == ["good", "fine"]


@pytest.mark.parametrize(
    ("form", "lost"),
    [(form, lost) for form in ("jsonl.gz", "jsonl.zst", "openwebtext.tar.xz", "parquet") for lost in (None, 6)]
    + [("openwebtext.tar", None)],
)
def test_a_cut_file_is_an_error_even_when_records_are_skipped(form, lost, tmp_path):
    write(form, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    # Also a cut behind the last document: what ends the file is missing.
    cut = len(content) * 2 // 3 if lost is None else len(content) - lost
    path.write_bytes(content[:cut])
    with pytest.raises(DataError, match=f"{path.name}.*(damaged or cut|not a complete parquet)"):
        read_all(tmp_path, on_error="skip")


def test_zero_bytes_are_no_parquet(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"a\.parquet is not a complete parquet file"):
        read_all(tmp_path)


def test_a_hub_name_that_cannot_be_opened_says_what_to_check(tmp_path):
    with pytest.raises(ConfigError, match=r"source=hf:.*with --hf_split train cannot be opened .*; check the name"):
        read_all(f"hf:{tmp_path / 'nowhere'}")
    write("hf", tmp_path)
    with pytest.raises(ConfigError, match="with --hf_split dev cannot be opened"):
        read_all(f"hf:{tmp_path}", hf_split="dev")
    with pytest.raises(DataError, match='no column "body"; use --text_field with one of: id, text'):
        read_all(f"hf:{tmp_path}", text_field="body")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_files_lose_their_mark_and_odd_line_ends(tmp_path, encoding, end):
    (tmp_path / "a.txt").write_bytes(f"é one{end}two\u2028three{end}".encode(encoding))
    (tmp_path / "b.tar").write_bytes(tar_of({"b.txt": f"é{end}".encode(encoding)}))
    assert read_all(tmp_path / "a.txt", tmp_path / "b.tar") == ["é one\ntwo\u2028three\n", "é\n"]


def test_json_lines_of_an_old_mac_and_of_joined_files_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r{"text": "b"}\r\n\xef\xbb\xbf{"text": "c"}\r\r')
    assert read_all(tmp_path / "a.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": NaN}', 'line 1: field "text" holds null, not text'),
        ('{"text": 5}', 'line 1: field "text" holds the number 5, not text'),
        ('{"text": ["a"]}', 'field "text" holds a list, not text'),
        ('{"text": "a", "text": "b"}', "line 1: broken JSON .the key 'text' is duplicated"),
    ],
)
def test_values_that_are_not_text_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "a.jsonl")


def test_a_text_file_with_nul_characters_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("plain\nwide".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"a\.txt line 1: a NUL character, so it is not text, or UTF-16"):
        read_all(tmp_path / "a.txt")
    assert read_all(tmp_path / "a.txt", on_error="skip") == []
