import errno
import json
import os
from enum import Enum
from pathlib import Path

import pytest

from glmq.checkpoint import json_file
from glmq.checkpoint.json_file import Fields, JsonObject, read_json_object, write_json, write_whole
from glmq.errors import CheckpointError, SpaceError


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_json_object(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_written_json_keeps_order_ends_in_a_newline_and_is_not_for_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    before = os.umask(0o077)
    try:
        write_json(path, {"b": 1, "a": ["é", None]}, indent=2)
    finally:
        os.umask(before)
    assert path.read_bytes() == '{\n  "b": 1,\n  "a": [\n    "é",\n    null\n  ]\n}\n'.encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_json_object(path).items()) == [("b", 1), ("a", ["é", None])]


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 1}', "is not JSON (the key 'a' appears twice); download or write it again"),
        (b'{"a": {"b\\n": 1, "c": 2, "b\\n": 1}}', "is not JSON (the key 'b\\n' appears twice); download or write it again"),
        (b"[]", "wanted a JSON object, found list; download or write it again"),
        (b"3", "wanted a JSON object, found int; download or write it again"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON (a number has 5000 digits, 40 are read); download or write it again"),
        (b'{"a": 1e400}', "is not JSON (1e400 is out of range); download or write it again"),
        (b'{"a": [NaN]}', "is not JSON (NaN is not a JSON number); download or write it again"),
        (b'{"a": -Infinity}', "is not JSON (-Infinity is not a JSON number); download or write it again"),
        (b'{"a": ["x\\ud800"]}', "is not JSON ('x\\ud800' has half of a surrogate pair, which is no character); "
                                "download or write it again"),
        (b'{"\\udfff": 1}', "is not JSON ('\\udfff' has half of a surrogate pair, which is no character); "
                           "download or write it again"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON (more than 64 lists and objects lie within each other); "
                                           "download or write it again"),
        (b'{"a":' * 100_000, "is not JSON (more than 64 lists and objects lie within each other); "
                             "download or write it again"),
        (b"{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
               "download or write it again"),
        (b"\xff", "is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
                  "download or write it again"),
    ],
)  # fmt: skip
def test_other_contents_than_a_json_object_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refusal(tmp_path / "a.json") == message


def test_an_oversized_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a":123456}')
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 10)
    assert refusal(tmp_path / "a.json") == ("is larger than 10 bytes; it is not a file of a GLM-4.1V or GLM-4.6V-Flash")


def test_what_a_json_file_may_hold_at_most_is_read(tmp_path: Path) -> None:
    text = '{"pair": "\\ud83d\\ude00", "limit": ' + "1" + "0" * 39 + ', "deep": ' + "[" * 63 + "]" * 63 + "}"
    (tmp_path / "a.json").write_text(text)
    assert read_json_object(tmp_path / "a.json") == {
        "pair": "😀",
        "limit": 10**39,
        "deep": json.loads("[" * 63 + "]" * 63),
    }


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    assert refusal(pipe) == "is a pipe, a regular file is needed; give the file itself"
    assert refusal(link) == "is a device, a regular file is needed; give the file itself"
    assert refusal(tmp_path) == "cannot be read (Is a directory); check the path and its permissions"


def test_fields_give_typed_values_or_one_sentence(tmp_path: Path) -> None:
    class Colour(Enum):
        RED = "red"

    document: JsonObject = {"n": 3, "t": "x", "l": [1, 2], "c": "red", "o": {"p": "q"}, "m": [{"z": 0}], "b": True}
    fields = Fields(document, "file", CheckpointError)
    assert (fields.count("n"), fields.text("t"), fields.counts("l", 2), list(fields)) == (
        3,
        "x",
        (1, 2),
        list(document),
    )
    assert (fields.choice("c", Colour), fields.fields("o").text("p")) == (Colour.RED, "q")
    assert [item.count("z") for item in fields.list_of_fields("m")] == [0]
    for call, message in [
        (lambda: fields.count("b"), "file: 'b' is True, wanted a count"),
        (lambda: fields.count("none"), "file: 'none' is missing, wanted a count"),
        (lambda: Fields({"n": 2**63}, "file", CheckpointError).count("n"), f"file: 'n' is {2**63}, wanted a count"),
        (lambda: Fields({"n": -1}, "file", CheckpointError).count("n"), "file: 'n' is -1, wanted a count"),
        (lambda: fields.text("n"), "file: 'n' is 3, wanted a text"),
        (lambda: fields.counts("t", 2), "file: 't' is 'x', wanted a list of 2 counts"),
        (lambda: fields.counts("m", 1), "file: 'm' is [{'z': 0}], wanted a list of 1 counts"),
        (lambda: fields.counts("l", 3), "file: 'l' is [1, 2], wanted a list of 3 counts"),
        (lambda: fields.choice("t", Colour), "file: 't' is 'x', wanted one of the names that this glmq knows"),
        (lambda: fields.fields("l"), "file: 'l' is [1, 2], wanted an object"),
        (lambda: fields.fields("o").count("p"), "file: o: 'p' is 'q', wanted a count"),
        (lambda: fields.list_of_fields("l"), "file: 'l' is [1, 2], wanted a list of objects"),
        (lambda: fields.list_of_fields("m")[0].text("z"), "file: m 0: 'z' is 0, wanted a text"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            call()
        assert str(caught.value) == message


def test_a_missing_json_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.json") == (
        "cannot be read (No such file or directory); check the path and its permissions"
    )


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SpaceError) as caught:
        write_whole(path, b"new!")
    assert str(caught.value).startswith(f"{path}: 4 bytes are to be written, but its disk takes no more, with ")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_other_failures_of_writing_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [b"a\xffb", "\u9898\u00e9".encode() + b"\x80", b"\xed\xa0\x80", b"plain"], ids=repr)
def test_a_path_that_is_no_utf8_is_written_and_reads_back_where_paths_are_expected(path: bytes, tmp_path: Path) -> None:
    name = os.fsdecode(path)
    file = tmp_path / "run.json"
    write_json(file, {"path": name, name: ["\u9898"]}, indent=1)
    assert "\u9898" in file.read_text(encoding="utf-8")
    found = read_json_object(file, has_paths=True)
    assert found == {"path": name, name: ["\u9898"]}
    assert os.fsencode(str(found["path"])) == path


def test_half_of_a_pair_that_is_no_byte_is_refused_even_in_a_path(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"a": "\\ud800"}', encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_json_object(file, has_paths=True)
    assert str(caught.value) == (
        f"{file}: is not JSON ('\\ud800' has half of a surrogate pair, which is no character); download or write it again"
    )
