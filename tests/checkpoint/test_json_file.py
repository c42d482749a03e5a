import errno
import os
from pathlib import Path

import pytest

from glmq.checkpoint import json_file
from glmq.checkpoint.json_file import read_json_object, write_json, write_whole
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
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice; remove one of them"),
        (b"[]", "wanted a JSON object, found list; download or write it again"),
        (b"{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
               "download or write it again"),
        (b"\xff", "is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
                  "download or write it again"),
    ],
)  # fmt: skip
def test_other_contents_than_a_json_object_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refusal(tmp_path / "a.json") == message


def test_a_json_bomb_and_an_oversized_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a":' * 100_000)
    assert "is not JSON" in refusal(tmp_path / "a.json")
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 10)
    assert refusal(tmp_path / "a.json") == ("is larger than 10 bytes; it is not a file of a GLM-4.1V checkpoint")


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
    assert str(caught.value) == f"{path}: 4 bytes are to be written, but its disk is full; make room"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_other_failures_of_writing_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == []
