"""The reader of JSON gives plain finite values, or names the file and what is wrong with it."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.files.json_file import (
    MAX_DEPTH,
    Record,
    parse_json,
    read_json,
    read_json_lines,
)

BAD = {
    b"": "Expecting value",
    b'{"a": 1': "Expecting",
    b"\xff\xfe{}": "utf-8",
    b"[1, 2]": "is not a JSON object",
    b'{"a": NaN}': "it holds NaN, which is not a number",
    b'{"a": [-Infinity]}': "it holds -Infinity, which is not a number",
    b'{"a": 1e999}': "it holds 1e999, which is beyond all numbers",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' appears twice",
    b'{"a": "\\ud800"}': "surrogates not allowed",
    b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}": "nested more than 64 deep",
    b'{"a": ' + b"[" * 200_000: "nested more than 64 deep",
    b'{"a": ' * 100_000: "nested more than 64 deep",
    b'{"a": ' + b"9" * 5000 + b"}": "(5000|4300)",
    b"{" + b" " * (1 << 20) + b"}": "bytes are more than 1048576",
}


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_refused_names_the_file_and_the_fault(tmp_path, number) -> None:
    content, fault = list(BAD.items())[number]
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=rf"state.json.*{fault}.*Try: buy another") as error:
        read_json(path, fix="buy another")
    assert len(str(error.value)) < 500


def test_plain_content_is_what_json_reads(tmp_path) -> None:
    content = {
        "a": [1, -2.5, None, True, "Ü\U0001f600"],
        "b": {"": {}},
        "deep": deep(MAX_DEPTH - 2),
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert read_json(path) == content


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "missing"])
@pytest.mark.parametrize("reader", [read_json, lambda path: list(read_json_lines(path))])
def test_only_plain_files_are_read(tmp_path, kind, reader) -> None:
    path = tmp_path / "x.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(
        BadFileError, match="x.json': (it is not a plain file|No such file|Is a dir)"
    ):
        reader(path)


def test_links_to_plain_files_are_read(tmp_path) -> None:
    (tmp_path / "x").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert read_json(tmp_path / "link") == {}


def test_lines_end_where_a_killed_writer_stopped(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert list(read_json_lines(path)) == [
        ('{"step": 1}\n', {"step": 1}),
        ('{"step": 2}\n', {"step": 2}),
    ]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff", b'{"a": NaN}', b"", b"x" * 70_000])
def test_a_damaged_line_is_named(tmp_path, line) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(BadFileError, match=r"rows.jsonl, line 2': "):
        list(read_json_lines(path))


RECORD = Record(
    {"n": 3, "x": 1.5, "t": "a", "b": True, "l": [1, "a"], "d": {"k": 1}}, "x.json", "mend it"
)


def test_entries_are_of_the_type_asked_for() -> None:
    assert RECORD.get("n", int) == 3 and RECORD.get("n", float) == 3.0
    assert RECORD.size("n", low=3, high=3) == 3
    assert RECORD.dict_of("d", int) == {"k": 1}
    for ask, text in (
        (lambda r: r.get("m", int), "'m' is missing"),
        (lambda r: r.get("t", int), "'t' is 'a', not a whole number"),
        (lambda r: r.get("b", int), "'b' is True, not a whole number"),
        (lambda r: r.get("n", bool), "'n' is 3, not true or false"),
        (lambda r: r.list_of("l", int), r"l\[1\] is 'a', not a whole number"),
        (lambda r: r.dict_of("d", str), r"d\['k'\] is 1, not text"),
        (lambda r: r.size("n", high=2), "'n' is 3, not within 0 and 2"),
    ):
        with pytest.raises(BadFileError, match=f"^cannot read 'x.json': {text}. Try: mend it$"):
            ask(RECORD)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}":,0123456789.eE-+NaInfity\\ud8', max_size=60))
def test_any_bytes_are_read_or_refused(text) -> None:
    try:
        content = parse_json(text, "x")
    except BadFileError:
        return
    # whatever is read can be written, strictly, and is read again as it was
    again = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    assert parse_json(again, "x") == content
